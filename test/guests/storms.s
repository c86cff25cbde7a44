# Interrupts at a high rate while code of all kinds runs: timer, IPIs and NMIs from another processor, by handlers that use every register. What
# the code computes must be what it computes in peace. And how interrupts are let in, and calls and returns that do not match. cpus=N, 2 if
# the command line does not say.
        .include "macros.inc"

        .set    TIMES, 100              # interrupts that each computation must have seen
        .set    BUFFER, 8192
        .set    CR4_OSXSAVE, 1 << 18
        .set    TIMER, 0x40
        .set    IPI, 0x41
        .set    SELF, 0x42

# Computation \code, in peace and then until TIMES interrupts have come, again and again: check \n is that its RAX is always the same.
        .macro  computation n, code
        lea     \code(%rip), %rax
        mov     %rax, job(%rip)
        call    storm
        expect  e, \n
        .endm
# RAX += the register, turned.
        .macro  fold registers:vararg
        .irp    register, \registers
        rol     $9, %rax
        add     \register, %rax
        .endr
        .endm

        .code64
        .section .text
        .global main
main:   call    enable_avx
        fninit
        gate    TIMER, on_timer
        gate    IPI, on_ipi
        gate    SELF, on_self
        gate    2, on_nmi
        call    read_count
        mov     LAPIC + APIC_ID, %eax
        and     $0xff000000, %eax
        mov     %eax, me(%rip)
        mov     $other, %edi
        call    start_others
        apic_write APIC_LVT_LINT0, 1 << 16
        apic_write APIC_TIMER_DIVIDE, 0xb
        apic_write APIC_LVT_TIMER, TIMER

# 1: general registers and carries. 2: SSE. 3: AVX. 4: x87. 5: string instructions. 6: recursion, 10000 levels. 7: flags in PUSHF, LAHF, SETcc, CMOV.
# 8: code that changes itself. 9: numbers of 1024 bits.
        computation 1, integers
        computation 2, vectors
        cmpb    $0, avx_missing(%rip)
        je      1f
        skip_checks 3, 3
        jmp     2f
1:      computation 3, wide_vectors
2:      computation 4, x87
        computation 5, strings
        computation 6, recursion
        computation 7, flags
        computation 8, changing
        computation 9, numbers

# Calls and returns that do not match. 10: two stacks, by turns. 11: a return to what was pushed, 12: to an address that was changed, 13: with bytes
# released. 14: a call whose return address is taken off. 15: out of 50 calls at once. 16: indirect jumps by returns. 17: far returns, far
# jumps and IRETQ. 18: to 32-bit code, which runs for a while, and back. 19: that calls and returns itself.
        computation 10, coroutines
        computation 11, push_and_return
        computation 12, changed_return
        computation 13, releasing_return
        computation 14, call_and_pop
        computation 15, long_jump
        computation 16, retpolines
        computation 17, far_transfers
        computation 18, compatibility
        computation 19, compatibility_calls

# 20: where a loop is interrupted, its registers are what they are there: all that came before is done, nothing behind.
        movl    $0, interrupts(%rip)
        movl    $1, looking(%rip)
        movl    $0, torn(%rip)
        movl    $0, outside(%rip)
        call    timer_on
1:      call    watched_loop
        cmpl    $20 * TIMES, interrupts(%rip)
        jb      1b
        call    timer_off
        movl    $0, looking(%rip)
        cmpl    $0, torn(%rip)
        expect  e, 20

# 21: out of a jump to itself; 22: out of PAUSE and a jump. 23: HLT wakes, whenever the interrupt comes: STI and HLT are one.
        movl    $0, leaving(%rip)
        mov     $200, %r12d
1:      lea     2f(%rip), %rax
        mov     %rax, leave_to(%rip)
        mov     %rsp, leave_rsp(%rip)
        movl    $1, leaving(%rip)
        call    timer_on
3:      jmp     3b
2:      dec     %r12d
        jnz     1b
        call    timer_off
        cmp     $0, %r12d
        expect  e, 21
        mov     $200, %r12d
