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
BPF_F_TABLE("array", u32, struct xm_detail, details, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct xm_past, past, 1, BPF_F_MMAPABLE);
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

/* A number that is less than `limit`, a power of two. Clang knows that it is, and would leave out the mask, which the verifier of kernel 6.1
   needs. */
static __always_inline u64 small(u64 number, u64 limit)
{
	asm volatile("" : "+r"(number));
	return number & (limit - 1);
}

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

/* Of a source, in 32 bits. */
static __always_inline u64 name_of(const struct xm_packet *p)
{
	if (p->family == XM_FAMILY_IPV4)
		return p->source[0];
	u64 words = p->source[0] ^ p->source[1];
	return (u32)words ^ words >> 32;
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

/* What `state` says. */
static __always_inline u64 id_in(u64 state)
{
	return state >> (XM_STATE_MOMENT_SHIFT + XM_POLICY_BITS);
}

/* Of the window before. To be read after the moment, before which it was stored: see Control.close_window. */
static __always_inline u64 id_before(const struct xm_control *ctl)
{
	return *(volatile u32 *)&ctl->before & (XM_WINDOW_IDS - 1);
}

static __always_inline u64 id_of(u64 moment)
{
	return moment >> XM_POLICY_BITS;
}

static __always_inline u64 packets_in(u64 state)
{
	return (state & XM_STATE_PACKETS) >> XM_STATE_PACKETS_SHIFT;
}

/*
 * The table has entries of one of two kinds, for talkers or for flows, which begin with their talker. What only flows have is behind it: these
 * functions do nothing where flows are off.
 */
#ifdef XM_FLOWS
#define xm_entry xm_flow
#define xm_entry_set xm_flow_set
#define xm_talker_of(entry) (&(entry)->talker)
#define XM_LOOK 2
#else
#define xm_entry xm_talker
#define xm_entry_set xm_set
#define xm_talker_of(entry) (entry)
#define XM_LOOK 4 /* entries of a set that the search begins with */
#endif

/* What is known of a packet beside its talker. */
struct xm_more {
	u32 ports; /* the source's, and above it the destination's */
	u32 ip_size;
	u32 seen;  /* now, in units of XM_SEEN_SHIFT */
	u8 outcome;
	u8 slot;
};

/* Of two flows of one talker: 0 if they are the same. */
static __always_inline u64 flow_differs(const struct xm_entry *entry, const struct xm_packet *p, const struct xm_more *more)
{
#ifdef XM_FLOWS
	const u64 *key = (const u64 *)entry->destination;
	u64 differs = (key[0] ^ p->destination[0]) | (key[1] ^ p->destination[1]) | (u32)(key[2] ^ more->ports);
	return (u32)differs | differs >> 32;
#else
	return 0;
#endif
}

/* Before the window's id is stored, and after. */
static __always_inline void flow_move(struct xm_entry *entry)
{
#ifdef XM_FLOWS
	entry->ip_bytes[1] = entry->ip_bytes[0];
	entry->tcp_flags[1] = entry->tcp_flags[0];
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
	entry->last_seen = more->seen;
#endif
}

static __always_inline bool is_syn(const struct xm_packet *p)
{
	return (p->tcp_flags & (XM_TCP_SYN | XM_TCP_ACK)) == XM_TCP_SYN;
}

/* What is kept aside for the entry at a place. */
static __always_inline struct xm_detail *detail_at(u64 place)
{
	u32 index = place;
	return details.lookup(&index);
}

static __always_inline struct xm_past *past_at(u64 place)
{
	u32 index = place;
	return past.lookup(&index);
}

/* Begin a window in an entry; returns its new state. */
static __always_inline u64 roll(const struct xm_control *ctl, struct xm_entry *entry, u64 place, u64 state, u64 moment)
{
	struct xm_detail *d = detail_at(place);
	struct xm_past *before = past_at(place);
	if (!d || !before)
		return state;
	u64 carried = id_in(state) == id_before(ctl) ? XM_STATE_CARRIED : 0;
	if (carried) {
		before->packets = d->packets + packets_in(state);
		before->bytes = d->bytes + (state & XM_STATE_BYTES);
		before->syns = d->syns;
		flow_move(entry);
	}
	state = moment << XM_STATE_MOMENT_SHIFT | carried | (state & XM_STATE_SEEN);
	barrier(); /* a reader that sees the new id must see the moved counts, and when the talker was last seen: see kernel/talkers.py */
	xm_talker_of(entry)->state = state;
	barrier();
	d->packets = 0;
	d->bytes = 0;
	d->syns = 0;
	flow_zero(entry);
	return state;
}

/* Enter a rank in the register of a cell. Shared by all CPUs, without a lock: of two that raise one register at once the larger rank may be
   lost, and the sketch is then as if that source had not come, which is far within its error. */
static __always_inline void raise(u64 cell, u64 place, u8 rank)
{
	struct xm_sketch *sketch = xm_value_of(XM_VALUE_SKETCHES);
	u8 *held = &sketch[small(cell, 2 * XM_SKETCH_CELLS)].registers[place & (XM_SKETCH_REGISTERS - 1)];
	if (*held < rank)
		*held = rank;
}

/* Enter the source in the sketches of its family and of the port in `tail`, if that has one. Needed once in a window for each talker, which
   is when it gets its entry or is the first time heard in it; a packet without an entry may be the first of its source. */
static __always_inline void sketch_source(const struct xm_control *ctl, const struct xm_packet *p, u64 tail, u64 moment)
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
	u64 half = (id_of(moment) & 1) * XM_SKETCH_CELLS;
	u64 family = p->family == XM_FAMILY_IPV6;
	raise(half + family * XM_SKETCH_OVERALL + ((hash / XM_SKETCH_REGISTERS) & (XM_SKETCH_OVERALL - 1)), hash, rank);

	u64 of = p->protocol == IPPROTO_TCP ? 0 : p->protocol == IPPROTO_UDP ? 1 : p->protocol == XM_PROTOCOL_SCTP ? 2 : 3;
	u64 place = of * 65536 + (u16)tail;
	u64 pair = place < XM_SKETCHED ? ((u8 *)xm_value_of(XM_VALUE_SKETCHED))[place] : 0;
	if (pair)
		raise(half + 2 * XM_SKETCH_OVERALL + 2 * (pair - 1) + family, hash, rank);
}

