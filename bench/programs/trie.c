/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the kernel's own maps come to: a longest-prefix trie for the policy, and three LRU tables for who, where to, and which flow. IPv4
 * over Ethernet alone.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>

struct prefix {
	u32 length;
	u32 address; /* network byte order */
};

struct counted {
	u64 packets;
	u64 bytes;
};

struct flow {
	u32 source;
	u32 destination;
	u32 ports;
	u32 protocol;
};

BPF_F_TABLE("lpm_trie", struct prefix, u32, policy, PREFIXES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lru_percpu_hash", u32, struct counted, by_source, TALKERS, 0);
BPF_F_TABLE("lru_percpu_hash", u32, struct counted, by_port, TALKERS, 0);
BPF_F_TABLE("lru_percpu_hash", struct flow, struct counted, by_flow, TALKERS, 0);

static __always_inline void count(struct counted *counted, u64 size)
{
	if (counted) {
		counted->packets += 1;
		counted->bytes += size;
	}
}

int trie(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	u32 *ports = (void *)(ip + 1);
	if ((void *)(ports + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP))
		return XDP_PASS;
	u64 size = end - data;
	struct prefix key = {.length = 32, .address = ip->saddr};
	u32 *denied = policy.lookup(&key);
	struct flow flow = {.source = ip->saddr, .destination = ip->daddr, .ports = *ports, .protocol = ip->protocol};
	u32 port = *ports >> 16;
	struct counted fresh = {};
	count(by_source.lookup_or_try_init(&flow.source, &fresh), size);
	count(by_port.lookup_or_try_init(&port, &fresh), size);
	count(by_flow.lookup_or_try_init(&flow, &fresh), size);
	return denied ? XDP_DROP : XDP_PASS;
}
