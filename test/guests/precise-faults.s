# Faults are precise: an instruction that faults has changed nothing, and done again does the whole of its work, whatever page of its operands
# is absent or read-only. Each instruction of the table is run with all pages there, then with each combination of them missing: a fault must
# show all registers and flags as they were (of a repeated string instruction, as far as it has come), and the end must be the same.
# Then faults of other kinds in loops that have run often, and locked operations across lines and pages by cpus=N at once.
        .include "macros.inc"

        .set    HOT, 100000
        .set    WINDOW, 0x40000000      # pages 0, 1: what is written; 2, 3: what is read; 4, 5: frames for what else is needed
        .set    CR0_AM, 1 << 18
        .set    CR0_NE, 1 << 5
        .set    CR0_MP_TS_EM, 1 << 1 | 1 << 2 | 1 << 3
        .set    CR4_OSXMMEXCPT, 1 << 10
        .set    CR4_OSXSAVE, 1 << 18
        .set    STATUS, 0xcd5           # CF, PF, AF, ZF, SF, DF, OF
        .set    AREA, 0xe00             # bytes of both pairs that are filled and compared
        .set    AREA_SIZE, 0x500

# What a case needs.
        .set    ALIGNED, 1              # by 64, that is
        .set    UNIFORM, 2              # all bytes the same, 0x5a
        .set    STRING, 4               # RCX, RSI and RDI move on
        .set    CODE, 8                 # the operands hold the address of case_done
        .set    AVX, 16
        .set    LODS, 32                # RAX too

        .macro  often times, what
        mov     $\times, %ebp
.Loften\@:
        \what
        dec     %ebp
        jnz     .Loften\@
        .endm

# A case: a word of flags, code that goes before, the instruction, what comes behind. RDI, RSI: operands; RCX: 35.
        .macro  case flags, before, what, behind
.Lcase\@:
        \before
        movq    $.Lat\@, case_at
        jmp     snapshot
        lea     (%rsp), %rsp            # never run
.Lat\@: \what
        \behind
        jmp     case_done
        .pushsection .rodata
        .quad   .Lcase\@, \flags
        .popsection
        .endm

        .code64
        .section .text
        .global main
main:   call    prepare

# 1 to so many: the table.
        lea     cases(%rip), %rax
        mov     %rax, this_case(%rip)
        movl    $1, number(%rip)
1:      mov     this_case(%rip), %rbx
        cmpq    $0, (%rbx)
        je      4f
        testb   $AVX, 8(%rbx)
        jz      2f
        cmpb    $0, avx_missing(%rip)
        je      2f
        pushq   number(%rip)
        call    skip
        jmp     3f
2:      call    run_case
        pushq   number(%rip)
        cmpl    $0, wrong(%rip)
        jne     5f
        call    ok
        jmp     3f
5:      call    fail
        call    explain
3:      addq    $16, this_case(%rip)
        incl    number(%rip)
        jmp     1b
4:
        gate    14, page_fault_stub     # back to the ordinary way
        movb    $0, idt + 14 * 16 + 4

# 300: carries through 64 additions of memory, in 8 pages each of which is absent until it is touched, and through stores.
        call    adc_chain
        expect  e, 300

# 310: #DE in a loop, after it has run often; 311: registers. 312: and when it is mended it goes on.
        mov     $HOT, %ecx
        xor     %esi, %esi
        movl    $0, faults(%rip)
        gate    0, on_divide
        mov     $0x1234, %r8d
        mov     $-1, %r9
1:      mov     %ecx, %ebx
        sub     $100, %ebx
        mov     $1000000, %eax
        xor     %edx, %edx
11:     div     %ebx                    # zero once
        add     %eax, %esi
        dec     %ecx
        jnz     1b
        cmpl    $1, faults(%rip)
        jne     2f
        cmp     $11b, %r10
2:      expect  e, 310
        cmp     $100, %r11d
        jne     1f
        cmp     $0x1234, %r8d
        jne     1f
        cmp     $-1, %r9
1:      expect  e, 311
        cmp     $0, %ecx
        expect  e, 312

# 313: #GP of an address that is not canonical, in a loop; its error code, and no CR2. 314: a load, 315: a store, of one that begins canonical and
# does not end so.
        movabs  $0x7fffffffffffffff, %rbx
        mov     $0x1234, %eax
        mov     %rax, %cr2
        mov     $WINDOW + 0x4000, %esi
        mov     $HOT, %ecx
        try     1f
2:      mov     %rsi, %rdi
        cmp     $50, %ecx
        cmove   %rbx, %rdi
11:     mov     (%rdi), %eax
        dec     %ecx
        jnz     2b
1:      expect_trap 313, 13, 0, 11b
        mov     %cr2, %rax
        cmp     $0x1234, %rax
        jne     1f
        cmpl    $50, trap_registers + 8(%rip)
1:      expect  e, 314
        movabs  $0x00007ffffffffffc, %rbx
        try     1f
11:     mov     %rax, (%rbx)
1:      expect_trap 315, 13, 0, 11b

# 316: #MF is raised by the next waiting x87 instruction, not by the one at fault. 317: FNSTSW does not wait. 318: #XM at the instruction, which has
# changed nothing. 319: in a loop.
        mov     %cr0, %rax
        or      $CR0_NE, %rax
        mov     %rax, %cr0
        fninit
        fldcw   unmasked_x87(%rip)
        fld1
        try     1f
        fdivs   counter(%rip)           # by 0
        fnstsw  %ax
        mov     %eax, %ebx
        nop
11:     fldz
1:      expect_trap 316, 16, 0, 11b
        test    $4, %bl
        expect  nz, 317
        fninit
        ldmxcsr unmasked_sse(%rip)
        mov     $1, %eax
        cvtsi2sd %eax, %xmm0
        xorps   %xmm1, %xmm1
        movaps  %xmm0, %xmm2
        try     1f
11:     divsd   %xmm1, %xmm0
1:      expect_trap 318, 19, 0, 11b
        mov     $HOT, %ecx
        try     2f
1:      cvtsi2sd %ecx, %xmm1
        movaps  %xmm2, %xmm0
        dec     %ecx
