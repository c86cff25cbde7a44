# Debug exceptions in code that has run often without any: single steps through instructions of every kind, breakpoints that appear in hot
# loops and go again, on what is executed, written, read, in all shapes; GD, RF, BS, BD, shadows, SYSCALL. SDM vol. 3B chapter 17.
        .include "macros.inc"

        .set    HOT, 100000
        .set    MILLION, 1000000
        .set    TF, 1 << 8
        .set    RF, 1 << 16
        .set    BS, 1 << 14
        .set    BD, 1 << 13
        .set    DR7, 1 << 10            # what is always set
        .set    EXECUTE, 0
        .set    WRITE, 1
        .set    ACCESS, 3
        .set    MSR_STAR, 0xc0000081
        .set    MSR_LSTAR, 0xc0000082
        .set    MSR_FMASK, 0xc0000084
        .set    WINDOW, 0x40000000

        .macro  often times, what
        mov     $\times, %ebp
.Loften\@:
        \what
        dec     %ebp
        jnz     .Loften\@
        .endm

# Breakpoint \n (0 to 3) at \address.
        .macro  breakpoint n, address, what, bytes
        lea     \address, %rax
        mov     %rax, %dr\n
        mov     $DR7 | 1 << (2 * \n) | (\what | (\bytes - 1) << 2) << (16 + 4 * \n), %eax
        mov     %rax, %dr7
        .endm
        .macro  no_breakpoints
        mov     $DR7, %eax
        mov     %rax, %dr7
        .endm
# Nothing has been logged, and no more than \most will.
        .macro  listen most
        movl    $0, count(%rip)
        movl    $\most, most(%rip)
        .endm
# Checks, as \n, that \times debug exceptions came, each with \dr6 at \at.
        .macro  logged n, times, dr6, at
        mov     $\times, %ecx
        mov     $\dr6, %edx
        lea     \at(%rip), %rsi
        call    all_logged
        expect  e, \n
        .endm
# Single-steps from here on, after the next instruction.
        .macro  step
        pushf
        orl     $TF, (%rsp)
        popf
        .endm
        .macro  no_step
        pushf
        andl    $~TF, (%rsp)
        popf
        .endm
# Checks, as \n, that single steps have been logged at the addresses in the table.
        .macro  stepped n, table
        lea     \table(%rip), %rsi
        call    compare_steps
        expect  e, \n
        .endm

        .code64
        .section .text
        .global main
main:   gate    1, on_debug
        movb    $2, idt + 16 + 4        # with its own stack: it may come where the stack is watched
        movq    $debug_stack_end, tss + 0x2c
        gate    0x90, on_interrupt
        movl    $window_pt + 7, pd + 512 * 8
        movl    $page_1 + 3, window_pt
        movl    $page_2 + 3, window_pt + 8

# 1: single steps, through code that has run HOT times. 2: PUSHF shows TF. 3: and how the code ended.
        mov     $HOT / 10, %r12d
1:      call    stepped_code
        dec     %r12d
        jnz     1b
        listen  1000
        step
        call    stepped_code
stepped_back:
        no_step
        mov     %eax, %r12d
        stepped 1, steps
        testl   $TF, pushed_flags(%rip)
        expect  nz, 2
        cmp     $1234, %r12d
        expect  e, 3

# 4: POPF that sets TF is itself not a step, one that clears it is. 5: IRETQ that sets it is not. 6: INT is not, nor is what its handler does. 7: MOV SS
# holds it up for one instruction.
        listen  1000
        pushf
        pop     %rax
        or      $TF, %eax
        push    %rax
        and     $~TF, %eax
        push    %rax
        pop     %rbx
        popf
        push    %rbx
4:      popf
        nop
        jmp     5f
        .section .rodata
        .balign 8
steps_popf:
        .quad   4b, 4b + 1, 0
        .section .text
5:      stepped 4, steps_popf
        listen  1000
        mov     %rsp, %rbx
        push    $DATA
        push    %rbx
        push    $TF | 2
        push    $CODE64
        lea     1f(%rip), %rax
        push    %rax
        iretq
1:      nop
2:      nop
3:      no_step
4:      jmp     5f
        .section .rodata
        .balign 8
steps_iret:
        .quad   2b, 3b, 3b + 1, 3b + 8, 4b, 0
        .section .text
5:      stepped 5, steps_iret
        listen  1000
        step
1:      nop
2:      int     $0x90
        nop
3:      nop
4:      no_step
5:      jmp     6f
        .section .rodata
        .balign 8
