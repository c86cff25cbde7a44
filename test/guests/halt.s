# Halts with interrupts off: nothing can wake it.
        .include "macros.inc"

        .code64
        .section .text
        .global main
main:   print   "skep: halting with interrupts off\n"
1:      cli
        hlt
        jmp     1b
