#!/bin/busybox sh
# The first process of L1. Mounts the file system of the machine below (9p, read-only) under a layer of memory, mounts the
# shared folders, loads KVM, runs the command, and tells its output and exit status over virtio serial ports.
/bin/busybox --install -s /bin
export PATH=/bin

die() {
  echo "l1: $*"
  poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do
  insmod "/modules/$module" || die "cannot load the module $module"
done </modules/order
[ -c /dev/kvm ] || die "the kernel offers no /dev/kvm"
mount -t debugfs debugfs /sys/kernel/debug

job=
for word in $(cat /proc/cmdline); do
  case $word in l1.job=*) job=${word#l1.job=} ;; esac
done

p9=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $p9,ro,cache=loose root /below || die "cannot mount the file system of the machine below"
mount -t tmpfs -o size=75% tmpfs /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/below,upperdir=/layer/upper,workdir=/layer/work overlay /system ||
  die "cannot mount the layer of memory"
for folder in dev proc sys; do
  mkdir -p "/system/$folder"
  mount -o rbind "/$folder" "/system/$folder"
done
mkdir -p /system/dev/pts /system/dev/shm /system/run /system/tmp
chmod 1777 /system/tmp
mount -t devpts devpts /system/dev/pts
mount -t tmpfs tmpfs /system/dev/shm
mount -t tmpfs tmpfs /system/run
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
# Each line is a tag and a path, which is the same inside and outside.
while read -r tag path; do
  mkdir -p "/system$path"
  mount -t 9p -o $p9,cache=none "$tag" "/system$path" || die "cannot mount $path"
done <"/below$job/shares"

for port in /sys/class/virtio-ports/*; do
  case $(cat "$port/name") in
    stdout) stdout=/dev/${port##*/} ;;
    stderr) stderr=/dev/${port##*/} ;;
    status) status=/dev/${port##*/} ;;
  esac
done
ip link set lo up
hostname l1
echo "l1: ready after $(cut -d' ' -f1 /proc/uptime) s"
setsid chroot /system /bin/sh "$job/command" </dev/null >"$stdout" 2>"$stderr"
ended=$?
echo "l1: the command ended with status $ended after $(cut -d' ' -f1 /proc/uptime) s"
sync
echo "$ended" >"$status"
poweroff -f