1:      mov     interrupts(%rip), %ebx
        call    timer_on
2:      pause
        cmp     %ebx, interrupts(%rip)
        je      2b
        dec     %r12d
        jnz     1b
        call    timer_off
        cmp     $0, %r12d
        expect  e, 22
        mov     $300, %r12d
1:      mov     interrupts(%rip), %ebx
        call    timer_on
        call    random
        and     $0xfff, %eax
2:      dec     %eax
        jns     2b
        cli
        cmp     %ebx, interrupts(%rip)
        jne     3f
        sti
        hlt
3:      sti
        cmp     %ebx, interrupts(%rip)
        jne     4f
        incl    torn(%rip)
4:      dec     %r12d
        jnz     1b
        call    timer_off
        cmpl    $0, torn(%rip)
        expect  e, 23

# 24: behind STI one instruction runs first; 25: behind POPF none does; in a hot loop both. 26: STI in the shadow of STI is none. 27: inside CLI and
# STI there is no interrupt, 28: between them there are.
        mov     $500, %r12d
        xor     %r13d, %r13d
1:      cli
        apic_write APIC_ICR_LOW, 1 << 18 | SELF
        call    ipi_sent
        sti
        nop
2:      nop
        cli
        lea     2b(%rip), %rax
        cmp     %rax, self_rip(%rip)
        je      3f
        inc     %r13d
3:      dec     %r12d
        jnz     1b
        cmp     $0, %r13d
        expect  e, 24
        mov     $500, %r12d
        xor     %r13d, %r13d
1:      cli
        apic_write APIC_ICR_LOW, 1 << 18 | SELF
        call    ipi_sent
        pushf
        orl     $1 << 9, (%rsp)
        popf
2:      nop
        cli
        lea     2b(%rip), %rax
        cmp     %rax, self_rip(%rip)
        je      3f
        inc     %r13d
3:      dec     %r12d
        jnz     1b
        cmp     $0, %r13d
        expect  e, 25
        mov     $500, %r12d
        xor     %r13d, %r13d
1:      cli
        apic_write APIC_ICR_LOW, 1 << 18 | SELF
        call    ipi_sent
        sti
        sti
2:      nop
        cli
        lea     2b(%rip), %rax
        cmp     %rax, self_rip(%rip)
        je      3f
        inc     %r13d
3:      dec     %r12d
        jnz     1b
        cmp     $0, %r13d
        expect  e, 26
        movl    $0, torn(%rip)
        movl    $0, interrupts(%rip)
        call    timer_on
1:      mov     $1000, %ecx
2:      cli
        incl    critical(%rip)
        incl    inside(%rip)
        decl    critical(%rip)
        sti
        nop
        dec     %ecx
        jnz     2b
        cmpl    $TIMES, interrupts(%rip)
        jb      1b
        call    timer_off
        cmpl    $0, torn(%rip)
        expect  e, 27
        cmpl    $TIMES, interrupts(%rip)
        expect  ae, 28

# 29: with CR8 at its highest none comes in a loop, and at once when it falls.
        mov     $15, %eax
        mov     %rax, %cr8
        mov     interrupts(%rip), %ebx
        call    timer_on
        mov     $300000, %ecx
1:      loop    1b
        cmp     %ebx, interrupts(%rip)
        jne     3f
        apic_write APIC_ICR_LOW, 1 << 18 | SELF
        call    ipi_sent
        xor     %eax, %eax
        mov     %rax, %cr8
2:      nop
        nop
        cmp     %ebx, interrupts(%rip)
        je      3f
        cmp     %eax, %eax
        jmp     4f
3:      test    %rsp, %rsp
4:      pushf
        xor     %eax, %eax
        mov     %rax, %cr8
        call    timer_off
        popf
        expect  e, 29

# Interrupts and NMIs from the other processors, on top of the timer. 30 to 36: computations 1, 2, 4, 5, 6, 10, 18.
        cmpl    $2, cpus(%rip)
        jae     1f
        skip_checks 30, 36
        ret
