# Exceptions: vector, error code, saved RIP and CR2 of each kind, from ring 0 and from ring 3. QEMU 7.2 (TCG) fails 14
# and 30, where it gives vector * 16 + 2 as the error code, and 23, where it leaves the P bit out; processors pass.
        .include "macros.inc"

# Pages of their own at 4 GiB, mapped by exceptions: see map.
        .set    WINDOW, 0x100000000
        .set    READ_ONLY, WINDOW
        .set    NO_EXECUTE, WINDOW + 0x1000
        .set    NOT_PRESENT, WINDOW + 0x2000
        .set    USER_STACK, WINDOW + 0x3000
        .set    USER_PAGE, WINDOW + 0x4000
        .set    RESERVED_BIT, 1 << 39

        .code64
        .section .text
        .global main
main:   call    map

# 1: #DE, divide by zero. 2: #DE, quotient too large.
        try     1f
        xor     %ecx, %ecx
11:     div     %ecx
1:      expect_trap 1, 0, 0, 11b
        try     1f
        mov     $5, %edx
        mov     $5, %ecx
11:     div     %ecx
1:      expect_trap 2, 0, 0, 11b

# 3: #UD.
        try     1f
11:     ud2
1:      expect_trap 3, 6, 0, 11b

# 4: #BP is a trap: RIP is behind the instruction.
        try     1f
        int3
11:     nop
1:      expect_trap 4, 3, 0, 11b

# 5: #DB of single-stepping comes behind the instruction after POPF; 6: DR6 says so.
        try     1f
        pushf
        orl     $1 << 8, (%rsp)
        popf
        nop
11:     nop
1:      expect_trap 5, 1, 0, 11b
        mov     %dr6, %rax
        bt      $14, %rax
        expect  c, 6

# 7: #NM, FPU instruction with CR0.TS set.
        mov     %cr0, %rbx
        mov     %rbx, %rax
        or      $CR0_TS, %rax
        mov     %rax, %cr0
        try     1f
11:     fninit
1:      mov     %rbx, %cr0
        expect_trap 7, 7, 0, 11b

# 8: #NP names the selector. 9: #GP names a selector beyond the table. 10: SS wants RPL = CPL.
        try     1f
        mov     $ABSENT, %ecx
11:     mov     %ecx, %ds
1:      expect_trap 8, 11, ABSENT, 11b
        try     1f
        mov     $0x1001, %ecx
11:     mov     %ecx, %es
1:      expect_trap 9, 13, 0x1000, 11b
        try     1f
        mov     $USER_DATA, %ecx
11:     mov     %ecx, %ss
1:      expect_trap 10, 13, USER_DATA&~3, 11b

# 11: #GP(0), an address that is not canonical. 12: a task that is busy already. 13: a data segment in CS.
        try     1f
        movabs  $0x8000000000000000, %rcx
11:     mov     (%rcx), %eax
1:      expect_trap 11, 13, 0, 11b
        try     1f
        mov     $TASK, %ecx
11:     ltr     %cx
1:      expect_trap 12, 13, TASK, 11b
        try     1f
        push    $DATA
        push    $0x100000
11:     lretq
1:      expect_trap 13, 13, DATA, 11b

# 14: INT to what is no gate, #GP with its index and the IDT bit.
        try     1f
11:     int     $0x77
1:      expect_trap 14, 13, 0x77*8+2, 11b

# 15, 16: #PF, read of what is not present, and CR2. 17: write. 18: CR2 is where the access begins to fail.
        movabs  $NOT_PRESENT + 0x123, %rbx
        try     1f
11:     mov     (%rbx), %eax
1:      expect_trap 15, 14, 0, 11b
        cmp     %rbx, trap_cr2(%rip)
        expect  e, 16
        movabs  $NOT_PRESENT - 2, %rbx
        try     1f
11:     movl    $0, (%rbx)
1:      expect_trap 17, 14, 2, 11b
        lea     2(%rbx), %rbx
        cmp     %rbx, trap_cr2(%rip)
        expect  e, 18

# 19: what a failed write straddled is untouched.
        movabs  $NO_EXECUTE + 0xffe, %rbx
        cmpw    $0x5aa5, (%rbx)
        expect  e, 19

# 20: #PF, write to a read-only page with CR0.WP. 21: with WP clear, supervisors may.
        movabs  $READ_ONLY, %rbx
        try     1f
11:     movl    $1, (%rbx)
1:      expect_trap 20, 14, 3, 11b
        mov     %cr0, %rcx
        btr     $16, %rcx
        mov     %rcx, %cr0
        movl    $77, (%rbx)
        bts     $16, %rcx
        mov     %rcx, %cr0
        cmpl    $77, (%rbx)
        expect  e, 21

