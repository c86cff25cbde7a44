#!/bin/sh
# Builds the test guests into a folder: build.sh OUTDIR [as options, such as --defsym S5_TYPE=0]
set -eu

if [ $# -lt 1 ]; then
    echo "usage: $0 OUTDIR [as options]" >&2
    exit 2
fi
for tool in as ld objcopy; do
    if ! command -v "$tool" >/dev/null; then
        echo "$0: $tool is missing; install binutils (Debian: apt-get install binutils)" >&2
        exit 1
    fi
done
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")"
objects=$(mktemp -d "$out/.objects.XXXXXX")
trap 'rm -rf "$objects"' EXIT

assemble() { # source, object, options
    source=$1 object=$2
    shift 2
    as --64 -I lib "$@" -o "$objects/$object.o" "$source"
}

link() { # script, entry, guest, output
    ld -z noexecstack -z max-page-size=4096 -T "$1" -o "$4" \
        "$objects/$2.o" "$objects/long.o" "$objects/report.o" "$objects/traps.o" "$objects/smp.o" "$objects/$3.o"
}

for part in long report traps smp; do
    assemble "lib/$part.s" "$part" "$@"
done
for entry in multiboot pvh rom; do
    assemble "entry-$entry.s" "entry-$entry" "$@"
done
assemble entry-multiboot.s entry-multiboot-flat --defsym ADDRESSES=1 "$@"

# One guest by every way of starting.
assemble hello.s hello "$@"
link image.ld entry-multiboot hello "$out/hello-multiboot64.elf"
objcopy -O elf32-i386 "$out/hello-multiboot64.elf" "$out/hello-multiboot.elf"
link image.ld entry-multiboot-flat hello "$objects/flat.elf"
objcopy -O binary "$objects/flat.elf" "$out/hello-multiboot.bin"
link image.ld entry-pvh hello "$out/hello-pvh.elf"
link rom.ld entry-rom hello "$objects/rom.elf"
objcopy -O binary -j .text -j .reset --gap-fill 0xff --pad-to 0x100000 "$objects/rom.elf" "$out/hello.rom"

assemble real-mode.s real-mode "$@"
ld -z noexecstack -T rom.ld -o "$objects/rom.elf" "$objects/real-mode.o"
objcopy -O binary -j .text -j .reset --gap-fill 0xff --pad-to 0x100000 "$objects/rom.elf" "$out/real-mode.rom"

# The others by multiboot.
for guest in code-changes code32 debugging page-tables precise-faults devices emulation exceptions halt interrupts ipi-storm lines power-off processors reset-cf9 \
    reset-keyboard self-modifying storms triple-fault; do
    assemble "$guest.s" "$guest" "$@"
    link image.ld entry-multiboot "$guest" "$objects/$guest.elf"
    objcopy -O elf32-i386 "$objects/$guest.elf" "$out/$guest.elf"
done