1:      movl    $1, stage(%rip)
        computation 30, integers
        computation 31, vectors
        computation 32, x87
        computation 33, strings
        computation 34, recursion
        computation 35, coroutines
        computation 36, compatibility
        movl    $2, stage(%rip)
        ret

# What the others do: IPIs and NMIs to the first.
other:  cmpl    $1, stage(%rip)
        ja      2f
        jb      1f
        mov     me(%rip), %eax
        mov     %eax, LAPIC + APIC_ICR_HIGH
        apic_write APIC_ICR_LOW, 0x4000 | IPI
        call    ipi_sent
        mov     $500, %ecx
3:      pause
        loop    3b
        mov     me(%rip), %eax
        mov     %eax, LAPIC + APIC_ICR_HIGH
        apic_write APIC_ICR_LOW, 0x4400
        call    ipi_sent
        mov     $500, %ecx
4:      pause
        loop    4b
1:      pause
        jmp     other
2:      cli
        hlt
        jmp     2b

# Runs the job in peace, and then in the storm: ZF if the result was always the same.
storm:  cli
        call    run_job
        mov     %rax, peace(%rip)
        call    run_job                 # and once more: it is the same each time
        cmp     %rax, peace(%rip)
        jne     3f
        movl    $0, interrupts(%rip)
        movl    $0, ipis(%rip)
        movl    $0, nmis(%rip)
        call    timer_on
1:      call    run_job
        cmp     %rax, peace(%rip)
        jne     2f
        cmpl    $TIMES, interrupts(%rip)
        jb      1b
        cmpl    $1, stage(%rip)
        jne     4f
        cmpl    $10, ipis(%rip)
        jb      1b
        cmpl    $10, nmis(%rip)
        jb      1b
4:      cmp     %eax, %eax
2:      pushf
        call    timer_off
        popf
3:      ret
# Runs the job; all registers but RAX are its own.
run_job:
        cld
        jmp     *job(%rip)

# Interrupts from the timer, from now on, each at a time by chance behind the last.
timer_on:
        movl    $1, timing(%rip)
        apic_write APIC_TIMER_INITIAL, 2000
        sti
        ret
timer_off:
        cli
        movl    $0, timing(%rip)
        apic_write APIC_TIMER_INITIAL, 0
        sti                             # what has come already
        nop
        nop
        cli
        ret

random: mov     seed(%rip), %eax
        imul    $1103515245, %eax, %eax
        add     $12345, %eax
        mov     %eax, seed(%rip)
        shr     $12, %eax
        ret

# Leaves nothing in any register as it was, between saving and restoring.
        .macro  wreck area
        push    %rax
        push    %rcx
        push    %rdx
        push    %rbx
        push    %rbp
        push    %rsi
        push    %rdi
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        cld
        mov     $7, %eax
        xor     %edx, %edx
        cmpb    $0, avx_missing(%rip)
        jne     .Lfx\@
        xsave   \area(%rip)
        vpcmpeqd %xmm0, %xmm0, %xmm0
        vinsertf128 $1, %xmm0, %ymm0, %ymm1
        vmovaps %ymm1, %ymm5
        vmovaps %ymm1, %ymm15
        jmp     .Lsaved\@
.Lfx\@: fxsave  \area(%rip)
.Lsaved\@:
        fninit
        fldpi
        fld1
        .irp    n, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14
        pcmpeqd %xmm\n, %xmm\n
        .endr
        mov     $-1, %rbx
        .irp    register, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
        mov     %rbx, %\register
        .endr
        .endm
        .macro  mend area
        mov     $7, %eax
        xor     %edx, %edx
        cmpb    $0, avx_missing(%rip)
        jne     .Lfx\@
        xrstor  \area(%rip)
        jmp     .Lmended\@
.Lfx\@: fxrstor \area(%rip)
.Lmended\@:
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rbp
        pop     %rbx
        pop     %rdx
        pop     %rcx
        pop     %rax
        .endm

on_timer:
        cmpl    $0, looking(%rip)
        je      1f
        call    look_at_loop
