#!/bin/busybox sh
# shellcheck shell=dash
# The first process, in the initramfs: loads what the disk needs, mounts it, puts the modules and what this run brought onto it, and goes
# on there with /vm/main.
PATH=/bin
bb=/bin/busybox
$bb mkdir -p /proc /disk
$bb mount -t proc proc /proc
while read -r module; do
    # A module may be built in; whether all is there shows when the disk is mounted.
    $bb modprobe "$module" 2>/dev/null
done </vm/first-modules
$bb mount -t devtmpfs devtmpfs /dev
for _ in 0 1 2 3 4 5 6 7 8 9; do
    [ -b /dev/vda ] && break
    $bb sleep 1
done
$bb mount -t ext4 /dev/vda /disk || exit 1
$bb cp -a /lib/modules /disk/usr/lib/
$bb cp -a /vm /project /disk/
$bb umount /dev /proc
exec $bb switch_root /disk /vm/main
