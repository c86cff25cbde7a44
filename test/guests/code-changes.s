# Code that changes, against whatever a translating processor remembers of it: every instruction that can write code, code that
# has run a million times before, loops that change themselves, and code that another processor is running. What is expected
# is SDM vol. 3A §8.1.3; the checks that rely on more (121, 122) say so. cpus=N on the command line, 2 if it does not.
        .include "macros.inc"

        .set    HOT, 100000
        .set    MILLION, 1000000
        .set    ROUNDS, 100             # for each shape of store; fits a byte
        .set    ALIAS, 0x40000000       # the first 2 MiB once more
        .set    CR4_OSXSAVE, 1 << 18

# A function of 8 bytes, mov $value, %eax; ret; nop; nop.
        .set    FUNCTION, 0x9090c300000000b8

# Runs \what \times times. Clobbers EBP.
        .macro  often times, what:vararg
        mov     $\times, %ebp
.Loften\@:
        \what
        dec     %ebp
        jnz     .Loften\@
        .endm

# Each store of the table, ROUNDS times upon \function, which has run HOT times; \from to \to are the checks, \first_entry the first
# shape. R13 is where it is written, R14 whether to serialize afterwards.
        .macro  shapes function, from, first_entry, last_entry
        lea     \first_entry(%rip), %r12
        mov     $\from, %ebx
.Lshape\@:
        mov     8(%r12), %al
        test    %al, avx_missing(%rip)
        jz      1f
        push    %rbx
        call    skip
        jmp     7f
1:      movabs  $FUNCTION, %rax
        mov     %rax, \function(%rip)
        push    %rbx
        often   HOT / 4, call \function
        mov     $1, %r15d
2:      movabs  $FUNCTION, %rax
        mov     %r15, %rcx
        shl     $8, %rcx
        or      %rcx, %rax
        mov     %r13, %rdi
        call    *(%r12)
        test    %r14d, %r14d
        jz      3f
        push    %rax
        xor     %eax, %eax
        cpuid
        pop     %rax
3:      call    \function
        cmp     %r15d, %eax
        jne     5f
        mov     $3, %ebp
4:      xor     %eax, %eax
        call    \function
        cmp     %r15d, %eax
        jne     5f
        dec     %ebp
        jnz     4b
        inc     %r15d
        cmp     $ROUNDS, %r15d
        jbe     2b
        pop     %rbx
        push    %rbx
        call    ok
        jmp     7f
5:      pop     %rbx
        push    %rbx
        call    fail
7:      inc     %ebx
        add     $16, %r12
        lea     \last_entry(%rip), %rax
        cmp     %rax, %r12
        jb      .Lshape\@
        .endm

        .code64
        .section .text
        .global main
main:   call    enable_avx
        movl    $0x83, pd + 512 * 8     # at ALIAS; nothing was there

# 1: the very next instruction, in a loop that never finds the same one.
        xor     %ebx, %ebx
        mov     $40, %ebp
1:      xor     %ecx, %ecx
2:      mov     %cl, 3f + 1(%rip)
3:      mov     $0, %al
        movzbl  %al, %eax
        add     %eax, %ebx
        inc     %ecx
        cmp     $256, %ecx
        jb      2b
        dec     %ebp
        jnz     1b
        cmp     $255 * 128 * 40, %ebx
        expect  e, 1

# 2: a loop that changes itself when it has run half a million times: INC becomes DEC.
        xor     %eax, %eax
        mov     $MILLION, %ecx
1:      inc     %eax
        cmp     $MILLION / 2, %ecx
        jne     2f
        movb    $0xc8, 1b + 1(%rip)
2:      dec     %ecx
        jnz     1b
        cmp     $2, %eax                # it has counted to 500001, and then down
        expect  e, 2
        movb    $0xc0, 1b + 1(%rip)

# 3: one of the next 32 instructions, every one of them in turn. 4: by REP STOSB, the next seven. 5: one of the 32 before.
        xor     %ebx, %ebx
        mov     $100, %ebp
1:      xor     %ecx, %ecx
        lea     3f(%rip), %rdi
2:      clc
        movb    $0xf9, (%rdi, %rcx)     # STC
3:      .fill   32, 1, 0x90
        adc     $0, %ebx
        movb    $0x90, (%rdi, %rcx)
        inc     %ecx
        cmp     $32, %ecx
        jb      2b
        dec     %ebp
        jnz     1b
        cmp     $3200, %ebx
        expect  e, 3
        xor     %ebx, %ebx
        mov     $1000, %ebp
1:      lea     3f(%rip), %rdi
        mov     $7, %ecx
        mov     $0xf5, %al              # CMC
        clc
        rep     stosb
3:      .fill   7, 1, 0x90
        adc     $0, %ebx
        sub     $7, %rdi
        mov     $7, %ecx
        mov     $0x90, %al
        rep     stosb
        dec     %ebp
        jnz     1b
        cmp     $1000, %ebx
        expect  e, 4
        xor     %ebx, %ebx
        mov     $100, %ebp
1:      xor     %ecx, %ecx
        lea     3f(%rip), %rdi
2:      clc
3:      .fill   32, 1, 0x90
        adc     $0, %ebx
        xorb    $0x90 ^ 0xf9, (%rdi, %rcx)
        clc
        jmp     4f
4:      testb   $1, (%rdi, %rcx)        # now STC: once more
        jnz     3b
        inc     %ecx
        cmp     $32, %ecx
        jb      2b
        dec     %ebp
        jnz     1b
        cmp     $3200, %ebx
        expect  e, 5