1:      wreck   timer_area
        incl    interrupts(%rip)
        cmpl    $0, critical(%rip)
        je      2f
        incl    torn(%rip)
2:      apic_write APIC_EOI, 0
        cmpl    $0, timing(%rip)
        je      3f
        call    random
        and     $0xffff, %eax
        add     $500, %eax
        mov     %eax, LAPIC + APIC_TIMER_INITIAL
3:      mend    timer_area
        cmpl    $0, leaving(%rip)
        je      4f
        movl    $0, leaving(%rip)
        push    %rax
        mov     leave_to(%rip), %rax
        mov     %rax, 8(%rsp)
        mov     leave_rsp(%rip), %rax
        mov     %rax, 32(%rsp)
        pop     %rax
4:      iretq
on_ipi: wreck   ipi_area
        incl    ipis(%rip)
        apic_write APIC_EOI, 0
        mend    ipi_area
        iretq
on_nmi: wreck   nmi_area
        incl    nmis(%rip)
        mend    nmi_area
        iretq
on_self:
        push    %rax
        mov     8(%rsp), %rax
        mov     %rax, self_rip(%rip)
        incl    interrupts(%rip)
        apic_write APIC_EOI, 0
        pop     %rax
        iretq

# A loop whose registers tell where it is: R8 to R11 count in turn, and so do two words of memory.
watched_loop:
        xor     %r8d, %r8d
        xor     %r9d, %r9d
        xor     %r10d, %r10d
        xor     %r11d, %r11d
        movl    $0, watched_a(%rip)
        movl    $0, watched_b(%rip)
        mov     $20000, %ecx
watched_0:
        inc     %r8
watched_1:
        inc     %r9
watched_2:
        incl    watched_a(%rip)
watched_3:
        inc     %r10
watched_4:
        incl    watched_b(%rip)
watched_5:
        inc     %r11
watched_6:
        dec     %ecx
watched_7:
        jnz     watched_0
        ret
# How many of the six have been counted up already at each place.
look_at_loop:
        push    %rax
        push    %rbx
        mov     24(%rsp), %rax          # RIP, above the return address of this call
        xor     %ebx, %ebx
        .irp    n, 0, 1, 2, 3, 4, 5
        lea     watched_\n(%rip), %r15
        cmp     %r15, %rax
        je      1f
        inc     %ebx
        .endr
        lea     watched_6(%rip), %r15
        cmp     %r15, %rax
        je      1f
        lea     watched_7(%rip), %r15
        cmp     %r15, %rax
        jne     9f                      # elsewhere
# All that have been counted in this round are one more than the others.
1:      mov     %r8, %r14               # the count that R8 has
        mov     %r14, %r13
        test    %ebx, %ebx
        jz      2f
        dec     %r13                    # and the others
2:      cmp     $6, %ebx
        jb      3f
        mov     %r14, %r13
3:      mov     %r9, %rax
        mov     $2, %r15d
        call    count_is
        mov     watched_a(%rip), %eax
        mov     $3, %r15d
        call    count_is
        mov     %r10, %rax
        mov     $4, %r15d
        call    count_is
        mov     watched_b(%rip), %eax
        mov     $5, %r15d
        call    count_is
        mov     %r11, %rax
        mov     $6, %r15d
        call    count_is
9:      pop     %rbx
        pop     %rax
        ret
# RAX: the count of number R15; if EBX have been counted in this round it should be R14 up to there, and R13 behind.
count_is:
        cmp     %r15d, %ebx
        jae     1f
        cmp     %rax, %r13
        jne     2f
        ret
1:      cmp     %rax, %r14
        jne     2f
        ret
2:      incl    torn(%rip)
        ret

integers:
        mov     $1, %eax
        mov     $3, %ebx
        mov     $5, %edx
        mov     $7, %esi
        mov     $11, %edi
        mov     $13, %ebp
        .irp    n, 8, 9, 10, 11, 12, 13, 14, 15
        lea     \n * 77(%rax), %r\n
        .endr
        mov     $3000, %ecx
