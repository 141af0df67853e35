"""The kernel side: compile and load, maps, events, links. `compile` alone imports bcc, in a child process; all else is libbpf and mmap."""
