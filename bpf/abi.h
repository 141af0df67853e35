/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the packet path and the daemon share. This is the one definition; xdpmond/kernel/abi.py mirrors it, and a test compiles a dumper
 * from this file and compares every offset, size and constant. Raise XM_ABI_VERSION with any change: the daemon then starts with new maps
 * in place of those kept in the descriptor store.
 *
 * Widths are fixed, padding is written out, numbers are in host byte order, addresses in network byte order. An IPv4 address fills the
 * first 4 of the 16 bytes; the rest is zero. One writer a field: the packet path or the daemon, as each comment says.
 */
#ifndef XDPMOND_ABI_H
#define XDPMOND_ABI_H

#define XM_ABI_VERSION 1

#define XM_MAX_SLOTS 16       /* interfaces watched at once */
#define XM_WAYS 4             /* talkers in a set */
#define XM_PORT_NONE 0        /* talker port: the protocol has none, or it could not be read */
#define XM_VLAN_NONE 0xffff   /* event vlan: no tag seen */
#define XM_SEEN_SHIFT 24      /* first and last seen are CLOCK_MONOTONIC nanoseconds >> this: units of 16.8 ms, 2.28 years in 32 bits */
#define XM_SAMPLER_CELLS 16384 /* a power of two */
#define XM_RULE_DEFAULT 0     /* rule index of "no entry matched" */

enum xm_class {
	XM_CLASS_OTHER,
	XM_CLASS_TCP,
	XM_CLASS_UDP,
	XM_CLASS_ICMP,
	XM_CLASS_ICMPV6,
	XM_CLASS_SCTP,
	XM_CLASS_ARP,
	XM_CLASS_NON_IP,
	XM_CLASSES
};

enum xm_family { XM_FAMILY_OTHER, XM_FAMILY_IPV4, XM_FAMILY_IPV6, XM_FAMILIES };

enum xm_verdict { XM_VERDICT_ALLOW = 1, XM_VERDICT_LOG, XM_VERDICT_DENY };

enum xm_outcome {
	XM_NO_SOURCE,
	XM_ALLOWED,
	XM_DENIED_PASSED,
	XM_DENIED_DROPPED,
	XM_DEFAULT_ALLOWED,
	XM_DEFAULT_LOGGED,
	XM_DEFAULT_DENIED_PASSED,
	XM_DEFAULT_DENIED_DROPPED,
	XM_ESSENTIAL_PASSED,
	XM_OUTCOMES = 16 /* a power of two, so that an index needs no multiplication */
};

/* What was odd about a frame. One frame may count in several; each is a number of frames. */
enum xm_anomaly {
	XM_ANOMALY_SHORT_FRAME,     /* no whole link header: no source */
	XM_ANOMALY_VLAN_DEPTH,      /* more than two VLAN tags: no source */
	XM_ANOMALY_SHORT_IP,        /* an IP header cut short: no source, unless the source itself is whole */
	XM_ANOMALY_IP_VERSION,      /* EtherType and version disagree: no source */
	XM_ANOMALY_IP_LENGTH,       /* header or total length impossible: the source counts, the port does not */
	XM_ANOMALY_EXTENSION_DEPTH, /* more extension headers than are followed */
	XM_ANOMALY_SHORT_EXTENSION, /* an extension header cut short */
	XM_ANOMALY_SHORT_TRANSPORT, /* a transport header cut before its ports end */
	XM_ANOMALY_LATER_FRAGMENT,  /* not odd, but without a port */
	XM_ANOMALY_UNKNOWN_SLOT,    /* arrived on an interface without a slot: passed unseen */
	XM_ANOMALIES = 16
};

/* Flags of a port, eight bits each, packed eight ports to an element of the map `ports`. */
#define XM_PORT_TCP_LISTENS 1
#define XM_PORT_UDP_LISTENS 2
#define XM_PORT_TCP_FAILSAFE 4
#define XM_PORT_UDP_FAILSAFE 8

struct xm_count {
	u64 packets;
	u64 bytes; /* frame length without FCS, all fragments of the frame included */
};

/* An interface that the program is attached to; its position is its slot. */
struct xm_slot {
	u32 ifindex; /* 0: free */
	u8 enforce;  /* 1: drop what is denied */
	u8 number;   /* its position again: a value read from here is one unknown number to the verifier, not sixteen known ones */
	u8 pad[2];
};

/* Element 0 of the map `control`: all that the daemon tells the packet path. Written by the daemon alone. */
struct xm_control {
	u64 seed[4];          /* secret multipliers of the hashes, odd */
	u64 event_interval;   /* ns */
	u32 window;           /* number of the running window, from 1 */
	u32 read_window;      /* the last closed window that the daemon has read; window - 1, but while it reads */
	u32 policy;           /* 0 or 1: the trie that holds the policy */
	u32 default_verdict[2]; /* enum xm_verdict, for each of the tries: switched with them */
	u32 event_budget;     /* events a second and CPU */
	u32 event_reserve;    /* of these, kept for sources already known */
	u16 ephemeral_first;  /* ip_local_port_range */
	u16 ephemeral_last;
	struct xm_slot slots[XM_MAX_SLOTS];
};

