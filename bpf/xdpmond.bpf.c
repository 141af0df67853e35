/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The way of a packet: parse, look up the policy, account, perhaps sample an event, pass or drop.
 *
 * Compiled by BCC at start; XM_EVENTS, XM_FLOWS, XM_LOCAL and XM_FRAGS are defined if wanted and possible. The maps get their sizes from the
 * daemon, which makes them (kernel/tables.py): the numbers of elements here are those of the compiler's own throw-away maps. What is counted
 * is counted here, for every packet; an event is a sample.
 *
 * What is no field of a struct is u64 where it can be: BCC's clang makes the first kind of BPF, without 32-bit arithmetic, in which a u32 costs
 * two shifts each time.
 */
#include "abi.h"

/* A map of one value, which is used by its address. What it really holds, and how large it is, the daemon says. */
#define XM_ONE_VALUE(name, flags) BPF_F_TABLE("array", u32, u64, name, 1, flags)
#define xm_value_of(number)                                                                            \
	({                                                                                             \
		void *value;                                                                           \
		asm volatile("%0 = %1 ll" : "=r"(value) : "i"((u64)XM_VALUE_MARK << 32 | (number))); \
		value;                                                                                 \
	})

#include "parse.h"
#include "policy.h"

XM_ONE_VALUE(control, BPF_F_MMAPABLE);
XM_ONE_VALUE(policy, BPF_F_MMAPABLE);
XM_ONE_VALUE(ports, BPF_F_MMAPABLE);
XM_ONE_VALUE(sketches, BPF_F_MMAPABLE);
XM_ONE_VALUE(sketched, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct xm_ledger, ledger, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct xm_rule_count, rules, 1, BPF_F_MMAPABLE);
#ifdef XM_FLOWS
BPF_F_TABLE("array", u32, struct xm_flow_set, talkers, 1, BPF_F_MMAPABLE);
#else
BPF_F_TABLE("array", u32, struct xm_set, talkers, 1, BPF_F_MMAPABLE);
#endif
BPF_PERCPU_ARRAY(totals, struct xm_count, XM_TOTAL_CELLS);
BPF_PERCPU_ARRAY(cpu, struct xm_cpu, 1);
#ifdef XM_LOCAL
BPF_F_TABLE("hash", struct xm_address, u8, locals, XM_LOCALS, BPF_F_NO_PREALLOC);
#endif
#ifdef XM_EVENTS
XM_ONE_VALUE(sampler, 0);
BPF_RINGBUF_OUTPUT(events, 1);
#endif

#define barrier() asm volatile("" ::: "memory")

/* Both are per CPU, or of one CPU's slice, so that plain additions lose nothing. */
static __always_inline void add(struct xm_count *count, u64 size)
{
	count->packets += 1;
	count->bytes += size;
}

static __always_inline u64 mix(u64 hash, u64 word, u64 multiplier)
{
	hash = (hash ^ word) * multiplier;
	return hash ^ (hash >> 32);
}

/* A sender who does not know the seed cannot aim at a set of the talker table. `tail` tells what the talker is beside its source. */
static __always_inline u64 hash_talker(const struct xm_control *ctl, const struct xm_packet *p, u64 tail)
{
	if (p->family == XM_FAMILY_IPV4)
		return mix(ctl->seed[0], tail << 32 | p->source[0], ctl->seed[1]);
	u64 hash = mix(ctl->seed[0], p->source[0], ctl->seed[1]);
	hash = mix(hash, p->source[1], ctl->seed[2]);
	return mix(hash, tail, ctl->seed[3]);
}

static __always_inline u64 hash_flow(const struct xm_control *ctl, const struct xm_packet *p, u64 talker, u32 ports)
{
	return mix(mix(mix(talker, p->destination[0], ctl->seed[1]), p->destination[1], ctl->seed[2]), ports, ctl->seed[3]);
}

static __always_inline u8 port_flags(u16 port)
{
	return ((u8 *)xm_value_of(XM_VALUE_PORTS))[port];
}

/* The port that a talker is kept under: an ephemeral port that nobody listens on is folded with its like, or each answer to this host's
   own connections would be a talker of its own. */
