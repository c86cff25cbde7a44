# Page tables that change under code and data that have been used often: every way of flushing, permissions that shrink, accessed and
# dirty bits, large pages that are split, address spaces by PCID, code in two places at once, instructions in two pages, SMAP,
# SMEP, WP, and another processor that is told to forget. What is expected is SDM vol. 3A §4.6 to §4.10.
        .include "macros.inc"

        .set    HOT, 100000
        .set    ROUNDS, 200
        .set    WINDOW, 0x40000000      # 2 MiB of pages of 4 KiB: entry n of window_pt is page n
        .set    LARGE, 0x40200000       # the next 2 MiB
        .set    LARGE_FRAME, 0x400000   # what is there
        .set    HUGE, 0x200000000       # 1 GiB
        .set    GATE, 0x80              # user mode ends by this interrupt

        .set    P, 1
        .set    W, 2
        .set    U, 4
        .set    A, 0x20
        .set    D, 0x40
        .set    PS, 0x80
        .set    G, 0x100

        .set    CR4_PGE, 1 << 7
        .set    CR4_PCIDE, 1 << 17
        .set    CR4_SMEP, 1 << 20
        .set    CR4_SMAP, 1 << 21
        .set    HAS_PCID, 1
        .set    HAS_INVPCID, 2
        .set    HAS_SMEP, 4
        .set    HAS_SMAP, 8
        .set    HAS_1G, 16

# Entry \n of the window becomes \value (a frame and flags). Clobbers RAX.
        .macro  put n, value
        mov     $\value, %eax
        mov     %rax, window_pt + 8 * \n
        .endm
        .macro  put_nx n, value
        put     \n, \value
        btsq    $63, window_pt + 8 * \n
        .endm
        .macro  flush n
        invlpg  WINDOW + 0x1000 * \n
        .endm
        .macro  often times, what:vararg
        mov     $\times, %ebp
.Loften\@:
        \what
        dec     %ebp
        jnz     .Loften\@
        .endm

# Checks, as \n, that page \page of the window has these of the bits accessed and dirty.
        .macro  bits n, page, wanted
        mov     window_pt + 8 * \page, %eax
        and     $A | D, %eax
        cmp     $\wanted, %eax
        expect  e, \n
        .endm
        .macro  clear_bits page
        andq    $~(A | D), window_pt + 8 * \page
        flush   \page
        .endm

# Checks, as \n, that the instruction at \at has raised #PF with \error for \address.
        .macro  expect_fault n, error, at, address
        lea     \at(%rip), %rax
        mov     $14, %edi
        mov     $\error, %esi
        call    compare_trap
        jne     .Lfault\@
        mov     $\address, %eax
        cmp     %rax, trap_cr2(%rip)
.Lfault\@:
        expect  e, \n
        .endm
# The same for a fetch: RIP is a number too.
        .macro  expect_fetch_fault n, error, at, address
        mov     $\at, %eax
        mov     $14, %edi
        mov     $\error, %esi
        call    compare_trap
        jne     .Lfault\@
        mov     $\address, %eax
        cmp     %rax, trap_cr2(%rip)
.Lfault\@:
        expect  e, \n
        .endm
        .macro  without feature, from, to, label
        testb   $\feature, features(%rip)
        jnz     .Lwith\@
        skip_checks \from, \to
        jmp     \label
.Lwith\@:
        .endm

        .code64
        .section .text
        .global main
main:   call    prepare

# Page 0 is code, page 1 data; each is one frame, then another, ROUNDS times, with a flush after each change. 1 to 7: code; 11 to
# 17: data, read and written. 1, 11: INVLPG. 2, 12: CR3. 3, 13: CR4.PGE. 4 to 7, 14 to 17: INVPCID of an address, of a PCID, of all, of
# all that is not global.
        lea     flushes(%rip), %r12
        mov     $1, %ebx
1:      mov     8(%r12), %al
        or      features(%rip), %al
        cmp     features(%rip), %al
        je      2f
        push    %rbx
        call    skip
        add     $10, %ebx
        push    %rbx
        call    skip
        jmp     3f
2:      call    remap_code
        call    report
        add     $10, %ebx
        call    remap_data
        call    report
3:      sub     $9, %ebx
        add     $16, %r12
        cmp     $8, %ebx
        jb      1b

# 21: global pages too, by INVLPG; 22: by CR4.PGE; 23: by INVPCID of all.
        mov     %cr4, %rax
        or      $CR4_PGE, %rax
        mov     %rax, %cr4
        movl    $G, global(%rip)
        mov     $21, %ebx
        lea     flushes(%rip), %r12
        call    remap_code
        call    report
        inc     %ebx
        lea     flushes + 32(%rip), %r12
        call    remap_code
        call    report
        without HAS_INVPCID, 23, 23, 1f
        inc     %ebx
        lea     flushes + 80(%rip), %r12
        call    remap_code
        call    report
1:      movl    $0, global(%rip)
        mov     %cr4, %rax
        and     $~CR4_PGE, %rax
        mov     %rax, %cr4

# Permissions that shrink under what has used them. 30: a store, and 31: nothing has been stored. 32: when it is allowed again, at the
# latest after one more fault. 33, 34: a load and a store where nothing is any more. 35: a call. 36: a call to what is no code any more. 37:
# and again.
        put     1, data_a + P + W
        flush   1
        often   HOT, movl %ebp, WINDOW + 0x1000
        put     1, data_a + P
        flush   1
        try     1f
        movl    $77, %ecx
11:     movl    %ecx, WINDOW + 0x1000
1:      expect_fault 30, 3, 11b, WINDOW+0x1000
        cmpl    $1, data_a
        expect  e, 31
        put     1, data_a + P + W
        try     1f
        movl    $78, WINDOW + 0x1000