# 6: PUSH over the next 8 bytes. 7: a call whose return address becomes the number in the function called. 8: an interrupt whose
# handler is in the frame: SS, 00 or 18 with zeros behind it, is four ADDs, or an SBB and three ADDs, of AL to (RAX).
        movabs  $0x90900000002ac0c7, %rbx      # mov $42, %eax in 6 bytes; nop; nop
        mov     %rsp, %rdx
        xor     %eax, %eax
        lea     1f + 8(%rip), %rsp
        push    %rbx
1:      .fill   8, 1, 0x90
        mov     %rdx, %rsp
        cmp     $42, %eax
        expect  e, 6
        mov     %rsp, %rdx
        mov     $1000, %ebp
1:      lea     eats_return + 2 + 8(%rip), %rsp
        lea     2f(%rip), %rcx
        xor     %eax, %eax
        call    eats_return
2:      cmp     %rcx, %rax
        jne     3f
        lea     eats_return + 2 + 8(%rip), %rsp
        lea     4f(%rip), %rcx
        call    eats_return
4:      cmp     %rcx, %rax
        jne     3f
        dec     %ebp
        jnz     1b
        test    %ebp, %ebp
3:      mov     %rdx, %rsp
        expect  e, 7
        mov     $0x81, %edi
        lea     eats_frame(%rip), %rsi
        call    set_gate
        mov     %rsp, %rdx
        xor     %ebx, %ebx
        mov     $1000, %ebp
        mov     $4, %esi
1:      lea     eats_frame + 8(%rip), %rsp
        lea     2f(%rip), %rcx
        lea     one(%rip), %rax
        movb    $0, (%rax)
        mov     %ebx, %ss
        clc
        int     $0x81
2:      cmp     %sil, (%rax)
        jne     3f
        xor     $DATA, %ebx
        xor     $4 ^ 2, %esi
        dec     %ebp
        jnz     1b
        test    %ebp, %ebp
3:      mov     %rdx, %rsp
        mov     $DATA, %eax
        mov     %eax, %ss
        expect  e, 8

# A branch that has been taken a million times goes elsewhere. 9: CALL; 10: JMP; 11: JZ; 12: the byte of a short JMP; 13: from one to the
# other and back.
        call    caller
        often   MILLION, call caller
        movl    $gives_2 - (caller_call + 5), caller_call + 1(%rip)
        call    caller
        cmp     $2, %eax
        expect  e, 9
        often   MILLION, call jumper
        movl    $gives_2 - (jumper + 5), jumper + 1(%rip)
        call    jumper
        cmp     $2, %eax
        expect  e, 10
        often   MILLION, call branch
        movl    $gives_2 - (branch_jump + 6), branch_jump + 2(%rip)
        call    branch
        cmp     $2, %eax
        expect  e, 11
        often   MILLION, call short
        movb    $short_2 - (short + 2), short + 1(%rip)
        call    short
        cmp     $2, %eax
        expect  e, 12
        xor     %ebx, %ebx
        mov     $1000, %r12d
1:      movl    $gives_1 - (caller_call + 5), caller_call + 1(%rip)
        movl    $gives_1 - (jumper + 5), jumper + 1(%rip)
        movl    $gives_1 - (branch_jump + 6), branch_jump + 2(%rip)
        movb    $short_1 - (short + 2), short + 1(%rip)
        call    sum_of_four
        movl    $gives_2 - (caller_call + 5), caller_call + 1(%rip)
        movl    $gives_2 - (jumper + 5), jumper + 1(%rip)
        movl    $gives_2 - (branch_jump + 6), branch_jump + 2(%rip)
        movb    $short_2 - (short + 2), short + 1(%rip)
        call    sum_of_four
        dec     %r12d
        jnz     1b
        cmp     $12000, %ebx
        expect  e, 13

# 14: a function's head becomes a jump to another, and back. 15: INT3 at the head of one that has run often: a trap at it, and the function
# again when it is taken away. 16: the first byte changes how the rest is read.
        xor     %ebx, %ebx
        mov     $1000, %r12d
        mov     gives_1(%rip), %r13
1:      often   20, call gives_1
        add     %eax, %ebx
        movl    $0x3e9, gives_1(%rip)   # jmp gives_2, 3 bytes on; its last byte is there
        often   20, call gives_1
        add     %eax, %ebx
        mov     %r13, gives_1(%rip)
        dec     %r12d
        jnz     1b
        cmp     $3000, %ebx
        expect  e, 14
        often   HOT, call gives_1
        gate    3, on_breakpoint
        xor     %ebx, %ebx
        movl    $0, breakpoints(%rip)
        mov     $1000, %r12d
1:      movb    $0xcc, gives_1(%rip)
        call    gives_1                 # gives 3, and a count
        add     %eax, %ebx
        movb    $0xb8, gives_1(%rip)
        call    gives_1
        add     %eax, %ebx
        dec     %r12d
        jnz     1b
        cmp     $4000, %ebx
        jne     1f
        cmpl    $1000, breakpoints(%rip)
1:      expect  e, 15
        xor     %ebx, %ebx
        often   HOT, call grows
        mov     $1000, %r12d
1:      movb    $0xb8, grows(%rip)      # mov $0x00c30304.., %eax
        xor     %eax, %eax
        call    grows
        cmp     $0xc3030405, %eax
        jne     2f
        movb    $0xb0, grows(%rip)      # mov $5, %al; add $3, %al; ret
        xor     %eax, %eax
        call    grows
        cmp     $8, %eax
        jne     2f
        dec     %r12d
        jnz     1b
        test    %r12d, %r12d
2:      expect  e, 16

# 17: the instruction to return to, changed by the function called. 18: and the one after it.
        xor     %ebx, %ebx
        mov     $20, %ebp
