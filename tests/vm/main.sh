#!/bin/sh
# The first process, on the disk: mounts what a system has, runs the command that the host wrote into /vm/command, and hands its output,
# exit status and report to the host over named virtio ports. It ends by switching the machine off; should it die, the kernel panics and
# the machine ends too, without a status.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for directory in /dev/shm /run /tmp; do
    mount -t tmpfs tmpfs "$directory"
done
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
echo guest >/proc/sys/kernel/hostname
ip link set lo up
# The kernel loads other modules when they are asked for; this one is asked for through a device file, which it makes itself.
modprobe tun

# port NAME: the device of a virtio port. The ports appear some time after their module.
port() {
    for _ in 0 1 2 3 4 5 6 7 8 9; do
        for name in /sys/class/virtio-ports/*/name; do
            if [ -e "$name" ] && [ "$(cat "$name")" = "$1" ]; then
                echo "/dev/$(basename "$(dirname "$name")")"
                return
            fi
        done
        sleep 1
    done
    echo "no port $1" >&2
}
output=$(port output) report=$(port report) status=$(port status)
{
    echo "guest: Linux $(uname -r), $(nproc) processors, up in $(cut -d' ' -f1 /proc/uptime) s"
    cd /project || exit 1
    # shellcheck source=/dev/null
    . /vm/environment
    sh /vm/command </dev/null
    echo $? >/run/status
} >"$output" 2>&1
if [ -e /run/report ]; then
    cat /run/report >"$report"
fi
cat /run/status >"$status"
# What was written is with the host when the write returns. Off.
echo o >/proc/sysrq-trigger
while :; do
    sleep 1
done