/* Sets in a slice of the talker table, less one. In the text, so that a program and its table cannot disagree: while a daemon takes over, the
   program of the last one runs on, with a table of another size. */
static __always_inline u64 set_mask(void)
{
	u64 mask;
	asm volatile("%0 = %1" : "=r"(mask) : "i"(XM_SETS_MARK));
	return mask;
}

/* The first set of this CPU's slice. */
static __always_inline u64 slice_of_cpu(void)
{
	return (u64)bpf_get_smp_processor_id() * (set_mask() + 1);
}

/* The way with which a talker's search in its first set begins: that of a cache line. */
static __always_inline u64 line_of(u64 hash)
{
	return hash >> 40 & (XM_WAYS - XM_LOOK);
}

static __always_inline struct xm_entry_set *set_at(u64 number)
{
	u32 index = number;
	return talkers.lookup(&index);
}

/* What the table knew of a talker before this packet. */
enum xm_seen {
	XM_SEEN_NEVER,  /* or so long ago that it is forgotten */
	XM_SEEN_BEFORE, /* but not in this window */
	XM_SEEN_NOW,
};

/* Who the talker of a packet is, and what its places are made from. */
struct xm_who {
	u64 key;  /* the first word of its entry */
	u64 hash;
	u64 slice;
	u64 home; /* number of its first set */
};

/* The two sets that a talker may be in. */
static __always_inline u64 home_set(u64 slice, u64 hash)
{
	return slice + ((hash ^ hash >> 48) & set_mask());
}

static __always_inline u64 other_set(const struct xm_who *who)
{
	return who->slice + (who->hash >> 42 & set_mask());
}