static __always_inline u16 talker_port(const struct xm_control *ctl, const struct xm_packet *p)
{
	u16 port = p->destination_port;
	if (!p->has_ports)
		return p->icmp;
	if (port < ctl->ephemeral_first || port > ctl->ephemeral_last)
		return port;
	u8 listens = p->protocol == IPPROTO_UDP ? XM_PORT_UDP_LISTENS : XM_PORT_TCP_LISTENS;
	return port_flags(port) & listens ? port : ctl->ephemeral_first;
}

/* Counts that the daemon has not read from this entry and would lose with it. While it reads the window before the running one, that
   window's counts are not lost but keep the entry from being replaced. */
static __always_inline bool keeps_closed(const struct xm_talker *t, u32 window)
{
	return (t->window == window && t->packets[1]) || (t->window == window - 1 && t->packets[0]);
}

/*
 * The table has entries of one of two kinds, for talkers or for flows, which begin with their talker. What only flows have is behind it: these
 * functions do nothing where flows are off.
 */
#ifdef XM_FLOWS
#define xm_entry xm_flow
#define xm_entry_set xm_flow_set
#define xm_talker_of(entry) (&(entry)->talker)
#else
#define xm_entry xm_talker
#define xm_entry_set xm_set
#define xm_talker_of(entry) (entry)
#endif

/* What is known of a packet beside its talker. */
struct xm_more {
	u32 ports; /* the source's, and above it the destination's */
	u32 ip_size;
	u8 outcome;
	u8 slot;
};

static __always_inline bool flow_is(const struct xm_entry *entry, const struct xm_packet *p, const struct xm_more *more)
{
#ifdef XM_FLOWS
	const u64 *key = (const u64 *)entry->destination;
	return key[0] == p->destination[0] && key[1] == p->destination[1] && (u32)key[2] == more->ports;
#else
	return true;
#endif
}

/* Before the window's number is stored, and after. */
static __always_inline void flow_move(struct xm_entry *entry, bool keep)
{
#ifdef XM_FLOWS
	entry->ip_bytes[1] = keep ? entry->ip_bytes[0] : 0;
	entry->tcp_flags[1] = keep ? entry->tcp_flags[0] : 0;
#endif
}

static __always_inline void flow_zero(struct xm_entry *entry)
{
#ifdef XM_FLOWS
	entry->ip_bytes[0] = 0;
	entry->tcp_flags[0] = 0;
#endif
}

static __always_inline void flow_name(struct xm_entry *entry, const struct xm_packet *p, const struct xm_more *more)
{
#ifdef XM_FLOWS
	u64 *key = (u64 *)entry->destination;
	key[0] = p->destination[0];
	key[1] = p->destination[1];
	*(u32 *)&entry->source_port = more->ports;
#endif
}

static __always_inline void flow_count(struct xm_entry *entry, const struct xm_packet *p, const struct xm_more *more)
{
#ifdef XM_FLOWS
	entry->ip_bytes[0] += more->ip_size;
	entry->tcp_flags[0] |= p->tcp_flags;
	entry->outcome = more->outcome;
	entry->slot = more->slot;
#endif
}

#define XM_REMEMBERED ((1ULL << XM_BYTES_SHIFT) - 1)

/* What the policy said of this talker's source in the running window, in 32 bits, or 0. */
static __always_inline u64 remembered(const struct xm_talker *t)
{
	return (t->bytes[0] & XM_REMEMBERED) | (t->bytes[1] & XM_REMEMBERED) << XM_BYTES_SHIFT;
}

static __always_inline void remember(struct xm_talker *t, u64 what)
{
	t->bytes[0] = (t->bytes[0] & ~XM_REMEMBERED) | (what & XM_REMEMBERED);
	t->bytes[1] = (t->bytes[1] & ~XM_REMEMBERED) | what >> XM_BYTES_SHIFT;
}