steps_int:
        .quad   2b, 3b, 4b, 4b + 1, 4b + 8, 5b, 0
        .section .text
6:      stepped 6, steps_int
        listen  1000
        mov     $DATA, %ecx
        step
        nop
1:      mov     %ecx, %ss
2:      nop
3:      nop
4:      no_step
5:      jmp     6f
        .section .rodata
        .balign 8
steps_ss:
        .quad   1b, 3b, 4b, 4b + 1, 4b + 8, 5b, 0
        .section .text
6:      stepped 7, steps_ss

# 8: user mode: SYSCALL and SYSRET look at TF when they are done.
        call    prepare_syscall
        mov     $HOT, %r12d
        mov     $2, %esi
        call    in_user_mode            # hot first
        listen  1000
        mov     $2, %r12d
        mov     $2 | TF, %esi
        call    in_user_mode
        lea     user_steps(%rip), %rsi
        call    compare_steps
        expect  e, 8

# 9: INT1 is a trap. 10: single steps in a loop that has run a million times, for a while in its middle.
        listen  10
        .byte   0xf1
1:      nop
        logged  9, 1, 0, 1b
        listen  100000
        mov     $MILLION, %ecx
        xor     %ebx, %ebx
1:      add     $3, %ebx
        cmp     $1000, %ecx
        jne     2f
        step
2:      cmp     $900, %ecx
        jne     3f
        no_step
3:      dec     %ecx
        jnz     1b
        cmp     $3 * MILLION, %ebx
        jne     1f
        cmpl    $4 + 99 * 7 + 8, count(%rip)
1:      expect  e, 10

# Breakpoints in a loop that has run a million times. 20, 21: on an instruction, as often as it runs; 22: on the next; 23: on its first; 24: on the
# one behind it. 25: the loop has counted right.
        lea     loop_code(%rip), %r13
        mov     $MILLION, %ecx
        call    *%r13
        listen  10
        breakpoint 0, loop_middle(%rip), EXECUTE, 1
        mov     $100, %ecx
        call    *%r13
        mov     %ebx, %r12d
        no_breakpoints
        logged  20, 10, 1, loop_middle
        cmp     $200, %r12d
        expect  e, 21
        mov     $MILLION / 10, %ecx
        call    *%r13
        listen  100
        breakpoint 3, loop_store(%rip), EXECUTE, 1
        mov     $100, %ecx
        call    *%r13
        no_breakpoints
        logged  22, 100, 8, loop_store
        listen  100
        breakpoint 2, loop_code(%rip), EXECUTE, 1
        mov     $100, %ecx
        call    *%r13
        no_breakpoints
        logged  23, 1, 4, loop_code
        listen  100
        breakpoint 1, loop_end(%rip), EXECUTE, 1
        mov     $100, %ecx
        call    *%r13
        mov     %ebx, %r12d
        no_breakpoints
        logged  24, 1, 2, loop_end
        cmp     $200, %r12d
        expect  e, 25

# 26: on where a call returns to. 27: on a function's entry, and 28: on what falls into it. 29: on a string instruction: once. 30: on one in two pages. 31:
# turned on in the loop itself.
        often   HOT, "call calls_it"
        listen  100
        breakpoint 0, calls_it_back(%rip), EXECUTE, 1
        often   10, "call calls_it"
        no_breakpoints
        logged  26, 10, 1, calls_it_back
        listen  100
        breakpoint 0, called(%rip), EXECUTE, 1
        often   10, "call calls_it"
        no_breakpoints
        logged  27, 10, 1, called
        listen  100
        breakpoint 0, called(%rip), EXECUTE, 1
        often   10, "call falls_into_it"
        no_breakpoints
        logged  28, 10, 1, called
        often   HOT / 10, "call string_code"
        listen  100
        breakpoint 0, string_at(%rip), EXECUTE, 1
        call    string_code
        no_breakpoints
        logged  29, 1, 1, string_at
        movb    $0xb8, page_1 + 0xffe   # mov $1, %eax; ret
        movb    $1, page_1 + 0xfff
        movl    $0, page_2
        movb    $0xc3, page_2 + 3
        mov     %cr3, %rax
        mov     %rax, %cr3
        often   HOT / 10, "call WINDOW + 0xffe"
        listen  100
        breakpoint 0, WINDOW + 0xffe, EXECUTE, 1
        often   10, "call WINDOW + 0xffe"
        no_breakpoints
        mov     $10, %ecx
        mov     $1, %edx
        mov     $WINDOW + 0xffe, %esi
        call    all_logged
        expect  e, 30
        listen  1000
        lea     3f(%rip), %rax
        mov     %rax, %dr0
        mov     $MILLION, %ecx
        mov     $DR7, %edx
        mov     $DR7 | 1, %edi