1:      movl    $78, WINDOW + 0x1000
        cmpl    $78, data_a
        expect  e, 32
        often   HOT, mov WINDOW + 0x1000, %ecx
        put     1, 0
        flush   1
        try     1f
11:     mov     WINDOW + 0x1004, %eax
1:      expect_fault 33, 0, 11b, WINDOW+0x1004
        try     1f
11:     mov     %al, WINDOW + 0x1ffe
1:      expect_fault 34, 2, 11b, WINDOW+0x1ffe
        put     0, code_a + P
        flush   0
        often   HOT, call WINDOW
        put     0, 0
        flush   0
        try     1f
        call    WINDOW
1:      expect_fetch_fault 35, 0x10, WINDOW, WINDOW
        put     0, code_a + P
        often   HOT, call WINDOW
        put_nx  0, code_a + P
        flush   0
        try     1f
        call    WINDOW
1:      expect_fetch_fault 36, 0x11, WINDOW, WINDOW
        put     0, code_b + P
        flush   0
        call    WINDOW
        cmp     $2, %eax
        expect  e, 37

# User mode: page 2 is its code, page 3 its stack, page 4 its data. 38: it runs. 39: its code is the supervisor's now. 40: its data; 41: a
# store there.
        put     2, user_page + P + U
        put     3, user_stack + P + W + U
        put     4, data_a + P + W + U
        flush   2
        flush   3
        flush   4
        mov     $user_loop - user_start, %edi
        call    in_user_mode
        cmp     $2 * HOT, %ecx
        expect  e, 38
        put     2, user_page + P
        flush   2
        try     1f
        mov     $user_loop - user_start, %edi
        call    in_user_mode
1:      expect_fetch_fault 39, 0x15, WINDOW+0x2000+user_loop-user_start, WINDOW+0x2000+user_loop-user_start
        put     2, user_page + P + U
        flush   2
        put     4, data_a + P + W
        flush   4
        try     1f
        mov     $user_loop - user_start, %edi
        call    in_user_mode
1:      expect_fetch_fault 40, 5, WINDOW+0x2000+user_loop_at-user_start, WINDOW+0x4000
        try     1f
        mov     $user_store - user_start, %edi
        call    in_user_mode
1:      expect_fetch_fault 41, 7, WINDOW+0x2000+user_store_at-user_start, WINDOW+0x4000

# Accessed and dirty. 42: a flush alone leaves them. 43: a load. 44: a store behind it. 45: again and again in a loop. 46 to 48: by
# instructions that read, that write (though they may write what was there), that do neither; with and without a load before.
        put     5, data_a + P + W
        flush   5
        bits    42, 5, 0
        mov     WINDOW + 0x5000, %eax
        bits    43, 5, A
        movl    %eax, WINDOW + 0x5000
        bits    44, 5, A+D
        mov     $1000, %ebp
1:      clear_bits 5
        mov     WINDOW + 0x5008, %ecx
        mov     window_pt + 8 * 5, %eax
        and     $A | D, %eax
        cmp     $A, %eax
        jne     2f
        mov     %ecx, WINDOW + 0x5008
        mov     %ecx, WINDOW + 0x500c
        mov     window_pt + 8 * 5, %eax
        and     $A | D, %eax
        cmp     $A | D, %eax
        jne     2f
        dec     %ebp
        jnz     1b
        test    %ebp, %ebp
2:      expect  e, 45
        mov     $46, %ebx
        mov     $A, %r13d
        lea     readers(%rip), %r12
        call    bits_of_all
        mov     $A | D, %r13d
        lea     writers(%rip), %r12
        call    bits_of_all
        xor     %r13d, %r13d
        lea     neither(%rip), %r12
        call    bits_of_all

# 49: a store that fails leaves no D. 50: what runs is accessed, and not dirty. 51: the level above is accessed, and never dirty.
        put     5, data_a + P
        flush   5
        try     1f
        movl    $1, WINDOW + 0x5000
1:      testl   $D, window_pt + 8 * 5
        expect  z, 49
        put     0, code_a + P + W
        flush   0
        call    WINDOW
        bits    50, 0, A
        andl    $~(A | D), pd + 512 * 8
        put     5, data_a + P + W
        flush   5
        movl    $1, WINDOW + 0x5000
        mov     pd + 512 * 8, %eax
        and     $A | D, %eax
        cmp     $A, %eax
        expect  e, 51

# A page of 2 MiB becomes 512, one of which is elsewhere, and one again. 52: code; 53: data. 54: its dirty bit. 55: the same with 1 GiB
# and 2 MiB.
        mov     $LARGE_FRAME, %edi
        mov     $large_pt, %esi
        mov     $512, %ecx
1:      lea     P + W(%rdi), %rax
        mov     %rax, (%rsi)
        add     $0x1000, %edi
        add     $8, %esi
        loop    1b
        movl    $code_b + P, large_pt + 8 * 3
        movl    $data_b + P + W, large_pt + 8 * 4
        movl    $2, data_b
        movl    $0xb8 | 1 << 8, LARGE_FRAME + 0x3000    # mov $1, %eax; ret
        movl    $0xc30000, LARGE_FRAME + 0x3003
        movl    $1, LARGE_FRAME + 0x4000
        movl    $LARGE_FRAME + P + W + PS, pd + 513 * 8
        often   HOT, call LARGE + 0x3000
        xor     %ebx, %ebx
        xor     %r13d, %r13d
        mov     $ROUNDS, %r12d