/* 0 if the entry is of this talker or flow, but for what stands in the details; else below 2^63, since no family has a number of eight bits. */
static __always_inline u64 differs(const struct xm_entry *entry, const struct xm_packet *p, const struct xm_who *who, const struct xm_more *more)
{
	return (*(const u64 *)entry ^ who->key) | flow_differs(entry, p, more);
}

static __always_inline bool source_is(const struct xm_packet *p, u64 place)
{
	if (p->family == XM_FAMILY_IPV4)
		return true;
	const struct xm_detail *d = detail_at(place);
	return d && d->high == p->source[1] && d->second == p->source[0] >> 32;
}

/* The place of a talker that is in this set, else XM_NOWHERE. */
#define XM_NOWHERE 0xffffffff
static __always_inline u64 place_in(const struct xm_entry_set *set, u64 number, const struct xm_packet *p, const struct xm_who *who,
				    const struct xm_more *more)
{
#pragma unroll
	for (int way = 0; way < XM_WAYS; way++)
		if (!differs(&set->way[way], p, who, more) && source_is(p, number * XM_WAYS + way))
			return number * XM_WAYS + way;
	return XM_NOWHERE;
}

/* The entry that makes room, and its place: that which was silent longest, and of those that were last seen at one time that with the fewest
   packets; 0 if all have what the daemon has still to read. */
static __always_inline struct xm_entry *oldest_talker(const struct xm_control *ctl, struct xm_packet *p, struct xm_entry_set *home,
						      const struct xm_who *who, u64 moment, u64 seen, u64 *place)
{
	bool reading = *(volatile u32 *)&ctl->read_window != *(volatile u32 *)&ctl->before;
	u64 before = id_before(ctl);
	u64 number = other_set(who);
	struct xm_entry_set *other = set_at(number);
	if (!other)
		return 0;
	const u64 lower = XM_STATE_SEEN | XM_STATE_PACKETS | XM_STATE_BYTES;
	u64 line = line_of(who->hash), oldest = 0, oldest_age = 0, now = seen | XM_STATE_PACKETS | XM_STATE_BYTES;
#pragma unroll
	for (int i = 0; i < 2 * XM_WAYS; i++) {
		u64 state = xm_talker_of(&(i < XM_WAYS ? home : other)->way[(i % XM_WAYS) ^ line])->state;
		u64 age = ((now - state) & lower) + 1;
		/* What the daemon has not read of an entry would be lost with it. */
		bool unread = reading;
		if (id_in(state) == id_of(moment)) {
			unread = reading && state & XM_STATE_CARRIED;
		} else if (id_in(state) == before) {
			age += lower;
		} else {
			/* One that was silent for a whole window goes like one that is free: of these the first. */
			age = ~0ULL;
			unread = false;
		}
		if (age > oldest_age && !unread) {
			oldest = i;
			oldest_age = age;
		}
	}
	if (!oldest_age)
		return 0;
	/* By way of memory: the verifier then takes all ways for one, and looks at what follows once. */
	*(volatile u32 *)&p->place = oldest;
	oldest = *(volatile u32 *)&p->place;
	u64 way = (oldest ^ line) & (XM_WAYS - 1);
	if (oldest < XM_WAYS) {
		number = who->home;
		other = home;
	}
	*place = number * XM_WAYS + way;
	return &other->way[small(way, XM_WAYS)];
}

/* The entry of a talker or flow in this CPU's slice of the table, and its place. It is in one of two sets, so that a table which is half full
   turns hardly anybody away. */
