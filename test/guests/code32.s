# 32-bit code: in compatibility mode at level 0 and 3, and in protected mode without long mode, with paging and without.
# A workload gives what it gives in 64-bit mode; code is hot before anything changes.
#
# 1 to 4: the workload in compatibility mode, level 0 and 3; twice each, as translations are there the second time.
# 5, 6: in protected mode without paging, and with 4 MiB pages. 7: in compatibility mode again.
# 10 to 26: instructions that only 32-bit code has. 30: the same bytes at the same address in both modes by turns. 31: segments that
# change under hot code. 32: GS with a base. 33: addresses that wrap. 34: code that changes.
# 40 to 47: faults in hot loops at level 3, with the registers that they find; 60 to 69: which faults. 50: software interrupts. 51: calls to other
# segments.
        .include "macros.inc"

        .set    USER_CODE32, 0x48 | 3
        .set    BASED, 0x50 | 3
        .set    THREAD, 0x58 | 3
        .set    MY_GDT_SIZE, 0x60
        .set    ROUNDS, 3000
        .set    HOT, 200
        .set    ABSENT_PAGE, 32 << 20
        .set    USER_PAGE, 34 << 20
        .set    USER_STACK, USER_PAGE + 0x100000
        .set    CR4_PSE, 1 << 4
        .set    CR4_PAE, 1 << 5
        .set    EFER_LME, 1 << 8
        .set    CR0_PG, 1 << 31

        .section .text
# Pushes or pops a whole register; goes through a register.
        .macro  push_whole bits, name
        .if     \bits == 64
        push    %r\name
        .else
        push    %e\name
        .endif
        .endm
        .macro  pop_whole bits, name
        .if     \bits == 64
        pop     %r\name
        .else
        pop     %e\name
        .endif
        .endm
        .macro  through bits, what, name
        .if     \bits == 64
        \what   *%r\name
        .else
        \what   *%e\name
        .endif
        .endm

# EDI: rounds. EAX: what came of them. ESP and EBP stay.
        .macro  workload bits
        .code\bits
work\bits:
        push_whole \bits, bp
        xor     %eax, %eax
        xor     %ebx, %ebx
        xor     %ecx, %ecx
        xor     %edx, %edx
        mov     $area, %ebp
        pxor    %xmm1, %xmm1
        .balign 16
1:      inc     %eax
        imul    $31, %eax, %eax
        add     %edi, %eax
        mov     %eax, %ebx
        shr     $7, %ebx
        xor     %ebx, %eax
        lea     3(%eax, %ebx, 4), %ecx
        rol     %cl, %eax
        adc     %ebx, %eax
        sbb     %ecx, %edx
        push_whole \bits, dx
        mov     %eax, %esi
        and     $63, %esi
        mov     %edx, area(, %esi, 4)
        add     %eax, area + 8(, %esi, 4)
        mov     area + 128, %eax
        add     %esi, %eax
        mov     %eax, area + 132
        movzbl  area + 3(%esi), %ebx
        movsbl  (%ebp, %esi), %edx
        sub     %ebx, %edx
        cmovs   %ebx, %edx
        setp    %bl
        xadd    %edx, 16(%ebp)
        bswap   %edx
        btc     $5, %edx
        adc     $0, %edx
        shld    $3, %edx, %ebx
        add     %ebx, %eax
        mul     %edx
        or      $1, %ecx
        xor     %edx, %edx
        div     %ecx
        add     %edx, %eax
        call    frame\bits
        mov     $frame\bits, %esi
        through \bits, call, si
        mov     $2f, %esi
        through \bits, jmp, si
        inc     %eax
2:      movd    %eax, %xmm0
        pshufd  $0x1b, %xmm0, %xmm0
        paddd   %xmm0, %xmm1
        movdqu  %xmm1, area + 64
        add     area + 68, %eax
        mov     $stack_word, %esi
        xchg    %eax, (%esi)
        add     (%esi), %eax
        mov     %eax, %ecx
        xor     %ecx, %ecx
        inc     %ecx
        dec     %edx
        test    $7, %edi
        jnz     3f
        push_whole \bits, di
        mov     $area, %esi
        mov     $area + 512, %edi
        mov     $40, %ecx
        rep     movsl
        mov     $area + 600, %edi
        mov     $19, %ecx
        rep     stosb
        mov     $area + 512, %esi
        lodsl
        lodsb
        mov     $100, %ecx
        repne   scasb
        add     %ecx, %eax
        pop_whole \bits, di
