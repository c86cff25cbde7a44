# Turns the machine off by ACPI: SLP_TYP of S5 and SLP_EN into the PM1a control register.
        .include "macros.inc"

        .code64
        .section .text
        .global main
main:   print   "skep: power off\n"
        mov     $S5_TYPE << 10 | 1 << 13, %eax
        mov     $PM1A_CONTROL, %edx
        out     %ax, %dx
1:      cli
        hlt
        jmp     1b