static __always_inline struct xm_entry *find_entry(struct xm_packet *p, struct xm_entry_set *home,
						   const struct xm_who *who, const struct xm_more *more)
{
	u64 line = line_of(who->hash), found = 0;
	/* The details of a set are two lines. Their reads begin here, so that they come together with that of the set. */
	if (p->family != XM_FAMILY_IPV4) {
		struct xm_detail *d = detail_at(who->home * XM_WAYS);
		if (d)
			*(volatile u64 *)&d->high;
		d = detail_at(who->home * XM_WAYS + 2);
		if (d)
			*(volatile u64 *)&d->high;
	}
	/* Nine in ten are in the line where they would be first, and which of its entries it is, is not a branch: it would be guessed wrong
	   most of the time, and that be known only when the line is there, so that nothing could be done meanwhile. The barriers keep clang
	   from making one. */
#pragma unroll
	for (int i = 0; i < XM_LOOK; i++) {
		u64 is = differs(&home->way[line + i], p, who, more) - 1;
		asm volatile("" : "+r"(is));
		found |= is >> 63 << i;
	}
	found &= -found; /* more than one may have the key of an IPv6 source */
	u64 way = line + (((found >> 1) - (found >> 3)) & (XM_LOOK - 1)); /* of four bits the one that is set */
	u64 place = who->home * XM_WAYS + way;
	if (found && source_is(p, place)) {
		p->place = place;
		return &home->way[small(way, XM_WAYS)];
	}
	struct xm_entry_set *set = home;
	place = XM_NOWHERE;
	if (found || XM_LOOK < XM_WAYS)
		place = place_in(home, who->home, p, who, more);
	if (place == XM_NOWHERE) {
		u64 number = other_set(who);
		set = set_at(number);
		if (!set)
			return 0;
		place = place_in(set, number, p, who, more);
		if (place == XM_NOWHERE)
			return 0;
	}
	/* By way of memory, as above. */
	*(volatile u32 *)&p->place = place;
	return &set->way[*(volatile u32 *)&p->place & (XM_WAYS - 1)];
}

/* Counts a packet in its talker's entry, whose state is to be this one. */
static __always_inline void count_packet(const struct xm_packet *p, struct xm_tallies *tallies, struct xm_entry *entry, u64 state,
					 const struct xm_more *more, u64 size, u64 seen)
{
	struct xm_talker *t = xm_talker_of(entry);
	struct xm_detail *d;
	u64 bytes = (state & XM_STATE_BYTES) + size;
	state = (state & ~XM_STATE_SEEN) | seen;
	if (bytes > XM_STATE_BYTES || (state & XM_STATE_PACKETS) == XM_STATE_PACKETS) {
		d = detail_at(p->place);
		if (!d)
			return;
		u64 held = packets_in(state), stay = held < XM_STATE_STAY ? held : XM_STATE_STAY;
		u64 packets = d->packets + held - stay;
		if (packets > 0xffffffff - packets_in(XM_STATE_PACKETS)) {
			add(&tallies->untracked, size);
			return;
		}
		/* This packet and some more stay, their bytes do not. A reader may miss for a moment what is on its way, and never finds it
		   twice. */
		t->state = (state & ~(XM_STATE_PACKETS | XM_STATE_BYTES)) + (stay + 1 << XM_STATE_PACKETS_SHIFT);
		barrier();
		d->packets = packets;
		d->bytes += bytes;
	} else {
		t->state = state + (1 << XM_STATE_PACKETS_SHIFT) + size;
	}
	flow_count(entry, p, more);
	if (is_syn(p)) {
		d = detail_at(p->place);
		if (d)
			d->syns += 1;
	}
}