11:     divsd   %xmm1, %xmm0            # by 1 at last, and then by 0
        jmp     1b
2:      ldmxcsr masked_sse(%rip)
        cmpl    $-1, trap_registers + 8(%rip)
        jne     3f
        ucomisd %xmm2, %xmm0
        jne     3f
        cmpl    $19, trap_vector(%rip)
3:      expect  e, 319

# 320: #AC in user mode with CR0.AM and RFLAGS.AC, in a loop, 321: with what it should show; 322: not without AC. 323: not for what has been done
# in parts, nor for 16 bytes by MOVUPS.
        movw    $0xffff, counter(%rip)
        mov     %cr0, %rax
        or      $CR0_AM, %rax
        mov     %rax, %cr0
        try     1f
        mov     $user_unaligned, %edi
        mov     $1 << 18 | 2, %esi
        call    in_user_mode
1:      mov     $WINDOW + 0x6000 + user_unaligned_at - user_start, %eax
        mov     $17, %edi
        xor     %esi, %esi
        call    compare_trap
        expect  e, 320
        cmpl    $500, trap_registers + 8(%rip)
        expect  e, 321
        mov     $user_unaligned, %edi
        mov     $2, %esi
        call    in_user_mode
        cmp     $0, %ecx
        expect  e, 322
        mov     $user_aligned, %edi
        mov     $1 << 18 | 2, %esi
        call    in_user_mode
        cmp     $0, %ecx
        expect  e, 323
        mov     %cr0, %rax
        and     $~CR0_AM, %rax
        mov     %rax, %cr0

# Locked additions by all processors to what lies across a line, and across a page: none is lost. 330, 331: 8 bytes. 332, 333: 4 bytes. 334, 335: by
# CMPXCHG. 336, 337: by XCHG, of which every value comes out once. 338: across pages that do not follow each other in memory.
        call    read_count
        cmp     $2, %edi
        jae     1f
        movl    $1, cpus(%rip)
        jmp     2f
1:      mov     $other, %edi
        call    start_others
2:      mov     $330, %ebx
        lea     places(%rip), %r12
3:      mov     (%r12), %rdi
        movq    $0, (%rdi)
        mov     %rdi, place(%rip)
        mov     8(%r12), %rax
        mov     %rax, work(%rip)
        call    barrier
        mov     place(%rip), %rdi
        xor     %r15d, %r15d
        call    *work(%rip)
        call    barrier
        mov     (%r12), %rdi
        mov     (%rdi), %rax
        mov     cpus(%rip), %ecx
        imul    16(%r12), %rcx
        cmp     %rax, %rcx
        push    %rbx
        jne     5f
        call    ok
        jmp     6f
5:      call    fail
6:      inc     %ebx
        add     $24, %r12
        lea     places_end(%rip), %rax
        cmp     %rax, %r12
        jb      3b
        movq    $0, place(%rip)
        call    barrier
        ret

other:  mov     $1, %r15d
        lock    xadd %r15d, numbers(%rip)
        inc     %r15d
1:      call    barrier
        mov     place(%rip), %rdi
        test    %rdi, %rdi
        jz      2f
        call    *work(%rip)
        call    barrier
        jmp     1b
2:      cli
        hlt
        jmp     2b

        .set    LOCKED, 3000
        .section .rodata
        .balign 8
places: .quad   lines + 60, work_quad, LOCKED * 3      # 330
        .quad   lines + 0x1000 - 3, work_quad, LOCKED * 3
        .quad   lines + 62, work_long, LOCKED * 3
        .quad   lines + 0x1000 - 1, work_long, LOCKED * 3
        .quad   lines + 57, work_cmpxchg, LOCKED
        .quad   lines + 0x1000 - 7, work_cmpxchg, LOCKED
        .quad   lines + 60, work_xchg, LOCKED
        .quad   lines + 0x1000 - 4, work_xchg, LOCKED
        .quad   WINDOW + 0x8000 - 5, work_quad, LOCKED * 3
places_end:
        .section .text
work_quad:
        mov     $LOCKED, %ecx
        mov     $1, %eax
1:      lock    incq (%rdi)
        lock    addq $1, (%rdi)
        mov     $1, %eax
        lock    xadd %rax, (%rdi)
        loop    1b
        ret
work_long:
        mov     $LOCKED, %ecx
1:      lock    incl (%rdi)
        lock    subl $-1, (%rdi)
        mov     $1, %eax
        lock    xadd %eax, (%rdi)
        loop    1b
        ret
work_cmpxchg:
        mov     $LOCKED, %ecx
1:      mov     (%rdi), %rax
2:      lea     1(%rax), %rdx
        lock    cmpxchg %rdx, (%rdi)
        jnz     2b
        loop    1b
        ret
# Adds one to what it takes out, and puts that where nothing is: a lock of sorts. What is in it is never seen in parts.
work_xchg:
        mov     $LOCKED, %ecx
1:      mov     $-1, %rax               # taken
        xchg    %rax, (%rdi)
        cmp     $-1, %rax
        je      2f
        inc     %rax
        xchg    %rax, (%rdi)
        loop    1b
        ret
2:      pause
        jmp     1b

# Runs one case in all placements with all combinations of pages missing. wrong: what was wrong first.
run_case:
        movl    $0, wrong(%rip)
        movl    $0, placement(%rip)
1:      mov     placement(%rip), %eax
        movzwl  placements(, %rax, 2), %eax
        test    %eax, %eax
        jz      9f
        mov     %eax, offset(%rip)
        movl    $0, mode(%rip)
2:      call    once
        cmpl    $0, mode(%rip)
        jne     3f
# All pages were there: this is how it should be.
        mov     $result, %esi
        mov     $reference, %edi
        mov     $RESULT_SIZE / 8, %ecx
        rep     movsq
        call    keep_area
        jmp     4f
3:      call    compare
        cmpl    $0, wrong(%rip)
        jne     9f
4:      incl    mode(%rip)
        cmpl    $64, mode(%rip)
        jb      2b
        mov     this_case(%rip), %rax
        testb   $ALIGNED, 8(%rax)
        jnz     9f
        incl    placement(%rip)
        jmp     1b
