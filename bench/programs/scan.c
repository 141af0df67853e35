/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How the systems before this one do it: each packet walks through a list of up to 256 networks, one map lookup each, until one covers its
 * source; then it is counted by source. IPv4 over Ethernet alone.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>

#define NETWORKS 256

struct network {
	u32 address; /* network byte order, as the mask */
	u32 mask;
};

struct counted {
	u64 packets;
	u64 bytes;
};

BPF_ARRAY(networks, struct network, NETWORKS);
BPF_F_TABLE("lru_hash", u32, struct counted, by_source, 65536 * 2, 0);

int scan(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	if ((void *)(ip + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP))
		return XDP_PASS;
	u32 source = ip->saddr;
	int action = XDP_DROP;
	for (u32 i = 0; i < NETWORKS; i++) {
		u32 key = i;
		struct network *network = networks.lookup(&key);
		if (network && (source & network->mask) == network->address) {
			action = XDP_PASS;
			break;
		}
	}
	struct counted fresh = {}, *counted = by_source.lookup_or_try_init(&source, &fresh);
	if (counted) {
		__sync_fetch_and_add(&counted->packets, 1);
		__sync_fetch_and_add(&counted->bytes, end - data);
	}
	return action;
}