1:      mov     %edx, %eax
        cmp     $500, %ecx
        cmove   %edi, %eax
        cmp     $500, %ecx
        ja      2f
        mov     %rax, %dr7
2:      nop
3:      nop
        dec     %ecx
        jnz     1b
        no_breakpoints
        logged  31, 1, 1, 3b

# Data, 4 bytes at variable. 40: each store of a hot loop, 41: and not its loads. 42: loads too. 43: a store of which one byte is in it; 44: none beside
# it. 45: PUSH; 46: CALL; 47: RET; 48: XCHG; 49: SSE; 50: a store across pages. 51: behind MOV SS, when the shadow is gone.
        mov     $MILLION, %ecx
        call    data_loop
        listen  1000
        breakpoint 1, variable(%rip), WRITE, 4
        mov     $100, %ecx
        call    data_loop
        no_breakpoints
        logged  40, 100, 2, data_loop_stored
        mov     $MILLION / 10, %ecx
        call    data_loop
        listen  1000
        breakpoint 1, variable(%rip), WRITE, 4
        often   100, "mov variable(%rip), %ecx"
        no_breakpoints
        cmpl    $0, count(%rip)
        expect  e, 41
        listen  1000
        breakpoint 2, variable(%rip), ACCESS, 4
        mov     $100, %ecx
        call    data_loop
        no_breakpoints
        cmpl    $200, count(%rip)
        expect  e, 42
        .macro  data n, dr6, what
        listen  100
        breakpoint 0, variable(%rip), WRITE, 4
        lea     variable(%rip), %rdi
        \what
.Ldata\@:
        no_breakpoints
        logged  \n, 1, \dr6, .Ldata\@
        .endm
        data    43, 1, "mov %rax, -7(%rdi)"
        listen  100
        breakpoint 0, variable(%rip), WRITE, 4
        lea     variable(%rip), %rdi
        mov     %rax, -8(%rdi)
        mov     %eax, 4(%rdi)
        movb    $0, -1(%rdi)
        movups  %xmm0, -16(%rdi)
        movups  %xmm0, 4(%rdi)
        no_breakpoints
        cmpl    $0, count(%rip)
        expect  e, 44
        mov     %rsp, %r14
        lea     variable + 8(%rip), %rsp
        listen  100
        breakpoint 0, variable(%rip), WRITE, 4
        push    %rax
1:      mov     %r14, %rsp
        no_breakpoints
        logged  45, 1, 1, 1b
        listen  100
        lea     variable + 8(%rip), %rsp
        breakpoint 0, variable(%rip), WRITE, 4
        call    1f
        nop
1:      mov     %r14, %rsp
        no_breakpoints
        logged  46, 1, 1, 1b
        listen  100
        lea     1f(%rip), %rax
        mov     %rax, variable(%rip)
        lea     variable(%rip), %rsp
        breakpoint 0, variable(%rip), ACCESS, 4
        ret
        nop
1:      mov     %r14, %rsp
        no_breakpoints
        logged  47, 1, 1, 1b
        data    48, 1, "xchg %eax, (%rdi)"
        data    49, 1, "movups %xmm0, -12(%rdi)"
        listen  100
        breakpoint 0, WINDOW + 0x1000, WRITE, 1
        mov     %rax, WINDOW + 0xffd
1:      no_breakpoints
        logged  50, 1, 1, 1b
        movl    $DATA, variable(%rip)
        listen  100
        breakpoint 0, variable(%rip), ACCESS, 4
        mov     variable(%rip), %ss
        nop
1:      no_breakpoints
        logged  51, 1, 1, 1b

# 52: in the middle of REP MOVSB, as soon as its byte is written: 53: RCX says so. 54: of REP STOSB downwards.
        often   100, "call copy"
        listen  100
        breakpoint 0, buffer + 100(%rip), WRITE, 1
        call    copy
        no_breakpoints
        logged  52, 1, 1, copy_at
        cmpq    $1000 - 101, log_rcx(%rip)
        expect  e, 53
        listen  100
        breakpoint 0, buffer + 100(%rip), WRITE, 1
        mov     $200, %ecx
        lea     buffer + 199(%rip), %rdi
        std
2:      rep     stosb
        cld
        no_breakpoints
        logged  54, 1, 1, 2b

