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

#define XM_ABI_VERSION 7

#define XM_MAX_SLOTS 16       /* interfaces watched at once */
#define XM_WAYS 4             /* talkers in a set */
#define XM_PORT_NONE 0        /* talker port: the protocol has none, or it could not be read; of ICMP and ICMPv6 it is the type + 1 */
#define XM_VLAN_NONE 0xffff   /* event vlan: no tag seen */
#define XM_SEEN_SHIFT 24      /* first seen, and last seen of flows: CLOCK_MONOTONIC nanoseconds >> this: units of 16.8 ms, 2.28 years in 32 bits */
/* The state of a talker, a word; see struct xm_talker. */
#define XM_STATE_BYTES 0xffffULL
#define XM_STATE_PACKETS_SHIFT 16
#define XM_STATE_PACKETS (0x1fULL << XM_STATE_PACKETS_SHIFT)
#define XM_STATE_STAY 8 /* packets that stay there when the others are added to the details */
#define XM_STATE_SEEN_SHIFT 21
#define XM_STATE_SEEN (0xffULL << XM_STATE_SEEN_SHIFT)
#define XM_STATE_CARRIED (1ULL << 29)
#define XM_STATE_CODE_SHIFT 30
#define XM_STATE_MOMENT_SHIFT 32
#define XM_POLICY_BITS 8       /* of a moment are the policy's number */
#define XM_POLICY_NUMBERS (1 << XM_POLICY_BITS) /* what the policy of number 0 or 1 says is not remembered */
#define XM_WINDOW_IDS (1 << 24) /* the bits above it are the id of a window */
#define XM_SAMPLER_CELLS 16384 /* a power of two */
#define XM_SEARCH_STEPS 16     /* room for the depths of IPv6 nodes, 2 to 15 */
#define XM_SEARCH_ROUNDS 4     /* a binary search among them ends in so many */
#define XM_BUCKET4 7           /* references in a bucket */
#define XM_BUCKET6 5           /* nodes in a bucket */
#define XM_DISPLACED 3         /* what does not fit in its bucket is in one of so many after it */
#define XM_REF_KEY_SHIFT 40    /* from here on a reference tells what it belongs to */
#define XM_REF_DEEPER (1ULL << 44) /* IPv6: there are deeper nodes under this one */
#define XM_SKETCH_REGISTERS 2048 /* a power of two */
#define XM_SKETCH_OVERALL 8    /* cells of a family for all its sources, a power of two */
#define XM_SKETCH_PAIRS 120    /* of cells, for IPv4 and IPv6, for the sources on single ports */
#define XM_SKETCH_CELLS (2 * XM_SKETCH_OVERALL + 2 * XM_SKETCH_PAIRS) /* a power of two */
#define XM_SKETCH_ICMP (3 * 65536) /* byte of the map `sketched` with which ICMP begins; TCP, UDP and SCTP have 65536 each before it */
#define XM_SKETCHED (XM_SKETCH_ICMP + 512)
#define XM_LOCALS 16384       /* addresses that this host may have */
#define XM_TOPS 65536         /* IPv6: all /16 */
#define XM_TOP_DEEPER 4        /* IPv6: longer prefixes lie under this /16 */
#define XM_LINK_MARK 0x584d4c48 /* stands in the program text where the daemon writes how frames start: see has_ethernet */
#define XM_SETS_MARK 0x584d5354 /* and where it writes how many sets the table of talkers has: see set_mask */
#define XM_VALUE_MARK 0x584d5641 /* and the upper half of what stands where it writes the address of a map's one value: see xm_value_of */

/* Maps of one value whose address is in the instructions: a lookup would cost twelve more, and the registers that a call takes. */
enum xm_value { XM_VALUE_CONTROL, XM_VALUE_POLICY, XM_VALUE_PORTS, XM_VALUE_SKETCHES, XM_VALUE_SKETCHED, XM_VALUE_SAMPLER };

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

/* What the policy says of an address, in two bits. In a reference, LINE says that the codes stand in a line. */
enum xm_code { XM_CODE_NONE, XM_CODE_ALLOW, XM_CODE_DENY, XM_CODE_LINE };

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
	XM_UNREADABLE_DROPPED,
	XM_OUTCOMES = 16 /* a power of two, so that an index needs no multiplication */
};

