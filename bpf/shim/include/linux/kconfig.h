/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Stands in for the kernel's own headers, which a server need not have installed: BCC asks for these few names before it compiles, and
 * the packet path uses the kernel's public interface (package linux-libc-dev) alone.
 */
#ifndef XDPMOND_SHIM_KCONFIG_H
#define XDPMOND_SHIM_KCONFIG_H

#include <uapi/linux/types.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
enum { false, true };
typedef __SIZE_TYPE__ size_t;
typedef unsigned long uintptr_t;

#define CONFIG_BPF_SYSCALL 1
#define PAGE_SIZE 4096 /* named by BCC's helpers; nothing of ours depends on it */

#endif
