# Instructions that hypervisors have to take apart when they meet device memory: CMPXCHG16B, SSE, AVX and x87, on ordinary
# memory, on the registers of HPET and I/O APIC, and where nothing is. The HPET's counter stands still meanwhile.
        .include "macros.inc"

# Comparator and FSB route of timer 0 are 16 bytes that hold what is written; the route of timer 1 is one of 8 at a multiple
# of 16, and zeros behind it.
        .set    PAIR, HPET + 0x108
        .set    ALIGNED, HPET + 0x130
# Nobody answers here: all ones.
        .set    HOLE, 0xfec80000 - (1 << 32)

# Checks, as \n, that the 16 bytes in XMM0 are those at \address.
        .macro  same n, address
        movdqu  \address, %xmm15
        pcmpeqb %xmm0, %xmm15
        pmovmskb %xmm15, %eax
        cmp     $0xffff, %eax
        expect  e, \n
        .endm

# Checks, as \n, that the quadwords at \address are \low and \high.
        .macro  holds n, address, low, high
        movabs  $\low, %rax
        cmp     %rax, \address
        jne     .Lholds\@
        movabs  $\high, %rax
        cmp     %rax, \address + 8
.Lholds\@:
        expect  e, \n
        .endm

# Sets the quadwords at \address.
        .macro  fill address, low, high
        movabs  $\low, %rax
        mov     %rax, \address
        movabs  $\high, %rax
        mov     %rax, \address + 8
        .endm

        .set    A, 0x1716151413121110
        .set    B, 0x1f1e1d1c1b1a1918
        .set    C, 0x0123456789abcdef
        .set    D, 0x7edcba9876543210

        .code64
        .section .text
        .global main
main:   movl    $0, HPET + 0x10
        movl    $0, HPET + 0x100
        movl    $0, HPET + 0x120
        fninit

# CMPXCHG16B on memory. 1: equal. 2: not equal. 3: RFLAGS and registers say so. 4: a misaligned one is #GP.
        fill    buffer, A, B
        call    compare_ab
        lock    cmpxchg16b buffer(%rip)
        setz    %sil
        holds   1, buffer, C, D
        call    compare_ab
        lock    cmpxchg16b buffer(%rip)
        setnz   %dil
        call    is_cd
        expect  e, 2
        and     %dil, %sil
        cmp     $1, %sil
        expect  e, 3
        try     1f
11:     lock    cmpxchg16b buffer + 8(%rip)
1:      expect_trap 4, 13, 0, 11b

# The same on device memory. 5: equal. 6: not equal. 7: what is not there is all ones, and stays so. 8: misaligned.
        movq    $0, ALIGNED
        xor     %eax, %eax
        xor     %edx, %edx
        movabs  $C, %rbx
        movabs  $D, %rcx
        lock    cmpxchg16b ALIGNED
        setz    %sil
        holds   5, ALIGNED, C, 0
        call    compare_ab
        lock    cmpxchg16b ALIGNED
        setnz   %dil
        and     %dil, %sil
        cmp     $1, %sil
        jne     1f
        movabs  $C, %rbx
        cmp     %rbx, %rax
        jne     1f
        test    %rdx, %rdx
1:      expect  e, 6
        mov     $-1, %rax
        mov     $-1, %rdx
        lock    cmpxchg16b HOLE
        jnz     1f
        cmpq    $-1, HOLE
1:      expect  e, 7
        try     1f
11:     lock    cmpxchg16b PAIR
1:      expect_trap 8, 13, 0, 11b

# Loads, from memory and device. 9, 10: MOVDQA. 11, 12: MOVUPS where 16 does not divide. 13: all ones.
        fill    buffer, A, B
        movdqa  buffer(%rip), %xmm0
        same    9, buffer
        fill    expected, C, 0
        movdqa  ALIGNED, %xmm0
        same    10, expected
        movups  buffer + 3(%rip), %xmm0
        same    11, buffer+3
        fill    PAIR, A, B
        movups  PAIR, %xmm0
        same    12, buffer
        movdqa  HOLE, %xmm0
        pcmpeqd %xmm1, %xmm1
        movdqu  %xmm1, expected
        same    13, expected

