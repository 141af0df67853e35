/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One parser a header: cursor in, bounds first, next protocol out. No map is touched here.
 *
 * Two promises hold for any sequence of bytes. Once `source` is filled in (`family` is set), nothing that follows takes it back. And a
 * port is filled in only if the whole of it was read from the transport header of a first or only fragment.
 */
#ifndef XDPMOND_PARSE_H
#define XDPMOND_PARSE_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>

#include "abi.h"

#define XM_VLAN_DEPTH 8
#define XM_EXTENSION_DEPTH 8 /* RFC 8200, section 4.1 names seven in order; AH may stand among them */

#define XM_NEXT_FRAGMENT 44
#define XM_NEXT_NONE 59
#define XM_PROTOCOL_SCTP 132
#define XM_DHCP_SERVER 67
#define XM_DHCP_CLIENT 68
#define XM_DHCPV6_CLIENT 546
#define XM_DHCPV6_SERVER 547

#define XM_TCP_SYN 0x02
#define XM_TCP_ACK 0x10

/* Why a packet that would be dropped passes all the same. */
enum xm_essential {
	XM_NOT_ESSENTIAL,
	XM_ESSENTIAL_ALWAYS,          /* cannot come from beyond the link: neighbour discovery, MLD queries and DHCPv6 from a link-local address */
	XM_ESSENTIAL_BEFORE_DEFAULT,  /* not from a source that is denied by name: DHCP */
};

struct xm_cursor {
	void *at;
	void *end;
	u64 *anomalies; /* this CPU's counts, by enum xm_anomaly */
	u64 vlan;       /* id of the outer tag, or XM_VLAN_NONE */
	u64 link;       /* bytes before the IP header */
	u32 *any;       /* in a map: what is stored there and read again is any number to the verifier, so that many ways become one */
};

#define xm_odd(cursor, what) ((cursor)->anomalies[what] += 1)

/* IP total and payload lengths of 0 mean "as long as the frame" (jumbogram, BIG TCP aggregate). */
#define XM_LEFT_UNKNOWN 0xffffffffU

struct xm_vlan {
	__be16 tci;
	__be16 next;
};

static __always_inline bool xm_is_tag(int type)
{
	return type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD);
}

/* Returns the EtherType behind the link header and its tags, in network byte order, or -1. That of a tag, if there are more than are followed. */
static __always_inline int xm_parse_link(struct xm_cursor *c)
{
	struct ethhdr *eth = c->at;
	if ((void *)(eth + 1) > c->end) {
		xm_odd(c, XM_ANOMALY_SHORT_FRAME);
		return -1;
	}
	c->at = eth + 1;
	int type = *(u16 *)((void *)eth + __builtin_offsetof(struct ethhdr, h_proto)); /* the struct is packed, and would be read byte by byte */
	if (!xm_is_tag(type))
		return type;
	u32 depth;
#pragma unroll
	for (depth = 0; depth < XM_VLAN_DEPTH; depth++) {
		if (!xm_is_tag(type))
			break;
		struct xm_vlan *tag = c->at;
		if ((void *)(tag + 1) > c->end) {
			xm_odd(c, XM_ANOMALY_SHORT_FRAME);
			return -1;
		}
		if (depth == 0)
			c->vlan = bpf_ntohs(tag->tci) & 0x0fff;
		type = tag->next;
		c->at = tag + 1;
	}
	*(volatile u32 *)c->any = depth;
	c->at = (void *)(eth + 1) + (*(volatile u32 *)c->any & (2 * XM_VLAN_DEPTH - 1)) * sizeof(struct xm_vlan);
	if (xm_is_tag(type))
		xm_odd(c, XM_ANOMALY_VLAN_DEPTH);
	return type;
}

/* Returns the transport protocol, or -1 if no source could be read or nothing further can be. */
static __always_inline int xm_parse_ipv4(struct xm_cursor *c, struct xm_packet *p)
{
	struct iphdr *ip = c->at;
	if ((void *)&ip->daddr > c->end) {
		xm_odd(c, XM_ANOMALY_SHORT_IP);
		return -1;
	}
	if (ip->version != 4) {
		xm_odd(c, XM_ANOMALY_IP_VERSION);
		return -1;
	}
	p->family = XM_FAMILY_IPV4;
	/* Whole words, here and for IPv6: what is read as one soon would wait for the stores of its parts. */
	p->source[0] = ip->saddr;
	p->protocol = ip->protocol;
	p->hop_limit = ip->ttl;
	if ((void *)(ip + 1) > c->end) {
		xm_odd(c, XM_ANOMALY_SHORT_IP);
		return -1;
	}
	p->destination[0] = ip->daddr;

	u32 header = ip->ihl * 4U;
	u32 total = bpf_ntohs(ip->tot_len);
	if (header < sizeof(*ip) || (total && total < header) || c->at + header > c->end) {
		xm_odd(c, XM_ANOMALY_IP_LENGTH);
		return -1;
	}
	p->left = total ? total - header : XM_LEFT_UNKNOWN;
#ifdef XM_FLOWS
	p->ip_size = total;
#endif
	u16 fragment = bpf_ntohs(ip->frag_off);
	p->fragment = (fragment & 0x3fff) != 0; /* more fragments, or an offset */
	p->later = (fragment & 0x1fff) != 0;
	c->at += header;
	return ip->protocol;
}