1:      xor     %ecx, %ecx
2:      lea     3f + 1(%rip), %rdi
        call    writes_byte
3:      mov     $0, %al
        movzbl  %al, %eax
        add     %eax, %ebx
        inc     %ecx
        cmp     $256, %ecx
        jb      2b
        dec     %ebp
        jnz     1b
        cmp     $255 * 128 * 20, %ebx
        expect  e, 17
        xor     %ebx, %ebx
        mov     $20, %ebp
1:      xor     %ecx, %ecx
2:      lea     3f + 1(%rip), %rdi
        call    writes_byte
        nop
3:      mov     $0, %al
        movzbl  %al, %eax
        add     %eax, %ebx
        inc     %ecx
        cmp     $256, %ecx
        jb      2b
        dec     %ebp
        jnz     1b
        cmp     $255 * 128 * 20, %ebx
        expect  e, 18

# 19: an instruction in two pages: its second half changes, then its first, at every split.
        mov     $1, %r12d               # bytes of it in the first page
1:      lea     second_page(%rip), %rdi
        sub     %r12, %rdi
        movabs  $FUNCTION, %rax
        mov     %rax, (%rdi)
        often   10000, call *%rdi
        xor     %r13d, %r13d
2:      mov     %r13d, %eax
        imul    $0x01010101, %eax, %eax
        mov     %eax, %r14d
        mov     $5, %ecx
        sub     %r12d, %ecx             # bytes in the second page
        lea     second_page(%rip), %rdx
3:      rol     $8, %eax
        mov     %al, (%rdx)
        inc     %rdx
        loop    3b
        call    *%rdi
        mov     %r12d, %ecx             # those are the upper ones
        dec     %ecx
        shl     $3, %ecx
        shr     %cl, %eax
        mov     %r14d, %edx
        shr     %cl, %edx
        cmp     %eax, %edx
        jne     4f
        cmp     $1, %r12d
        je      5f
        lea     1(%rdi), %rdx
        mov     %r13b, (%rdx)           # its lowest byte, in the first page
        call    *%rdi
        cmp     %al, %r13b
        jne     4f
5:      inc     %r13d
        cmp     $256, %r13d
        jb      2b
        inc     %r12d
        cmp     $4, %r12d
        jbe     1b
        cmp     %eax, %eax
4:      expect  e, 19

# 20: functions made one after the other, 5000 of them, each called twice, in an arena that begins anew after 4096.
        xor     %ebx, %ebx
        xor     %r12d, %r12d
1:      mov     %r12d, %ecx
        and     $4095, %ecx
        shl     $4, %ecx
        lea     arena(%rip), %rdi
        add     %rcx, %rdi
        movabs  $FUNCTION, %rax
        mov     %r12, %rcx
        shl     $8, %rcx
        or      %rcx, %rax
        mov     %rax, (%rdi)
        call    *%rdi
        cmp     %eax, %r12d
        jne     2f
        call    *%rdi
        cmp     %eax, %r12d
        jne     2f
        inc     %r12d
        cmp     $10000, %r12d
        jb      1b
        cmp     %eax, %eax
2:      expect  e, 20

# 21: a page of code that is also the stack, to a depth of 100 calls. 22: and whose other bytes are counters, in the same line and
# elsewhere; 23: while the code changes too, 24: and through the alias.
        lea     stack_and_code(%rip), %rdi
        lea     recursive(%rip), %rsi
        mov     $recursive_end - recursive, %ecx
        rep     movsb
        mov     %rsp, %rdx
        xor     %ebx, %ebx
        mov     $300, %ebp
1:      lea     stack_and_code + 0x1000(%rip), %rsp
        mov     $100, %ecx
        xor     %eax, %eax
        lea     stack_and_code(%rip), %rdi
        call    *%rdi
        add     %eax, %ebx
        dec     %ebp
        jnz     1b
        mov     %rdx, %rsp
        cmp     $30000, %ebx
        expect  e, 21
        movabs  $FUNCTION | 5 << 8, %rax
        mov     %rax, mixed(%rip)
        movq    $0, mixed + 8(%rip)
        movq    $0, mixed + 1024(%rip)
        xor     %ebx, %ebx
        mov     $5000, %ebp
1:      call    mixed
        add     %eax, %ebx
        incl    mixed + 8(%rip)
        addl    $2, mixed + 1024(%rip)
        dec     %ebp
        jnz     1b
        add     mixed + 8(%rip), %ebx
        add     mixed + 1024(%rip), %ebx
        cmp     $8 * 5000, %ebx
        expect  e, 22
        xor     %ebx, %ebx
        movl    $0, mixed + 8(%rip)
        mov     $5000, %ebp
1:      mov     %bp, mixed + 1(%rip)
        incl    mixed + 8(%rip)
        call    mixed
        cmp     %eax, %ebp
        jne     2f
        dec     %ebp
        jnz     1b
        cmpl    $5000, mixed + 8(%rip)
2:      expect  e, 23
        movl    $0, mixed + 8(%rip)
        mov     $3000, %ebp
1:      mov     %bp, ALIAS + mixed + 1
        incl    ALIAS + mixed + 8
        xor     %eax, %eax
        cpuid
        call    mixed
        cmp     %eax, %ebp
        jne     2f
        dec     %ebp
        jnz     1b
        cmpl    $3000, mixed + 8(%rip)
2:      expect  e, 24

# 25: code that is written with what it holds already stays right, in a loop through it. 26: what is written, and put back, before the code
# is reached.
        xor     %ebx, %ebx
        mov     $5000, %ecx
1:      mov     2f(%rip), %al
        mov     %al, 2f(%rip)