static __always_inline void roll(struct xm_entry *entry, u32 window)
{
	struct xm_talker *t = xm_talker_of(entry);
	bool just_before = t->window == window - 1;
	t->packets[1] = just_before ? t->packets[0] : 0;
	t->bytes[1] = just_before ? t->bytes[0] & ~XM_REMEMBERED : 0; /* a new window asks anew */
	t->syns[1] = just_before ? t->syns[0] : 0;
	flow_move(entry, just_before);
	barrier(); /* a reader that sees the new number must see the moved counts: see kernel/talkers.py */
	t->window = window;
	barrier();
	t->packets[0] = 0;
	t->bytes[0] = 0;
	t->syns[0] = 0;
	flow_zero(entry);
}

/* Enter a rank in the register of a cell. Shared by all CPUs, without a lock: of two that raise one register at once the larger rank may be
   lost, and the sketch is then as if that source had not come, which is far within its error. */
static __always_inline void raise(u64 cell, u64 place, u8 rank)
{
	struct xm_sketch *sketch = xm_value_of(XM_VALUE_SKETCHES);
	asm volatile("" : "+r"(cell)); /* clang knows that it is small and would leave out the mask, which the verifier of kernel 6.1 needs */
	u8 *held = &sketch[cell & (2 * XM_SKETCH_CELLS - 1)].registers[place & (XM_SKETCH_REGISTERS - 1)];
	if (*held < rank)
		*held = rank;
}

/* Enter the source in the sketches of its family and of the port in `tail`, if that has one. Needed once in a window for each talker, which
   is when it gets its entry or is the first time heard in it; a packet without an entry may be the first of its source. */
static __always_inline void sketch_source(const struct xm_control *ctl, const struct xm_packet *p, u64 tail)
{
	u64 hash = mix(mix(mix(ctl->seed[3], p->source[0], ctl->seed[1]), p->source[1], ctl->seed[2]), p->family, ctl->seed[0]);
	/* Zeros from the top until a bit is set, plus one; the lowest 14 bits choose the register, and one in their place ends the count. */
	u64 ones = hash >> 14;
	ones |= ones >> 1;
	ones |= ones >> 2;
	ones |= ones >> 4;
	ones |= ones >> 8;
	ones |= ones >> 16;
	ones |= ones >> 32;
	u8 rank = 51 - __builtin_popcountll(ones);
	u64 half = (*(volatile u32 *)&ctl->window & 1) * XM_SKETCH_CELLS;
	u64 family = p->family == XM_FAMILY_IPV6;
	raise(half + family * XM_SKETCH_OVERALL + ((hash / XM_SKETCH_REGISTERS) & (XM_SKETCH_OVERALL - 1)), hash, rank);

	u64 of = p->protocol == IPPROTO_TCP ? 0 : p->protocol == IPPROTO_UDP ? 1 : p->protocol == XM_PROTOCOL_SCTP ? 2 : 3;
	u64 place = of * 65536 + (u16)tail;
	u64 pair = place < XM_SKETCHED ? ((u8 *)xm_value_of(XM_VALUE_SKETCHED))[place] : 0;
	if (pair)
		raise(half + 2 * XM_SKETCH_OVERALL + 2 * (pair - 1) + family, hash, rank);
}

/* The first set of this CPU's slice, and the two sets that a talker may be in. */
static __always_inline u64 slice_of(const struct xm_control *ctl)
{
	return (u64)bpf_get_smp_processor_id() * ((u64)ctl->talker_mask + 1);
}

static __always_inline struct xm_entry_set *set_of(const struct xm_control *ctl, u64 slice, u64 hash, int choice)
{
	u32 index = slice + ((choice ? hash >> 42 : hash ^ hash >> 48) & ctl->talker_mask);
	return talkers.lookup(&index);
}

/* Begin to read where the talker most likely is. */
static __always_inline void touch_talker(struct xm_entry_set *home)
{
	xm_touch(home);
#ifdef XM_FLOWS
	xm_touch(home->way[0].destination); /* its second line */
	xm_touch(&home->way[1]);
#endif
}

/* What the table knew of a talker before this packet. */
enum xm_seen {
	XM_SEEN_NEVER,  /* or so long ago that it is forgotten */
	XM_SEEN_BEFORE, /* but not in this window */
	XM_SEEN_NOW,
};

