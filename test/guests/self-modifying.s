# Self-modifying code: what is executed is what memory holds, as SDM vol. 3A §8.1.3 promises for one processor.
        .include "macros.inc"

        .code64
        .section .text
        .global main
main:
# 1: the very next instruction.
        movb    $42, 1f + 1(%rip)
1:      mov     $7, %al
        cmp     $42, %al
        expect  e, 1

# 2: a function that has been called often, changed between calls, 256 times.
        mov     $1000, %ecx
1:      call    constant
        loop    1b
        xor     %ebx, %ebx
        xor     %ecx, %ecx
2:      mov     %cl, constant + 1(%rip)
        call    constant
        add     %eax, %ebx
        inc     %ecx
        cmp     $256, %ecx
        jb      2b
        cmp     $255 * 256 / 2, %ebx
        expect  e, 2

# 3: a loop that changes its own body: INC (ff c0) becomes DEC (ff c8) in the fifth round.
        mov     $100, %eax
        mov     $10, %ecx
1:      inc     %eax
        cmp     $6, %ecx
        jne     2f
        movb    $0xc8, 1b + 1(%rip)
2:      loop    1b
        cmp     $100, %eax
        expect  e, 3

# 4: an instruction across two pages, changed in the second one only.
        movabs  $0xb8, %rax
        mov     %al, straddle
        movl    $0x11111111, straddle + 1
        movb    $0xc3, straddle + 5
        call    straddle
        cmp     $0x11111111, %eax
        jne     1f
        movb    $0x22, straddle + 4
        call    straddle
        cmp     $0x22111111, %eax
1:      expect  e, 4

# 5: through another linear address, with a serializing instruction between (§8.1.3 asks for one).
        movl    $alias_pd + 7, pdpt + 4 * 8
        movl    $0x83, alias_pd
        movabs  $0x100000000 + constant + 1, %rdi
        movb    $1, constant + 1(%rip)
        call    constant
        movb    $99, (%rdi)
        xor     %eax, %eax
        cpuid
        call    constant
        cmp     $99, %eax
        expect  e, 5

# 6: by REP MOVSB over code that has run.
        call    target
        mov     %eax, %ebx
        lea     other(%rip), %rsi
        lea     target(%rip), %rdi
        mov     $target_end - target, %ecx
        rep     movsb
        call    target
        shl     $16, %ebx
        or      %ebx, %eax
        cmp     $0x00010002, %eax
        expect  e, 6

# 7: by REP STOSB: the slide of INCs becomes one of NOPs.
        xor     %eax, %eax
        call    slide
        mov     %eax, %ebx
        mov     $0x90, %al
        lea     slide(%rip), %rdi
        mov     $64, %ecx
        rep     stosb
        xor     %eax, %eax
        call    slide
        add     %ebx, %eax
        cmp     $32, %eax
        expect  e, 7

# 8: data beside code does not disturb it (nor does it go unseen).
        xor     %eax, %eax
        mov     $10000, %ecx
1:      addl    $1, counter(%rip)
        add     $2, %eax
        loop    1b
        add     counter(%rip), %eax
        cmp     $30000, %eax
        expect  e, 8

# 9: by a locked exchange; 10: by PUSH.
        mov     $0xc3c301b0, %eax       # mov $1, %al; ret; ret
        lock    xchg %eax, patch(%rip)
        call    patch
        cmp     $1, %al
        expect  e, 9
        mov     %rsp, %rbx
        lea     patch + 8(%rip), %rsp
        pushq   $0x00c302b0             # mov $2, %al; ret
        mov     %rbx, %rsp
        call    patch
        cmp     $2, %al
        expect  e, 10
        ret

constant:
        mov     $0, %eax
        ret
counter:
        .long   0

        .balign 16
target: mov     $1, %eax
        ret
target_end:
other:  mov     $2, %eax
        ret

        .balign 8
patch:  .quad   0

slide:  .rept   32
        inc     %eax
        .endr
        ret

        .section .bss
        .balign 4096
alias_pd:
        .skip   0x1000
        .skip   0x1000 - 3
straddle:
        .skip   0x1003