struct xm_extension {
	u8 next;
	u8 length; /* units of 8 bytes beyond the first 8; in AH units of 4 beyond the first 8 */
	__be16 fragment_offset;
	__be32 fragment_id;
};

/* IANA's IPv6 extension header types that can be followed: not ESP, nor "no next header". The verifier explores each branch of each round of
   the loop below, so that one test of a bit is worth its look. */
static __always_inline bool xm_is_extension(u8 next)
{
	const u64 low = 1ULL << IPPROTO_HOPOPTS | 1ULL << IPPROTO_ROUTING | 1ULL << XM_NEXT_FRAGMENT | 1ULL << IPPROTO_AH | 1ULL << IPPROTO_DSTOPTS;
	const u64 high = 1ULL << (135 - 128) | 1ULL << (139 - 128) | 1ULL << (140 - 128); /* mobility, HIP, shim6 */
	u64 of = next & 128 ? high : low;
	return next & 64 ? false : of >> (next & 63) & 1;
}

/* Follows extension headers from `next` on; returns the transport protocol, or -1 if the chain cannot be followed to one. */
static __always_inline int xm_parse_extensions(struct xm_cursor *c, struct xm_packet *p, int next)
{
#pragma unroll
	for (int depth = 0; depth <= XM_EXTENSION_DEPTH; depth++) {
		/* What is known of the packet is read anew in each round: kept in registers it would be known, and the verifier would follow each way. */
		asm volatile("" ::: "memory");
		if (!xm_is_extension(next))
			return next;
		if (depth == XM_EXTENSION_DEPTH)
			break;
		struct xm_extension *header = c->at;
		if ((void *)(header + 1) > c->end || p->left < sizeof(*header)) {
			xm_odd(c, XM_ANOMALY_SHORT_EXTENSION);
			return -1;
		}
		u32 length = (header->length + 1U) * 8;
		if (next == IPPROTO_AH)
			length = (header->length + 2U) * 4;
		if (next == XM_NEXT_FRAGMENT) {
			length = sizeof(*header);
			u16 fragment = bpf_ntohs(header->fragment_offset);
			p->fragment = (fragment & 0xfff9) != 0; /* an atomic fragment (RFC 6946) is whole */
			p->later = (fragment & 0xfff8) != 0;
		}
		if (c->at + length > c->end || p->left < length) {
			xm_odd(c, XM_ANOMALY_SHORT_EXTENSION);
			return -1;
		}
		next = header->next;
		p->protocol = next;
		c->at += length;
		if (p->left != XM_LEFT_UNKNOWN)
			p->left -= length;
		if (p->later)
			return next;
	}
	xm_odd(c, XM_ANOMALY_EXTENSION_DEPTH);
	return -1;
}

static __always_inline int xm_parse_ipv6(struct xm_cursor *c, struct xm_packet *p)
{
	struct ipv6hdr *ip = c->at;
	if ((void *)&ip->daddr > c->end) {
		xm_odd(c, XM_ANOMALY_SHORT_IP);
		return -1;
	}
	if (ip->version != 6) {
		xm_odd(c, XM_ANOMALY_IP_VERSION);
		return -1;
	}
	p->family = XM_FAMILY_IPV6;
	p->source[0] = *(u64 *)&ip->saddr;
	p->source[1] = *((u64 *)&ip->saddr + 1);
	p->hop_limit = ip->hop_limit;
	p->protocol = ip->nexthdr;
	if ((void *)(ip + 1) > c->end) {
		xm_odd(c, XM_ANOMALY_SHORT_IP);
		return -1;
	}
	p->destination[0] = *(u64 *)&ip->daddr;
	p->destination[1] = *((u64 *)&ip->daddr + 1);
	u32 payload = bpf_ntohs(ip->payload_len);
	p->left = payload ? payload : XM_LEFT_UNKNOWN;
#ifdef XM_FLOWS
	p->ip_size = payload ? payload + sizeof(*ip) : 0;
#endif
	c->at = ip + 1;
	return xm_parse_extensions(c, p, ip->nexthdr);
}

