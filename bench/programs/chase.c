/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a read costs on this machine: each packet reads one line of a table, and finds in it which one the next packet reads, so that no read
 * can begin before the one before has ended.
 */
#include <uapi/linux/bpf.h>

struct line {
	u32 next;
	u32 pad[15];
};

BPF_F_TABLE("array", u32, struct line, chain, LINES, BPF_F_MMAPABLE);
BPF_ARRAY(position, u32, 1);

int chase(struct xdp_md *ctx)
{
	u32 zero = 0;
	u32 *at = position.lookup(&zero);
	if (!at)
		return XDP_PASS;
	u32 index = *at;
	struct line *line = chain.lookup(&index);
	if (!line)
		return XDP_PASS;
	*at = line->next;
	return XDP_DROP;
}