/* Where in a set the talker's entry is; XM_WAYS if it is not there. */
static __always_inline u64 way_of(const struct xm_entry_set *set, const struct xm_packet *p, u64 tail, const struct xm_more *more)
{
#pragma unroll
	for (int way = 0; way < XM_WAYS; way++) {
		const struct xm_entry *entry = &set->way[way];
		const struct xm_talker *t = xm_talker_of(entry);
		const u64 *key = (const u64 *)t;
		/* Port, protocol and family as one word. */
		if (key[0] == p->source[0] && key[1] == p->source[1] && *(const u32 *)&t->port == tail && flow_is(entry, p, more))
			return way;
	}
	return XM_WAYS;
}

/* The entry that makes room: that which was silent longest; 0 if all have what the daemon has still to read. */
static __always_inline struct xm_entry *oldest_talker(const struct xm_control *ctl, struct xm_entry_set *home, struct xm_entry_set *other,
						      u32 window, u32 now)
{
	bool reading = *(volatile u32 *)&ctl->read_window != window - 1;
	struct xm_entry *oldest = 0;
	u32 oldest_age = 0;
#pragma unroll
	for (int choice = 0; choice < 2; choice++) {
		struct xm_entry_set *set = choice ? other : home;
		if (!set)
			break;
#pragma unroll
		for (int way = 0; way < XM_WAYS; way++) {
			const struct xm_talker *t = xm_talker_of(&set->way[way]);
			/* One that was silent for a whole window goes like one that is free. */
			u32 age = t->family && window - t->window <= 1 ? now - t->last_seen + 1 : 0xffffffff;
			if (age > oldest_age && !(reading && keeps_closed(t, window))) {
				oldest = &set->way[way];
				oldest_age = age;
			}
		}
	}
	return oldest;
}

/* The entry of a talker or flow, whose hash it is, in this CPU's slice of the table. It is in one of two sets, so that a table which is half
   full turns hardly anybody away. */
static __always_inline struct xm_entry *find_entry(const struct xm_control *ctl, struct xm_packet *p, struct xm_entry_set *home, u64 slice,
						   u64 tail, u64 hash, const struct xm_more *more)
{
	struct xm_entry_set *set = home;
	u64 way = way_of(home, p, tail, more);
	if (way == XM_WAYS) {
		set = set_of(ctl, slice, hash, 1);
		if (!set)
			return 0;
		way = way_of(set, p, tail, more);
		if (way == XM_WAYS)
			return 0;
	}
	/* By way of memory: the verifier then takes all ways for one, and looks at what follows once. */
	*(volatile u32 *)&p->way = way;
	return &set->way[*(volatile u32 *)&p->way & (XM_WAYS - 1)];
}

/* Counts the packet in its talker's entry, or in one that makes room for it. `says` is what the policy said of it, to be remembered; 0 if it was
   not asked. */
static __always_inline enum xm_seen account_talker(const struct xm_control *ctl, const struct xm_packet *p, struct xm_tallies *tallies,
						   struct xm_entry *entry, struct xm_entry_set *home, u64 slice, u64 tail, u64 hash,
						   const struct xm_more *more, u64 size, u32 window, u32 now, u64 says)
{
	bool syn = (p->tcp_flags & (XM_TCP_SYN | XM_TCP_ACK)) == XM_TCP_SYN;
	if (entry) {
		struct xm_talker *t = xm_talker_of(entry);
		enum xm_seen seen = XM_SEEN_NOW;
		if (t->window != window) {
			roll(entry, window);
			seen = XM_SEEN_BEFORE;
		}
		if (t->packets[0] == 0xffffffff) {
			add(&tallies->untracked, size);
			return seen;
		}
		t->packets[0] += 1;
		t->bytes[0] += size << XM_BYTES_SHIFT;
		if (syn)
			t->syns[0] += 1;
		t->last_seen = now;
		flow_count(entry, p, more);
		if (says)
			remember(t, says);
		return seen;
	}
	struct xm_entry *old = oldest_talker(ctl, home, set_of(ctl, slice, hash, 1), window, now);
	if (!old) {
		add(&tallies->untracked, size);
		return XM_SEEN_NEVER;
	}
	struct xm_talker *victim = xm_talker_of(old);
	if (victim->family && victim->window == window) {
		tallies->evicted.packets += victim->packets[0];
		tallies->evicted.bytes += victim->bytes[0] >> XM_BYTES_SHIFT;
		tallies->evictions += 1;
	}
	u64 *key = (u64 *)victim;
	victim->packets[1] = 0;
	victim->bytes[1] = 0;
	victim->syns[1] = 0;
	flow_move(old, false);
	barrier();
	flow_name(old, p, more);
	key[0] = p->source[0];
	key[1] = p->source[1];
	key[2] = tail | (u64)window << 32;
	barrier();
	victim->packets[0] = 1;
	victim->bytes[0] = size << XM_BYTES_SHIFT | (says & XM_REMEMBERED);
	victim->bytes[1] = says >> XM_BYTES_SHIFT;
	victim->syns[0] = syn;
	victim->first_seen = now;
	victim->last_seen = now;
	flow_zero(old);
	flow_count(old, p, more);
	return XM_SEEN_NEVER;
}