# 22: #PF, fetch from a no-execute page; RIP is the target.
        movabs  $NO_EXECUTE, %rbx
        try     1f
        jmp     *%rbx
1:      movl    $14, %edi
        movl    $0x11, %esi
        mov     %rbx, %rax
        call    compare_trap
        expect  e, 22

# 23: #PF, reserved bit set (PS in a PML4 entry).
        movabs  $RESERVED_BIT, %rbx
        try     1f
11:     mov     (%rbx), %eax
1:      expect_trap 23, 14, 9, 11b

# 24: the write set accessed and dirty. 25: no access, no bit. 26: a read sets accessed only.
        mov     window_pt, %eax
        and     $0x60, %eax
        cmp     $0x60, %eax
        expect  e, 24
        movabs  $USER_STACK, %rbx
        testl   $0x60, window_pt + 3 * 8
        expect  z, 25
        mov     (%rbx), %eax
        mov     window_pt + 3 * 8, %eax
        and     $0x60, %eax
        cmp     $0x20, %eax
        expect  e, 26

# Ring 3. 27: read of a supervisor page, error code with the user bit. 28: CS of the frame.
        try     1f
        mov     $user_read - user_start, %edi
        jmp     to_user
1:      mov     $user_read_at - user_start, %edi
        mov     $14, %esi
        mov     $5, %edx
        call    compare_user
        expect  e, 27
        cmpq    $USER_CODE, trap_cs(%rip)
        expect  e, 28

# 29: privileged instruction. 30: INT to a gate with DPL 0. 31: a gate with DPL 3 is let through.
        try     1f
        mov     $user_halt - user_start, %edi
        jmp     to_user
1:      mov     $user_halt_at - user_start, %edi
        mov     $13, %esi
        mov     $0, %edx
        call    compare_user
        expect  e, 29
        gate    0x30, finish
        try     1f
        mov     $user_int - user_start, %edi
        jmp     to_user
1:      mov     $user_int_at - user_start, %edi
        mov     $13, %esi
        mov     $0x30 * 8 + 2, %edx
        call    compare_user
        expect  e, 30
        mov     $0x80, %edi
        lea     2f(%rip), %rsi
        call    set_user_gate
        mov     %rsp, %rbx
        mov     $user_call - user_start, %edi
        jmp     to_user
2:      cmpq    $USER_CODE, 8(%rsp)
        mov     %rbx, %rsp
        expect  e, 31

# 32: SYSCALL is #UD while EFER.SCE is clear.
        try     1f
11:     syscall
1:      expect_trap 32, 6, 0, 11b
        ret

# EDI: offset in the user page; continues there in ring 3.
to_user:
        movabs  $USER_PAGE, %rax
        add     %rax, %rdi
        movabs  $USER_STACK + 0x1000, %rax
        push    $USER_DATA
        push    %rax
        push    $2
        push    $USER_CODE
        push    %rdi
        iretq

# EDI: offset in the user page, ESI: vector, EDX: error code; ZF if they were so.
compare_user:
        movabs  $USER_PAGE, %rax
        add     %rdi, %rax
        mov     %esi, %edi
        mov     %edx, %esi
        jmp     compare_trap

# The window at 4 GiB, and a reserved bit at 512 GiB.
map:    movl    $window_pd + 7, pdpt + 4 * 8
        movl    $window_pt + 7, window_pd
        movl    $page_a + 1, window_pt
        movl    $page_b + 3, window_pt + 8
        movl    $1 << 31, window_pt + 12
        movl    $page_c + 7, window_pt + 3 * 8
        movl    $page_d + 5, window_pt + 4 * 8
        movl    $1 | 1 << 7, pml4 + 8
        movw    $0x5aa5, page_b + 0xffe
        mov     $user_start, %esi
        mov     $page_d, %edi
        mov     $user_end - user_start, %ecx
        rep     movsb
        mov     %cr3, %rax
        mov     %rax, %cr3
        ret

# What runs in ring 3, copied to USER_PAGE.
        .balign 16
user_start:
user_read:
        mov     $0x100000, %ebx
user_read_at:
        mov     (%rbx), %eax
user_halt:
        nop
user_halt_at:
        hlt
user_int:
        nop
user_int_at:
        int     $0x30
user_call:
        int     $0x80
user_end:

        .section .bss
        .balign 4096
window_pd:
        .skip   0x1000
window_pt:
        .skip   0x1000
page_a: .skip   0x1000
page_b: .skip   0x1000
page_c: .skip   0x1000
page_d: .skip   0x1000