# Stores. 14, 15: MOVDQA. 16: MOVUPS. 17: to where nothing is, without effect. 18, 19: MOVDQA that is misaligned.
        fill    buffer, C, D
        movdqa  buffer(%rip), %xmm0
        movdqa  %xmm0, buffer + 16(%rip)
        holds   14, buffer+16, C, D
        fill    buffer, A, 0
        movdqa  buffer(%rip), %xmm1
        movdqa  %xmm1, ALIGNED
        holds   15, ALIGNED, A, 0
        movups  %xmm0, PAIR
        holds   16, PAIR, C, D
        movdqa  %xmm0, HOLE
        holds   17, HOLE, -1, -1
        try     1f
11:     movdqa  buffer + 8(%rip), %xmm0
1:      expect_trap 18, 13, 0, 11b
        try     1f
11:     movdqa  %xmm0, PAIR
1:      expect_trap 19, 13, 0, 11b

# Arithmetic. 20, 21: PAND. 22, 23: PSHUFB. 24 to 27: CVTSI2SD of 4 and 8 bytes. 28: ADDSD.
        fill    buffer, A, 0
        fill    expected, A&0x00ff00ff00ff00ff, 0
        fill    buffer+16, 0x00ff00ff00ff00ff, -1
        movdqa  buffer + 16(%rip), %xmm0
        pand    buffer(%rip), %xmm0
        same    20, expected
        movdqa  buffer + 16(%rip), %xmm0
        pand    ALIGNED, %xmm0
        same    21, expected
        mov     $1, %eax
        cpuid
        bt      $9, %ecx
        jc      1f
        skip_checks 22, 23
        jmp     2f
1:      fill    buffer, 0x8007060504030201, 0x8080808080808080
        fill    buffer+16, A, B
        fill    expected, 0x0017161514131211, 0
        movdqa  buffer + 16(%rip), %xmm0
        pshufb  buffer(%rip), %xmm0
        same    22, expected
        mov     buffer(%rip), %rax
        mov     %rax, ALIGNED
        fill    expected, 0x0017161514131211, 0x1010101010101010
        movdqa  buffer + 16(%rip), %xmm0
        pshufb  ALIGNED, %xmm0
        same    23, expected
2:      fill    buffer, -7, 0x4008000000000000
        fill    PAIR, -7, 0x4008000000000000
        movabs  $0xc01c000000000000, %rbx
        pxor    %xmm0, %xmm0
        cvtsi2sdl buffer(%rip), %xmm0
        movq    %xmm0, %rax
        cmp     %rbx, %rax
        expect  e, 24
        pxor    %xmm0, %xmm0
        cvtsi2sdl PAIR, %xmm0
        movq    %xmm0, %rax
        cmp     %rbx, %rax
        expect  e, 25
        cvtsi2sdq buffer(%rip), %xmm0
        movq    %xmm0, %rax
        cmp     %rbx, %rax
        expect  e, 26
        cvtsi2sdq PAIR, %xmm0
        movq    %xmm0, %rax
        cmp     %rbx, %rax
        expect  e, 27
        addsd   PAIR + 8, %xmm0         # -7 + 3
        movq    %xmm0, %rax
        movabs  $0xc010000000000000, %rbx
        cmp     %rbx, %rax
        expect  e, 28

# Past the caches, and in parts. 29, 30: MOVNTI. 31: MASKMOVDQU to memory leaves out what its mask does. 32: to the I/O APIC's
# select register, one byte. 33: MOVSS, MOVSD, MOVHPS to and from the device. 34: MOVNTDQ.
        fill    buffer, A, B
        mov     $0x55667788, %eax
        movnti  %eax, buffer(%rip)
        holds   29, buffer, 0x1716151455667788, B
        fill    PAIR, A, B
        movabs  $C, %rax
        movnti  %rax, PAIR
        mov     $0x55667788, %eax
        movnti  %eax, PAIR + 8
        holds   30, PAIR, C, 0x1f1e1d1c55667788
        fill    buffer, A, B
        fill    buffer+16, 0x8000000000000080, 0x0080000000000000
        fill    expected, C, D
        movdqa  expected(%rip), %xmm0
        movdqa  buffer + 16(%rip), %xmm1
        lea     buffer(%rip), %rdi
        maskmovdqu %xmm1, %xmm0
        holds   31, buffer, 0x01161514131211ef, 0x1fdc1d1c1b1a1918
        movl    $0, IOAPIC
        mov     $1, %eax
        movd    %eax, %xmm0
        mov     $0x80, %eax
        movd    %eax, %xmm1
        mov     $IOAPIC, %rdi
        maskmovdqu %xmm1, %xmm0
        mov     IOAPIC + 0x10, %eax     # the version register, with the highest input in bits 23:16
        shr     $16, %eax
        cmp     $23, %al
        expect  e, 32
        fill    PAIR, A, B
        movss   PAIR, %xmm0
        movhps  PAIR + 8, %xmm0
        movsd   PAIR + 8, %xmm1
        movss   %xmm1, PAIR
        movhps  %xmm0, PAIR + 8
        movlps  PAIR, %xmm0
        movups  %xmm0, buffer(%rip)
        holds   33, buffer, 0x171615141b1a1918, B
        fill    buffer, C, 0
        movdqa  buffer(%rip), %xmm0
        movntdq %xmm0, ALIGNED
        holds   34, ALIGNED, C, 0

