# Resets the machine by the reset control register: the kind of reset, then the trigger.
        .include "macros.inc"

        .code64
        .section .text
        .global main
main:   print   "skep: reset by port 0xcf9\n"
        outb    0x02, RESET_CONTROL
        outb    0x06, RESET_CONTROL
1:      cli
        hlt
        jmp     1b