/* Is the packet for this host? An address of its own, loopback, broadcast or multicast; what it forwards, or only sees, is not. */
static __always_inline bool to_this_host(const struct xm_packet *p)
{
#ifdef XM_LOCAL
	struct xm_address key = {.family = p->family};
	__builtin_memcpy(key.address, p->destination, 16);
	if (locals.lookup(&key))
		return true;
	if (p->family == XM_FAMILY_IPV6)
		return key.address[0] == 0xff;
	return (key.address[0] & 0xf0) == 224 || key.address[0] == 127 || *(u32 *)key.address == 0xffffffff;
#else
	return true;
#endif
}

#ifdef XM_EVENTS
#define XM_SECOND 1000000000ULL /* ns */

static __always_inline void sample_event(const struct xm_control *ctl, struct xm_cpu *of_cpu, u64 hash, u64 now_ns, u64 size, u64 slot,
					 u64 outcome, bool known)
{
	const struct xm_packet *p = &of_cpu->packet;
	struct xm_tallies *tallies = &of_cpu->tallies;
	struct xm_budget *b = &of_cpu->budget;
	/* With the budget spent, no cell is looked at: with many sources that is one more read out of the cache. */
	if (now_ns < b->until) {
		tallies->events_over_budget += 1;
		return;
	}
	if (now_ns - b->began >= XM_SECOND) {
		b->began = now_ns;
		b->spent = 0;
		b->unknown = 0;
	}
	bool all = b->spent >= ctl->event_budget;
	if (all)
		b->until = b->began + XM_SECOND;
	/* A flood of spoofed sources, each unknown, may not use up what a known source needs. */
	if (all || (!known && b->unknown + ctl->event_reserve >= ctl->event_budget)) {
		tallies->events_over_budget += 1;
		return;
	}
	/* The hash is that of the talker; its lower bits chose a set of the talker table. */
	u64 tag = (hash + outcome * ctl->seed[2]) | 1;
	struct xm_sampler *cell = (struct xm_sampler *)xm_value_of(XM_VALUE_SAMPLER) + ((tag >> 40) & (XM_SAMPLER_CELLS - 1));
	u64 held = cell->tag;
	u64 last = cell->last;
	/* `last` may be of a coarse clock tick that another CPU saw before this one */
	if (held == tag && (s64)(now_ns - last) < (s64)ctl->event_interval) {
		__sync_fetch_and_add(&cell->suppressed, 1);
		return;
	}
	/* Of several CPUs that get here for one cell at once, one makes the event. */
	bool ours = held == tag ? __sync_val_compare_and_swap(&cell->last, last, now_ns) == last
				: __sync_val_compare_and_swap(&cell->tag, held, tag) == held;
	if (!ours) {
		tallies->events_merged += 1;
		return;
	}
	cell->last = now_ns;
	u64 suppressed = __sync_lock_test_and_set(&cell->suppressed, 0);
	if (held != tag) {
		tallies->events_merged += suppressed;
		suppressed = 0;
	}
	struct xm_event *event = events.ringbuf_reserve(sizeof(struct xm_event));
	if (!event) {
		tallies->events_ring_full += 1;
		tallies->events_merged += suppressed;
		return;
	}
	u64 flow = mix(hash_talker(ctl, p, p->protocol), p->source_port | (u64)p->destination_port << 16, ctl->seed[3]);
	flow = mix(flow, p->destination[0], ctl->seed[1]);
	flow = mix(flow, p->destination[1], ctl->seed[2]);
	event->timestamp = now_ns;
	__builtin_memcpy(event->source, p->source, 16);
	__builtin_memcpy(event->destination, p->destination, 16);
	event->packet_size = size;
	event->suppressed = suppressed;
	event->flow_hash = flow;
	event->source_port = p->source_port;
	event->destination_port = p->destination_port;
	event->vlan = p->vlan;
	event->slot = slot;
	event->family = p->family;
	event->protocol = p->protocol;
	event->outcome = outcome;
	event->has_ports = p->has_ports;
	event->tcp_flags = p->tcp_flags;
	events.ringbuf_submit(event, 0);

	tallies->events_made += 1;
	b->spent += 1;
	b->unknown += !known;
}
#endif