3:      pop_whole \bits, dx
        add     %edx, %eax
        mov     %eax, %edx
        and     $15, %edx
        add     %eax, area(, %edx, 8)
        dec     %edi
        jnz     1b
        mov     $area, %esi
        mov     $256, %ecx
4:      rol     %eax
        add     (%esi), %eax
        add     $4, %esi
        dec     %ecx
        jnz     4b
        pop_whole \bits, bp
        ret

# A frame with locals.
frame\bits:
        push_whole \bits, bp
        mov     %esp, %ebp
        sub     $32, %esp
        mov     %eax, -8(%ebp)
        mov     %ecx, 4(%esp)
        mov     -8(%ebp), %ebx
        xor     4(%esp), %ebx
        add     %ebx, %eax
        leave
        ret
        .endm

        workload 64
        workload 32

# Clears what the workload works on, and does it in 64-bit mode: EAX.
        .code64
clear:  mov     $area, %edi
        mov     $2048, %ecx
        xor     %eax, %eax
        rep     stosb
        movl    $0, stack_word
        ret

# Goes to 32-bit code at level 0, at EBX, which comes back by far return.
call_32:
        mov     %ebx, far_address
        movw    $CODE32, far_address + 4
        lcall   *far_address
        ret

# Goes to user code at RBX with the selector in ECX. It comes back by whatever exception it raises.
user:   push    $USER_DATA
        push    $USER_STACK
        push    $2
        push    %rcx
        push    %rbx
        mov     $USER_DATA, %ecx
        mov     %ecx, %ds
        mov     %ecx, %es
        iretq

# What comes back from level 3 has user segments.
        .macro  user_32 at
        mov     $\at, %ebx
        mov     $USER_CODE32, %ecx
        jmp     user
        .endm

        .macro  expect_work n
        cmp     wanted, %eax
        expect  e, \n
        .endm

        .global main
main:   call    prepare
        call    clear
        mov     $ROUNDS, %edi
        call    work64
        mov     %eax, wanted

        .irp    n, 1, 2
        call    clear
        mov     $work_at_0, %ebx
        call    call_32
        expect_work \n
        .endr

        .irp    n, 3, 4
        call    clear
        try     5f
        user_32 work_at_3
5:      mov     result, %eax
        expect_work \n
        .endr

        call    clear
        mov     $without_long_mode, %ebx
        call    call_32
        mov     result, %eax
        expect_work 5
        mov     result + 4, %eax
        expect_work 6
        call    clear
        mov     $work_at_0, %ebx
        call    call_32
        expect_work 7

        mov     $only_32, %ebx
        call    call_32
        mov     $only_32, %ebx
        call    call_32
        .set    n, 10
        .rept   17
        cmpl    $HOT * 2, counts + 4 * (n - 10)
        expect  e, n
        .set    n, n + 1
        .endr

        call    both_modes
        call    other_segments
        call    thread_segment
        call    wrapping
        call    changing
        call    faults
        call    interrupts
        call    far_calls
        ret

# Tables of our own: more segments, pages for user mode, and one that is absent.
prepare:
        mov     $gdt, %esi
        mov     $my_gdt, %edi
        mov     $GDT_SIZE, %ecx
        rep     movsb
        mov     $more_segments, %esi
        mov     $MY_GDT_SIZE - GDT_SIZE, %ecx
        rep     movsb
        mov     $thread_area, %eax
        mov     %ax, my_gdt + 0x58 + 2
        shr     $16, %eax
        mov     %al, my_gdt + 0x58 + 4
        mov     %ah, my_gdt + 0x58 + 7
        lgdt    my_gdt_pointer
        orl     $4, pd
        orl     $4, pd + 8
        orl     $4, pd + 8 * (USER_PAGE >> 21)
        orl     $4, pd + 8 * ((ABSENT_PAGE >> 21) - 1)
        movl    $0, pd + 8 * (ABSENT_PAGE >> 21)
        mov     %cr3, %rax
        mov     %rax, %cr3
        ret

        .code32
work_at_0:
        mov     $ROUNDS, %edi
        call    work32
        lret

work_at_3:
        mov     $ROUNDS, %edi
        call    work32
        mov     %eax, result
        ud2

# The workload in protected mode, and back.
without_long_mode:
        mov     %cr0, %eax
        and     $~CR0_PG, %eax
        mov     %eax, %cr0
        mov     $MSR_EFER, %ecx
        rdmsr
        and     $~EFER_LME, %eax
        wrmsr
        mov     $ROUNDS, %edi
        call    work32
        mov     %eax, result
        mov     $area, %edi
        mov     $2048, %ecx
        xor     %eax, %eax
        rep     stosb
        movl    $0, stack_word
