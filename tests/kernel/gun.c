/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Runs frames through an XDP program (BPF_PROG_TEST_RUN) on one CPU until SIGTERM, in an order of its own. Writes a byte when it
 * begins, and at the end for each frame how many were sent and how many of these were dropped. Usage: gun PROGRAM_FD CPU FRAMES, a file of (u32 length, bytes).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/bpf.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST 65536

static volatile sig_atomic_t stopped;

static void stop(int number)
{
	(void)number;
	stopped = 1;
}

static struct {
	uint32_t length;
	void *data;
} frames[MOST];

static uint64_t counts[MOST][2];

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGTERM, stop);
	cpu_set_t cpus;
	CPU_ZERO(&cpus);
	CPU_SET(atoi(argv[2]), &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		return 3;

	FILE *file = fopen(argv[3], "rb");
	uint32_t count = 0, length;
	while (file && count < MOST && fread(&length, sizeof(length), 1, file) == 1) {
		frames[count].length = length;
		frames[count].data = malloc(length);
		if (fread(frames[count].data, 1, length, file) != length)
			return 4;
		count++;
	}
	if (!count)
		return 4;

	/* Says that it can be stopped. */
	if (write(STDOUT_FILENO, "", 1) != 1)
		return 6;
	uint64_t state = 88172645463325252ULL + atoi(argv[2]);
	while (!stopped) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		uint32_t chosen = state % count;
		union bpf_attr attr;
		memset(&attr, 0, sizeof(attr));
		attr.test.prog_fd = atoi(argv[1]);
		attr.test.data_in = (uint64_t)(uintptr_t)frames[chosen].data;
		attr.test.data_size_in = frames[chosen].length;
		attr.test.repeat = 1;
		if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof(attr))) {
			/* A signal may end a test run before it ran. */
			if (errno == EINTR)
				continue;
			return 5;
		}
		counts[chosen][0]++;
		counts[chosen][1] += attr.test.retval == XDP_DROP;
	}
	return fwrite(counts, sizeof(counts[0]), count, stdout) == count ? 0 : 6;
}