# Integer instructions on the device. 35: XCHG. 36: LOCK XADD. 37: LOCK BTS, with an offset in a register. 38: LOCK CMPXCHG8B.
# 39: REP MOVSQ. 40: POPCNT, if there.
        fill    PAIR, A, B
        movabs  $C, %rbx
        xchg    %rbx, PAIR
        movabs  $A, %rax
        cmp     %rax, %rbx
        jne     1f
        movabs  $C, %rax
        cmp     %rax, PAIR
1:      expect  e, 35
        mov     $0x10000000, %ebx
        lock    xadd %ebx, PAIR
        cmp     $0x89abcdef, %ebx
        jne     1f
        cmpl    $0x99abcdef, PAIR
1:      expect  e, 36
        mov     $69, %ebx               # bit 5 of the second quadword
        lock    bts %rbx, PAIR
        setnc   %cl
        movabs  $B | 0x20, %rax
        cmp     %rax, PAIR + 8
        jne     1f
        cmp     $1, %cl
1:      expect  e, 37
        mov     $0x99abcdef, %eax
        mov     $0x01234567, %edx
        mov     $1, %ebx
        mov     $2, %ecx
        lock    cmpxchg8b PAIR
        jnz     1f
        movabs  $0x200000001, %rax
        cmp     %rax, PAIR
1:      expect  e, 38
        fill    buffer, C, D
        lea     buffer(%rip), %rsi
        mov     $PAIR, %rdi
        mov     $2, %ecx
        rep     movsq
        mov     $PAIR, %rsi
        lea     buffer + 16(%rip), %rdi
        mov     $2, %ecx
        rep     movsq
        holds   39, buffer+16, C, D
        mov     $1, %eax
        cpuid
        bt      $23, %ecx
        jc      1f
        skip_checks 40, 40
        jmp     2f
1:      popcnt  PAIR, %rax
        cmp     $32, %eax
        expect  e, 40
2:
# x87. 41: FLD and FSTP of 8 bytes. 42: of 10 bytes. 43: FXSAVE and FXRSTOR.
        fill    PAIR, 0x4008000000000000, 0
        fldl    PAIR
        fld     %st(0)
        faddp
        fstpl   PAIR + 8
        holds   41, PAIR, 0x4008000000000000, 0x4018000000000000
        fill    buffer, 0x8000000000000000, 0x3fff
        fill    buffer+16, 0, 0
        fldt    buffer(%rip)            # 1
        fld1
        faddp
        fstpt   buffer + 16(%rip)
        holds   42, buffer+16, 0x8000000000000000, 0x4000
        fill    buffer, A, B
        movdqa  buffer(%rip), %xmm7
        fxsave  image(%rip)
        pxor    %xmm7, %xmm7
        fxrstor image(%rip)
        movdqa  %xmm7, %xmm0
        same    43, buffer

# A page that is not there behind one that is. 44, 46: #PF and its address; 45: nothing was loaded. 47, 48: nor stored.
        movl    $pd_high + 7, pdpt + 4 * 8
        movl    $0x83, pd_high          # 4 GiB: 2 MiB of low memory, and nothing behind
        mov     %cr3, %rax
        mov     %rax, %cr3
        movabs  $0x100000000 + 0x200000 - 8, %rbx
        fill    buffer, A, B
        movdqa  buffer(%rip), %xmm0
        try     1f
11:     movups  (%rbx), %xmm0
1:      expect_trap 44, 14, 0, 11b
        same    45, buffer
        lea     8(%rbx), %rcx
        cmp     %rcx, trap_cr2(%rip)
        expect  e, 46
        movabs  $C, %rax
        mov     %rax, (%rbx)
        try     1f
11:     movups  %xmm0, (%rbx)
1:      expect_trap 47, 14, 2, 11b
        movabs  $C, %rax
        cmp     %rax, (%rbx)
        expect  e, 48