1:      movl    $large_pt + P + W, pd + 513 * 8
        invlpg  LARGE + 0x3000
        invlpg  LARGE + 0x4000
        often   5, call LARGE + 0x3000
        add     %eax, %ebx
        add     LARGE + 0x4000, %r13d
        movl    $LARGE_FRAME + P + W + PS, pd + 513 * 8
        invlpg  LARGE + 0x3000
        invlpg  LARGE + 0x4000
        often   5, call LARGE + 0x3000
        add     %eax, %ebx
        add     LARGE + 0x4000, %r13d
        dec     %r12d
        jnz     1b
        cmp     $3 * ROUNDS, %ebx
        expect  e, 52
        cmp     $3 * ROUNDS, %r13d
        expect  e, 53
        movl    $LARGE_FRAME + P + W + PS, pd + 513 * 8
        invlpg  LARGE
        mov     LARGE + 0x5000, %eax
        mov     pd + 513 * 8, %ebx
        mov     %eax, LARGE + 0x15000
        mov     pd + 513 * 8, %eax
        and     $A | D, %ebx
        and     $A | D, %eax
        shl     $8, %eax
        or      %ebx, %eax
        cmp     $(A | D) << 8 | A, %eax
        expect  e, 54
        without HAS_1G, 55, 55, 2f
        movl    $P + W + PS, huge_pd            # 0 to 2 MiB, and 4 MiB at 2 MiB
        movl    $LARGE_FRAME + P + W + PS, huge_pd + 8
        movl    $P + W + PS, pdpt + 8 * 8
        movl    $0xb8 | 3 << 8, LARGE_FRAME - 0x200000 + 0x3000
        movl    $0xc30000, LARGE_FRAME - 0x200000 + 0x3003
        movabs  $HUGE + 0x203000, %rdi
        often   HOT, call *%rdi
        xor     %ebx, %ebx
        mov     $ROUNDS, %r12d
1:      movl    $huge_pd + P + W, pdpt + 8 * 8
        invlpg  (%rdi)
        often   5, call *%rdi
        add     %eax, %ebx
        movl    $P + W + PS, pdpt + 8 * 8
        invlpg  (%rdi)
        often   5, call *%rdi
        add     %eax, %ebx
        dec     %r12d
        jnz     1b
        cmp     $4 * ROUNDS, %ebx
        expect  e, 55
2:
# Code in two places, pages 8 and 10, which says where it is: 56: by LEA; 57: by CALL. What is behind it differs: 58: jumps, calls and falls
# into the next page go where they should, in turn.
        put     8, mobile + P
        put     9, code_a + P
        put     10, mobile + P
        put     11, code_b + P
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $HOT, %ebp
1:      call    WINDOW + 0x8000
        cmp     $WINDOW + 0x8000 + 7, %rax
        jne     2f
        call    WINDOW + 0xa000
        cmp     $WINDOW + 0xa000 + 7, %rax
        jne     2f
        dec     %ebp
        jnz     1b
        test    %ebp, %ebp
2:      expect  e, 56
        mov     $HOT, %ebp
1:      call    WINDOW + 0x8000 + mobile_call - mobile
        cmp     $WINDOW + 0x8000 + mobile_call_next - mobile, %rax
        jne     2f
        call    WINDOW + 0xa000 + mobile_call - mobile
        cmp     $WINDOW + 0xa000 + mobile_call_next - mobile, %rax
        jne     2f
        dec     %ebp
        jnz     1b
        test    %ebp, %ebp
2:      expect  e, 57
        lea     crossings(%rip), %r12
1:      movzwl  (%r12), %r13d
        lea     WINDOW + 0x8000(%r13), %rsi
        lea     WINDOW + 0xa000(%r13), %rdi
        mov     $HOT, %ebp
3:      call    *%rsi
        cmp     $1, %eax
        jne     2f
        call    *%rdi
        cmp     $2, %eax
        jne     2f
        dec     %ebp
        jnz     3b
        add     $2, %r12
        cmpw    $0, (%r12)
        jne     1b
2:      expect  e, 58

# 59: the same from page 8 alone, behind which pages come and go. 60: an instruction whose second half does. 61: the page that is returned
# to is another than the one that called. 62: code that changes the page it is in, and flushes by INVLPG; 63: by CR3.
        lea     crossings(%rip), %r12
1:      movzwl  (%r12), %r13d
        lea     WINDOW + 0x8000(%r13), %rsi
        often   HOT, call *%rsi
        mov     $ROUNDS, %ebp
3:      put     9, code_b + P
        flush   9
        call    *%rsi
        cmp     $2, %eax
        jne     2f
        put     9, code_a + P
        flush   9
        call    *%rsi
        cmp     $1, %eax
        jne     2f
        dec     %ebp
        jnz     3b
        add     $2, %r12
        cmpw    $0, (%r12)
        jne     1b
2:      expect  e, 59
        movb    $0xb8, mobile_end - 1   # mov $n, %eax; ret
        movl    $0x01234567, code_a + 0x100
        put     9, half_a + P
        flush   9
        call    WINDOW + 0x8fff
        often   HOT, call WINDOW + 0x8fff
        mov     $ROUNDS, %ebp
3:      put     9, half_b + P
        flush   9
        call    WINDOW + 0x8fff
        cmp     $0x22222222, %eax
        jne     2f
        put     9, half_a + P
        flush   9
        call    WINDOW + 0x8fff
        cmp     $0x11111111, %eax
        jne     2f
        dec     %ebp
        jnz     3b
        test    %ebp, %ebp
2:      expect  e, 60
        movb    $0xc3, mobile_end - 1
        put     12, returns_a + P
        flush   12
        lea     do_nothing(%rip), %rdi
        often   HOT, call WINDOW + 0xc000
        lea     change_12(%rip), %rdi
        mov     $ROUNDS, %ebp
1:      mov     $returns_b + P, %edx
        call    WINDOW + 0xc000
        cmp     $2, %eax
        jne     2f
        mov     $returns_a + P, %edx
        call    WINDOW + 0xc000
        cmp     $1, %eax
        jne     2f
        dec     %ebp
        jnz     1b
        test    %ebp, %ebp
2:      expect  e, 61
        mov     $62, %ebx
        mov     $WINDOW + 0xc000 + changes_self_invlpg - returns_a_code, %r12d