1:      add     %rbx, %rax
        adc     %rdx, %rsi
        adc     $0, %rdi
        rcl     $3, %rbp
        sbb     %r8, %r9
        imul    %r10, %r11
        lea     7(%r11, %rax, 4), %r10
        xor     %r9, %r12
        ror     $11, %r13
        add     %r12, %r13
        bts     %r13, %r14
        adc     %r14, %r15
        shld    $9, %r15, %r8
        popcnt  %r8, %rbx
        add     %r15, %rbx
        mul     %rdx
        xor     %rsi, %rdx
        bswap   %rbp
        dec     %ecx
        jnz     1b
        fold    %rbx, %rdx, %rsi, %rdi, %rbp, %r8, %r9, %r10, %r11, %r12, %r13, %r14, %r15
        ret

vectors:
        movdqu  seeds(%rip), %xmm0
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movdqa  %xmm0, %xmm\n
        pslldq  $1, %xmm\n
        paddd   %xmm0, %xmm\n
        .endr
        mov     $1500, %ecx
1:      paddq   %xmm1, %xmm0
        pshufd  $0x39, %xmm2, %xmm1
        pxor    %xmm3, %xmm2
        pmuludq %xmm4, %xmm3
        paddd   %xmm5, %xmm4
        psrlq   $3, %xmm5
        por     %xmm6, %xmm5
        psubw   %xmm7, %xmm6
        pmaddwd %xmm8, %xmm7
        pavgb   %xmm9, %xmm8
        packuswb %xmm10, %xmm9
        punpcklbw %xmm11, %xmm10
        pshufb  %xmm12, %xmm11
        cvtdq2ps %xmm13, %xmm12
        paddq   %xmm14, %xmm13
        pminub  %xmm15, %xmm14
        paddd   %xmm0, %xmm15
        dec     %ecx
        jnz     1b
        xor     %eax, %eax
        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movq    %xmm\n, %rbx
        punpckhqdq %xmm\n, %xmm\n
        movq    %xmm\n, %rdx
        fold    %rbx, %rdx
        .endr
        ret

wide_vectors:
        vbroadcastf128 seeds(%rip), %ymm0
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovaps %ymm0, %ymm\n
        .endr
        vextractf128 $1, %ymm3, %xmm4
        mov     $1500, %ecx
1:      vaddps  %ymm1, %ymm0, %ymm2
        vperm2f128 $1, %ymm2, %ymm3, %ymm1
        vxorps  %ymm3, %ymm4, %ymm3
        vshufps $0x1b, %ymm4, %ymm5, %ymm4
        vmulpd  %ymm6, %ymm7, %ymm5
        vandps  %ymm8, %ymm9, %ymm6
        vorps   %ymm10, %ymm11, %ymm7
        vunpcklps %ymm12, %ymm13, %ymm8
        vblendps $0xa5, %ymm14, %ymm15, %ymm9
        vmovdqa %xmm9, %xmm10           # clears the upper half
        vinsertf128 $1, %xmm1, %ymm10, %ymm10
        vxorps  %ymm10, %ymm15, %ymm15
        vpermilps $0x4e, %ymm15, %ymm14
        vmaxps  %ymm14, %ymm13, %ymm12
        dec     %ecx
        jnz     1b
        xor     %eax, %eax
        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovq   %xmm\n, %rbx
        vextractf128 $1, %ymm\n, %xmm\n
        vmovq   %xmm\n, %rdx
        fold    %rbx, %rdx
        .endr
        vzeroall
        ret

x87:    fninit
        fldpi
        fld1
        fldl2t
        fldl2e
        fldln2
        fldlg2
        mov     $1000, %ecx