/* Makes an entry for a new talker, with its first packet. */
static __always_inline void enter_talker(const struct xm_control *ctl, struct xm_packet *p, struct xm_tallies *tallies,
					 struct xm_entry_set *home, const struct xm_who *who, const struct xm_more *more, u64 size, u64 moment,
					 u64 code, u64 seen, u64 now)
{
	u64 place = 0;
	struct xm_entry *entry = oldest_talker(ctl, p, home, who, moment, seen, &place);
	struct xm_detail *d = detail_at(place);
	if (!entry || !d) {
		add(&tallies->untracked, size);
		return;
	}
	struct xm_talker *t = xm_talker_of(entry);
	u64 state = t->state;
	if (id_in(state) == id_of(moment)) {
		tallies->evicted.packets += packets_in(state);
		tallies->evicted.bytes += state & XM_STATE_BYTES;
		tallies->evictions += 1;
		/* A single packet with its bytes has nothing in the details, whose line is not waited for then: in a flood that is most of them. */
		if (packets_in(state) > 1 || !(state & XM_STATE_BYTES)) {
			tallies->evicted.packets += d->packets;
			tallies->evicted.bytes += d->bytes;
		}
	}
	t->state = 0; /* nobody's, until it is whole */
	barrier();
	*(u64 *)t = who->key;
	d->high = p->source[1];
	d->second = p->source[0] >> 32;
	d->first_seen = now >> XM_SEEN_SHIFT;
	u64 held = size > XM_STATE_BYTES ? 0 : size;
	d->bytes = size - held;
	d->packets = 0;
	d->syns = is_syn(p);
	flow_name(entry, p, more);
	flow_zero(entry);
	flow_count(entry, p, more);
	barrier();
	t->state = moment << XM_STATE_MOMENT_SHIFT | code << XM_STATE_CODE_SHIFT | seen | 1 << XM_STATE_PACKETS_SHIFT | held;
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

static __always_inline const struct xm_policy *policy_of(u64 moment)
{
	return xm_value_of(XM_VALUE_POLICY) + (moment & 1) * (sizeof(struct xm_policy) + XM_TOPS * sizeof(u32));
}

#define XM_BY_DEFAULT ((int)XM_DEFAULT_ALLOWED - XM_VERDICT_ALLOW)
#define XM_CODE_DEFAULT XM_CODE_LINE /* in place of 0, where 0 is what nobody asked */

/* What becomes of a packet that is dropped nowhere, by the policy's code for its source. With a branch: what is guessed right need not wait
   for the policy's lines, and what follows goes on. */
static __always_inline u64 judge(u64 moment, u64 code)
{
	_Static_assert(XM_ALLOWED == (int)XM_CODE_ALLOW && XM_DENIED_PASSED == (int)XM_CODE_DENY, "a code is its outcome");
	_Static_assert(XM_DEFAULT_LOGGED == XM_VERDICT_LOG + XM_BY_DEFAULT && XM_DEFAULT_DENIED_PASSED == XM_VERDICT_DENY + XM_BY_DEFAULT,
		       "outcomes by default are in the order of verdicts");
	return code != XM_CODE_DEFAULT ? code : policy_of(moment)->default_verdict + XM_BY_DEFAULT;
}

/* The same where denied packets are dropped. */
static __always_inline u64 enforced(const struct xm_packet *p, u64 outcome)
{
	_Static_assert(XM_DENIED_DROPPED == XM_DENIED_PASSED + 1 && XM_DEFAULT_DENIED_DROPPED == XM_DEFAULT_DENIED_PASSED + 1, "each after its like");
	if (outcome != XM_DENIED_PASSED && outcome != XM_DEFAULT_DENIED_PASSED)
		return outcome;
	if (p->essential == XM_ESSENTIAL_ALWAYS)
		return XM_ESSENTIAL_PASSED;
	if (outcome == XM_DENIED_PASSED)
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

/* CLOCK_MONOTONIC in ns, as of the last tick or the one before it. The clock itself is asked in the first packet after a tick: a call takes
   as long as a tenth of all else that is done for a packet, and the number of the tick is one read. */
static __always_inline u64 time_of(const struct xm_control *ctl, struct xm_clock *clock)
{
	u64 tick = bpf_jiffies64();
	if (clock->tick != tick) {
		clock->tick = tick;
		clock->now = bpf_ktime_get_coarse_ns();
		clock->seen = clock->now >> (ctl->seen_shift & 63) << XM_STATE_SEEN_SHIFT & XM_STATE_SEEN;
	}
	return clock->now;
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
	u64 now = time_of(ctl, &of_cpu->clock);
	u64 slice = slice_of_cpu();

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
	struct xm_cursor c = {.at = begin, .end = (void *)(long)ctx->data_end, .anomalies = tally->anomaly, .vlan = XM_VLAN_NONE, .any = &p->place};
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
		u64 moment = *(volatile u32 *)&ctl->moment;
		u64 tail = (*(u32 *)&p->has_ports & 0xffff0000) | talker_port(ctl, p); /* port, protocol, family, as in struct xm_talker */
		u64 hash = hash_talker(ctl, p, tail);
		struct xm_more more = {};
		struct xm_who who = {.key = tail << 32 | name_of(p), .hash = hash, .slice = slice};
#ifdef XM_FLOWS
		more.ports = p->source_port | p->icmp_code | (u32)(p->destination_port | p->icmp) << 16;
		more.ip_size = p->ip_size && p->ip_size < size - p->link ? p->ip_size : size - p->link;
		more.slot = number;
		more.seen = now >> XM_SEEN_SHIFT;
		who.hash = hash_flow(ctl, p, hash, more.ports);
#endif
		who.home = home_set(slice, who.hash);
		struct xm_entry_set *home = set_at(who.home);
		if (!home)
			return XDP_PASS;
		bool here = to_this_host(p);
		struct xm_entry *entry = here ? find_entry(p, home, &who, &more) : 0;
		enum xm_seen seen = entry ? XM_SEEN_NOW : XM_SEEN_NEVER;
		u64 state = entry ? xm_talker_of(entry)->state : 0;
		u64 code = state >> XM_STATE_CODE_SHIFT & 3;
		if (state >> XM_STATE_MOMENT_SHIFT != moment) {
			code = 0;
			if (entry && id_in(state) != id_of(moment)) {
				state = roll(ctl, entry, p->place, state, moment);
				seen = XM_SEEN_BEFORE;
			}
		}
		/* What a talker's entry remembers of the policy that holds need not be looked up: a source costs the same under one prefix and
		   under a million. */
		if (!code) {
			const struct xm_policy *held = policy_of(moment);
			code = p->family == XM_FAMILY_IPV4 ? xm_verdict4(ctl, held, bpf_ntohl((u32)p->source[0]))
							   : xm_verdict6(ctl, held, bpf_ntohll(p->source[0]), bpf_ntohll(p->source[1]));
			if (!code)
				code = XM_CODE_DEFAULT;
			u64 remembered = moment & (XM_POLICY_NUMBERS - 2) ? code : 0;
			state = (state & (XM_STATE_CARRIED * 2 - 1)) | moment << XM_STATE_MOMENT_SHIFT | remembered << XM_STATE_CODE_SHIFT;
		}
		outcome = judge(moment, code);
		if (enforce)
			outcome = enforced(p, outcome);
		more.outcome = outcome;
		add(&tally->sourced, size);
		if (entry)
			count_packet(p, tally, entry, state, &more, size, of_cpu->clock.seen);
		else if (here)
			enter_talker(ctl, p, tally, home, &who, &more, size, moment, state >> XM_STATE_CODE_SHIFT & 3, of_cpu->clock.seen, now);
		else
			add(&tally->elsewhere, size);
		if (here && seen != XM_SEEN_NOW)
			sketch_source(ctl, p, tail, moment);
#ifdef XM_EVENTS
		bool reported = outcome != XM_ALLOWED && outcome != XM_DEFAULT_ALLOWED && outcome != XM_ESSENTIAL_PASSED;
		if (reported)
			sample_event(ctl, of_cpu, hash, now, size, number, outcome, seen != XM_SEEN_NEVER);
#endif
	} else if (enforce && xm_is_tag(type)) {
		/* The stack takes off any number of tags with the id 0, and may find a packet behind them whose source nobody has looked at. */
		outcome = XM_UNREADABLE_DROPPED;
	}
	u32 cell = ((number * XM_FAMILIES + p->family) * XM_CLASSES + p->class) * XM_OUTCOMES + outcome;
	struct xm_count *total = totals.lookup(&cell);
	if (total)
		add(total, size);
	bool dropped = outcome == XM_DENIED_DROPPED || outcome == XM_DEFAULT_DENIED_DROPPED || outcome == XM_UNREADABLE_DROPPED;
	return dropped ? XDP_DROP : XDP_PASS;
}