1:      mov     $ROUNDS, %ebp
        mov     $WINDOW + 0xc000, %esi
3:      mov     $returns_b + P, %edx
        call    *%r12
        cmp     $2, %eax
        jne     2f
        mov     $returns_a + P, %edx
        call    *%r12
        cmp     $1, %eax
        jne     2f
        dec     %ebp
        jnz     3b
        test    %ebp, %ebp
2:      call    report
        mov     $WINDOW + 0xc000 + changes_self_cr3 - returns_a_code, %r12d
        inc     %ebx
        cmp     $63, %ebx
        je      1b

# Instructions in two pages. 70: the second is not there: RIP is the instruction, CR2 the second page. 71: it is no code. 72: now it is. 73: what
# ends with its page needs no next one. 74, 75: what runs into it does all of its work before that.
        movb    $0xb8, mobile_end - 1
        put     9, 0
        flush   9
        try     1f
        call    WINDOW + 0x8fff
1:      expect_fetch_fault 70, 0x10, WINDOW+0x8fff, WINDOW+0x9000
        put_nx  9, half_a + P
        try     1f
        call    WINDOW + 0x8fff
1:      expect_fetch_fault 71, 0x11, WINDOW+0x8fff, WINDOW+0x9000
        put     9, half_b + P
        flush   9
        call    WINDOW + 0x8fff
        cmp     $0x22222222, %eax
        expect  e, 72
        movb    $0xc3, mobile_end - 1
        put     9, 0
        flush   9
        xor     %eax, %eax
        call    WINDOW + 0x8000 + mobile_fall - mobile
        expect  z, 73
        movb    $0x90, mobile_end - 1
        movl    $0, counter(%rip)
        try     1f
        lea     counter(%rip), %rdi
        call    WINDOW + 0x8000 + mobile_count - mobile
1:      expect_fetch_fault 74, 0x10, WINDOW+0x9000, WINDOW+0x9000
        cmpl    $3, counter(%rip)
        expect  e, 75

# SMAP: page 4 is the user's. 80: load and 81: store are refused. 82: STAC lets them, CLAC no more, in a loop. 83: POPF does too. 84: the
# processor's own loads are refused always: a segment from a table in that page.
        put     4, data_a + P + W + U
        flush   4
        without HAS_SMAP, 80, 84, 5f
        mov     %cr4, %rax
        or      $CR4_SMAP, %rax
        mov     %rax, %cr4
        clac
        try     1f
11:     mov     WINDOW + 0x4000, %eax
1:      expect_fault 80, 1, 11b, WINDOW+0x4000
        try     1f
11:     mov     %eax, WINDOW + 0x4010
1:      expect_fault 81, 3, 11b, WINDOW+0x4010
        xor     %ebx, %ebx
        mov     $ROUNDS, %r12d
1:      mov     $50, %ebp
2:      stac
        addl    $1, WINDOW + 0x4000
        clac
        addl    $1, WINDOW + 0x5000
        dec     %ebp
        jnz     2b
        try     3f
        addl    $1, WINDOW + 0x4000
        jmp     4f
3:      cmpl    $3, trap_error(%rip)
        jne     4f
        inc     %ebx
4:      dec     %r12d
        jnz     1b
        cmp     $ROUNDS, %ebx
        expect  e, 82
        pushf
        orl     $1 << 18, (%rsp)
        popf
        mov     WINDOW + 0x4000, %ecx
        pushf
        andl    $~(1 << 18), (%rsp)
        popf
        try     1f
11:     mov     WINDOW + 0x4000, %eax
1:      expect_fault 83, 1, 11b, WINDOW+0x4000
        movabs  $0x00cf93000000ffff, %rax
        mov     %rax, data_a + 0x800
        call    load_ldt
        stac
        try     1f
        mov     $4, %ecx
11:     mov     %ecx, %es
1:      clac
        expect_fault 84, 1, 11b, WINDOW+0x4800
        xor     %eax, %eax
        lldt    %ax
        lgdt    gdt_pointer
        mov     $DATA, %eax
        mov     %eax, %es
        mov     %cr4, %rax
        and     $~CR4_SMAP, %rax
        mov     %rax, %cr4
5:
# SMEP. 85: without it user code runs here. 86: with it, not. 87: code that becomes the user's.
        put     0, code_a + P + U
        flush   0
        call    WINDOW
        cmp     $1, %eax
        expect  e, 85
        often   HOT, call WINDOW
        without HAS_SMEP, 86, 87, 5f
        mov     %cr4, %rax
        or      $CR4_SMEP, %rax
        mov     %rax, %cr4
        try     1f
        call    WINDOW
1:      expect_fetch_fault 86, 0x11, WINDOW, WINDOW
        put     0, code_a + P
        flush   0
        often   HOT, call WINDOW
        put     0, code_a + P + U
        flush   0
        try     1f
        call    WINDOW
1:      expect_fetch_fault 87, 0x11, WINDOW, WINDOW
        mov     %cr4, %rax
        and     $~CR4_SMEP, %rax
        mov     %rax, %cr4
5:
# 88: CR0.WP, again and again.
        put     5, data_a + P
        flush   5
        mov     %cr0, %r13
        mov     %r13, %r14
        btr     $16, %r14
        movl    $0, data_a
        xor     %ebx, %ebx
        mov     $ROUNDS, %ebp
1:      mov     %r14, %cr0
        incl    WINDOW + 0x5000
        mov     %r13, %cr0
        try     2f
        incl    WINDOW + 0x5000
        jmp     3f
2:      inc     %ebx
3:      dec     %ebp
        jnz     1b
        cmp     $ROUNDS, %ebx
        jne     1f
        cmpl    $ROUNDS, data_a
1:      expect  e, 88

