# An exception that finds no descriptor table, nor does the double fault that follows.
        .include "macros.inc"

        .code64
        .section .text
        .global main
main:   print   "skep: triple fault\n"
        lidt    nothing(%rip)
        ud2

        .section .rodata
nothing:
        .word   0
        .quad   0