# 64 MiB one to one.
        mov     $directory, %edi
        mov     $0x83, %eax
        mov     $16, %ecx
1:      stosl
        add     $4 << 20, %eax
        loop    1b
        mov     %cr4, %eax
        and     $~CR4_PAE, %eax
        or      $CR4_PSE, %eax
        mov     %eax, %cr4
        mov     $directory, %eax
        mov     %eax, %cr3
        mov     %cr0, %eax
        or      $CR0_PG, %eax
        mov     %eax, %cr0
        mov     $ROUNDS, %edi
        call    work32
        mov     %eax, result + 4
        mov     %cr0, %eax
        and     $~CR0_PG, %eax
        mov     %eax, %cr0
        mov     %cr4, %eax
        or      $CR4_PAE, %eax
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $EFER_LME, %eax
        wrmsr
        mov     %cr0, %eax
        or      $CR0_PG, %eax
        mov     %eax, %cr0
        lret

# Counts, HOT times each, how often they come out right.
        .macro  right n
        jne     9f
        incl    counts + 4 * (\n - 10)
9:
        .endm
only_32:
        movl    $HOT, turns
1:      mov     $0x11111111, %eax
        mov     $0x22222222, %ecx
        mov     $0x33333333, %edx
        mov     $0x44444444, %ebx
        mov     $0x66666666, %ebp
        mov     $0x77777777, %esi
        mov     $0x88888888, %edi
        pusha
        inc     %eax
        dec     %ecx
        inc     %edx
        dec     %ebx
        inc     %ebp
        dec     %esi
        inc     %edi
        inc     %ax
        dec     %di
        add     %ecx, %eax
        add     %edx, %eax
        add     %ebx, %eax
        add     %ebp, %eax
        add     %esi, %eax
        add     %edi, %eax
        cmp     $0x11111111 + 0x22222222 + 0x33333333 + 0x44444444 + 0x66666666 + 0x77777777 + 0x88888888 + 1 - 0x200000000, %eax
        right   10
        popa
        add     %esi, %edi
        cmp     $0xffffffff, %edi
        right   11
# INC and DEC leave CF.
        stc
        inc     %eax
        dec     %ecx
        sbb     %edx, %edx
        cmp     $-1, %edx
        right   12
# Absolute addresses of every size.
        mov     $0x12345678, %eax
        mov     %eax, number
        mov     number + 1, %al
        mov     %ax, number + 2
        mov     number, %eax
        cmp     $0x56565678, %eax
        right   13
        mov     $0x9a, %al
        mov     %al, number
        mov     number, %ax
        cmp     $0x5656569a, %eax
        right   14
# Decimal arithmetic.
        mov     $0x59, %al
        add     $0x28, %al
        daa
        cmp     $0x87, %al
        right   15
        mov     $57, %al
        aam
        aad
        cmp     $57, %ax
        right   16
# Segment registers.
        mov     $0xffffffff, %eax
        push    %eax
        pop     %eax
        push    %ds
        pop     %es
        push    %es
        pop     %eax
        mov     %ds, %ecx
        cmp     %cx, %ax
        right   17
        movl    $0x1234, number
        movw    $DATA, number + 4
        les     number, %edx
        lds     number, %ecx
        cmp     %ecx, %edx
        right   18
# 16-bit addresses.
        mov     $0x10123, %ebx
        mov     $0x20211, %esi
        lea     5(%bx, %si), %edx
        cmp     $0x339, %edx
        right   19
# BOUND within bounds, INTO without overflow, SALC.
        movl    $5, number
        movl    $7, number + 4
        mov     $6, %eax
        bound   %eax, number
        cmp     %eax, %eax
        into
        stc
        .byte   0xd6
        cmp     $0xff, %al
        right   20
# The other encoding of operations on bytes.
        mov     $3, %al
        .byte   0x82, 0xc0, 4
        cmp     $7, %al
        right   21
# ENTER, LEAVE, RET with an argument.
        mov     %esp, %esi
        enter   $16, $0
        push    $1
        leave
        push    $4
        push    $9
        call    7f
        cmp     %esi, %esp
        right   22
# LOOP and JECXZ.
        mov     $5, %ecx
        xor     %eax, %eax
2:      inc     %eax
        loop    2b
        jecxz   3f
        inc     %eax
3:      cmp     $5, %eax
        right   23
        xor     %ecx, %ecx
        mov     $0x10001, %ecx
        addr16 loop 4f
        inc     %eax
