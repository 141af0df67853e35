"""Tests of the packet path in the kernel, by BPF_PROG_TEST_RUN: no interface carries a packet here, but in namespaces made for it.

They need root. The environment variable XDPMOND_TEST_EXAMPLES sets how many packets the property tests generate (default 200).
"""