9:      ret

        .section .rodata
placements:
        .word   0xfc0, 0xfff, 0xffd, 0xff9, 0xff8, 0xff3, 0
        .section .text

# Fills memory, sets up pages and registers, runs the case, and takes down how it ends.
once:   mov     this_case(%rip), %rbx
        lea     pattern(%rip), %rsi
        testb   $UNIFORM, 8(%rbx)
        jz      1f
        lea     uniform(%rip), %rsi
1:      mov     %rsi, %rdx
        mov     $frames + AREA, %edi
        mov     $AREA_SIZE / 8, %ecx
        rep     movsq
        mov     %rdx, %rsi
        mov     $frames + 0x2000 + AREA, %edi
        mov     $AREA_SIZE / 8, %ecx
        rep     movsq
        mov     offset(%rip), %edx
        testb   $CODE, 8(%rbx)
        jz      1f
        movq    $case_done, frames(%rdx)
        movq    $case_done, frames + 0x2000(%rdx)
1:
# Pages: bits 0 to 3 of the mode say which are absent, bits 4 and 5 which of the first two are read-only.
        xor     %ecx, %ecx
2:      mov     %ecx, %eax
        call    frame_of
        bt      %ecx, mode(%rip)
        jnc     3f
        and     $~1, %eax
3:      mov     %rax, window_pt(, %rcx, 8)
        inc     %ecx
        cmp     $4, %ecx
        jb      2b
        mov     %cr3, %rax
        mov     %rax, %cr3

        mov     %rsp, kept_rsp(%rip)
        lea     WINDOW(%rdx), %rax
        mov     %rax, image + 7 * 8(%rip)
        add     $0x2000, %rax
        mov     %rax, image + 6 * 8(%rip)
        lea     -256(%rsp), %rax
        mov     %rax, image + 4 * 8(%rip)
        mov     (%rbx), %rax
        mov     %rax, case_entry(%rip)
        fxrstor vectors(%rip)
        mov     placement(%rip), %eax
        and     $1, %eax
        imul    $0x8d5, %eax, %eax
        or      $2, %eax
        push    %rax
        popf
        mov     image(%rip), %rax
        mov     image + 1 * 8(%rip), %rcx
        mov     image + 2 * 8(%rip), %rdx
        mov     image + 3 * 8(%rip), %rbx
        mov     image + 4 * 8(%rip), %rsp
        mov     image + 5 * 8(%rip), %rbp
        mov     image + 6 * 8(%rip), %rsi
        mov     image + 7 * 8(%rip), %rdi
        mov     image + 8 * 8(%rip), %r8
        mov     image + 9 * 8(%rip), %r9
        mov     image + 10 * 8(%rip), %r10
        mov     image + 11 * 8(%rip), %r11
        mov     image + 12 * 8(%rip), %r12
        mov     image + 13 * 8(%rip), %r13
        mov     image + 14 * 8(%rip), %r14
        mov     image + 15 * 8(%rip), %r15
        movl    $1, in_case(%rip)
        jmp     *case_entry(%rip)

        .macro  store_registers to
        mov     %rax, \to(%rip)
        mov     %rcx, \to + 1 * 8(%rip)
        mov     %rdx, \to + 2 * 8(%rip)
        mov     %rbx, \to + 3 * 8(%rip)
        mov     %rsp, \to + 4 * 8(%rip)
        mov     %rbp, \to + 5 * 8(%rip)
        mov     %rsi, \to + 6 * 8(%rip)
        mov     %rdi, \to + 7 * 8(%rip)
        mov     %r8, \to + 8 * 8(%rip)
        mov     %r9, \to + 9 * 8(%rip)
        mov     %r10, \to + 10 * 8(%rip)
        mov     %r11, \to + 11 * 8(%rip)
        mov     %r12, \to + 12 * 8(%rip)
        mov     %r13, \to + 13 * 8(%rip)
        mov     %r14, \to + 14 * 8(%rip)
        mov     %r15, \to + 15 * 8(%rip)
        .endm

# What a fault must show: registers and flags before the instruction. Changes nothing.
snapshot:
        store_registers expected
        mov     kept_rsp(%rip), %rsp
        pushf
        popq    expected_flags(%rip)
        mov     expected + 4 * 8(%rip), %rsp
        jmp     *case_at(%rip)

case_done:
        movl    $0, in_case(%rip)
        store_registers result
        mov     kept_rsp(%rip), %rsp
        pushf
        popq    result_flags(%rip)
        cld
        fxsave  result_vectors(%rip)
        fninit
        ret

# #PF, on a stack of its own.
on_page_fault:
        store_registers at_fault
        cmpl    $0, in_case(%rip)
        je      page_fault_stub
        mov     this_case(%rip), %rbx
        mov     8(%rbx), %ebx
        mov     8(%rsp), %rax           # RIP
        cmp     case_at(%rip), %rax
        mov     $1, %edx
        jne     9f
        mov     24(%rsp), %rax          # flags
        xor     expected_flags(%rip), %rax
        test    $STATUS, %eax
        mov     $2, %edx
        jnz     9f
        mov     32(%rsp), %rax
        mov     %rax, at_fault + 4 * 8(%rip)
        xor     %ecx, %ecx
1:      mov     at_fault(, %rcx, 8), %rax
        cmp     expected(, %rcx, 8), %rax
        je      2f
        test    $STRING, %bl
        lea     0x10(%rcx), %edx
        jz      9f
        mov     $1 << 1 | 1 << 6 | 1 << 7, %eax
        test    $LODS, %bl
        jz      3f
        or      $1, %eax
3:      bt      %ecx, %eax
        jnc     9f
2:      inc     %ecx
        cmp     $16, %ecx
        jb      1b
# The address lies in a page that is absent, or read-only, and of a string instruction, where it has come to.
        mov     %cr2, %rax
        test    $STRING, %bl
        jz      3f
        mov     %rax, %rcx
        sub     at_fault + 7 * 8(%rip), %rcx
        cmp     $8, %rcx
        jb      3f
        mov     %rax, %rcx
        sub     at_fault + 6 * 8(%rip), %rcx
        cmp     $8, %rcx
        mov     $3, %edx
        jae     9f