# Two address spaces, PCIDs 1 and 2, in which pages 0 and 1 are others. 90: switched with what is cached kept; 91: and not. 92: pages 0 and 1 change
# in the one that is not in use, told by INVPCID of the address; 93: of the PCID; 94: of all; 95: of what is not global. 96: not told of until its
# CR3 is loaded.
        without HAS_PCID, 90, 96, 5f
        call    second_space
        mov     %cr4, %rax
        or      $CR4_PCIDE, %rax
        mov     %rax, %cr4
        movl    $pml4_b + 2, cr3_b(%rip)
        movl    $pml4 + 1, cr3_a(%rip)
        put     0, code_a + P
        put     1, data_a + P + W
        movl    $code_b + P, window_pt_b
        movl    $data_b + P + W, window_pt_b + 8
        movl    $1, data_a
        movl    $2, data_b
        btsq    $63, cr3_a(%rip)
        btsq    $63, cr3_b(%rip)
        mov     $5000, %r13d
        call    switch_spaces
        expect  e, 90
        btrq    $63, cr3_a(%rip)
        btrq    $63, cr3_b(%rip)
        mov     $1000, %r13d
        call    switch_spaces
        expect  e, 91
        btsq    $63, cr3_a(%rip)
        btsq    $63, cr3_b(%rip)
        without HAS_INVPCID, 92, 95, 4f
        mov     cr3_a(%rip), %rax
        mov     %rax, %cr3
        mov     $92, %ebx
        xor     %r12d, %r12d            # the type
1:      mov     $ROUNDS, %r13d
2:      test    $1, %r13d
        mov     $code_b + P, %eax
        mov     $data_b + P + W, %ecx
        jz      3f
        mov     $code_c + P, %eax
        mov     $data_c + P + W, %ecx
3:      mov     %eax, window_pt_b
        mov     %ecx, window_pt_b + 8
        movq    $2, descriptor(%rip)
        movq    $WINDOW, descriptor + 8(%rip)
        invpcid descriptor(%rip), %r12
        movq    $WINDOW + 0x1000, descriptor + 8(%rip)
        test    %r12d, %r12d
        jnz     3f
        invpcid descriptor(%rip), %r12
3:      mov     %r13d, %r14d
        and     $1, %r14d
        add     $2, %r14d
        call    look_at_b
        jne     3f
        dec     %r13d
        jnz     2b
        test    %r13d, %r13d
3:      call    report
        inc     %ebx
        inc     %r12d
        cmp     $4, %r12d
        jb      1b
4:      btrq    $63, cr3_b(%rip)
        mov     $ROUNDS, %r13d
2:      test    $1, %r13d
        mov     $code_b + P, %eax
        mov     $data_b + P + W, %ecx
        jz      3f
        mov     $code_c + P, %eax
        mov     $data_c + P + W, %ecx
3:      mov     %eax, window_pt_b
        mov     %ecx, window_pt_b + 8
        mov     %r13d, %r14d
        and     $1, %r14d
        add     $2, %r14d
        call    look_at_b
        jne     3f
        dec     %r13d
        jnz     2b
        test    %r13d, %r13d
3:      expect  e, 96
        mov     $pml4, %eax
        mov     %rax, %cr3
        mov     %cr4, %rax
        and     $~CR4_PCIDE, %rax
        mov     %rax, %cr4
5:
# The others are told to forget: behind that they use the new page. 100: code; 101: data.
        call    read_count
        cmp     $2, %edi
        jae     1f
        skip_checks 100, 101
        ret
1:      gate    0x70, on_forget
        put     0, code_a + P
        put     1, data_a + P + W
        movl    $1, data_a
        movl    $2, data_b
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $other, %edi
        call    start_others
        call    barrier
        mov     $1, %r12d
1:      mov     $code_a + P, %eax
        mov     $data_a + P + W, %ecx
        test    $1, %r12d
        jz      2f
        mov     $code_b + P, %eax
        mov     $data_b + P + W, %ecx
2:      movl    $0, acknowledged(%rip)
        mov     %r12d, coming(%rip)
        mov     %eax, window_pt
        mov     %ecx, window_pt + 8
        apic_write APIC_ICR_LOW, 0xc4070
        call    ipi_sent
        mov     cpus(%rip), %ecx
        dec     %ecx
3:      pause
        cmp     %ecx, acknowledged(%rip)
        jb      3b
        mov     %r12d, told(%rip)
        mov     $200, %ecx
4:      pause
        loop    4b
        inc     %r12d
        cmp     $ROUNDS, %r12d
        jb      1b
        movl    $-1, told(%rip)
        call    barrier
        cmpl    $0, wrong_code(%rip)
        expect  e, 100
        cmpl    $0, wrong_data(%rip)
        expect  e, 101
        ret

other:  call    barrier
        sti
1:      mov     told(%rip), %ebx
        cmp     $-1, %ebx
        je      3f
        call    WINDOW
        mov     WINDOW + 0x1000, %edx
        mov     %eax, %esi
        cmp     %ebx, coming(%rip)      # the next may have been on its way: then either is right
        jne     1b
        and     $1, %ebx
        inc     %ebx
        cmp     %esi, %ebx
        je      2f
        lock    incl wrong_code(%rip)
2:      cmp     %edx, %ebx
        je      1b
        lock    incl wrong_data(%rip)
        jmp     1b
3:      cli
        call    barrier
4:      hlt
        jmp     4b

# By turns INVLPG and CR3.
on_forget:
        push    %rax
        mov     $1, %eax
        lock    xadd %eax, asked(%rip)
        test    $1, %eax
        jz      1f
        invlpg  WINDOW
        invlpg  WINDOW + 0x1000
        jmp     2f
1:      mov     %cr3, %rax
        mov     %rax, %cr3
2:      lock    incl acknowledged(%rip)
        apic_write APIC_EOI, 0
        pop     %rax
        iretq