# 60: GD: a move to a debug register is a fault, 61: and GD is off then; BD says why. 62: RF in IRETQ's frame skips a breakpoint, once. 63: a million
# iterations under a breakpoint that is not met.
        listen  100
        mov     $DR7 | 1 << 13, %eax
        mov     %rax, %dr7
1:      mov     %dr0, %rax
        logged  60, 1, BD, 1b
        mov     %dr7, %rax
        test    $1 << 13, %eax
        expect  z, 61
        listen  100
        lea     1f(%rip), %rax
        mov     %rax, %dr0
        mov     $DR7 | 1, %ecx
        mov     %rcx, %dr7
        mov     %rsp, %rbx
        mov     $2, %ecx
        push    $DATA
        push    %rbx
        push    $RF | 2
        push    $CODE64
        push    %rax
        iretq
1:      dec     %ecx
        jnz     1b                      # the second time it is met
        no_breakpoints
        logged  62, 1, 1, 1b
        listen  100
        breakpoint 0, variable(%rip), WRITE, 1
        mov     $HOT, %ecx
        movl    $0, other_variable(%rip)
        xor     %ebx, %ebx
1:      incl    other_variable(%rip)
        add     other_variable(%rip), %ebx
        dec     %ecx
        jnz     1b
        no_breakpoints
        cmpl    $0, count(%rip)
        jne     1f
        cmpl    $HOT, other_variable(%rip)
1:      expect  e, 63
        ret

# #DB: logs, sets RF for breakpoints on instructions, and takes them away when there have been enough.
on_debug:
        push    %rax
        push    %rbx
        mov     count(%rip), %ebx
        incl    count(%rip)
        cmp     $LOG, %ebx
        jae     1f
        mov     16(%rsp), %rax
        mov     %rax, log_rip(, %rbx, 8)
        mov     %rcx, log_rcx(, %rbx, 8)
        mov     %dr6, %rax
        mov     %rax, log_dr6(, %rbx, 8)
1:      mov     $0xffff0ff0, %eax
        mov     %rax, %dr6
        orl     $RF, 32(%rsp)
        inc     %ebx
        cmp     most(%rip), %ebx
        jb      2f
        mov     $DR7, %eax
        mov     %rax, %dr7
        andl    $~TF, 32(%rsp)
2:      pop     %rbx
        pop     %rax
        iretq

on_interrupt:
        push    %rax
        add     $1, %rax
        pop     %rax
        iretq

# ECX: how many, EDX: DR6, RSI: RIP of all of them. ZF.
all_logged:
        cmp     %ecx, count(%rip)
        jne     2f
        xor     %ebx, %ebx
1:      cmp     log_rip(, %rbx, 8), %rsi
        jne     2f
        mov     log_dr6(, %rbx, 8), %eax
        and     $BS | BD | 15, %eax
        cmp     %edx, %eax
        jne     2f
        inc     %ebx
        loop    1b
        cmp     %eax, %eax
2:      ret

# RSI: addresses, then 0. Each has been logged, as a single step and in this order.
compare_steps:
        xor     %ebx, %ebx
1:      mov     (%rsi, %rbx, 8), %rax
        test    %rax, %rax
        jz      2f
        cmp     log_rip(, %rbx, 8), %rax
        jne     3f
        mov     log_dr6(, %rbx, 8), %eax
        and     $BS | BD | 15, %eax
        cmp     $BS, %eax
        jne     3f
        inc     %ebx
        jmp     1b
2:      cmp     %ebx, count(%rip)
        ret
3:      push    %rax
        push    %rdi
        print   " step "
        mov     %ebx, %edi
        call    print_number
        print   " was at "
        mov     log_rip(, %rbx, 8), %rdi
        call    print_hex
        print   " not "
        mov     8(%rsp), %rdi
        call    print_hex
        print   "\n"
        pop     %rdi
        pop     %rax
        test    %rsp, %rsp
        ret