3:      mov     %rax, %rcx
        sub     $WINDOW, %rcx
        shr     $12, %rcx
        cmp     $4, %rcx
        mov     $4, %edx
        jae     9f
        mov     window_pt(, %rcx, 8), %rax
        test    $1, %al
        jnz     4f
        mov     %ecx, %eax              # it was absent
        call    frame_of
        testb   $1, (%rsp)
        mov     $5, %edx
        jz      5f
        jmp     9f
4:      test    $2, %al
        mov     $6, %edx
        jnz     9f                      # nothing was wrong with it
        mov     (%rsp), %edx            # read-only: a write to what is there
        and     $3, %edx
        cmp     $3, %edx
        mov     $7, %edx
        jne     9f
        or      $2, %eax
5:      mov     %rax, window_pt(, %rcx, 8)
        mov     %cr2, %rax
        invlpg  (%rax)
        jmp     8f
9:      cmpl    $0, wrong(%rip)
        jne     7f
        mov     %edx, wrong(%rip)
        mov     8(%rsp), %rax
        mov     %rax, wrong_at(%rip)
7:      incl    give_up(%rip)
        xor     %ecx, %ecx              # all pages, so that it comes to an end
6:      mov     %ecx, %eax
        call    frame_of
        or      $3, %eax
        mov     %rax, window_pt(, %rcx, 8)
        inc     %ecx
        cmp     $4, %ecx
        jb      6b
        mov     %cr3, %rax
        mov     %rax, %cr3
        cmpl    $1000, give_up(%rip)
        ja      page_fault_stub
8:      mov     at_fault(%rip), %rax
        mov     at_fault + 1 * 8(%rip), %rcx
        mov     at_fault + 2 * 8(%rip), %rdx
        mov     at_fault + 3 * 8(%rip), %rbx
        add     $8, %rsp
        iretq
# What comes unexpected is told in the usual way.
page_fault_stub:
        push    $14
        jmp     trapped

# EAX: a page's number; its entry, read-only where the mode says so.
frame_of:
        push    %rcx
        mov     %eax, %ecx
        shl     $12, %eax
        add     $frames + 3, %eax
        cmp     $2, %ecx
        jae     1f
        add     $4, %ecx
        bt      %ecx, mode(%rip)
        jnc     1f
        and     $~2, %eax
1:      pop     %rcx
        ret

keep_area:
        mov     $frames + AREA, %esi
        mov     $area_reference, %edi
        mov     $AREA_SIZE / 8, %ecx
        rep     movsq
        mov     $frames + 0x2000 + AREA, %esi
        mov     $AREA_SIZE / 8, %ecx
        rep     movsq
        ret

# The end against the reference.
compare:
        cmpl    $0, wrong(%rip)
        jne     9f
        xor     %ecx, %ecx
1:      mov     result(, %rcx, 8), %rax
        cmp     reference(, %rcx, 8), %rax
        lea     0x40(%rcx), %edx
        jne     8f
        inc     %ecx
        cmp     $16, %ecx
        jb      1b
        mov     result_flags(%rip), %eax
        xor     reference_flags(%rip), %eax
        test    $STATUS, %eax
        mov     $0x60, %edx
        jnz     8f
        mov     result_vectors(%rip), %eax      # control and status
        cmp     reference_vectors(%rip), %eax
        mov     $0x61, %edx
        jne     8f
        mov     $result_vectors + 32, %esi
        mov     $reference_vectors + 32, %edi
        mov     $(416 - 32) / 8, %ecx
        repe    cmpsq
        mov     $0x62, %edx
        jne     8f
        mov     $frames + AREA, %esi
        mov     $area_reference, %edi
        mov     $AREA_SIZE / 8, %ecx
        repe    cmpsq
        mov     $0x63, %edx
        jne     8f
        mov     $frames + 0x2000 + AREA, %esi
        mov     $AREA_SIZE / 8, %ecx
        repe    cmpsq
        mov     $0x64, %edx
        je      9f
8:      mov     %edx, wrong(%rip)
9:      ret

# For those who look into a failure.
explain:
        print   " wrong, offset, mode, at: "
        mov     wrong(%rip), %edi
        call    print_hex
        print   " "
        mov     offset(%rip), %edi
        call    print_hex
        print   " "
        mov     mode(%rip), %edi
        call    print_hex
        print   " "
        mov     case_at(%rip), %rdi
        call    print_hex
        print   "\n"
        ret

# 8 pages of the window, 0x10 to 0x17, come one by one as they are touched, within a chain of additions with carry. ZF if right.
adc_chain:
        mov     $adc_frames, %edi       # all ones: every addition of zero and the carry carries
        mov     $-1, %rax
        mov     $8 * 512, %ecx
        rep     stosq
        mov     $300, %r12d
        gate    14, on_chain_fault
1:      mov     $0x10, %ecx
2:      movq    $0, window_pt(, %rcx, 8)
        inc     %ecx
        cmp     $0x18, %ecx
        jb      2b
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $WINDOW + 0x10000, %esi
        xor     %eax, %eax
        xor     %ebx, %ebx
        stc
        .set    step, 0
        .rept   64
        mov     $0, %eax                # flags stay
        adc     0x1000 * (step % 8) + 8 * step(%rsi), %rax
        lea     1(%rbx), %rbx
        .set    step, step + 1
        .endr
        jnc     3f
        adc     $0, %rax
        cmp     $1, %rax
        jne     3f
        cmp     $64, %rbx
        jne     3f
        dec     %r12d
        jnz     1b
# And with stores, by SBB with borrow, through pages that are read-only until they are written.
        mov     $300, %r12d