/* With branches: what is guessed right need not wait for the policy's lines, and what follows goes on. */
static __always_inline u64 decide(const struct xm_packet *p, u64 code, u64 default_verdict, bool enforce)
{
	u64 verdict = code == XM_CODE_ALLOW ? XM_VERDICT_ALLOW : code == XM_CODE_DENY ? XM_VERDICT_DENY : default_verdict;
	if (verdict == XM_VERDICT_ALLOW)
		return code ? XM_ALLOWED : XM_DEFAULT_ALLOWED;
	if (verdict == XM_VERDICT_LOG)
		return XM_DEFAULT_LOGGED;
	if (!enforce)
		return code ? XM_DENIED_PASSED : XM_DEFAULT_DENIED_PASSED;
	if (p->essential == XM_ESSENTIAL_ALWAYS)
		return XM_ESSENTIAL_PASSED;
	if (code)
		return XM_DENIED_DROPPED;
	if (p->essential == XM_ESSENTIAL_BEFORE_DEFAULT)
		return XM_ESSENTIAL_PASSED;
	if (p->has_ports) {
		u8 failsafe = p->protocol == IPPROTO_TCP ? XM_PORT_TCP_FAILSAFE : p->protocol == IPPROTO_UDP ? XM_PORT_UDP_FAILSAFE : 0;
		if (port_flags(p->destination_port) & failsafe)
			return XM_ESSENTIAL_PASSED;
	}
	return XM_DEFAULT_DENIED_DROPPED;
}

/* Does a frame start with an Ethernet header, or with that of IP? The daemon writes 1 or 0 in the place of the mark, and so loads two programs
   of one text. The verifier follows one branch, and takes the instructions of the other away. */
static __always_inline u64 has_ethernet(void)
{
	u64 answer;
	asm volatile("%0 = %1" : "=r"(answer) : "i"(XM_LINK_MARK));
	return answer;
}