2:      inc     %ebx
        dec     %ecx
        jnz     1b
        cmp     $5000, %ebx
        expect  e, 25
        xor     %ebx, %ebx
        mov     $3000, %ecx
1:      movb    $0xcc, 2f(%rip)
        movb    $0xff, 2f(%rip)
2:      inc     %ebx                    # ff c3
        dec     %ecx
        jnz     1b
        cmp     $3000, %ebx
        expect  e, 26

# 27: the very next instruction again, by instructions of many kinds. 28: and by those of AVX.
        .macro  next_changes what
        xor     %ebx, %ebx
        movabs  $0x909090909090c5ff, %rax       # inc %ebp and no-ops
        movabs  $0x9090909090909090, %rdx
        movq    %rax, %xmm2
        punpcklqdq %xmm2, %xmm2
        xor     %ebp, %ebp
        lea     .Lnext\@(%rip), %rdi
        mov     %rax, scratch(%rip)
        \what
.Lnext\@:
        .fill   16, 1, 0x90
        cmp     $0, %ebp
        setne   %bl
        mov     %rdx, (%rdi)
        mov     %rdx, 8(%rdi)
        add     %ebx, %r12d
        inc     %r13d
        .endm
        mov     $100, %r14d
        xor     %r12d, %r12d
        xor     %r13d, %r13d
1:      next_changes "mov %rax, (%rdi)"
        next_changes "movq %xmm2, (%rdi)"
        next_changes "movups %xmm2, (%rdi)"
        next_changes "movnti %rax, (%rdi)"
        next_changes "movhps %xmm2, (%rdi)"
        next_changes "xchg %rax, (%rdi)"
        next_changes "fninit; fildll scratch(%rip); fistpll (%rdi)"
        next_changes "movdq2q %xmm2, %mm1; movq %mm1, (%rdi)"
        next_changes "pextrq $0, %xmm2, (%rdi)"
        next_changes "pcmpeqd %xmm3, %xmm3; maskmovdqu %xmm3, %xmm2"
        next_changes "mov $1, %ecx; rep stosq; sub $8, %rdi"
        next_changes "stosq; sub $8, %rdi"
        next_changes "lea scratch(%rip), %rsi; movsq; sub $8, %rdi"
        next_changes "push %rax; pop (%rdi)"
        next_changes "mov %rax, %rcx; mov %rdx, %rax; lock cmpxchg %rcx, (%rdi)"
        dec     %r14d
        jnz     1b
        cmp     %r12d, %r13d
        expect  e, 27
        emms
        cmpb    $0, avx_missing(%rip)
        je      1f
        skip_checks 28, 28
        jmp     2f
1:      xor     %r12d, %r12d
        xor     %r13d, %r13d
        next_changes "vmovups %xmm2, (%rdi)"
        next_changes "vextractf128 $0, %ymm2, (%rdi)"
        next_changes "vpcmpeqd %xmm3, %xmm3, %xmm3; vmaskmovpd %xmm2, %xmm3, (%rdi)"
        cmp     %r12d, %r13d
        expect  e, 28
        vzeroupper
2:
# 30 to 75: every instruction that writes, upon code in a page of its own. 80 to 118: upon code in the page that it is in.
# 130 to 175: through an alias, and then a serializing instruction.
        lea     far_function(%rip), %r13
        xor     %r14d, %r14d
        shapes  far_function, 30, shape_table, shape_table_end
        lea     near_function(%rip), %r13
        xor     %r14d, %r14d
        shapes  near_function, 80, shape_table, shape_table_wide
        mov     $far_function + ALIAS, %r13d
        mov     $1, %r14d
        shapes  far_function, 130, shape_table, shape_table_end

# Several processors.
        call    read_count
        cmp     $2, %edi
        jae     1f
        skip_checks 120, 128
        ret
1:      gate    0x70, on_sync
        gate    3, on_poke
        mov     $others, %edi
        call    start_others

# 120: by the manual's algorithm, byte by byte.
        call    barrier
        mov     $1, %r12d
1:      mov     %r12d, %eax
        mov     %al, crossed + 1(%rip)
        mov     %al, crossed + 2(%rip)
        mov     %al, crossed + 3(%rip)
        mov     %al, crossed + 4(%rip)
        mov     %r12d, published(%rip)
        mov     cpus(%rip), %ecx
        dec     %ecx
        imul    %r12d, %ecx
2:      pause
        cmp     %ecx, acknowledged(%rip)
        jb      2b
        inc     %r12d
        cmp     $100, %r12d
        jbe     1b
        call    barrier
        call    no_errors
        expect  e, 120

# 121: without: an aligned store of 4 bytes to code that others run. They see one or the other, as every processor shows it.
        movl    $0, published(%rip)
        call    barrier
        mov     $1000, %r12d
1:      movzbl  %r12b, %eax
        imul    $0x01010101, %eax, %eax
        mov     %eax, crossed_4 + 1(%rip)
        dec     %r12d
        jnz     1b
        movl    $1, published(%rip)
        call    barrier
        call    no_errors
        expect  e, 121

# 122: loops without an end, ended from here without telling them, as every processor lets them; 123: at the latest after an IPI.
        movl    $0, not_told(%rip)
        mov     $8, %r12d
1:      lea     endless_table(%rip), %r13
2:      movl    $0, in_loop(%rip)
        mov     (%r13), %rdi
        mov     (%rdi), %r14            # to put back
        mov     %rdi, endless(%rip)
        call    barrier
        mov     cpus(%rip), %ecx
        dec     %ecx
3:      pause
        cmp     %ecx, in_loop(%rip)
        jb      3b
        rdtsc
        mov     %eax, %ebx
        and     $0xffff, %eax           # let them run for a while
        add     $1000, %eax