1:      mov     $0x10, %ecx
2:      andq    $~2, window_pt(, %rcx, 8)
        mov     %ecx, %eax
        shl     $9, %eax
        mov     $512, %edx
        inc     %ecx
        cmp     $0x18, %ecx
        jb      2b
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $adc_frames, %edi
        xor     %eax, %eax
        mov     $8 * 512, %ecx
        rep     stosq
        stc
        .set    step, 0
        .rept   64
        sbbq    $0, 0x1000 * (step % 8) + 8 * step(%rsi)
        mov     %rax, 0x1000 * (step % 8) + 8 * step + 2048(%rsi)
        .set    step, step + 1
        .endr
        jnc     3f
        cmpq    $-1, 0x7000 + 8 * 63(%rsi)
        jne     3f
        dec     %r12d
        jnz     1b
        test    %r12d, %r12d
3:      pushf
        gate    14, page_fault_stub
        popf
        ret
on_chain_fault:
        push    %rax
        push    %rcx
        mov     %cr2, %rax
        invlpg  (%rax)
        sub     $WINDOW + 0x10000, %rax
        shr     $12, %rax
        mov     %eax, %ecx
        shl     $12, %ecx
        testb   $2, 16(%rsp)
        jnz     1f
        add     $adc_frames + 1, %ecx
        jmp     2f
1:      add     $adc_frames + 3, %ecx
2:      mov     %rcx, window_pt + 0x10 * 8(, %rax, 8)
        pop     %rcx
        pop     %rax
        add     $8, %rsp
        iretq

# Takes down where, and divides by one.
on_divide:
        incl    faults(%rip)
        mov     (%rsp), %r10
        mov     %ecx, %r11d
        mov     $1, %ebx
        iretq

# EDI: where in user_start, ESI: flags.
in_user_mode:
        mov     %rsp, kept_rsp(%rip)
        add     $WINDOW + 0x6000, %rdi
        sub     $user_start, %rdi
        push    $USER_DATA
        push    $WINDOW + 0x6000
        push    %rsi
        push    $USER_CODE
        push    %rdi
        iretq
from_user_mode:
        mov     kept_rsp(%rip), %rsp
        ret

user_start:
user_unaligned:
        mov     $10000, %ecx
        mov     $WINDOW + 0x5000, %esi
1:      xor     %edx, %edx
        cmp     $500, %ecx
        sete    %dl
user_unaligned_at:
        mov     (%rsi, %rdx), %eax
        dec     %ecx
        jnz     1b
        int     $0x80
user_aligned:
        mov     $10000, %ecx
        mov     $WINDOW + 0x5000, %esi
1:      movups  1(%rsi), %xmm0
        movb    $0, 3(%rsi)
        mov     8(%rsi), %rax
        mov     2(%rsi), %ax
        dec     %ecx
        jnz     1b
        int     $0x80
user_end:

prepare:
        cli
        mov     %cr0, %rax
        and     $~CR0_MP_TS_EM, %rax
        or      $2, %rax
        mov     %rax, %cr0
        mov     %cr4, %rax
        or      $CR4_OSXMMEXCPT, %rax
        mov     %rax, %cr4
        movl    $window_pt + 7, pd + 512 * 8
        movl    $user_stack + 7, window_pt + 5 * 8
        movl    $user_page + 7, window_pt + 6 * 8
        movl    $user_page + 3, window_pt + 4 * 8
        movl    $spread + 3, window_pt + 7 * 8
        movl    $spread + 0x2003, window_pt + 8 * 8
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $user_start, %esi
        mov     $user_page, %edi
        mov     $user_end - user_start, %ecx
        rep     movsb
        mov     $0x80, %edi
        lea     from_user_mode(%rip), %rsi
        call    set_user_gate
        gate    14, on_page_fault
        movb    $1, idt + 14 * 16 + 4   # with its own stack
        movq    $fault_stack_end, tss + 0x24
# Registers.
        mov     $image, %edi
        movabs  $0x0123456789abcdef, %rax
        movabs  $0x1d872b41c3a5f09b, %rdx
        mov     $16, %ecx
1:      mov     %rax, (%rdi)
        add     %rdx, %rax
        rol     $7, %rax
        add     $8, %rdi
        loop    1b
        movq    $35, image + 8
# Memory, 8 bytes as a double that is no NaN here and there.
        mov     $pattern, %edi
        mov     $AREA_SIZE, %ecx
        xor     %eax, %eax
2:      mov     %al, (%rdi)
        add     $0x35, %al
        rol     $1, %al
        inc     %rdi
        loop    2b
        mov     $uniform, %edi
        mov     $AREA_SIZE, %ecx
        mov     $0x5a, %al
        rep     stosb
# Vectors.
        fninit
        fld1
        fldpi
        fxsave  vectors(%rip)
        mov     $vectors + 160, %edi
        mov     $256 / 8, %ecx
        movabs  $0x40091eb851eb851f, %rax
3:      mov     %rax, (%rdi)
        add     %rcx, %rax
        add     $8, %rdi
        loop    3b
        fninit
        movb    $1, avx_missing(%rip)
        mov     $1, %eax
        cpuid
        bt      $26, %ecx
        jnc     4f
        bt      $28, %ecx
        jnc     4f
        mov     $7, %eax
        xor     %ecx, %ecx
        cpuid
        bt      $5, %ebx
        jnc     4f
        mov     %cr4, %rax
        or      $CR4_OSXSAVE, %rax
        mov     %rax, %cr4
        mov     $7, %eax
        xor     %edx, %edx
        xor     %ecx, %ecx
        xsetbv
        movb    $0, avx_missing(%rip)
4:      ret

        .section .rodata
        .balign 8
