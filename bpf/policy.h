/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the policy says of a source: the verdict of the longest prefix that covers it.
 *
 * IPv4 has a top of two-bit codes for blocks of equal size, and in a hash of buckets a reference for each /24 of which more is to be said than
 * the top can. Where both stand follows from the address alone, so neither read waits for the other. IPv6 begins with an array of all /16;
 * below it, prefixes of up to 8 (d + 1) bits hang on a node that is known by its first d bytes, and the deepest node there is answers. Which
 * one that is, is found by a binary search over the depths in use: who put a node in put one on each depth that the search visits on its
 * way there.
 *
 * xdpmond/kernel/verdicts.py writes what is read here.
 */
#ifndef XDPMOND_POLICY_H
#define XDPMOND_POLICY_H

#include "abi.h"

BPF_F_TABLE("array", u32, struct xm_line, lines, 2, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct xm_bucket4, buckets4, 2, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct xm_bucket6, buckets6, 2, BPF_F_MMAPABLE);

/* All ones if x, which is below 2^63, is 0, else 0. The barrier keeps clang from making a branch of it, which would be guessed wrong as often
   as sources change. */
static __always_inline u64 xm_if_zero(u64 x)
{
	s64 less = x - 1;
	asm volatile("" : "+r"(less));
	return less >> 63;
}

/* The array behind the struct. */
static __always_inline u64 xm_top6(const struct xm_policy *held, u64 index)
{
	return ((const u32 *)(held + 1))[index];
}

/* The code of place 0 to 255 in a line. */
static __always_inline u64 xm_line_code(const struct xm_policy *held, u64 index, u64 place)
{
	u32 at = held->first_line + index;
	struct xm_line *line = lines.lookup(&at);
	return line ? line->codes[place >> 5 & 7] >> (2 * place & 62) & 3 : XM_CODE_NONE;
}

/* The code of place 0 to 255 of a reference: a lane of 16 bits for each range, whose eighth bit is then set if the place is not in it. */
static __always_inline u64 xm_reference_code(const struct xm_policy *held, u64 ref, u64 place)
{
	u64 outside = ((place * 0x10001 ^ ref) & ref >> 8 & 0xff00ff) + 0xff00ff;
	u64 code = ref >> 32 >> ((outside >> 7 & 2) | (outside >> 22 & 4)) & 3;
	return code == XM_CODE_LINE ? xm_line_code(held, (u32)ref, place) : code;
}

/* The reference of a /24 in a bucket, 0 if it is not there. */
static __always_inline u64 xm_in_bucket4(const struct xm_bucket4 *bucket, u64 key)
{
	u64 ref = 0;
#pragma unroll
	for (int i = 0; i < XM_BUCKET4; i++)
		ref |= bucket->ref[i] & xm_if_zero(bucket->ref[i] >> XM_REF_KEY_SHIFT ^ key);
	return ref;
}

static __always_inline u64 xm_verdict4(const struct xm_control *ctl, const struct xm_policy *held, u32 address)
{
	u64 place = (u64)address >> (held->shift4 & 31);
	u64 top = xm_line_code(held, place >> 8, place & 0xff);
	if (!(held->deeper4[address >> 30] >> (address >> 24 & 63) & 1))
		return top;
	u64 key = address >> 8;
	u64 hash = key * ctl->seed[0];
	u32 home = held->first4 + (hash >> 32 & held->mask4);
	struct xm_bucket4 *bucket = buckets4.lookup(&home);
	if (!bucket)
		return top;
	u64 ref = xm_in_bucket4(bucket, key);
	if (bucket->away && !ref) {
		u32 other = held->first4 + ((hash >> 32) + (hash >> 57 | 1) & held->mask4);
		bucket = buckets4.lookup(&other);
		if (bucket)
			ref = xm_in_bucket4(bucket, key);
	}
	u64 code = xm_reference_code(held, ref, address & 0xff);
	return code | (top & xm_if_zero(code));
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
#pragma unroll
	for (int displaced = 0; displaced <= XM_DISPLACED; displaced++) {
		u32 at = held->first6 + ((bucket + displaced) & held->mask6);
		struct xm_bucket6 *b = buckets6.lookup(&at);
		if (!b)
			break;
#pragma unroll
		for (int i = 0; i < XM_BUCKET6; i++) {
			if (b->node[i].high == high && b->node[i].low == low && (b->node[i].ref >> XM_REF_KEY_SHIFT & 15) == depth)
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
	u64 top = xm_top6(held, high >> 48);
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