/* What was odd about a frame. One frame may count in several; each is a number of frames. */
enum xm_anomaly {
	XM_ANOMALY_SHORT_FRAME,     /* no whole link header: no source */
	XM_ANOMALY_VLAN_DEPTH,      /* more than eight VLAN tags: no source */
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

/* Flags of a port, a byte each in the map `ports`. */
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

/* The map `control`: all that the daemon tells the packet path. Written by the daemon alone. */
struct xm_control {
	u64 seed[4];          /* secret multipliers of the hashes, odd */
	u64 event_interval;   /* ns */
	u64 moment;           /* what holds at one moment. Bits 0 to 7: number of the policy, of which the last bit is its copy; no two in one
	                         window have the same from 2 on. Bits 8 to 31: id of the running window, the lower bits of its number, which
	                         is in bits 32 to 63. */
	u32 before;           /* number of the window before the running one */
	u32 read_window;      /* of the last closed window that the daemon has read: that before, but while it reads */
	u32 event_budget;     /* events a second and CPU */
	u32 event_reserve;    /* of these, kept for sources already known */
	u32 seen_shift;       /* last seen of talkers: CLOCK_MONOTONIC nanoseconds >> this, eight bits of it, more than any two windows */
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
	u32 generation;     /* daemon starts on these maps, from 1 */
	u32 attributing;    /* the window whose counts are being added to those of the rules; 0: none */
	u32 pad;
	u64 build;          /* identity of the loaded program: hash of its sources and options */
	u64 started;        /* CLOCK_MONOTONIC ns at which the maps were made */
	u64 window_started; /* CLOCK_MONOTONIC ns at which the running window began */
	struct xm_ledger_half half[2]; /* the one with the newer window is the truth, the other is being written */
};

/* One depth of the binary search for an IPv6 node, and where to go on if there is one, or not; XM_SEARCH_STEPS and above: nowhere. */
struct xm_step {
	u8 depth; /* in bytes */
	u8 deeper;
	u8 shallower;
	u8 pad;
};

/*
 * Begins an element of the map `policy`: a copy of the policy, and where its parts are. Behind it stand XM_TOPS u32, not in the struct since
 * clang takes long over large ones: by the first 16 bits of an IPv6 address the code of prefixes of up to 16 bits, and XM_TOP_DEEPER. The top
 * of IPv4 is the copy's first lines. Written by the daemon alone, while packets look into the other copy.
 */
struct xm_policy {
	u32 default_verdict; /* enum xm_verdict, for addresses whose code is XM_CODE_NONE */
	u32 first_line;      /* of the copy's lines, from which their indexes count */
	u32 first4;          /* first bucket, and their number less one */
	u32 mask4;
	u32 first6;
	u32 mask6;
	u32 root;            /* the step to begin with */
	u32 shift4;          /* an IPv4 address >> this is its place in the top */
	struct xm_step steps[XM_SEARCH_STEPS];
	u64 deeper4[4];      /* a bit for each IPv4 /8: it has references */
};

/* Codes of 256 neighbours, of two bits each, the lowest first. */
struct xm_line {
	u64 codes[8];
};

/*
 * A reference tells the codes of 256 neighbours. Those in which `place & mask` is `first` are in a range, of which there are two: bits 0 to 7
 * and 8 to 15 are first and mask of one, bits 16 to 31 those of the other. Bits 32 to 39 are four codes: of a place that is in both, in the
 * other one alone, in the one alone, and in none. XM_CODE_LINE says that bits 0 to 31 are the index of a line instead.
 *
 * IPv4: the first 24 bits of the address stand from bit 40 on.
 */
struct xm_bucket4 {
	u64 ref[XM_BUCKET4];
	u64 away; /* how many belong here, but were put into the other bucket that they may be in */
};

/* `high` and `low` are the first `depth` bytes of the address in host byte order, zeros behind; the depth stands from bit 40 of `ref` on. */
struct xm_node {
	u64 high;
	u64 low;
	u64 ref;
};
struct xm_bucket6 {
	struct xm_node node[XM_BUCKET6];
	u64 pad;
};

/* Element of the map `rules`: what an entry of the policy was met by. Written by the daemon alone; kept here to outlive it. */
struct xm_rule_count {
	u8 address[16];
	u8 family;   /* enum xm_family */
	u8 length;   /* bits */
	u8 partial;  /* 1: at least so many */
	u8 used;     /* 0: free */
	u8 pad[4];
	u64 packets;
	u64 bytes;
};

/*
 * HyperLogLog registers; xdpmond/sketches.py tells what they mean. The map `sketches` has 2 * XM_SKETCH_CELLS of these, a half for windows of
 * even number and one for those of odd: the cells for all sources of IPv4, those of IPv6, then the pairs for ports. Raised by the packet path
 * of all CPUs; the daemon zeroes a half when it has read it, before the window that will write to it begins.
 *
 * The map `sketched` tells which port has a pair: a byte for each, the pair's number plus one. Written by the daemon.
 */
struct xm_sketch {
	u8 registers[XM_SKETCH_REGISTERS];
};

/*
 * One source on one destination port: what most packets need of it, a quarter of a cache line. What is seldom needed is in the maps `details` and
 * `past`, at the number of its set * XM_WAYS + way.
 *
 * `state` is one word, so that whoever reads it sees what belongs together. From below: bytes and packets that are not in the details (16 and 5
 * bits), to which they are added when a field is full, but for some packets, by which one who sends much is known from one who has just come; when it was last seen (8 bits, control.seen_shift); whether it was heard in the window
 * before, XM_STATE_CARRIED; what the policy said of the source (enum xm_code with XM_CODE_LINE for no prefix; 0: nobody asked); and the lower half
 * of control.moment: the policy's number when it was asked, and the id of the window in which the talker was last heard; id 0: nobody's.
 *
 * The details belong to that window, and the past to the one before it, if the state says that the talker was heard then. Nothing is cleared at a
 * window's end: the first packet of a new window moves the counts to the past. Written by the packet path of one CPU alone, since each CPU has a slice
 * of the table.
 */
struct xm_talker {
	u32 name;       /* the exclusive or of the four words of the source: of IPv4 the address itself */
	u16 port;       /* destination; ephemeral ports are folded to control.ephemeral_first */
	u8 protocol;
	u8 family;      /* enum xm_family; 0: the entry was never used */
	u64 state;
};

struct xm_set {
	struct xm_talker way[XM_WAYS];
};

struct xm_detail {
	u64 high;       /* of the source, the last eight bytes; of IPv4 0 */
	u32 second;     /* the second four; the first four are what makes the name of all */
	u32 first_seen;
	u64 bytes;      /* of the window in the state, with what is in the state */
	u32 packets;    /* where they would not fit further packets go to `untracked` */
	u32 syns;       /* TCP with SYN and without ACK */
};

/* What was counted in the window before. */
struct xm_past {
	u64 bytes;
	u32 packets;
	u32 syns;
};

/*
 * One source on one destination port, told by the whole 5-tuple: an entry of the same table where flows are on. `tcp_flags` are all that were
 * seen in a window, of the one in the state and of the one before; `outcome` and `slot` are those of the last packet. Of ICMP and ICMPv6
 * `destination_port` is the type + 1 and `source_port` the code.
 */
struct xm_flow {
	struct xm_talker talker;
	u8 destination[16];
	u16 source_port;
	u16 destination_port; /* as it was sent; that of the talker may be folded */
	u8 tcp_flags[2];
	u8 outcome;           /* enum xm_outcome */
	u8 slot;
	u64 ip_bytes[2];      /* of the IP packets, without what is around them */
	u32 last_seen;
	u32 pad;
};

struct xm_flow_set {
	struct xm_flow way[XM_WAYS];
};

/* Key of the map `locals`, a hash of this host's own addresses, with those that broadcast to it. */
struct xm_address {
	u8 address[16];
	u32 family; /* enum xm_family */
};

/* Per CPU. Written by the packet path alone; they only grow. */
struct xm_tallies {
	struct xm_count sourced;      /* packets with a readable source: the total of the books */
	struct xm_count evicted;      /* counts of talkers that lost their entry before they were read */
	struct xm_count untracked;    /* packets that found no entry */
	struct xm_count elsewhere;    /* packets to other hosts, where these do not count */
	u64 evictions;                /* entries replaced while they held unread counts */
	u64 events_made;
	u64 events_ring_full;
	u64 events_over_budget;
	u64 events_merged;            /* suppressed packets whose cell went to another source before they were told */
	u64 anomaly[XM_ANOMALIES];
};

/* Per CPU: events of the running second. */
struct xm_budget {
	u64 began;    /* of this second: ns of CLOCK_MONOTONIC */
	u64 until;    /* then this second ends, if all of its budget is spent; else a time gone by */
	u32 spent;    /* events made in it */
	u32 unknown;  /* of these, for sources not known before */
};

/* Per CPU: the time, asked for once in a tick of the kernel's. */
struct xm_clock {
	u64 tick;     /* jiffies */
	u64 now;      /* CLOCK_MONOTONIC as of this tick, ns */
	u64 seen;     /* the same as it stands in a talker's state */
};

/*
 * What is known of a packet. The fields that most packets have are two words, which are written whole. It is in a map, not on the stack: the
 * verifier then forgets what it knew of each field, and the paths through the parser meet.
 */
struct xm_packet {
	u64 source[2]; /* network byte order; IPv4 in the first 4 bytes */
	u64 destination[2];
	u8 has_ports;
	u8 tcp_flags;
	u8 protocol;
	u8 family;     /* enum xm_family */
	u8 class;      /* enum xm_class */
	u8 essential;  /* enum xm_essential of parse.h */
	u8 fragment;   /* 1: part of a fragmented packet, first or later */
	u8 later;      /* 1: no transport header here */
	u16 destination_port;
	u16 source_port;
	u16 vlan;
	u16 icmp;      /* type of ICMP or ICMPv6, plus one; 0: none was read */
	u32 left;      /* bytes of the IP packet from the cursor on, by the header's own word */
	u32 ip_size;   /* of the whole IP packet by its own word, 0 if it does not say: where flows are on */
	u16 link;      /* bytes before the IP header: where flows are on */
	u8 icmp_code;
	u8 hop_limit;
	u32 place;     /* of its talker in `details` and `past`, where that is known */
};

/* Per CPU, element 0 of the map `cpu`. */
struct xm_cpu {
	struct xm_tallies tallies;
	struct xm_budget budget;
	struct xm_clock clock;
	struct xm_packet packet; /* under way */
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
};

#define XM_TOTAL_CELLS (XM_MAX_SLOTS * XM_FAMILIES * XM_CLASSES * XM_OUTCOMES)

_Static_assert(sizeof(struct xm_count) == 16, "xm_count");
_Static_assert(sizeof(struct xm_slot) == 8, "xm_slot");
_Static_assert(sizeof(struct xm_control) == 200, "xm_control");
_Static_assert(sizeof(struct xm_ledger) == 88, "xm_ledger");
_Static_assert(sizeof(struct xm_policy) == 128, "xm_policy");
_Static_assert(sizeof(struct xm_line) == 64, "xm_line fills a cache line");
_Static_assert(sizeof(struct xm_bucket4) == 64, "xm_bucket4 fills a cache line");
_Static_assert(sizeof(struct xm_bucket6) == 128, "xm_bucket6 fills two cache lines");
_Static_assert(sizeof(struct xm_rule_count) == 40, "xm_rule_count");
_Static_assert(sizeof(struct xm_sketch) == XM_SKETCH_REGISTERS, "xm_sketch");
_Static_assert(XM_SKETCH_PAIRS < 256, "the number of a pair is one byte");
_Static_assert(sizeof(struct xm_talker) == 16, "xm_talker");
_Static_assert(sizeof(struct xm_set) == 64, "xm_set fills a cache line");
_Static_assert(sizeof(struct xm_detail) == 32, "xm_detail fills half a cache line");
_Static_assert(sizeof(struct xm_past) == 16, "xm_past");
_Static_assert(sizeof(struct xm_flow) == 64, "xm_flow fills a cache line");
_Static_assert(sizeof(struct xm_flow_set) == 256, "xm_flow_set");
_Static_assert(sizeof(struct xm_address) == 20, "xm_address");
_Static_assert(sizeof(struct xm_tallies) == 232, "xm_tallies");
_Static_assert(sizeof(struct xm_budget) == 24, "xm_budget");
_Static_assert(sizeof(struct xm_clock) == 24, "xm_clock");
_Static_assert(sizeof(struct xm_packet) == 64, "xm_packet");
_Static_assert(sizeof(struct xm_cpu) == 344, "xm_cpu");
_Static_assert(sizeof(struct xm_sampler) == 32, "xm_sampler");
_Static_assert(sizeof(struct xm_event) == 64, "xm_event");

#endif