cases:  .section .text
# 1: Loads.
        case    0, "", "mov (%rdi), %al"
        case    0, "", "mov (%rdi), %ax"
        case    0, "", "mov (%rdi), %eax"
        case    0, "", "mov (%rdi), %rax"
        case    0, "", "mov (%rdi), %ah"
        case    0, "", "movzbl (%rdi), %edx"
        case    0, "", "movswq (%rdi), %r8"
        case    0, "", "movslq (%rdi), %r9"
        case    0, "", "movbe (%rdi), %rbx"
        case    0, "", "add (%rdi), %rax"
        case    0, "", "adc (%rdi), %eax"
        case    0, "", "sbb (%rdi), %rdx"
        case    0, "", "cmp %rax, (%rdi)"
        case    0, "", "test %al, (%rdi)"
        case    0, "", "and (%rdi), %cx"
        case    0, "", "imul (%rdi), %rbx"
        case    0, "", "imul $77, (%rdi), %eax"
        case    0, "", "mulq (%rdi)"
        case    0, "", "imull (%rdi)"
        case    0, "", "bsf (%rdi), %rax"
        case    0, "", "popcnt (%rdi), %rax"
        case    0, "", "crc32q (%rdi), %rax"
        case    0, "", "cmovz (%rdi), %rax"
        case    0, "", "cmovnz (%rdi), %eax"
        case    0, "", "btq $40, (%rdi)"
        case    0, "", "btl %ecx, (%rdi)"
        case    UNIFORM, "mov $1, %edx", "divl (%rdi)"
        case    UNIFORM, "xor %edx, %edx", "idivq (%rdi)"
        case    0, "mov %rdi, %rbx; mov $0, %al", "xlat"
        case    0, "", "mov (%rdi), %rdi"
        case    0, "lea -35(%rsi), %rsi", "mov (%rsi, %rcx), %rsi"
# 32: Stores.
        case    0, "", "mov %al, (%rdi)"
        case    0, "", "mov %dx, (%rdi)"
        case    0, "", "mov %ebx, (%rdi)"
        case    0, "", "mov %r15, (%rdi)"
        case    0, "", "movl $0x12345678, (%rdi)"
        case    0, "", "movq $-2, (%rdi)"
        case    0, "", "movnti %rax, (%rdi)"
        case    0, "", "movbe %rax, (%rdi)"
        case    0, "", "setz (%rdi)"
        case    0, "", "mov %ds, (%rdi)"
        case    0, "", "sgdt (%rdi)"
        case    0, "", "str (%rdi)"
# 44: Both.
        case    0, "", "add %rax, (%rdi)"
        case    0, "", "adc %eax, (%rdi)"
        case    0, "", "sbbw $3, (%rdi)"
        case    0, "", "incq (%rdi)"
        case    0, "", "decl (%rdi)"
        case    0, "", "negq (%rdi)"
        case    0, "", "notl (%rdi)"
        case    0, "", "xor %r12, (%rdi)"
        case    0, "", "shlq %cl, (%rdi)"
        case    0, "", "rcrl %cl, (%rdi)"
        case    0, "", "rorw $3, (%rdi)"
        case    0, "", "shld %cl, %rax, (%rdi)"
        case    0, "", "shrd $9, %eax, (%rdi)"
        case    0, "", "btsq $33, (%rdi)"
        case    0, "", "btcl %ecx, (%rdi)"
        case    0, "", "xchg %rax, (%rdi)"
        case    0, "", "xchg %bl, (%rdi)"
        case    0, "", "xadd %rax, (%rdi)"
        case    0, "", "cmpxchg %rdx, (%rdi)"
        case    0, "", "lock addq $5, (%rdi)"
        case    0, "", "lock xadd %eax, (%rdi)"
        case    0, "", "lock decw (%rdi)"
        case    0, "", "lock btrl $1, (%rdi)"
        case    0, "", "lock cmpxchg %rdx, (%rdi)"
        case    0, "", "lock cmpxchg8b (%rdi)"
        case    UNIFORM, "movabs $0x5a5a5a5a5a5a5a5a, %rax", "lock cmpxchg %rdx, (%rdi)"
        case    UNIFORM, "mov $0x5a5a5a5a, %eax", "cmpxchg %edx, (%rdi)"
        case    UNIFORM, "mov $0x5a5a5a5a, %eax; mov %eax, %edx", "lock cmpxchg8b (%rdi)"
        case    ALIGNED, "", "lock cmpxchg16b (%rdi)"
        case    "ALIGNED|UNIFORM", "movabs $0x5a5a5a5a5a5a5a5a, %rax; mov %rax, %rdx", "lock cmpxchg16b (%rdi)"
# 74: The stack.
        case    0, "lea 8(%rdi), %rsp", "push %rax"
        case    0, "lea 2(%rdi), %rsp", "push %cx"
        case    0, "lea 8(%rdi), %rsp", "push $-7"
        case    0, "lea 8(%rdi), %rsp", "push (%rsi)"
        case    0, "lea 8(%rdi), %rsp", "push %rsp"
        case    0, "lea 8(%rdi), %rsp", "pushf"
        case    0, "mov %rdi, %rsp", "pop %rax"
        case    0, "mov %rdi, %rsp", "pop %rsp"
        case    0, "mov %rdi, %rsp", "pop (%rsi)"
        case    0, "mov %rdi, %rsp", "pop 8(%rsp)"
        case    0, "mov %rdi, %rsp", "popw (%rsi)"
        case    0, "lea 8(%rdi), %rsp", "call case_done"
        case    0, "lea 8(%rdi), %rsp; lea case_done(%rip), %rax", "call *%rax"
        case    CODE, "lea 8(%rdi), %rsp", "call *(%rsi)"
        case    CODE, "", "jmp *(%rsi)"
        case    CODE, "xor %ecx, %ecx", "jmp *(%rdi, %rcx, 8)"
        case    CODE, "mov %rdi, %rsp", "ret"
        case    CODE, "mov %rdi, %rsp", "ret $24"
        case    0, "mov %rdi, %rbp", "leave"
        case    0, "lea 8(%rdi), %rsp", "enter $16, $0"
        case    0, "lea 16(%rdi), %rsp; lea 8(%rsi), %rbp", "enter $16, $2"
        case    0, "lea 32(%rdi), %rsp; lea 20(%rsi), %rbp", "enter $0, $3"