4:      dec     %eax
        jnz     4b
        mov     8(%r13), %rsi
        mov     16(%r13), %al
        mov     %al, (%rsi)
        mov     $200000000, %ebx
5:      pause
        cmpl    $0, in_loop(%rip)
        je      6f
        dec     %ebx
        jnz     5b
        movl    $1, not_told(%rip)
        apic_write APIC_ICR_LOW, 0xc4070
        call    ipi_sent
        mov     $200000000, %ebx
7:      pause
        cmpl    $0, in_loop(%rip)
        je      6f
        dec     %ebx
        jnz     7b
        push    $123                    # they will not come again
        call    fail
        jmp     finish
6:      mov     (%r13), %rdi
        mov     %r14, (%rdi)
        add     $24, %r13
        lea     endless_table_end(%rip), %rax
        cmp     %rax, %r13
        jb      2b
        dec     %r12d
        jnz     1b
        movq    $0, endless(%rip)
        call    barrier
        cmpl    $0, not_told(%rip)
        expect  e, 122
        cmp     %eax, %eax
        expect  e, 123

# 124: INT3 first, everyone told, the rest, everyone told, the first byte, everyone told: a 5-byte no-op and a jump, while others run it.
        sti
        call    barrier
        mov     $15, %r12d
1:      lea     jump_bytes(%rip), %rsi
        call    poke
        lea     nop_bytes(%rip), %rsi
        call    poke
        dec     %r12d
        jnz     1b
        movl    $-1, sequence(%rip)
        call    barrier
        call    no_errors
        expect  e, 124

# 125: new functions at addresses that have not run, in pages that have, told of by a store alone.
        movl    $0, published(%rip)
        call    barrier
        mov     $1, %r12d
1:      mov     %r12d, %edi
        shl     $4, %edi
        add     $arena_2, %edi
        movabs  $FUNCTION, %rax
        mov     %r12, %rcx
        shl     $8, %rcx
        or      %rcx, %rax
        mov     %rax, (%rdi)
        mov     %r12d, published(%rip)
        mov     $50, %ecx
2:      pause
        loop    2b
        inc     %r12d
        cmp     $1500, %r12d
        jb      1b
        movl    $-1, published(%rip)
        call    barrier
        call    no_errors
        expect  e, 125

# 126: everyone changes a function of its own, all in one line; 127: in one page, each of them by a page-crossing distance from data.
        call    barrier
        mov     $8, %r14d
        xor     %r15d, %r15d
        call    change_own
        call    barrier
        call    no_errors
        expect  e, 126
        call    barrier
        mov     $128, %r14d
        xor     %r15d, %r15d
        call    change_own
        call    barrier
        call    no_errors
        expect  e, 127

# 128: whole pages of code copied over code that others run.
        xor     %ecx, %ecx
1:      movabs  $FUNCTION, %rax
        mov     %rcx, %rdx
        shl     $8, %rdx
        add     %rdx, %rax
        add     $0x100, %rax
        mov     %rax, page_0(%rcx)
        mov     %rax, page_1(%rcx)
        add     $0x100, %rax
        mov     %rax, page_2(%rcx)
        add     $8, %ecx
        cmp     $64, %ecx
        jb      1b
        call    barrier
        mov     $1000, %r12d
1:      lea     page_1(%rip), %rsi
        test    $1, %r12d
        jz      2f
        lea     page_2(%rip), %rsi
2:      lea     page_0(%rip), %rdi
        mov     $512, %ecx
        rep     movsq
        dec     %r12d
        jnz     1b
        movl    $-2, published(%rip)
        call    barrier
        call    no_errors
        expect  e, 128
        ret

# What the others do. R15: the processor's number.
others: mov     $1, %r15d
        lock    xadd %r15d, numbers(%rip)
        inc     %r15d
        call    barrier
        mov     $1, %r12d               # 120
1:      call    neighbour
        cmp     %r12d, published(%rip)
        jb      1b
        xor     %eax, %eax
        cpuid
        call    crossed
        movzbl  %r12b, %ecx
        imul    $0x01010101, %ecx, %ecx
        cmp     %eax, %ecx
        je      2f
        lock    incl errors(%rip)
2:      call    neighbour
        lock    incl acknowledged(%rip)
        inc     %r12d
        cmp     $100, %r12d
        jbe     1b
        call    barrier

        call    barrier                 # 121
1:      call    crossed_4
        mov     %eax, %ecx
        rol     $8, %ecx
        cmp     %eax, %ecx
        je      2f
        lock    incl errors(%rip)
2:      cmpl    $0, published(%rip)
        je      1b
        call    barrier

        sti
1:      call    barrier                 # 122
        mov     endless(%rip), %rdi
        test    %rdi, %rdi
        jz      2f
        lock    incl in_loop(%rip)
        mov     %rsp, %rbp
        call    *%rdi
        mov     %rbp, %rsp
        lock    decl in_loop(%rip)
        jmp     1b
2:
        call    barrier                 # 124
1:      mov     sequence(%rip), %ebx
        cmp     $-1, %ebx
        je      3f
        call    poked
        test    $1, %ebx
        jnz     2f
        cmp     %ebx, sequence(%rip)
        jne     2f
        shr     %ebx
        and     $1, %ebx
        inc     %ebx
        cmp     %eax, %ebx
        je      1b
        lock    incl errors(%rip)
        jmp     1b
2:      dec     %eax
        cmp     $1, %eax
        jbe     1b
        lock    incl errors(%rip)
        jmp     1b
3:      cli
        call    barrier

        call    barrier                 # 125