int xdpmond(struct xdp_md *ctx)
{
	/* What is a call comes first, while there is little that would have to be kept over it. */
	u32 zero = 0;
	struct xm_cpu *of_cpu = cpu.lookup(&zero);
	if (!of_cpu)
		return XDP_PASS;
	struct xm_tallies *tally = &of_cpu->tallies;
	struct xm_packet *p = &of_cpu->packet;
	const struct xm_control *ctl = xm_value_of(XM_VALUE_CONTROL);
#ifdef XM_FRAGS
	u64 size = bpf_xdp_get_buff_len(ctx);
#else
	u64 size = (long)ctx->data_end - (long)ctx->data;
#endif
	u64 now = bpf_ktime_get_coarse_ns();
	u64 slice = slice_of(ctl);

	u32 ifindex = ctx->ingress_ifindex;
	const struct xm_slot *slot = 0;
	for (int i = 0; i < XM_MAX_SLOTS; i++) {
		if (ctl->slots[i].ifindex == ifindex) {
			slot = &ctl->slots[i];
			break;
		}
	}
	if (!slot) {
		tally->anomaly[XM_ANOMALY_UNKNOWN_SLOT] += 1;
		return XDP_PASS;
	}
	u64 number = slot->number & (XM_MAX_SLOTS - 1);
	bool enforce = slot->enforce;

	void *begin = (void *)(long)ctx->data;
	struct xm_cursor c = {.at = begin, .end = (void *)(long)ctx->data_end, .anomalies = tally->anomaly, .vlan = XM_VLAN_NONE};
	int type = -1;
	if (has_ethernet()) {
		type = xm_parse_link(&c);
	} else {
		u8 *version = c.at;
		if ((void *)(version + 1) > c.end)
			xm_odd(&c, XM_ANOMALY_SHORT_FRAME);
		else
			type = *version >> 4 == 4 ? bpf_htons(ETH_P_IP) : *version >> 4 == 6 ? bpf_htons(ETH_P_IPV6) : 0;
	}
	c.link = c.at - begin;
	xm_parse_network(&c, p, type);
	barrier(); /* or a newer clang makes a way of its own for each kind of packet, and the verifier looks at them all */

	u64 outcome = XM_NO_SOURCE;
	if (p->family) {
		u64 policy_number = *(volatile u32 *)&ctl->policy;
		const struct xm_policy *held = xm_value_of(XM_VALUE_POLICY) + (policy_number & 1) * (sizeof(struct xm_policy) + XM_TOPS * sizeof(u32));
		u64 tail = (*(u32 *)&p->has_ports & 0xffff0000) | talker_port(ctl, p); /* port, protocol, family, as in struct xm_talker */
		u64 hash = hash_talker(ctl, p, tail);
		struct xm_more more = {};
		u64 entry_hash = hash;
#ifdef XM_FLOWS
		more.ports = p->source_port | p->icmp_code | (u32)(p->destination_port | p->icmp) << 16;
		more.ip_size = p->ip_size && p->ip_size < size - p->link ? p->ip_size : size - p->link;
		more.slot = number;
		entry_hash = hash_flow(ctl, p, hash, more.ports);
#endif
		struct xm_entry_set *home = set_of(ctl, slice, entry_hash, 0);
		if (!home)
			return XDP_PASS;
		touch_talker(home);
		/* What a talker's entry remembers of the policy that holds need not be looked up: a source costs the same under one prefix and
		   under a million. */
		u32 window = *(volatile u32 *)&ctl->window;
		bool here = to_this_host(p);
		struct xm_entry *entry = here ? find_entry(ctl, p, home, slice, tail, entry_hash, &more) : 0;
		u64 first = (u32)(policy_number << 2) + 1; /* what says XM_CODE_NONE of this policy */
		u64 code = entry && xm_talker_of(entry)->window == window ? remembered(xm_talker_of(entry)) - first : ~0ULL;
		u64 says = 0;
		if (code > XM_CODE_DENY) {
			code = p->family == XM_FAMILY_IPV4 ? xm_verdict4(ctl, held, bpf_ntohl((u32)p->source[0]))
							   : xm_verdict6(ctl, held, bpf_ntohll(p->source[0]), bpf_ntohll(p->source[1]));
			says = first + code;
		}
		outcome = decide(p, code, held->default_verdict, enforce);
		more.outcome = outcome;
		add(&tally->sourced, size);
		enum xm_seen seen = XM_SEEN_NEVER;
		if (here) {
			seen = account_talker(ctl, p, tally, entry, home, slice, tail, entry_hash, &more, size, window, now >> XM_SEEN_SHIFT, says);
			if (seen != XM_SEEN_NOW)
				sketch_source(ctl, p, tail);
		} else {
			add(&tally->elsewhere, size);
		}
#ifdef XM_EVENTS
		bool reported = outcome != XM_ALLOWED && outcome != XM_DEFAULT_ALLOWED && outcome != XM_ESSENTIAL_PASSED;
		if (reported)
			sample_event(ctl, of_cpu, hash, now, size, number, outcome, seen != XM_SEEN_NEVER);
#endif
	}
	u32 cell = ((number * XM_FAMILIES + p->family) * XM_CLASSES + p->class) * XM_OUTCOMES + outcome;
	struct xm_count *total = totals.lookup(&cell);
	if (total)
		add(total, size);
	return outcome == XM_DENIED_DROPPED || outcome == XM_DEFAULT_DENIED_DROPPED ? XDP_DROP : XDP_PASS;
}