# 96: Strings.
        case    STRING, "", "movsb"
        case    STRING, "", "movsw"
        case    STRING, "", "movsl"
        case    STRING, "", "movsq"
        case    STRING, "", "lodsq"
        case    STRING, "", "stosl"
        case    STRING, "", "scasb"
        case    STRING, "", "cmpsq"
        case    STRING, "", "rep movsb"
        case    STRING, "", "rep movsw"
        case    STRING, "", "rep movsl"
        case    STRING, "", "rep movsq"
        case    STRING, "", "rep stosb"
        case    STRING, "", "rep stosw"
        case    STRING, "", "rep stosl"
        case    STRING, "", "rep stosq"
        case    "STRING | LODS", "", "rep lodsb"
        case    "STRING | LODS", "", "rep lodsq"
        case    STRING, "", "addr32 rep movsb"
        case    "STRING|UNIFORM", "movabs $0x5a5a5a5a5a5a5a5a, %rax", "repe cmpsb"
        case    "STRING|UNIFORM", "movabs $0x5a5a5a5a5a5a5a5a, %rax", "repe cmpsq"
        case    "STRING|UNIFORM", "movabs $0x5a5a5a5a5a5a5a5a, %rax", "repe scasb"
        case    "STRING|UNIFORM", "movabs $0x5a5a5a5a5a5a5a5a, %rax", "repe scasw"
        case    STRING, "", "repne scasl"
        case    "STRING|UNIFORM", "lea 1(%rsi), %rsi", "repne cmpsb"
        case    STRING, "lea 17(%rdi), %rdi; lea 17(%rsi), %rsi; std", "rep movsb"
        case    STRING, "lea 136(%rdi), %rdi; lea 136(%rsi), %rsi; std", "rep movsq"
        case    STRING, "lea 34(%rdi), %rdi; lea 34(%rsi), %rsi; std", "rep movsw"
        case    STRING, "lea 17(%rdi), %rdi; lea 17(%rsi), %rsi; std", "rep stosb"
        case    STRING, "lea 68(%rdi), %rdi; lea 68(%rsi), %rsi; std", "rep stosl"
        case    "STRING | LODS", "lea 34(%rdi), %rdi; lea 34(%rsi), %rsi; std", "rep lodsw"
        case    "STRING|UNIFORM", "lea 34(%rdi), %rdi; lea 34(%rsi), %rsi; std", "repe cmpsw"
        case    "STRING|UNIFORM", "lea 17(%rdi), %rdi; mov $0x5a, %al; std", "repe scasb"
        case    STRING, "mov %rdi, %rsi; inc %rdi", "rep movsb"
        case    STRING, "lea -4(%rdi), %rsi", "rep movsq"
        case    STRING, "lea 3(%rdi), %rsi", "rep movsb"
        case    STRING, "lea 64(%rdi), %rdi; lea -3(%rdi), %rsi; std", "rep movsl"
        case    STRING, "mov $COM1 + 7, %edx", "rep outsb"
        case    STRING, "mov $COM1 + 7, %edx", "rep insb"
        case    STRING, "xor %ecx, %ecx", "rep stosb"
# 136: x87.
        case    0, "", "flds (%rdi)"
        case    0, "", "fldl (%rdi)"
        case    0, "", "fldt (%rdi)"
        case    0, "", "filds (%rdi)"
        case    0, "", "fildl (%rdi)"
        case    0, "", "fildll (%rdi)"
        case    0, "", "fsts (%rdi)"
        case    0, "", "fstl (%rdi)"
        case    0, "", "fstps (%rdi)"
        case    0, "", "fstpl (%rdi)"
        case    0, "", "fstpt (%rdi)"
        case    0, "", "fists (%rdi)"
        case    0, "", "fistl (%rdi)"
        case    0, "", "fistpll (%rdi)"
        case    0, "", "fisttpl (%rdi)"
        case    0, "", "fbstp (%rdi)"
        case    0, "", "fnstcw (%rdi)"
        case    0, "", "fnstsw (%rdi)"
        case    0, "", "faddl (%rdi)"
        case    0, "", "fcompl (%rdi)"
        case    0, "", "fnstenv (%rdi)"
        case    0, "", "fnsave (%rdi)"
        case    0, "", "fmuls (%rdi)"
        case    0, "", "fidivl (%rdi)"
# 160: MMX, SSE and what came with it.
        case    0, "", "movq (%rdi), %mm1", "emms"
        case    0, "", "movq %mm1, (%rdi)", "emms"
        case    0, "", "paddd (%rdi), %mm0", "emms"
        case    0, "", "movups (%rdi), %xmm0"
        case    0, "", "movdqu %xmm1, (%rdi)"
        case    0, "", "lddqu (%rdi), %xmm2"
        case    0, "", "movlps (%rdi), %xmm0"
        case    0, "", "movhps %xmm1, (%rdi)"
        case    0, "", "movss (%rdi), %xmm0"
        case    0, "", "movsd %xmm1, (%rdi)"
        case    0, "", "movd (%rdi), %xmm0"
        case    0, "", "cvtsi2sdl (%rdi), %xmm0"
        case    0, "", "cvtsi2ssq (%rdi), %xmm0"
        case    0, "", "cvtss2sd (%rdi), %xmm3"
        case    0, "", "cvttsd2si (%rdi), %rax"
        case    0, "", "addsd (%rdi), %xmm1"
        case    0, "", "mulss (%rdi), %xmm1"
        case    0, "", "ucomisd (%rdi), %xmm1"
        case    0, "", "comiss (%rdi), %xmm1"
        case    0, "", "pinsrb $3, (%rdi), %xmm0"
        case    0, "", "pinsrq $1, (%rdi), %xmm0"
        case    0, "", "pextrw $5, %xmm1, (%rdi)"
        case    0, "", "pextrq $0, %xmm1, (%rdi)"
        case    0, "", "extractps $2, %xmm1, (%rdi)"
        case    0, "", "pmovzxbw (%rdi), %xmm0"
        case    0, "", "roundsd $1, (%rdi), %xmm0"
        case    0, "", "stmxcsr (%rdi)"
        case    0, "pcmpeqd %xmm1, %xmm1", "maskmovdqu %xmm1, %xmm0"
        case    0, "pcmpeqd %xmm1, %xmm1; psrldq $9, %xmm1", "maskmovdqu %xmm1, %xmm0"
        case    ALIGNED, "", "movaps (%rdi), %xmm0"
        case    ALIGNED, "", "movntdq %xmm1, (%rdi)"
        case    ALIGNED, "", "paddd (%rdi), %xmm0"
        case    ALIGNED, "", "pshufd $27, (%rdi), %xmm0"
        case    ALIGNED, "", "aesenc (%rdi), %xmm0"
        case    ALIGNED, "", "pcmpistri $0, (%rdi), %xmm0"
        case    ALIGNED, "", "divpd (%rdi), %xmm1"
        case    ALIGNED, "", "fxsave (%rdi)"