4:      cmp     $6, %eax
        right   24
# A call to a register's value, and a jump through memory.
        mov     $8f, %eax
        call    *%eax
        movl    $5f, number
        jmp     *number
        inc     %ecx
5:      cmp     $0x31, %ecx
        right   25
# PUSHF and POPF.
        stc
        pushf
        orl     $0x40, (%esp)
        popf
        right   26
        decl    turns
        jnz     1b
        lret
7:      mov     4(%esp), %eax
        ret     $8
8:      mov     $0x31, %ecx
        ret

# DEC EAX and ADD EAX, EBX in 32-bit code, ADD RAX, RBX in 64-bit code; and LEA of an absolute address, which is relative
# there.
ambiguous:
        .byte   0x48, 0x01, 0xd8
        .byte   0x8d, 0x15, 0x00, 0x10, 0x00, 0x00
after_lea:
        .byte   0xc3
ambiguous_32:
        call    ambiguous
        lret

        .code64
both_modes:
        mov     $HOT, %ebp
        xor     %edi, %edi
1:      mov     $100, %eax
        mov     $11, %ebx
        call    ambiguous
        add     %eax, %edi
        lea     after_lea + 0x1000(%rip), %ecx
        sub     %ecx, %edx
        add     %edx, %edi
        mov     $100, %eax
        mov     $ambiguous_32, %ebx
        mov     %ebx, far_address
        movw    $CODE32, far_address + 4
        mov     $11, %ebx
        lcall   *far_address
        add     %eax, %edi
        sub     $0x1000, %edx
        add     %edx, %edi
        dec     %ebp
        jnz     1b
        cmp     $HOT * (111 + 110), %edi
        expect  e, 30
        ret

        .code32
# The word at an absolute address, through DS, flat and with a base by turns: EAX, their sums.
by_turns:
        mov     $HOT, %ecx
        xor     %eax, %eax
1:      mov     $DATA, %edx
        mov     %edx, %ds
        add     words, %eax
        mov     $BASED, %edx
        mov     %edx, %ds
        add     words, %eax
        mov     $DATA, %edx
        mov     %edx, %ds
        add     words, %eax
        dec     %ecx
        jnz     1b
        lret

of_thread:
        push    %gs
        mov     $THREAD, %eax
        mov     %eax, %gs
        mov     $HOT, %ecx
        xor     %eax, %eax
        mov     $8, %ebx
1:      add     %gs:4, %eax
        add     %gs:(%ebx), %eax
        mov     %ecx, %gs:0
        mov     %gs:0, %edx
        add     %gs:-4, %eax
        add     thread_area, %edx
        add     %edx, %eax
        dec     %ecx
        jnz     1b
        pop     %gs
        lret

# Sums that leave 32 bits.
wrap:   mov     $HOT, %ecx
        xor     %eax, %eax
        mov     $words + 0x80000000, %ebx
        mov     $0xfffffff0, %esi
        mov     $0x40000000, %edi
1:      add     0x80000000(%ebx), %eax
        add     words + 16(%esi), %eax
        add     words + 20(%esi), %eax
        add     words(, %edi, 4), %eax
        lea     0x80000000(%ebx), %edx
        sub     $words, %edx
        add     %edx, %eax
        dec     %ecx
        jnz     1b
        lret

change: mov     $HOT, %ecx
        xor     %eax, %eax
        mov     $2f + 1, %ebx
1:      mov     %cl, (%ebx)
2:      mov     $0, %edx
        add     %edx, %eax
        dec     %ecx
        jnz     1b
        movb    $0, (%ebx)
        lret

        .code64
other_segments:
        mov     $by_turns, %ebx
        call    call_32
        cmp     $HOT * (3 + 5 + 3), %eax
        expect  e, 31
        ret

thread_segment:
        movl    $4, thread_area - 4
        movl    $3, thread_area + 4
        movl    $7, thread_area + 8
        mov     $of_thread, %ebx
        call    call_32
        cmp     $HOT * (3 + 7 + 4) + HOT * (HOT + 1), %eax
        expect  e, 32
        ret

wrapping:
        mov     $wrap, %ebx
        call    call_32
        cmp     $HOT * (3 + 3 + 9 + 3), %eax
        expect  e, 33
        ret

changing:
        mov     $change, %ebx
        call    call_32
        cmp     $HOT * (HOT + 1) / 2, %eax
        expect  e, 34
        ret

        .code32