1:      mov     published(%rip), %ebx
        test    %ebx, %ebx
        jz      1b
        js      2f
        mov     %ebx, %edi
        shl     $4, %edi
        add     $arena_2, %edi
        call    *%rdi
        cmp     %eax, %ebx
        je      1b
        lock    incl errors(%rip)
        jmp     1b
2:      call    barrier

        call    barrier                 # 126, 127
        mov     $8, %r14d
        call    change_own
        call    barrier
        call    barrier
        mov     $128, %r14d
        call    change_own
        call    barrier

        call    barrier                 # 128
1:      xor     %ebx, %ebx
2:      lea     page_0(%rip), %rdi
        add     %rbx, %rdi
        call    *%rdi
        sub     %ebx, %eax
        dec     %eax
        cmp     $1, %eax
        jbe     3f
        lock    incl errors(%rip)
3:      add     $8, %ebx
        cmp     $64, %ebx
        jb      2b
        cmpl    $-2, published(%rip)
        jne     1b
        call    barrier
4:      cli
        hlt
        jmp     4b

# ZF if no processor has seen anything wrong since the last time.
no_errors:
        xor     %eax, %eax
        xchg    %eax, errors(%rip)
        test    %eax, %eax
        ret

# R14: distance of the functions, R15: whose.
change_own:
        mov     %r15d, %edi
        imul    %r14d, %edi
        lea     shared_functions(%rip), %r13
        add     %rdi, %r13
        movabs  $FUNCTION, %rax
        mov     %rax, (%r13)
        mov     $1000, %r12d
1:      mov     %r12d, 1(%r13)
        call    *%r13
        cmp     %eax, %r12d
        je      2f
        lock    incl errors(%rip)
2:      dec     %r12d
        jnz     1b
        ret

# RSI: 5 bytes that become the head of poked.
poke:   incl    sequence(%rip)
        movb    $0xcc, poked(%rip)
        call    sync
        mov     1(%rsi), %eax
        mov     %eax, poked + 1(%rip)
        call    sync
        mov     (%rsi), %al
        mov     %al, poked(%rip)
        call    sync
        incl    sequence(%rip)
        mov     $300, %ecx
1:      pause
        loop    1b
        ret

# Every other processor serializes.
sync:   movl    $0, synchronized(%rip)
        call    poked                   # this one runs into INT3 too
        apic_write APIC_ICR_LOW, 0xc4070
        call    ipi_sent
        mov     cpus(%rip), %ecx
        dec     %ecx
1:      pause
        cmp     %ecx, synchronized(%rip)
        jb      1b
        ret

on_sync:
        push    %rax
        push    %rbx
        push    %rcx
        push    %rdx
        xor     %eax, %eax
        cpuid
        lock    incl synchronized(%rip)
        apic_write APIC_EOI, 0
        pop     %rdx
        pop     %rcx
        pop     %rbx
        pop     %rax
        iretq

# INT3 at poked: as if the no-op were there.
on_poke:
        addq    $4, (%rsp)
        iretq

        .balign 8
poked:  .byte   0x0f, 0x1f, 0x44, 0x00, 0x00
        mov     $1, %eax
        ret
poked_alternative:
        mov     $2, %eax
        ret
nop_bytes:
        .byte   0x0f, 0x1f, 0x44, 0x00, 0x00
jump_bytes:
        .byte   0xe9
        .long   poked_alternative - (poked + 5)

# Loops that never end: a first byte to put back, where to change what to end it.
        .section .rodata
        .balign 8
endless_table:
        .quad   endless_jump, endless_jump + 1, 0
        .quad   endless_pause, endless_pause_jump, 0xc3
        .quad   endless_count, endless_count_jump + 1, 0
        .quad   endless_load, endless_load_jump + 1, 0
        .quad   endless_called, endless_callee, 0x5a       # pop %rdx
        .quad   endless_indirect, endless_indirect_jump, 0xc3
        .quad   endless_string, endless_string_jump + 1, 0
endless_table_end:
        .section .text
# Each in a page's worth of its own, so that the first 8 bytes that are put back are its own.
        .balign 64
endless_jump:
        jmp     endless_jump
        ret
        .balign 64
endless_pause:
        pause
        nop
endless_pause_jump:
        jmp     endless_pause
        .balign 64
endless_count:
        inc     %rax
        add     %rax, %rcx
endless_count_jump:
        jmp     endless_count
        ret
        .balign 64
endless_load:
        mov     in_loop(%rip), %eax     # 6 bytes
endless_load_jump:
        jmp     endless_load
        ret
        .balign 64
endless_called:
        call    endless_callee
        jmp     endless_called
endless_callee:
        ret
        ret
        .balign 64
endless_indirect:
        lea     endless_indirect(%rip), %rdx    # 7 bytes
endless_indirect_jump:
        jmp     *%rdx
        ret
        .balign 64
endless_string:
        xor     %ecx, %ecx
        rep     stosb
endless_string_jump:
        jmp     endless_string
        ret

        .balign 16
crossed:
        mov     $0, %eax
        ret
neighbour:
        mov     $1, %ebx
        ret
        .balign 16
        .skip   3
crossed_4:
        mov     $0, %eax                # the number is at a multiple of 4
        ret

# What the stores are made to. Here, with the functions that store.
        .balign 16
near_function:
        .skip   32
shape_byte:
        mov     %ah, 1(%rdi)
        ret
shape_word:
        shr     $8, %rax
        mov     %ax, 1(%rdi)
        ret
shape_long:
        shr     $8, %rax
        mov     %eax, 1(%rdi)
        ret
shape_quad:
        mov     %rax, (%rdi)
        ret
shape_inc:
        incb    1(%rdi)
        ret
shape_adc:
        stc
        adcl    $0, 1(%rdi)
        ret