# 197: AVX and AVX2.
        case    AVX, "", "vmovups (%rdi), %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "", "vaddps (%rdi), %ymm1, %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "", "vpaddd (%rdi), %ymm1, %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "", "vbroadcastss (%rdi), %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "", "vbroadcastf128 (%rdi), %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "", "vpmovzxbd (%rdi), %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "", "vinsertf128 $1, (%rdi), %ymm1, %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "", "vpermq $27, (%rdi), %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "vinsertf128 $1, %xmm2, %ymm1, %ymm1", "vmovups %ymm1, (%rdi)", "vzeroupper"
        case    AVX, "vinsertf128 $1, %xmm2, %ymm1, %ymm1", "vextractf128 $1, %ymm1, (%rdi)", "vzeroupper"
        case    "AVX|ALIGNED", "vinsertf128 $1, %xmm2, %ymm1, %ymm1", "vmovaps %ymm1, (%rdi)", "vzeroupper"
        case    AVX, "vpcmpeqd %xmm2, %xmm2, %xmm2; vinsertf128 $1, %xmm2, %ymm2, %ymm2; vpsrldq $0, %ymm2, %ymm2", "vmaskmovps (%rdi), %ymm2, %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "vpcmpeqd %xmm2, %xmm2, %xmm2; vinsertf128 $1, %xmm2, %ymm2, %ymm2; vpsrldq $0, %ymm2, %ymm2", "vmaskmovps %ymm1, %ymm2, (%rdi)", "vzeroupper"
        case    AVX, "vpcmpeqd %xmm2, %xmm2, %xmm2; vinsertf128 $1, %xmm2, %ymm2, %ymm2; vpsrldq $10, %ymm2, %ymm2", "vmaskmovps (%rdi), %ymm2, %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "vpcmpeqd %xmm2, %xmm2, %xmm2; vinsertf128 $1, %xmm2, %ymm2, %ymm2; vpsrldq $10, %ymm2, %ymm2", "vmaskmovps %ymm1, %ymm2, (%rdi)", "vzeroupper"
        case    AVX, "vpcmpeqd %xmm2, %xmm2, %xmm2; vinsertf128 $1, %xmm2, %ymm2, %ymm2; vpsrldq $14, %ymm2, %ymm2", "vmaskmovps (%rdi), %ymm2, %ymm0", "vextractf128 $1, %ymm0, %xmm3; vzeroupper"
        case    AVX, "vpcmpeqd %xmm2, %xmm2, %xmm2; vinsertf128 $1, %xmm2, %ymm2, %ymm2; vpsrldq $14, %ymm2, %ymm2", "vmaskmovps %ymm1, %ymm2, (%rdi)", "vzeroupper"
        case    AVX, "vpcmpeqd %ymm2, %ymm2, %ymm2; vpslldq $8, %ymm2, %ymm2", "vpmaskmovq %ymm1, %ymm2, (%rdi)", "vzeroupper"
        case    AVX, "vpcmpeqd %xmm2, %xmm2, %xmm2; vpxor %xmm1, %xmm1, %xmm1; vpinsrd $1, %ecx, %xmm1, %xmm1", "vgatherdps %xmm2, (%rdi, %xmm1), %xmm0"
        case    AVX, "", "vfmadd213sd (%rdi), %xmm1, %xmm0"
        case    AVX, "", "andn (%rdi), %rax, %rbx"
        case    AVX, "", "bextr %rcx, (%rdi), %rbx"
        case    AVX, "", "pdep (%rdi), %rax, %rbx"
        case    AVX, "", "rorx $5, (%rdi), %rbx"
        case    AVX, "", "mulx (%rdi), %rax, %rbx"
        case    AVX, "", "shlx %rcx, (%rdi), %rbx"
        case    "AVX|ALIGNED", "mov $7, %eax; xor %edx, %edx", "xsave (%rdi)"
        .section .rodata
        .quad   0

        .balign 4
unmasked_x87:
        .word   0x37f & ~4              # division by zero
        .balign 4
unmasked_sse:
        .long   0x1f80 & ~(1 << 9)
masked_sse:
        .long   0x1f80

        .section .bss
        .balign 4096
window_pt:
        .skip   4096
frames: .skip   4 * 4096
adc_frames:
        .skip   8 * 4096
user_page:
        .skip   4096
user_stack:
        .skip   4096
spread: .skip   3 * 4096
lines:  .skip   2 * 4096
fault_stack:
        .skip   4096
fault_stack_end:
pattern:
        .skip   8 * AREA_SIZE
uniform:
        .skip   8 * AREA_SIZE
area_reference:
        .skip   2 * AREA_SIZE
image:  .skip   16 * 8
expected:
        .skip   16 * 8
expected_flags:
        .skip   8
at_fault:
        .skip   16 * 8
        .balign 16
result: .skip   16 * 8
result_flags:
        .skip   16
result_vectors:
        .skip   512
        .set    RESULT_SIZE, 16 * 8 + 16 + 512
reference:
        .skip   16 * 8
reference_flags:
        .skip   16
reference_vectors:
        .skip   512
vectors:
        .skip   512
this_case:
        .skip   8
case_at:
        .skip   8
case_entry:
        .skip   8
kept_rsp:
        .skip   8
wrong_at:
        .skip   8
number: .skip   8
place:  .skip   8
work:   .skip   8
placement:
        .skip   4
offset: .skip   4
mode:   .skip   4
wrong:  .skip   4
give_up:
        .skip   4
in_case:
        .skip   4
faults: .skip   4
counter:
        .skip   4
numbers:
        .skip   4
avx_missing:
        .skip   4