1:      fadd    %st(3), %st
        fxch    %st(5)
        fmul    %st(2), %st
        fabs
        fsqrt
        fxch    %st(4)
        fsub    %st(1), %st
        fxch    %st(4)
        fabs
        fld1
        fdecstp
        fincstp
        fstp    %st(1)
        fpatan
        fld1
        fscale
        fxch    %st(5)
        frndint
        fcos
        fxch    %st(3)
        dec     %ecx
        jnz     1b
        xor     %eax, %eax
        .rept   6
        fstpt   x87_out(%rip)
        mov     x87_out(%rip), %rbx
        movzwl  x87_out + 8(%rip), %edx
        fold    %rbx, %rdx
        .endr
        fnstsw  x87_out(%rip)
        movzwl  x87_out(%rip), %ebx
        and     $0x7fff, %ebx
        fold    %rbx
        fninit
        ret

strings:
        lea     buffer(%rip), %rdi
        mov     $BUFFER, %ecx
        mov     $0x5a, %al
        rep     stosb
        lea     seeds(%rip), %rsi
        lea     buffer + 5(%rip), %rdi
        mov     $16, %ecx
        rep     movsb
        lea     buffer(%rip), %rsi      # upon itself, so that it spreads
        lea     buffer + 21(%rip), %rdi
        mov     $BUFFER / 2, %ecx
        rep     movsb
        lea     buffer + 3(%rip), %rsi
        lea     buffer_2 + 1(%rip), %rdi
        mov     $BUFFER / 8 - 2, %ecx
        rep     movsq
        std
        lea     buffer + BUFFER - 8(%rip), %rdi
        lea     buffer_2 + BUFFER - 10(%rip), %rsi
        mov     $500, %ecx
        rep     movsl
        lea     buffer + BUFFER - 100(%rip), %rdi
        mov     $200, %ecx
        mov     $0x1234, %eax
        rep     stosw
        cld
        lea     buffer(%rip), %rdi
        mov     $BUFFER, %ecx
        mov     $0x12, %al
        repne   scasb
        mov     %rcx, %r8
        lea     buffer + 21(%rip), %rdi
        lea     buffer(%rip), %rsi
        mov     $BUFFER / 4 - 8, %ecx
        repe    cmpsl
        mov     %rcx, %r9
        lea     buffer(%rip), %rsi
        mov     $BUFFER / 8, %ecx
        xor     %ebx, %ebx
1:      lodsq
        rol     $5, %rbx
        xor     %rax, %rbx
        loop    1b
        mov     %rbx, %rax
        fold    %r8, %r9, %rdi
        ret

recursion:
        mov     %rsp, %rbp
        lea     deep_stack_end(%rip), %rsp
        mov     $10000, %edi
        call    1f
        mov     %rbp, %rsp
        ret
1:      push    %rdi
        dec     %edi
        mov     $1, %eax
        jz      2f
        call    1b
2:      pop     %rdi
        rol     $1, %rax
        add     %rdi, %rax
        ret

flags:  xor     %eax, %eax
        mov     $12345, %ebx
        xor     %r8d, %r8d
        mov     $3000, %ecx
1:      imul    $1103515245, %ebx, %ebx
        add     $12345, %ebx
        mov     %ebx, %edx
        sub     %r8d, %edx
        pushf
        pop     %rsi
        and     $0x8d5, %esi
        lahf
        movzbl  %ah, %edi
        setl    %al
        movzbl  %al, %eax
        cmovo   %edi, %eax
        lea     (%rax, %rsi), %r9
        inc     %r9                     # CF stays
        adc     %r9, %r8
        rol     $3, %r8
        push    %rsi
        popf
        setp    %al
        sbb     %r10, %r10
        xor     %r10, %r8
        movzbl  %al, %eax
        add     %rax, %r8
        sti
        dec     %ecx
        jnz     1b
        mov     %r8, %rax
        cmpl    $0, timing(%rip)
        jne     2f
        cli
2:      ret

changing:
        xor     %ebx, %ebx
        mov     $30, %ecx
1:      mov     %cl, 2f + 2(%rip)
2:      add     $1, %ebx
        mov     %ebx, changed_code + 1(%rip)
        call    changed_code
        rol     $1, %rbx
        xor     %rax, %rbx
        dec     %ecx
        jnz     1b
        mov     %rbx, %rax
        ret
changed_code:
        mov     $0, %eax
        ret