struct xm_transport {
	__be16 source;
	__be16 destination;
};

/* The first two bytes of ICMP and ICMPv6. */
struct xm_icmp {
	u8 type;
	u8 code;
};

/* Is the source of an IPv6 packet in fe80::/10, which no router forwards? */
static __always_inline bool xm_link_local(const struct xm_packet *p)
{
	return (p->source[0] & bpf_htonll(0xffc0000000000000ULL)) == bpf_htonll(0xfe80000000000000ULL);
}

/* Ports of TCP, UDP and SCTP; flags of TCP; type of ICMP; what keeps a host reachable. Names only what was read. */
static __always_inline void xm_parse_transport(struct xm_cursor *c, struct xm_packet *p, int protocol)
{
	if (p->later) {
		xm_odd(c, XM_ANOMALY_LATER_FRAGMENT);
		return;
	}
	if (protocol == (p->family == XM_FAMILY_IPV6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
		struct xm_icmp *icmp = c->at;
		if ((void *)(icmp + 1) > c->end || p->left < sizeof(*icmp)) {
			xm_odd(c, XM_ANOMALY_SHORT_TRANSPORT);
			return;
		}
		p->icmp = icmp->type + 1;
		p->icmp_code = icmp->code;
		/* RFC 4861: 134 router advertisement, 135 and 136 neighbour solicitation and advertisement; hop limit 255 proves that no router
		   forwarded it. RFC 6980 forbids fragments. */
		if (protocol == IPPROTO_ICMPV6 && icmp->type >= 134 && icmp->type <= 136 && p->hop_limit == 255 && !p->fragment)
			p->essential = XM_ESSENTIAL_ALWAYS;
		/* RFC 3810, section 5.1.14: 130 multicast listener query. Who is not asked does not report, and a switch then keeps solicitations
		   from him. */
		if (protocol == IPPROTO_ICMPV6 && icmp->type == 130 && p->hop_limit == 1 && !p->fragment && xm_link_local(p))
			p->essential = XM_ESSENTIAL_ALWAYS;
		return;
	}
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != XM_PROTOCOL_SCTP)
		return;
	struct xm_transport *ports = c->at;
	if ((void *)(ports + 1) > c->end || p->left < sizeof(*ports)) {
		xm_odd(c, XM_ANOMALY_SHORT_TRANSPORT);
		return;
	}
	p->source_port = bpf_ntohs(ports->source);
	p->destination_port = bpf_ntohs(ports->destination);
	p->has_ports = 1;
	if (protocol == IPPROTO_TCP) {
		u8 *flags = c->at + 13;
		if ((void *)(flags + 1) > c->end || p->left < 14)
			xm_odd(c, XM_ANOMALY_SHORT_TRANSPORT);
		else
			p->tcp_flags = *flags;
	} else if (protocol == IPPROTO_UDP) {
		bool answer = p->source_port == XM_DHCP_SERVER && p->destination_port == XM_DHCP_CLIENT;
		if (p->family == XM_FAMILY_IPV4 && answer)
			p->essential = XM_ESSENTIAL_BEFORE_DEFAULT;
		bool answer6 = p->source_port == XM_DHCPV6_SERVER && p->destination_port == XM_DHCPV6_CLIENT;
		if (p->family == XM_FAMILY_IPV6 && answer6 && xm_link_local(p))
			p->essential = XM_ESSENTIAL_ALWAYS;
	}
}

static __always_inline u8 xm_class_of(u8 protocol)
{
	switch (protocol) {
	case IPPROTO_TCP:
		return XM_CLASS_TCP;
	case IPPROTO_UDP:
		return XM_CLASS_UDP;
	case IPPROTO_ICMP:
		return XM_CLASS_ICMP;
	case IPPROTO_ICMPV6:
		return XM_CLASS_ICMPV6;
	case XM_PROTOCOL_SCTP:
		return XM_CLASS_SCTP;
	default:
		return XM_CLASS_OTHER;
	}
}

/* The two words of a packet's common fields. */
#define XM_WORD_KIND (__builtin_offsetof(struct xm_packet, has_ports) / 8)
#define XM_WORD_PORTS (__builtin_offsetof(struct xm_packet, destination_port) / 8)
#define XM_WORD_SIZES (__builtin_offsetof(struct xm_packet, left) / 8)
#define XM_KIND(family, protocol, class) (1 | (u64)(protocol) << 16 | (u64)(family) << 24 | (u64)(class) << 32)
#define XM_PLAIN_BYTES 14 /* of the transport header: those up to the flags of TCP */