# Each is hot before it faults.
read_on:
        mov     $ABSENT_PAGE - 4 * HOT, %ebx
        xor     %eax, %eax
1:      inc     %eax
read_at:
        add     (%ebx), %edx
        add     $4, %ebx
        jmp     1b

push_on:
        mov     $USER_PAGE + 4 * HOT, %esp
        xor     %eax, %eax
1:      inc     %eax
push_at:
        push    %eax
        jmp     1b

call_on:
        mov     $USER_PAGE + 4 * HOT, %esp
        xor     %eax, %eax
1:      inc     %eax
call_at:
        call    1b

pop_on: mov     $ABSENT_PAGE - 4 * HOT, %esp
        xor     %eax, %eax
1:      inc     %eax
pop_at: pop     %edx
        jmp     1b

divide_on:
        mov     $HOT, %ebx
        mov     $1000, %eax
1:      xor     %edx, %edx
divide_at:
        div     %ebx
        mov     $1000, %eax
        dec     %ebx
        jmp     1b

bound_on:
        xor     %eax, %eax
        movl    $0, number
        movl    $HOT, number + 4
1:      inc     %eax
bound_at:
        bound   %eax, number
        jmp     1b

privileged_on:
        mov     $HOT, %eax
1:      dec     %eax
        jnz     1b
privileged_at:
        hlt

# A null segment.
null_on:
        mov     $HOT, %ecx
1:      mov     %gs:-4, %eax
        dec     %ecx
        jnz     1b
        xor     %eax, %eax
        mov     %eax, %gs
null_at:
        mov     %gs:-4, %eax
        ud2

        .code64
        .macro  expect_fault n, name, vector, error, eax
        try     5f
        user_32 \name\()_on
5:      expect_trap \n + 20, \vector, \error, \name\()_at
        cmpl    $\eax, trap_registers
        expect  e, \n
        .endm
faults: expect_fault 40, read, 14, 4, HOT + 1
        expect_fault 41, push, 14, 6, HOT + 1
        cmpl    $USER_PAGE, trap_registers + 32
        expect  e, 68
        expect_fault 42, call, 14, 6, HOT + 1
        cmpl    $USER_PAGE - 4, trap_cr2
        expect  e, 69
        expect_fault 43, pop, 14, 4, HOT + 1
        expect_fault 44, divide, 0, 0, 1000
        expect_fault 45, bound, 5, 0, HOT + 1
        expect_fault 46, privileged, 13, 0, 0
        mov     $THREAD, %eax
        mov     %eax, %gs
        expect_fault 47, null, 13, 0, 0
        ret

# INT from 32-bit code: adds EBX to EAX.
interrupts:
        mov     $0x80, %edi
        mov     $service, %esi
        call    set_user_gate
        try     5f
        user_32 serve_on
5:      cmpl    $HOT * 3, trap_registers
        expect  e, 50
        ret
service:
        add     %ebx, %eax
        iretq

        .code32
serve_on:
        xor     %eax, %eax
        mov     $3, %ebx
        mov     $HOT, %ecx
1:      int     $0x80
        dec     %ecx
        jnz     1b
        ud2

# To another segment and back: the same, to 64-bit code, and to 32-bit code again.
far_on: xor     %eax, %eax
        mov     $HOT, %ecx
1:      lcall   $CODE32, $2f
        pushl   $CODE64
        pushl   $3f
        lret
        .code64
3:      push    $CODE32
        pushq   $4f
        lretq
        .code32
4:      dec     %ecx
        jnz     1b
        lret
2:      inc     %eax
        lret

        .code64
far_calls:
        mov     $far_on, %ebx
        call    call_32
        cmp     $HOT, %eax
        expect  e, 51
        ret

        .section .rodata
        .balign 8
more_segments:
        .quad   0x00cffb000000ffff      # user code, 32 bits
        .quad   0x00cff3000010ffff      # user data with a base of 16
        .quad   0x00cff3000000ffff      # user data, whose base is that of the thread
my_gdt_pointer:
        .word   MY_GDT_SIZE - 1
        .quad   my_gdt

        .balign 16
words:  .long   3, 9, 0, 0, 5, 0, 0, 0

        .section .bss
        .balign 4096
directory:
        .skip   4096
my_gdt: .skip   MY_GDT_SIZE
        .balign 64
area:   .skip   2048
        .skip   16
thread_area:
        .skip   64
counts: .skip   4 * 17
result: .skip   8
wanted: .skip   4
turns:  .skip   4
number: .skip   8
stack_word:
        .skip   8
far_address:
        .skip   8