/* Element 0 of the map `ledger`: what the daemon must remember over its own restart. Written by the daemon alone. */
struct xm_ledger_half {
	u64 packets; /* tracked, read at the ends of all windows up to this one */
	u64 bytes;
	u32 window;
	u32 pad;
};
struct xm_ledger {
	u32 abi_version;
	u32 cpus;           /* slices of the talker table */
	u32 sets;           /* a slice, a power of two */
	u32 generation;     /* daemon starts on these maps, from 1 */
	u64 build;          /* identity of the loaded program: hash of its sources and options */
	u64 started;        /* CLOCK_MONOTONIC ns at which the maps were made */
	u64 window_started; /* CLOCK_MONOTONIC ns at which the running window began */
	struct xm_ledger_half half[2]; /* [window & 1]: the newer is the truth, the other is being written */
};

/* Key of the policy tries: compared bit by bit from `family` on. */
struct xm_prefix {
	u32 length; /* bits, 32 for the family included */
	u32 family; /* enum xm_family, in network byte order */
	u8 address[16];
};

/* Value of the policy tries. */
struct xm_rule {
	u32 index;   /* from 1; where its packets are counted, if the map `rules` reaches so far */
	u32 verdict; /* enum xm_verdict */
};

/*
 * One source on one destination port. `packets` to `syns` with index 0 belong to window `window`, with index 1 to the one before it
 * and are zero if the talker was silent then. Nothing is cleared at a window's end: the first packet of a new window moves 0 to 1.
 * Written by the packet path of one CPU alone, since each CPU has a slice of the table.
 */
struct xm_talker {
	u8 source[16];
	u16 port;       /* destination; ephemeral ports are folded to control.ephemeral_first */
	u8 protocol;
	u8 family;      /* enum xm_family; 0: the entry is free */
	u32 window;
	u64 bytes[2];
	u32 packets[2]; /* at 2^32 - 1 further packets go to `untracked` */
	u32 syns[2];    /* TCP with SYN and without ACK */
	u32 first_seen;
	u32 last_seen;
};

struct xm_set {
	struct xm_talker way[XM_WAYS];
};

/* Per CPU, element 0 of the map `tallies`. Written by the packet path alone; they only grow. */
struct xm_tallies {
	struct xm_count sourced;      /* packets with a readable source: the total of the books */
	struct xm_count evicted;      /* counts of talkers that lost their entry before they were read */
	struct xm_count untracked;    /* packets that found no entry */
	u64 evictions;                /* entries replaced while they held unread counts */
	u64 events_made;
	u64 events_ring_full;
	u64 events_over_budget;
	u64 events_merged;            /* suppressed packets whose cell went to another source before they were told */
	u64 anomaly[XM_ANOMALIES];
};

/* Per CPU, element 0 of the map `budget`. */
struct xm_budget {
	u32 second;   /* of CLOCK_MONOTONIC */
	u32 spent;    /* events made in it */
	u32 unknown;  /* of these, for sources not known before */
	u32 pad;
};

/*
 * When the last event of a (source, verdict, port) was made, and what was suppressed since. Shared by all CPUs, so that a source makes one
 * event wherever its packets arrive; claimed by compare-and-swap, so that no suppressed packet is told twice or not at all.
 */
struct xm_sampler {
	u64 tag;        /* hash of source, verdict, port and protocol; 0: free */
	u64 last;       /* CLOCK_MONOTONIC ns */
	u64 suppressed;
	u64 pad;
};

struct xm_event {
	u64 timestamp; /* CLOCK_MONOTONIC, ns */
	u8 source[16];
	u8 destination[16];
	u32 rule;        /* index of the matching rule */
	u32 packet_size;
	u32 suppressed;
	u32 flow_hash;
	u16 source_port;
	u16 destination_port;
	u16 vlan;        /* VLAN id of the outer tag, or XM_VLAN_NONE */
	u8 slot;
	u8 family;       /* enum xm_family */
	u8 protocol;
	u8 outcome;      /* enum xm_outcome */
	u8 has_ports;    /* 1: the ports were read */
	u8 tcp_flags;
	u8 pad[4];
};

#define XM_TOTAL_CELLS (XM_MAX_SLOTS * XM_FAMILIES * XM_CLASSES * XM_OUTCOMES)

_Static_assert(sizeof(struct xm_count) == 16, "xm_count");
_Static_assert(sizeof(struct xm_slot) == 8, "xm_slot");
_Static_assert(sizeof(struct xm_control) == 200, "xm_control");
_Static_assert(sizeof(struct xm_ledger) == 88, "xm_ledger");
_Static_assert(sizeof(struct xm_prefix) == 24, "xm_prefix");
_Static_assert(sizeof(struct xm_rule) == 8, "xm_rule");
_Static_assert(sizeof(struct xm_talker) == 64, "xm_talker fills a cache line");
_Static_assert(sizeof(struct xm_set) == 256, "xm_set");
_Static_assert(sizeof(struct xm_tallies) == 216, "xm_tallies");
_Static_assert(sizeof(struct xm_budget) == 16, "xm_budget");
_Static_assert(sizeof(struct xm_sampler) == 32, "xm_sampler");
_Static_assert(sizeof(struct xm_event) == 72, "xm_event");

#endif