# Instructions of many kinds, and in steps where each leaves RIP.
stepped_code:
c0:     mov     $3, %ecx
c1:     lea     variable(%rip), %rdi
c2:     rep     stosb
c3:     jmp     c5
c4:     ud2
c5:     call    c7
c6:     jmp     c8
c7:     ret
c8:     xor     %eax, %eax
c9:     jz      c11
c10:    ud2
c11:    jnz     c13
c12:    mov     $3, %ecx
c13:    loop    c13
c14:    pushf
c15:    popq    pushed_flags(%rip)
c16:    push    %rbp
c17:    mov     %rsp, %rbp
c18:    sub     $32, %rsp
c19:    leave
c20:    lock    incl variable(%rip)
c21:    movups  variable(%rip), %xmm0
c22:    paddd   %xmm0, %xmm0
c23:    fninit
c24:    fld1
c25:    fstpl   variable(%rip)
c26:    lea     buffer(%rip), %rsi
c27:    cmpsb
c28:    lea     c31(%rip), %rax
c29:    jmp     *%rax
c30:    ud2
c31:    xor     %ecx, %ecx
c32:    rep     movsb
c33:    std
c34:    cld
c35:    cli
c36:    mov     $1234, %eax
c37:    ret
        .section .rodata
        .balign 8
steps:
        .quad   c0, c1, c2, c2, c2, c3, c5, c7, c6, c8
        .quad   c9, c11, c12, c13, c13, c13, c14, c15, c16, c17
        .quad   c18, c19, c20, c21, c22, c23, c24, c25, c26, c27
        .quad   c28, c29, c31, c32, c33, c34, c35, c36, c37, stepped_back
        .quad   stepped_back + 1, stepped_back + 8, stepped_back + 9
        .quad   0
        .section .text

loop_code:
        xor     %ebx, %ebx
loop_start:
        add     $1, %ebx
loop_middle:
        add     $1, %ebx
loop_store:
        mov     %ebx, other_variable(%rip)
        dec     %ecx
        jnz     loop_start
loop_end:
        ret
        .balign 64
calls_it:
        call    called
calls_it_back:
        ret
falls_into_it:
        nop
called: nop
        ret
string_code:
        lea     buffer(%rip), %rdi
        mov     $100, %ecx
string_at:
        rep     stosb
        ret
data_loop:
        mov     variable(%rip), %eax
data_loop_loaded:
        inc     %eax
        mov     %eax, variable(%rip)
data_loop_stored:
        dec     %ecx
        jnz     data_loop
        ret
copy:   lea     buffer + 2048(%rip), %rsi
        lea     buffer(%rip), %rdi
        mov     $1000, %ecx
copy_at:
        rep     movsb
        ret

# User mode: R12 times round, flags ESI. Ends by SYSCALL with R12 = 0.
in_user_mode:
        mov     %rsp, kept_rsp(%rip)
        push    $USER_DATA
        push    $WINDOW + 0x4000
        push    %rsi
        push    $USER_CODE
        push    $WINDOW + 0x2000
        iretq
on_syscall:
        test    %r12d, %r12d
        jz      1f
        sysretq
1:      mov     $DATA, %eax
        mov     %eax, %ss
        mov     kept_rsp(%rip), %rsp
        ret
user_start:
        nop
user_syscall:
        syscall
user_back:
        dec     %r12d
user_branch:
        jnz     user_start
user_end:
        syscall
user_over:
        .section .rodata
        .balign 8
        .set    USER, WINDOW + 0x2000
user_steps:
        .quad   USER + user_syscall - user_start, USER + user_back - user_start, USER + user_branch - user_start, USER + user_start - user_start
        .quad   USER + user_syscall - user_start, USER + user_back - user_start, USER + user_branch - user_start, USER + user_end - user_start, 0
        .section .text
prepare_syscall:
        movl    $user_page + 7, window_pt + 16
        movl    $user_stack + 7, window_pt + 24
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $user_start, %esi
        mov     $user_page, %edi
        mov     $user_over - user_start, %ecx
        rep     movsb
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $1, %eax
        wrmsr
        mov     $MSR_STAR, %ecx
        xor     %eax, %eax
        mov     $DATA << 16 | CODE64, %edx
        wrmsr
        mov     $MSR_LSTAR, %ecx
        mov     $on_syscall, %eax
        xor     %edx, %edx
        wrmsr
        mov     $MSR_FMASK, %ecx
        mov     $TF | 1 << 9, %eax
        xor     %edx, %edx
        wrmsr
        ret

        .section .bss
        .balign 4096
window_pt:
        .skip   4096
page_1: .skip   4096
page_2: .skip   4096
user_page:
        .skip   4096
user_stack:
        .skip   4096
buffer: .skip   4096
        .set    LOG, 1024
log_rip:
        .skip   8 * LOG
log_rcx:
        .skip   8 * LOG
log_dr6:
        .skip   8 * LOG
        .skip   4096
debug_stack_end:
        .skip   16
variable:
        .skip   64
other_variable:
        .skip   8
pushed_flags:
        .skip   8
kept_rsp:
        .skip   8
count:  .skip   4
most:   .skip   4
