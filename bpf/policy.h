/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the policy says of a source: the verdict of the longest prefix that covers it.
 *
 * IPv4 takes one step a level: an array of all /16, a line of 256 codes for the /24 within one, and for the addresses within a /24 that has
 * prefixes of its own a reference in a hash of buckets. IPv6 begins alike with an array of all /16; below it, prefixes of up to 8 (d + 1)
 * bits hang on a node that is known by its first d bytes, and the deepest node there is answers. Which one that is, is found by a binary
 * search over the depths in use: who put a node in put one on each depth that the search visits on its way there.
 *
 * xdpmond/kernel/verdicts.py writes what is read here.
 */
#ifndef XDPMOND_POLICY_H
#define XDPMOND_POLICY_H

#include "abi.h"

BPF_F_TABLE("array", u32, struct xm_line, lines, 2, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct xm_bucket4, buckets4, 2, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct xm_bucket6, buckets6, 2, BPF_F_MMAPABLE);

/* Begin to read what will be needed: with many sources it is not in the cache, and reads that do not wait for each other cost as one. */
#define xm_touch(at)                                                                       \
	do {                                                                               \
		u64 ignored;                                                               \
		asm volatile("%0 = *(u64 *)(%1 + 0)" : "=r"(ignored) : "r"(at));           \
	} while (0)

/* All ones if x is 0, else 0. The barrier keeps clang from making a branch of it, which would be guessed wrong as often as sources change. */
static __always_inline u64 xm_if_zero(u64 x)
{
	u64 negative = -x;
	asm volatile("" : "+r"(negative));
	return ((x | negative) >> 63) - 1;
}

/* The array behind the struct. */
static __always_inline u32 xm_top(const struct xm_policy *held, u32 index)
{
	return ((const u32 *)(held + 1))[index];
}

static __always_inline u64 xm_code(u64 word, u32 place)
{
	return word >> (2 * (place & 31)) & 3;
}

/* The code of an address in a line. */
static __always_inline u64 xm_line_code(const struct xm_policy *held, u32 index, u32 byte)
{
	index += held->first_line;
	struct xm_line *line = lines.lookup(&index);
	return line ? xm_code(line->codes[byte >> 5 & 7], byte) : XM_CODE_NONE;
}

/* The code of the 256 places of a reference at `byte`: three codes written out, or a line. */
static __always_inline u64 xm_reference_code(const struct xm_policy *held, u64 ref, u32 byte)
{
	if (ref & XM_REF_LINE)
		return xm_line_code(held, (u32)ref, byte);
	u64 code = ref & 3;
	if (((byte - (u32)(ref >> 4)) & 0xff) <= (ref >> 12 & 0xff))
		code = ref >> 2 & 3;
	if (((byte - (u32)(ref >> 22)) & 0xff) <= (ref >> 30 & 0xff))
		code = ref >> 20 & 3;
	return code;
}

static __always_inline u64 xm_verdict4(const struct xm_control *ctl, const struct xm_policy *held, u32 address)
{
	u32 top = xm_top(held, address >> 16);
	u32 index = top >> 2;
	if (!index)
		return top & 3;
	u32 bucket = ((address >> 8) * ctl->seed[0]) >> 32;
	u32 home = held->first4 + (bucket & held->mask4);
	struct xm_bucket4 *likely = buckets4.lookup(&home);
	if (likely)
		xm_touch(likely);
	u64 code = xm_line_code(held, index, address >> 8 & 0xff);
	if (code == XM_CODE_DEEPER) {
		u64 key = (u64)(address >> 8) << 1 | 1;
		u64 ref = 0;
#pragma unroll
		for (int displaced = 0; displaced <= XM_DISPLACED; displaced++) {
			u32 at = held->first4 + ((bucket + displaced) & held->mask4);
			struct xm_bucket4 *b = buckets4.lookup(&at);
			if (!b)
				break;
#pragma unroll
			for (int i = 0; i < XM_BUCKET4; i++)
				ref |= b->ref[i] & xm_if_zero(b->ref[i] >> XM_REF_USED_SHIFT ^ key);
			if (ref)
				break;
		}
		code = xm_reference_code(held, ref, address & 0xff);
	}
	return code ? code : top & 3;
}

static __always_inline u64 xm_leading(u64 word, u32 bytes)
{
	return bytes ? word >> (64 - 8 * bytes) << (64 - 8 * bytes) : 0;
}

/* The reference of the node of this depth that the address is under, 0 if there is none. */
static __always_inline u64 xm_node6(const struct xm_control *ctl, const struct xm_policy *held, u64 high, u64 low, u32 depth)
{
	u64 ref = 0;
	if (depth < 8) {
		high = xm_leading(high, depth & 7);
		low = 0;
	} else {
		low = xm_leading(low, depth & 7);
	}
	u64 hash = (high ^ depth) * ctl->seed[0];
	hash = (hash ^ hash >> 32 ^ low) * ctl->seed[1];
	u32 bucket = hash >> 32;
	bucket ^= bucket >> 16; /* the upper bits of `low` reach the upper bits alone */
	u64 tag = (u64)depth << 1 | 1;
#pragma unroll
	for (int displaced = 0; displaced <= XM_DISPLACED; displaced++) {
		u32 at = held->first6 + ((bucket + displaced) & held->mask6);
		struct xm_bucket6 *b = buckets6.lookup(&at);
		if (!b)
			break;
#pragma unroll
		for (int i = 0; i < XM_BUCKET6; i++) {
			if (b->node[i].high == high && b->node[i].low == low && (b->node[i].ref >> XM_REF_USED_SHIFT & 31) == tag)
				ref = b->node[i].ref;
		}
		/* A bucket is filled in order: what would not fit is in the next one. */
		if (ref || !b->node[XM_BUCKET6 - 1].ref)
			break;
	}
	return ref;
}

static __always_inline u64 xm_verdict6(const struct xm_control *ctl, const struct xm_policy *held, u64 high, u64 low)
{
	u32 top = xm_top(held, XM_TOPS + (high >> 48));
	u64 code = top & 3;
	if (!(top & XM_TOP_DEEPER))
		return code;
	u32 at = held->root;
	u64 best = 0;
	u32 best_depth = 0;
#pragma unroll
	for (int round = 0; round < XM_SEARCH_ROUNDS; round++) {
		if (at >= XM_SEARCH_STEPS)
			break;
		struct xm_step step = held->steps[at & (XM_SEARCH_STEPS - 1)];
		u64 ref = xm_node6(ctl, held, high, low, step.depth);
		if (ref) {
			best = ref;
			best_depth = step.depth;
			if (!(ref & XM_REF_DEEPER))
				break;
		}
		at = ref ? step.deeper : step.shallower;
	}
	if (best) {
		u64 word = best_depth < 8 ? high : low;
		u64 found = xm_reference_code(held, best, word >> (56 - 8 * (best_depth & 7)) & 0xff);
		code = found ? found : code;
	}
	return code;
}

#endif