# Number EBX, by ZF. Keeps all registers.
report: push    %rbx
        jne     1f
        call    ok
        ret
1:      call    fail
        ret

# ZF if pages 0 and 1 are what they should be, each after a flush by [R12].
remap_code:
        mov     $code_a + P, %eax
        or      global(%rip), %eax
        mov     %rax, window_pt
        mov     $WINDOW, %edi
        call    *(%r12)
        often   HOT, call WINDOW
        mov     $ROUNDS, %r13d
1:      mov     $code_b + P, %eax
        or      global(%rip), %eax
        mov     %rax, window_pt
        mov     $WINDOW, %edi
        call    *(%r12)
        often   3, call WINDOW
        cmp     $2, %eax
        jne     2f
        mov     $code_a + P, %eax
        or      global(%rip), %eax
        mov     %rax, window_pt
        mov     $WINDOW, %edi
        call    *(%r12)
        often   3, call WINDOW
        cmp     $1, %eax
        jne     2f
        dec     %r13d
        jnz     1b
        test    %r13d, %r13d
2:      ret

remap_data:
        movl    $1, data_a
        movl    $2, data_b
        movl    $0, data_a + 8
        movl    $0, data_b + 8
        mov     $data_a + P + W, %eax
        mov     %rax, window_pt + 8
        mov     $WINDOW + 0x1000, %edi
        call    *(%r12)
        often   HOT, mov WINDOW + 0x1000, %eax
        mov     $ROUNDS, %r13d
1:      mov     $data_b + P + W, %eax
        mov     %rax, window_pt + 8
        mov     $WINDOW + 0x1000, %edi
        call    *(%r12)
        mov     WINDOW + 0x1000, %eax
        incl    WINDOW + 0x1008
        cmp     $2, %eax
        jne     2f
        mov     $data_a + P + W, %eax
        mov     %rax, window_pt + 8
        mov     $WINDOW + 0x1000, %edi
        call    *(%r12)
        movups  WINDOW + 0x1000, %xmm0
        addl    $2, WINDOW + 0x1008
        movd    %xmm0, %eax
        cmp     $1, %eax
        jne     2f
        dec     %r13d
        jnz     1b
        cmpl    $ROUNDS, data_b + 8
        jne     2f
        cmpl    $2 * ROUNDS, data_a + 8
2:      ret

        .section .rodata
        .balign 8
flushes:
        .quad   flush_invlpg, 0
        .quad   flush_cr3, 0
        .quad   flush_pge, 0
        .quad   flush_address, HAS_INVPCID
        .quad   flush_pcid, HAS_INVPCID
        .quad   flush_all, HAS_INVPCID
        .quad   flush_local, HAS_INVPCID
crossings:
        .word   mobile_jump - mobile, mobile_branch - mobile, mobile_calls - mobile
        .word   mobile_indirect - mobile, mobile_nops - mobile, mobile_short - mobile, 0
        .section .text
flush_invlpg:
        invlpg  (%rdi)
        ret
flush_cr3:
        mov     %cr3, %rax
        mov     %rax, %cr3
        ret
flush_pge:
        mov     %cr4, %rax
        xor     $CR4_PGE, %rax
        mov     %rax, %cr4
        xor     $CR4_PGE, %rax
        mov     %rax, %cr4
        ret
flush_address:
        xor     %eax, %eax
        jmp     1f
flush_pcid:
        mov     $1, %eax
        jmp     1f
flush_all:
        mov     $2, %eax
        jmp     1f
flush_local:
        mov     $3, %eax
1:      movq    $0, descriptor(%rip)
        mov     %rdi, descriptor + 8(%rip)
        invpcid descriptor(%rip), %rax
        ret

# R12: instructions upon page 5; each leaves it with these bits, R13, or EBX fails. With nothing before, and with a load before.
bits_of_all:
        xor     %r14d, %r14d
1:      mov     (%r12), %rax
        test    %rax, %rax
        jz      4f
        mov     $20, %ebp
2:      clear_bits 5
        call    one_of_bits
        mov     window_pt + 8 * 5, %eax
        and     $A | D, %eax
        cmp     %r13d, %eax
        jne     3f
        test    %r13d, %r13d
        jz      5f
        clear_bits 5
        mov     WINDOW + 0x5000, %eax
        call    one_of_bits
        mov     window_pt + 8 * 5, %eax
        and     $A | D, %eax
        cmp     %r13d, %eax
        je      5f
3:      inc     %r14d
5:      dec     %ebp
        jnz     2b
        add     $8, %r12
        jmp     1b
4:      test    %r14d, %r14d
        call    report
        inc     %ebx
        ret

# Runs instruction [R12] upon RDI.
one_of_bits:
        push    %rbx
        push    %rbp
        mov     %rsp, kept_rsp(%rip)
        mov     $WINDOW + 0x5100, %edi
        lea     scratch(%rip), %rsi
        xor     %ecx, %ecx
        movq    $bits_done, data_a + 0x108
        movl    $0, data_a + 0x100
        mov     $1, %eax
        mov     $1, %edx
        mov     $1, %ebx
        test    %eax, %eax              # not zero, no carry
        jmp     *(%r12)
bits_done:
        mov     kept_rsp(%rip), %rsp
        pop     %rbp
        pop     %rbx
        ret

        .macro  one_bit what
.Lone\@:
        \what
        jmp     bits_done
        .pushsection .rodata
        .quad   .Lone\@
        .popsection
        .endm
# Instructions up to the next table.
        .section .rodata
        .balign 8