shape_sub:
        subw    $-1, 1(%rdi)
        ret
shape_lock_inc:
        lock    incb 1(%rdi)
        ret
shape_lock_add:
        lock    addq $0x100, (%rdi)
        ret
shape_lock_or:
        lock    andb $0, 1(%rdi)
        lock    or %ah, 1(%rdi)
        ret
shape_bit:
        movb    $0, 1(%rdi)
        movzbl  %ah, %eax
        mov     $7, %ecx
1:      bt      %ecx, %eax
        jnc     2f
        lea     8(%rcx), %edx
        lock    bts %edx, (%rdi)
2:      dec     %ecx
        jns     1b
        ret
shape_xchg:
        xchg    %rax, (%rdi)
        ret
shape_xadd:
        mov     $1, %al
        lock    xadd %al, 1(%rdi)
        ret
shape_cmpxchg:
        mov     %rax, %rdx
        mov     (%rdi), %rax
        lock    cmpxchg %rdx, (%rdi)
        ret
shape_cmpxchg8b:
        push    %rbx
        mov     %eax, %ebx
        shr     $32, %rax
        mov     %eax, %ecx
        mov     (%rdi), %eax
        mov     4(%rdi), %edx
        lock    cmpxchg8b (%rdi)
        pop     %rbx
        ret
shape_cmpxchg16b:
        push    %rbx
        mov     %rax, %rbx
        mov     %rax, %rcx
        mov     (%rdi), %rax
        mov     8(%rdi), %rdx
        lock    cmpxchg16b (%rdi)
        pop     %rbx
        ret
shape_rotate:
        mov     $1, %cl
        ror     $8, %rax
        ror     $1, %al                 # as it is before it is turned
        mov     %al, 1(%rdi)
        rolb    %cl, 1(%rdi)
        ret
shape_set:
        and     $0xfe, %ah              # bit 0 by SETcc, the rest by OR
        bt      $0, %r15d
        setc    1(%rdi)
        or      %ah, 1(%rdi)
        ret
shape_pop:
        push    %rax
        popq    (%rdi)
        ret
shape_push:
        mov     %rsp, %rdx
        lea     8(%rdi), %rsp
        push    %rax
        mov     %rdx, %rsp
        ret
shape_enter:
        mov     %rsp, %rdx
        mov     %rbp, %rcx
        mov     %rax, %rbp
        lea     8(%rdi), %rsp
        enter   $0, $0
        mov     %rdx, %rsp
        mov     %rcx, %rbp
        ret
shape_movbe:
        mov     %rax, (%rdi)
        bswap   %rax
        movbe   %rax, (%rdi)
        ret
shape_movnti:
        movnti  %rax, (%rdi)
        sfence
        ret
shape_movsb:
        mov     %rax, scratch(%rip)
        lea     scratch(%rip), %rsi
        mov     $8, %ecx
        rep     movsb
        ret
shape_movsb_down:
        mov     %rax, scratch(%rip)
        lea     scratch + 7(%rip), %rsi
        add     $7, %rdi
        mov     $8, %ecx
        std
        rep     movsb
        cld
        ret
shape_movsq:
        mov     %rax, scratch(%rip)
        lea     scratch(%rip), %rsi
        movsq
        ret
shape_stosb:
        mov     %ah, %al
        inc     %rdi
        mov     $1, %ecx
        rep     stosb
        ret
shape_stosq:
        mov     $2, %ecx
        rep     stosq
        ret
shape_insb:
        mov     %ah, %al
        mov     $COM1 + 7, %edx         # a register that does nothing
        out     %al, %dx
        inc     %rdi
        insb
        ret
shape_movq:
        movq    %rax, %xmm2
        movq    %xmm2, (%rdi)
        ret
shape_movups:
        movq    %rax, %xmm2
        punpcklqdq %xmm2, %xmm2
        movups  %xmm2, (%rdi)
        ret
shape_movaps:
        movq    %rax, %xmm2
        punpcklqdq %xmm2, %xmm2
        movaps  %xmm2, (%rdi)
        ret
shape_movntdq:
        movq    %rax, %xmm2
        punpcklqdq %xmm2, %xmm2
        movntdq %xmm2, (%rdi)
        sfence
        ret
shape_movhps:
        movq    %rax, %xmm2
        punpcklqdq %xmm2, %xmm2
        movhps  %xmm2, (%rdi)
        ret
shape_pextrb:
        movq    %rax, %xmm2
        pextrb  $1, %xmm2, 1(%rdi)
        ret
shape_maskmov:
        movq    %rax, %xmm2
        mov     $0xff00, %eax           # byte 1 alone
        movq    %rax, %xmm3
        maskmovdqu %xmm3, %xmm2
        sfence
        ret
shape_mmx:
        movq    %rax, %mm1
        movq    %mm1, (%rdi)
        emms
        ret
shape_fistp:
        mov     %rax, scratch(%rip)
        fildll  scratch(%rip)
        fistpll (%rdi)
        ret
shape_fstp:
        mov     %rax, scratch(%rip)
        fldl    scratch(%rip)
        fstpl   (%rdi)
        ret
shape_vmovups:
        vmovq   %rax, %xmm2
        vpunpcklqdq %xmm2, %xmm2, %xmm2
        vinsertf128 $1, %xmm2, %ymm2, %ymm2
        vmovups %ymm2, (%rdi)
        vzeroupper
        ret
shape_vextract:
        vmovq   %rax, %xmm2
        vpunpcklqdq %xmm2, %xmm2, %xmm2
        vinsertf128 $1, %xmm2, %ymm3, %ymm3
        vextractf128 $1, %ymm3, (%rdi)
        vzeroupper
        ret
