/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Programs that give each packet another source and hand it on: BPF_PROG_TEST_RUN repeats one frame, and its sender of live frames too.
 *
 * `vary` takes the sources from an array, over and over, in the array's order, which is random; `flood` takes a new one for each packet
 * until all 2^32 have been. Both tail-call what stands in `target`, the program that is measured, or one that is empty, which tells
 * their own cost. `send` does as `vary` and transmits the frame. IPv4 is rewritten without its checksum, which nobody here reads.
 */
#include <uapi/linux/bpf.h>

#define SOURCE_AT_IPV4 26 /* Ethernet, then 12 bytes of the header */
#define SOURCE_AT_IPV6 22

struct ipv6 {
	u64 word[2];
};

/* In network byte order; IPv4 in the first 4 of 8 bytes, which an element has at least. */
BPF_F_TABLE("array", u32, u64, sources_ipv4, SOURCES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct ipv6, sources_ipv6, SOURCES, BPF_F_MMAPABLE);
BPF_PERCPU_ARRAY(position, u64, 1);
BPF_PROG_ARRAY(target, 1);

static __always_inline u64 next_position(void)
{
	u32 zero = 0;
	u64 *at = position.lookup(&zero);
	return at ? (*at)++ : 0;
}

static __always_inline bool write_ipv4(struct xdp_md *ctx, u32 source)
{
	void *data = (void *)(long)ctx->data;
	if (data + SOURCE_AT_IPV4 + 4 > (void *)(long)ctx->data_end)
		return false;
	*(u32 *)(data + SOURCE_AT_IPV4) = source;
	return true;
}

static __always_inline bool write_ipv6(struct xdp_md *ctx, u64 first, u64 second)
{
	void *data = (void *)(long)ctx->data;
	if (data + SOURCE_AT_IPV6 + 16 > (void *)(long)ctx->data_end)
		return false;
	/* Written by words: neither field is aligned to 8 bytes. */
	*(u32 *)(data + SOURCE_AT_IPV6) = first;
	*(u32 *)(data + SOURCE_AT_IPV6 + 4) = first >> 32;
	*(u32 *)(data + SOURCE_AT_IPV6 + 8) = second;
	*(u32 *)(data + SOURCE_AT_IPV6 + 12) = second >> 32;
	return true;
}

static __always_inline bool write_next_ipv4(struct xdp_md *ctx)
{
	u32 index = next_position() & (SOURCES - 1);
	u64 *source = sources_ipv4.lookup(&index);
	return source && write_ipv4(ctx, *source);
}

int vary_ipv4(struct xdp_md *ctx)
{
	if (write_next_ipv4(ctx))
		target.call(ctx, 0);
	return XDP_ABORTED;
}

int vary_ipv6(struct xdp_md *ctx)
{
	u32 index = next_position() & (SOURCES - 1);
	struct ipv6 *source = sources_ipv6.lookup(&index);
	if (source && write_ipv6(ctx, source->word[0], source->word[1]))
		target.call(ctx, 0);
	return XDP_ABORTED;
}

/* A permutation of the 32-bit numbers (the last steps of MurmurHash3), so that no source comes twice and none is near the one before. */
static __always_inline u32 scatter(u32 number)
{
	number ^= number >> 16;
	number *= 0x85ebca6b;
	number ^= number >> 13;
	number *= 0xc2b2ae35;
	return number ^ number >> 16;
}

int flood_ipv4(struct xdp_md *ctx)
{
	if (write_ipv4(ctx, scatter(next_position())))
		target.call(ctx, 0);
	return XDP_ABORTED;
}

/* All of 2000::/3, whose upper half too is new in each packet. */
int flood_ipv6(struct xdp_md *ctx)
{
	u64 at = next_position();
	u64 first = (u64)scatter(at) << 32 | scatter(~at);
	if (write_ipv6(ctx, (first & ~0xe0ULL) | 0x20, first))
		target.call(ctx, 0);
	return XDP_ABORTED;
}

int send_ipv4(struct xdp_md *ctx)
{
	return write_next_ipv4(ctx) ? XDP_TX : XDP_ABORTED;
}

int drop(struct xdp_md *ctx)
{
	return XDP_DROP;
}

int pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}