# A number of 1024 bits, multiplied and added, with carries that live across the loop.
numbers:
        lea     number(%rip), %rdi
        xor     %ecx, %ecx
1:      mov     %rcx, (%rdi, %rcx, 8)
        notq    (%rdi, %rcx, 8)
        inc     %ecx
        cmp     $16, %ecx
        jb      1b
        mov     $300, %r12d
2:      mov     $16, %ecx
        xor     %ebx, %ebx
        lea     number(%rip), %rdi
        clc
3:      mov     (%rdi), %rax
        adc     %rax, (%rdi)
        lea     8(%rdi), %rdi
        dec     %ecx
        jnz     3b
        lea     number(%rip), %rdi
        mov     $16, %ecx
        xor     %r8d, %r8d
4:      mov     (%rdi), %rax
        mov     $1000003, %edx
        mul     %rdx
        add     %r8, %rax
        adc     $0, %rdx
        mov     %rax, (%rdi)
        mov     %rdx, %r8
        lea     8(%rdi), %rdi
        dec     %ecx
        jnz     4b
        dec     %r12d
        jnz     2b
        xor     %eax, %eax
        lea     number(%rip), %rdi
        mov     $16, %ecx
5:      fold    (%rdi)
        add     $8, %rdi
        loop    5b
        ret

# Two that call each other's middle, each on a stack of its own.
coroutines:
        mov     %rsp, %r15
        lea     deep_stack_end - 4096(%rip), %r14       # of the other
        lea     2f(%rip), %rax
        sub     $8, %r14
        mov     %rax, (%r14)
        xor     %eax, %eax
        mov     $2000, %ecx
1:      call    switch
        rol     $3, %rax
        add     %rcx, %rax
        dec     %ecx
        jnz     1b
        mov     %r15, %rsp
        ret
2:      add     $7, %rax
        call    switch
        imul    $31, %rax, %rax
        call    switch
        jmp     2b
switch: xchg    %rsp, %r14
        ret

push_and_return:
        xor     %eax, %eax
        mov     $3000, %ecx
1:      lea     3f(%rip), %rbx
        test    $4, %cl
        jz      2f
        lea     4f(%rip), %rbx
2:      push    %rbx
        ret
3:      add     $3, %rax
        jmp     5f
4:      imul    $5, %rax, %rax
5:      rol     $1, %rax
        loop    1b
        ret

changed_return:
        xor     %eax, %eax
        mov     $3000, %ecx
1:      call    2f
        add     $1, %rax                # 4 bytes, left out by every other
        add     $2, %rax
        rol     $1, %rax
        loop    1b
        ret
2:      mov     %ecx, %edx
        and     $1, %edx
        shl     $2, %edx
        add     %rdx, (%rsp)
        ret

releasing_return:
        xor     %eax, %eax
        mov     $3000, %ecx
1:      push    %rcx
        push    %rax
        call    2f
        rol     $1, %rax
        loop    1b
        ret
2:      mov     8(%rsp), %rax
        add     16(%rsp), %rax
        ret     $16

call_and_pop:
        xor     %eax, %eax
        mov     $3000, %ecx
1:      call    2f
2:      pop     %rbx
        lea     2b(%rip), %rdx
        sub     %rdx, %rbx
        add     %rbx, %rax
        call    3f
        ud2
3:      add     $8, %rsp
        add     $1, %rax
        rol     $1, %rax
        loop    1b
        ret

long_jump:
        xor     %eax, %eax
        mov     $200, %ecx
        mov     %rsp, %rbp
1:      mov     $50, %edx
        call    2f
        ud2
3:      mov     %rbp, %rsp
        rol     $1, %rax
        add     %rcx, %rax
        loop    1b
        ret
2:      add     $1, %rax
        dec     %edx
        jz      3b
        call    2b
        ret

retpolines:
        xor     %eax, %eax
        mov     $2000, %ecx
1:      mov     %ecx, %ebx
        and     $3, %ebx
        lea     2f(%rip), %rdx
        lea     (%rdx, %rbx, 8), %rbx
        call    5f
        rol     $1, %rax
        loop    1b
        ret