shape_vmaskmov:
        vmovq   %rax, %xmm2
        vpcmpeqd %xmm3, %xmm3, %xmm3
        vmaskmovpd %xmm2, %xmm3, (%rdi)
        vzeroupper
        ret
# Those that write more than 32 bytes.
shape_page:
        mov     %rax, template_page + 1024(%rip)
        lea     template_page(%rip), %rsi
        sub     $1024, %rdi
        mov     $4096, %ecx
        rep     movsb
        ret
shape_page_down:
        mov     %rax, template_page + 1024(%rip)
        lea     template_page + 4088(%rip), %rsi
        add     $4088 - 1024, %rdi
        mov     $512, %ecx
        std
        rep     movsq
        cld
        ret
shape_fxsave:
        movq    %rax, %xmm2
        fxsave  -192(%rdi)
        ret
shape_xsave:
        movq    %rax, %xmm2
        mov     $7, %eax
        xor     %edx, %edx
        xsave   -192(%rdi)
        ret
near_end:

# Shape, and whether AVX must be there.
        .section .rodata
        .balign 8
shape_table:
        .quad   shape_byte, 0           # 30
        .quad   shape_word, 0
        .quad   shape_long, 0
        .quad   shape_quad, 0
        .quad   shape_inc, 0
        .quad   shape_adc, 0            # 35
        .quad   shape_sub, 0
        .quad   shape_lock_inc, 0
        .quad   shape_lock_add, 0
        .quad   shape_lock_or, 0
        .quad   shape_bit, 0            # 40
        .quad   shape_xchg, 0
        .quad   shape_xadd, 0
        .quad   shape_cmpxchg, 0
        .quad   shape_cmpxchg8b, 0
        .quad   shape_cmpxchg16b, 0     # 45
        .quad   shape_rotate, 0
        .quad   shape_set, 0
        .quad   shape_pop, 0
        .quad   shape_push, 0
        .quad   shape_enter, 0          # 50
        .quad   shape_movbe, 0
        .quad   shape_movnti, 0
        .quad   shape_movsb, 0
        .quad   shape_movsb_down, 0
        .quad   shape_movsq, 0          # 55
        .quad   shape_stosb, 0
        .quad   shape_stosq, 0
        .quad   shape_insb, 0
        .quad   shape_movq, 0
        .quad   shape_movups, 0         # 60
        .quad   shape_movaps, 0
        .quad   shape_movntdq, 0
        .quad   shape_movhps, 0
        .quad   shape_pextrb, 0
        .quad   shape_maskmov, 0        # 65
        .quad   shape_mmx, 0
        .quad   shape_fistp, 0
        .quad   shape_fstp, 0
        .quad   shape_vmovups, 1
        .quad   shape_vextract, 1       # 70
        .quad   shape_vmaskmov, 1
shape_table_wide:
        .quad   shape_page, 0
        .quad   shape_page_down, 0
        .quad   shape_fxsave, 0
        .quad   shape_xsave, 1          # 75
shape_table_end:

        .section .text
gives_1:
        mov     $1, %eax
        ret
        .skip   2
gives_2:
        mov     $2, %eax
        ret
caller:
        nop
caller_call:
        call    gives_1
        ret
jumper: .byte   0xe9
        .long   gives_1 - (jumper + 5)
branch: xor     %edx, %edx
branch_jump:
        .byte   0x0f, 0x84
        .long   gives_1 - (branch_jump + 6)
        ud2
short:  .byte   0xeb, short_1 - (short + 2)
short_1:
        mov     $1, %eax
        ret
short_2:
        mov     $2, %eax
        ret
grows:  .byte   0xb0, 5, 4, 3, 0xc3, 0xc3
sum_of_four:
        call    caller
        add     %eax, %ebx
        call    jumper
        add     %eax, %ebx
        call    branch
        add     %eax, %ebx
        call    short
        add     %eax, %ebx
        ret
writes_byte:
        mov     %cl, (%rdi)
        ret

on_breakpoint:
        incl    breakpoints(%rip)
        mov     $3, %eax
        addq    $4, (%rsp)              # to the RET
        iretq

# Stored over by its own call or frame, whose highest 8 bytes end where 16 divides.
        .balign 16
        .skip   6
eats_return:
        movabs  $0, %rax
        mov     %rdx, %rsp
        jmp     *%rcx
        .balign 16
        .skip   32 + 8
eats_frame:
        .fill   8, 1, 0x90
        mov     %rdx, %rsp
        jmp     *%rcx

# ECX: how deep; counts in EAX. Works anywhere.
recursive:
        push    %rcx
        inc     %eax
        dec     %ecx
        jz      1f
        call    recursive
1:      pop     %rcx
        ret
recursive_end:

# Sets avx_missing.
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
1:      fninit
        ret

        .section .bss
        .balign 4096
        .skip   1024
far_function:
        .skip   4096 - 1024
template_page:
        .skip   4096
first_page:
        .skip   4096
second_page:
        .skip   4096
stack_and_code:
        .skip   4096
mixed:  .skip   4096
shared_functions:
        .skip   4096
page_0: .skip   4096
page_1: .skip   4096
page_2: .skip   4096
        .skip   1
one:    .skip   4095             # an address that ends in 01
arena:  .skip   65536
arena_2:
        .skip   65536
scratch:
        .skip   8
endless:
        .skip   8
avx_missing:
        .skip   4
breakpoints:
        .skip   4
numbers:
        .skip   4
errors: .skip   4
published:
        .skip   4
acknowledged:
        .skip   4
in_loop:
        .skip   4
not_told:
        .skip   4
sequence:
        .skip   4
synchronized:
        .skip   4