/* The end of the two functions below. `ports` is the first word of the transport header, and `answer` what it is in an answer of DHCP. */
static __always_inline bool xm_parse_plain_ports(struct xm_cursor *c, struct xm_packet *p, void *transport, u8 protocol, u64 family, u32 answer,
						 u64 ip_size)
{
	u64 *word = (u64 *)p;
	u64 ports = *(u32 *)transport;
	if (protocol == IPPROTO_TCP)
		word[XM_WORD_KIND] = XM_KIND(family, IPPROTO_TCP, XM_CLASS_TCP) | (u64) * (u8 *)(transport + 13) << 8;
	else if (protocol == IPPROTO_UDP && ports != answer)
		word[XM_WORD_KIND] = XM_KIND(family, IPPROTO_UDP, XM_CLASS_UDP);
	else
		return false;
	word[XM_WORD_PORTS] = (u64)bpf_ntohl(ports) | c->vlan << 32;
#ifdef XM_FLOWS
	word[XM_WORD_SIZES] = ip_size << 32;
	word[XM_WORD_SIZES + 1] = c->link;
#endif
	return true;
}

/*
 * What most packets are: IPv4 without options, no fragment, TCP or UDP, and nothing odd. False: it is something else. The functions above come
 * to the same, with more instructions.
 */
static __always_inline bool xm_parse_plain4(struct xm_cursor *c, struct xm_packet *p)
{
	struct iphdr *ip = c->at;
	if ((void *)(ip + 1) + XM_PLAIN_BYTES > c->end)
		return false;
	u64 begin = *(u32 *)ip;
	u64 total = bpf_ntohs((u16)(begin >> 16));
	if ((begin & 0xff) != 0x45 || total < sizeof(*ip) + XM_PLAIN_BYTES || ip->frag_off & bpf_htons(0x3fff))
		return false;
	if (!xm_parse_plain_ports(c, p, ip + 1, ip->protocol, XM_FAMILY_IPV4, bpf_htonl(XM_DHCP_SERVER << 16 | XM_DHCP_CLIENT), total))
		return false;
	p->source[0] = ip->saddr;
	p->source[1] = 0;
	p->destination[0] = ip->daddr;
	p->destination[1] = 0;
	return true;
}

static __always_inline bool xm_parse_plain6(struct xm_cursor *c, struct xm_packet *p)
{
	struct ipv6hdr *ip = c->at;
	if ((void *)(ip + 1) + XM_PLAIN_BYTES > c->end)
		return false;
	u64 payload = bpf_ntohs(ip->payload_len);
	if ((*(u8 *)ip & 0xf0) != 0x60 || payload < XM_PLAIN_BYTES)
		return false;
	if (!xm_parse_plain_ports(c, p, ip + 1, ip->nexthdr, XM_FAMILY_IPV6, bpf_htonl(XM_DHCPV6_SERVER << 16 | XM_DHCPV6_CLIENT),
				  payload + sizeof(*ip)))
		return false;
	p->source[0] = *(u64 *)&ip->saddr;
	p->source[1] = *((u64 *)&ip->saddr + 1);
	p->destination[0] = *(u64 *)&ip->daddr;
	p->destination[1] = *((u64 *)&ip->daddr + 1);
	return true;
}

/* Parse from the IP header on. `type` is the EtherType in network byte order. */
static __always_inline void xm_parse_network(struct xm_cursor *c, struct xm_packet *p, int type)
{
	if (type == bpf_htons(ETH_P_IP) ? xm_parse_plain4(c, p) : type == bpf_htons(ETH_P_IPV6) && xm_parse_plain6(c, p))
		return;
	__builtin_memset(p, 0, sizeof(*p));
	p->vlan = c->vlan;
#ifdef XM_FLOWS
	p->link = c->link;
#endif
	int protocol = -1;
	p->class = XM_CLASS_NON_IP;
	if (type == bpf_htons(ETH_P_IP))
		protocol = xm_parse_ipv4(c, p);
	else if (type == bpf_htons(ETH_P_IPV6))
		protocol = xm_parse_ipv6(c, p);
	else if (type == bpf_htons(ETH_P_ARP))
		p->class = XM_CLASS_ARP;
	if (p->family)
		p->class = xm_class_of(p->protocol);
	if (protocol >= 0)
		xm_parse_transport(c, p, protocol);
}

#endif