# 49: single step over a load from the device traps behind it. 50: which was done.
        fill    PAIR, A, B
        pxor    %xmm0, %xmm0
        try     1f
        pushf
        orl     $1 << 8, (%rsp)
        popf
        movups  PAIR, %xmm0
11:     nop
1:      expect_trap 49, 1, 0, 11b
        same    50, buffer

# AVX.
        mov     $1, %eax
        cpuid
        and     $1 << 26 | 1 << 28, %ecx
        cmp     $1 << 26 | 1 << 28, %ecx
        je      1f
        skip_checks 51, 61
        ret
1:      mov     %cr4, %rax
        or      $1 << 18, %rax
        mov     %rax, %cr4
        xor     %ecx, %ecx
        xgetbv
        or      $7, %eax
        xsetbv

# VMOVDQU of 32 bytes: 51, 52: from memory; 53, 54: from the device. 55: VMOVUPS to it. 56: VMOVAPS. 57: misaligned.
        fill    buffer, A, B
        fill    buffer+16, C, D
        vmovdqu buffer(%rip), %ymm2
        call    split
        same    51, buffer
        movdqa  %xmm1, %xmm0
        same    52, buffer+16
        fill    PAIR, A, B
        vmovdqu PAIR - 8, %ymm2         # timer 0: configuration, comparator, route, and zero
        call    split
        mov     PAIR - 8, %rax
        mov     %rax, expected(%rip)
        movabs  $A, %rax
        mov     %rax, expected + 8(%rip)
        same    53, expected
        fill    expected, B, 0
        movdqa  %xmm1, %xmm0
        same    54, expected
        fill    buffer, C, D
        fill    buffer+16, 0, 0
        vmovdqu buffer(%rip), %ymm2
        vmovups %ymm2, PAIR             # and the configuration of timer 1, with all its bits off
        holds   55, PAIR, C, D
        vmovaps buffer(%rip), %ymm2
        vmovaps %ymm2, buffer + 32(%rip)
        holds   56, buffer+32, C, D
        try     1f
11:     vmovaps buffer + 16(%rip), %ymm2
1:      expect_trap 57, 13, 0, 11b

# 58: a load of 16 bytes clears what is above, 59: as does arithmetic on them. 60: VMASKMOVPS reads what its mask names.
# 61: VBROADCASTSS.
        vpcmpeqd %xmm2, %xmm2, %xmm2
        vinsertf128 $1, %xmm2, %ymm2, %ymm2
        fill    buffer, C, D
        vmovups PAIR, %xmm2
        call    split
        pxor    %xmm3, %xmm3
        pcmpeqb %xmm3, %xmm1
        pmovmskb %xmm1, %ebx
        pcmpeqb buffer(%rip), %xmm0
        pmovmskb %xmm0, %eax
        and     %ebx, %eax
        cmp     $0xffff, %eax
        expect  e, 58
        vpcmpeqd %xmm2, %xmm2, %xmm2
        vinsertf128 $1, %xmm2, %ymm2, %ymm2
        vpand   PAIR, %xmm2, %xmm2
        call    split
        pxor    %xmm3, %xmm3
        pcmpeqb %xmm3, %xmm1
        pmovmskb %xmm1, %ebx
        pcmpeqb buffer(%rip), %xmm0
        pmovmskb %xmm0, %eax
        and     %ebx, %eax
        cmp     $0xffff, %eax
        expect  e, 59
        fill    buffer, 0x8000000000000000, 0
        movdqa  buffer(%rip), %xmm3
        vmaskmovps PAIR, %xmm3, %xmm0
        fill    expected, C&0xffffffff00000000, 0
        same    60, expected
        vbroadcastss PAIR + 4, %xmm0
        fill    expected, 0x0123456701234567, 0x0123456701234567
        same    61, expected
        ret

# YMM2 to XMM0 and XMM1.
split:  vmovaps %xmm2, %xmm0
        vextractf128 $1, %ymm2, %xmm1
        ret

# RDX:RAX is B:A, to be replaced by D:C.
compare_ab:
        movabs  $A, %rax
        movabs  $B, %rdx
        movabs  $C, %rbx
        movabs  $D, %rcx
        ret

# ZF if RDX:RAX is D:C.
is_cd:  cmp     %rbx, %rax
        jne     1f
        cmp     %rcx, %rdx
1:      ret

        .section .bss
        .balign 4096
pd_high:
        .skip   0x1000
        .balign 64
buffer: .skip   128
expected:
        .skip   32
        .balign 16
image:  .skip   512