readers:
        .section .text
        one_bit "mov (%rdi), %eax"
        one_bit "movzbl (%rdi), %eax"
        one_bit "cmp %eax, (%rdi)"
        one_bit "test %eax, (%rdi)"
        one_bit "add (%rdi), %eax"
        one_bit "btl $3, (%rdi)"
        one_bit "cmovz (%rdi), %eax"
        one_bit "movups (%rdi), %xmm0"
        one_bit "fildll (%rdi); fstp %st"
        one_bit "mov %rdi, %rsi; lodsb"
        one_bit "scasb"
        one_bit "cmpsb"
        one_bit "mov %rdi, %rsp; pop %rax"
        one_bit "imul $3, (%rdi), %eax"
        one_bit "jmp *8(%rdi)"
        one_bit "lea 8(%rdi), %rsp; ret"
        one_bit "push (%rdi)"
        .section .rodata
        .quad   0
writers:
        .section .text
        one_bit "mov %eax, (%rdi)"
        one_bit "mov %al, (%rdi)"
        one_bit "movl $0, (%rdi)"
        one_bit "add %eax, (%rdi)"
        one_bit "incl (%rdi)"
        one_bit "lock incl (%rdi)"
        one_bit "andl $-1, (%rdi)"
        one_bit "xchg %eax, (%rdi)"
        one_bit "cmpxchg %edx, (%rdi)"
        one_bit "lock cmpxchg %edx, (%rdi)"
        one_bit "lock cmpxchg8b (%rdi)"
        one_bit "lock cmpxchg16b (%rdi)"
        one_bit "xadd %eax, (%rdi)"
        one_bit "btsl $0, (%rdi)"
        one_bit "setz (%rdi)"
        one_bit "shll (%rdi)"
        one_bit "notl (%rdi)"
        one_bit "movups %xmm0, (%rdi)"
        one_bit "movnti %eax, (%rdi)"
        one_bit "stosb"
        one_bit "movsb"
        one_bit "fninit; fldz; fistpll (%rdi)"
        one_bit "fnstcw (%rdi)"
        one_bit "stmxcsr (%rdi)"
        one_bit "lea 8(%rdi), %rsp; push %rax"
        one_bit "push %rax; pop (%rdi)"
        one_bit "lea 8(%rdi), %rsp; call .+5"
        one_bit "lea 8(%rdi), %rsp; enter $0, $0"
        one_bit "sgdt (%rdi)"
        one_bit "mov %ds, (%rdi)"
        .section .rodata
        .quad   0
neither:
        .section .text
        one_bit "lea (%rdi), %eax"
        one_bit "nopl (%rdi)"
        one_bit "rep stosb"
        one_bit "rep movsb"
        one_bit "repe cmpsb"
        one_bit "mov %eax, scratch"
        .section .rodata
        .quad   0
        .section .text

# EDI: offset in user_start, in page 2. Returns what the user left when it ended by GATE.
in_user_mode:
        mov     %rsp, kept_rsp(%rip)
        add     $WINDOW + 0x2000, %edi
        push    $USER_DATA
        push    $WINDOW + 0x4000
        push    $2
        push    $USER_CODE
        push    %rdi
        iretq
from_user_mode:
        mov     kept_rsp(%rip), %rsp
        ret

user_start:
user_loop:
        xor     %ecx, %ecx
        mov     $HOT, %ebp
        mov     $WINDOW + 0x4000, %esi
user_loop_at:
        mov     (%rsi), %eax
1:      push    %rax
        mov     (%rsi), %eax
        pop     %rax
        add     $2, %ecx
        dec     %ebp
        jnz     1b
        int     $GATE
user_store:
        mov     $WINDOW + 0x4000, %esi
user_store_at:
        mov     %eax, (%rsi)
        int     $GATE
user_end:

# Called through page 12, which is returns_a or returns_b: these differ in the number alone.
        .macro  returns value
        call    *%rdi
        mov     $\value, %eax
        ret
        .endm
        .macro  changes_self value, flushing
        mov     %rdx, window_pt + 8 * 12
        \flushing
        mov     $\value, %eax
        ret
        .endm
returns_a_code:
        returns 1
changes_self_invlpg:
        changes_self 1, "invlpg (%rsi)"
changes_self_cr3:
        changes_self 1, "mov %cr3, %rcx; mov %rcx, %cr3"
returns_b_code:
        returns 2
        changes_self 2, "invlpg (%rsi)"
        changes_self 2, "mov %cr3, %rcx; mov %rcx, %cr3"
returns_end:
change_12:
        mov     %rdx, window_pt + 8 * 12
        invlpg  WINDOW + 0xc000
do_nothing:
        ret

# EDX:EAX of both spaces, R13 times: ZF.
switch_spaces:
1:      mov     cr3_a(%rip), %rax
        mov     %rax, %cr3
        call    WINDOW
        cmp     $1, %eax
        jne     2f
        cmpl    $1, WINDOW + 0x1000
        jne     2f
        mov     cr3_b(%rip), %rax
        mov     %rax, %cr3
        call    WINDOW
        cmp     $2, %eax
        jne     2f
        cmpl    $2, WINDOW + 0x1000
        jne     2f
        dec     %r13d
        jnz     1b
        test    %r13d, %r13d
2:      ret
# ZF if pages 0 and 1 of the second space are R14.
look_at_b:
        mov     cr3_b(%rip), %rax
        mov     %rax, %cr3
        call    WINDOW
        mov     WINDOW + 0x1000, %ecx
        mov     cr3_a(%rip), %rdx
        mov     %rdx, %cr3
        cmp     %eax, %r14d
        jne     1f
        cmp     %ecx, %r14d
1:      ret

# pml4_b: as pml4, but for the window.
second_space:
        mov     $pml4, %esi
        mov     $pml4_b, %edi
        mov     $512, %ecx
        rep     movsq
        mov     $pdpt, %esi
        mov     $pdpt_b, %edi
        mov     $512, %ecx
        rep     movsq
        mov     $pd + 0x1000, %esi
        mov     $pd_b, %edi
        mov     $512, %ecx
        rep     movsq
        mov     $window_pt, %esi
        mov     $window_pt_b, %edi
        mov     $512, %ecx
        rep     movsq
        movl    $pdpt_b + 7, pml4_b
        movl    $pd_b + 7, pdpt_b + 8
        movl    $window_pt_b + 7, pd_b
        ret

