# Says how it was started, and with what command line.
        .include "macros.inc"

        .code64
        .section .text
        .global main
main:   print   "skep: long mode via "
        mov     protocol(%rip), %rdi
        call    puts
        print   ", cmdline="
        mov     command_line(%rip), %rdi
        test    %rdi, %rdi
        jz      1f
        call    puts
1:      print   "\n"
        ret
