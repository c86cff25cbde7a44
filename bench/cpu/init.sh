#!/bin/busybox sh
# The guest's first program. What stands behind "--" on the kernel's command line is one order, and the machine's end comes
# after it; without one, orders come over the serial port.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
cd /tmp || exit
[ $# -eq 0 ] && exec /bench/guest serve "$(/bin/busybox nproc)"
/bench/guest "$@"
echo "status $?"
/bin/busybox poweroff -f