5:      call    7f
6:      pause
        lfence
        jmp     6b
7:      mov     %rbx, (%rsp)
        ret
        .balign 8
2:      add     $1, %rax
        ret
        .balign 8
        add     $3, %rax
        ret
        .balign 8
        xor     $7, %rax
        ret
        .balign 8
        add     %rcx, %rax
        ret

far_transfers:
        xor     %eax, %eax
        mov     $500, %ecx
1:      push    $CODE64
        lea     2f(%rip), %rbx
        push    %rbx
        lretq
2:      add     $1, %rax
        mov     %rsp, %rbx
        push    $DATA
        push    %rbx
        pushf
        push    $CODE64
        lea     3f(%rip), %rbx
        push    %rbx
        iretq
3:      rol     $1, %rax
        lcall   *far_pointer(%rip)
        loop    1b
        ret
far_function:
        add     $5, %rax
        lretl

# Through 32-bit code. The stack is below 4 GiB.
compatibility:
        movl    $0, number(%rip)
        mov     $1, %eax
        mov     $200, %ecx
1:      ljmp    *to_32(%rip)
        .code32
in_32:  mov     $50, %edx
2:      inc     %eax                    # one byte, which is a prefix elsewhere
        imul    $31, %eax, %eax
        push    %eax
        pop     %ebx
        add     %ebx, number
        adc     $0, %eax
        dec     %edx
        jnz     2b
        ljmp    $CODE64, $3f
        .code64
3:      mov     %eax, %eax
        dec     %ecx
        jnz     1b
        ret

compatibility_calls:
        mov     $1, %eax
        mov     $200, %ecx
1:      ljmp    *to_32_calls(%rip)
        .code32
in_32_calls:
        mov     $20, %edx
2:      call    3f
        lea     3f, %ebx
        call    *%ebx
        pusha
        popa
        dec     %edx
        jnz     2b
        push    $CODE64
        push    $4f
        lret
3:      push    %edx
        call    5f
        add     (%esp), %eax
        add     $4, %esp
        ret
5:      lea     (%eax, %eax, 2), %eax
        ret
        .code64
4:      mov     %eax, %eax
        dec     %ecx
        jnz     1b
        ret

enable_avx:
        movb    $1, avx_missing(%rip)
        mov     $1, %eax
        cpuid
        bt      $26, %ecx
        jnc     1f
        bt      $28, %ecx
        jnc     1f
        mov     %cr4, %rax
        or      $CR4_OSXSAVE, %rax
        mov     %rax, %cr4
        mov     $7, %eax
        xor     %edx, %edx
        xor     %ecx, %ecx
        xsetbv
        movb    $0, avx_missing(%rip)
1:      ret

        .section .rodata
        .balign 16
seeds:  .quad   0x0123456789abcdef, 0x3fe1d872b41c3a5f
to_32:  .long   in_32
        .word   CODE32
to_32_calls:
        .long   in_32_calls
        .word   CODE32
far_pointer:
        .long   far_function
        .word   CODE64

        .section .bss
        .balign 64
timer_area:
        .skip   1024
ipi_area:
        .skip   1024
nmi_area:
        .skip   1024
buffer: .skip   BUFFER
buffer_2:
        .skip   BUFFER
        .skip   0x40000
deep_stack_end:
        .skip   16
number: .skip   16 * 8
x87_out:
        .skip   16
job:    .skip   8
peace:  .skip   8
leave_to:
        .skip   8
leave_rsp:
        .skip   8
self_rip:
        .skip   8
interrupts:
        .skip   4
ipis:   .skip   4
nmis:   .skip   4
timing: .skip   4
looking:
        .skip   4
leaving:
        .skip   4
torn:   .skip   4
outside:
        .skip   4
critical:
        .skip   4
inside: .skip   4
stage:  .skip   4
seed:   .skip   4
me:     .skip   4
watched_a:
        .skip   4
watched_b:
        .skip   4
avx_missing:
        .skip   4