# An LDT at WINDOW + 0x4800, and a GDT that has it.
load_ldt:
        mov     $gdt, %esi
        mov     $long_gdt, %edi
        mov     $GDT_SIZE, %ecx
        rep     movsb
        movabs  $((WINDOW + 0x4800) & 0xffffff) << 16 | ((WINDOW + 0x4800) >> 24) << 56 | 0x820000000fff, %rax
        mov     %rax, long_gdt + 0x48
        lgdt    long_gdt_pointer(%rip)
        mov     $0x48, %eax
        lldt    %ax
        ret

prepare:
        fninit
        movl    $window_pt + 7, pd + 512 * 8
        movl    $code_a + P, window_pt
        mov     %cr3, %rax
        mov     %rax, %cr3
# mov $n, %eax; ret
        movl    $0xb8 | 1 << 8, code_a
        movl    $0xc30000, code_a + 3
        movl    $0xb8 | 2 << 8, code_b
        movl    $0xc30000, code_b + 3
        movl    $0xb8 | 3 << 8, code_c
        movl    $0xc30000, code_c + 3
        movl    $3, data_c
        movl    $0x11111111, half_a
        movb    $0xc3, half_a + 4
        movl    $0x22222222, half_b
        movb    $0xc3, half_b + 4
        mov     $mobile_code, %esi
        mov     $mobile, %edi
        mov     $mobile_code_end - mobile_code, %ecx
        rep     movsb
        mov     $user_start, %esi
        mov     $user_page, %edi
        mov     $user_end - user_start, %ecx
        rep     movsb
        mov     $returns_a_code, %esi
        mov     $returns_a, %edi
        mov     $returns_b_code - returns_a_code, %ecx
        rep     movsb
        mov     $returns_b_code, %esi
        mov     $returns_b, %edi
        mov     $returns_end - returns_b_code, %ecx
        rep     movsb
        mov     $GATE, %edi
        lea     from_user_mode(%rip), %rsi
        call    set_user_gate
        xor     %r12d, %r12d
        mov     $1, %eax
        cpuid
        bt      $17, %ecx
        jnc     1f
        or      $HAS_PCID, %r12d
1:      mov     $0x80000001, %eax
        cpuid
        bt      $26, %edx
        jnc     1f
        or      $HAS_1G, %r12d
1:      xor     %eax, %eax
        cpuid
        cmp     $7, %eax
        jb      1f
        mov     $7, %eax
        xor     %ecx, %ecx
        cpuid
        bt      $10, %ebx
        jnc     2f
        or      $HAS_INVPCID, %r12d
2:      bt      $7, %ebx
        jnc     2f
        or      $HAS_SMEP, %r12d
2:      bt      $20, %ebx
        jnc     1f
        or      $HAS_SMAP, %r12d
1:      mov     %r12b, features(%rip)
        ret

# A page of code, copied to mobile.
mobile_code:
        lea     0(%rip), %rax
        ret
        .set    mobile_call, mobile + (. - mobile_code)
        call    1f
        .set    mobile_call_next, mobile + (. - mobile_code)
1:      pop     %rax
        ret
        .set    mobile_jump, mobile + (. - mobile_code)
        .byte   0xe9
        .long   0x1000 - (. + 4 - mobile_code)
        .set    mobile_branch, mobile + (. - mobile_code)
        cmp     %eax, %eax
        .byte   0x0f, 0x84
        .long   0x1000 - (. + 4 - mobile_code)
        .set    mobile_calls, mobile + (. - mobile_code)
        .byte   0xe8
        .long   0x1000 - (. + 4 - mobile_code)
        ret
        .set    mobile_indirect, mobile + (. - mobile_code)
        .byte   0x48, 0x8d, 0x15        # lea of the next page, %rdx
        .long   0x1000 - (. + 4 - mobile_code)
        jmp     *%rdx
        .org    mobile_code + 0xfa0
        .set    mobile_short, mobile + (. - mobile_code)
        .byte   0xeb, 0x1000 - (. + 2 - mobile_code)
        .set    mobile_count, mobile + (. - mobile_code)
        incl    (%rdi)
        incl    (%rdi)
        nop
        incl    (%rdi)
        .set    mobile_nops, mobile + (. - mobile_code)
        .set    mobile_fall, mobile + (. - mobile_code)
        .fill   mobile_code + 0x1000 - ., 1, 0x90
mobile_code_end:

        .section .rodata
long_gdt_pointer:
        .word   0x57
        .quad   long_gdt

        .section .bss
        .balign 4096
window_pt:
        .skip   4096
large_pt:
        .skip   4096
huge_pd:
        .skip   4096
pml4_b: .skip   4096
pdpt_b: .skip   4096
pd_b:   .skip   4096
window_pt_b:
        .skip   4096
code_a: .skip   4096
code_b: .skip   4096
code_c: .skip   4096
data_a: .skip   4096
data_b: .skip   4096
data_c: .skip   4096
half_a: .skip   4096
half_b: .skip   4096
mobile: .skip   4096
mobile_end:
returns_a:
        .skip   4096
returns_b:
        .skip   4096
user_page:
        .skip   4096
user_stack:
        .skip   4096
scratch:
        .skip   64
        .balign 16
descriptor:
        .skip   16
long_gdt:
        .skip   0x58
kept_rsp:
        .skip   8
cr3_a:  .skip   8
cr3_b:  .skip   8
global: .skip   4
counter:
        .skip   4
acknowledged:
        .skip   4
told:   .skip   4
asked:  .skip   4
coming: .skip   4
wrong_code:
        .skip   4
wrong_data:
        .skip   4
features:
        .skip   1
