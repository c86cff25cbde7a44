# Serial output, checks and the end of a guest.
        .include "constants.inc"

        .code64
        .section .text
        .global serial_init, putc, puts, print_number, print_hex, ok, fail, skip, finish, exit

# 115200 baud, 8 data bits, no parity, no interrupts.
serial_init:
        lea     serial_setup(%rip), %rsi
        mov     $serial_setup_end - serial_setup, %ecx
1:      lodsw
        movzbl  %al, %edx
        add     $COM1, %edx
        mov     %ah, %al
        out     %al, %dx
        sub     $2, %ecx
        jnz     1b
        ret

# AL: a character. Keeps all registers.
putc:   push    %rdx
        push    %rax
        mov     $COM1 + 5, %edx
1:      in      %dx, %al
        test    $0x20, %al
        jz      1b
        pop     %rax
        mov     $COM1, %edx
        out     %al, %dx
        pop     %rdx
        ret

# RDI: a NUL-terminated string. Keeps all registers.
puts:   push    %rax
        push    %rdi
1:      mov     (%rdi), %al
        inc     %rdi
        test    %al, %al
        jz      2f
        call    putc
        jmp     1b
2:      pop     %rdi
        pop     %rax
        ret

# EDI: a number, in decimal. Keeps all registers.
print_number:
        push    %rax
        push    %rcx
        push    %rdx
        push    %rbx
        mov     %edi, %eax
        mov     $10, %ebx
        xor     %ecx, %ecx
1:      xor     %edx, %edx
        div     %ebx
        push    %rdx
        inc     %ecx
        test    %eax, %eax
        jnz     1b
2:      pop     %rax
        add     $'0', %al
        call    putc
        loop    2b
        pop     %rbx
        pop     %rdx
        pop     %rcx
        pop     %rax
        ret

# RDI: a number, in 16 hexadecimal digits. Keeps all registers.
print_hex:
        push    %rax
        push    %rcx
        push    %rdi
        mov     $16, %ecx
1:      rol     $4, %rdi
        mov     %edi, %eax
        and     $15, %al
        add     $'0', %al
        cmp     $'9', %al
        jbe     2f
        add     $'a' - '9' - 1, %al
2:      call    putc
        loop    1b
        pop     %rdi
        pop     %rcx
        pop     %rax
        ret

# The number of a check is on the stack, and is taken off. Keeps all registers.
ok:     push    %rdi
        lea     text_ok(%rip), %rdi
        jmp     1f
skip:   push    %rdi
        lea     text_skip(%rip), %rdi
        jmp     1f
fail:   push    %rdi
        movb    $1, failed(%rip)
        lea     text_fail(%rip), %rdi
1:      call    puts
        mov     16(%rsp), %edi
        call    print_number
        push    %rax
        mov     $'\n', %al
        call    putc
        pop     %rax
        pop     %rdi
        ret     $8

# Says how it went and ends.
finish: cmpb    $0, failed(%rip)
        jne     1f
        lea     text_passed(%rip), %rdi
        call    puts
        mov     $EXIT_PASS, %edi
        jmp     exit
1:      lea     text_failed(%rip), %rdi
        call    puts
        mov     $EXIT_FAIL, %edi

# EDI: the value for the debug-exit port. Where there is no such port, the processor halts for good.
exit:   mov     %edi, %eax
        mov     $DEBUG_EXIT, %edx
        out     %eax, %dx
1:      cli
        hlt
        jmp     1b

        .section .rodata
# Pairs of register and value: line control with the divisor latch, divisor 1, line control, no interrupts, FIFOs on,
# modem control.
serial_setup:
        .byte   3, 0x83, 0, 1, 1, 0, 3, 0x03, 1, 0, 2, 0x07, 4, 0x03
serial_setup_end:
text_ok:
        .asciz  "ok "
text_skip:
        .asciz  "skip "
text_fail:
        .asciz  "FAIL "
text_passed:
        .asciz  "skep: passed\n"
text_failed:
        .asciz  "skep: FAILED\n"

        .section .bss
failed: .skip   1
