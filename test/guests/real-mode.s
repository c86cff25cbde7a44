# A ROM that stays in real mode for most of what it does: 16-bit instructions, interrupts by the table at 0, addresses above
# 1 MiB by segments with other limits, and protected, 32-bit and 64-bit mode and back.
        .include "constants.inc"

        .set    BASE, 0xf0000
        .set    ROM, BASE >> 4

# Where things lie in memory. DS, ES and SS are 0.
        .set    COUNT, 0x500            # of interrupts
        .set    SAVED_IP, 0x502
        .set    SAVED_FLAGS, 0x504
        .set    FAILED, 0x506
        .set    SAVED_CS, 0x508
        .set    RESUME, 0x50a
        .set    WORK, 0x600
        .set    STACK, 0x7000
        .set    TABLES, 0x10000
        .set    IDT, 0x20000
        .set    HIGH, 0x200000

# Selectors of this ROM's table.
        .set    S_CODE16, 0x08
        .set    S_DATA16, 0x10
        .set    S_CODE32, 0x18
        .set    S_DATA32, 0x20
        .set    S_CODE64, 0x28

# Reports check \n by condition \cc.
        .macro  expect cc, n
        j\cc    .Lok\@
        pushw   $\n
        call    fail
        jmp     .Ldone\@
.Lok\@: pushw   $\n
        call    ok
.Ldone\@:
        .endm

        .macro  vector n, handler
        movw    $\handler - BASE, \n * 4
        movw    $ROM, \n * 4 + 2
        .endm

        .macro  outb value, port
        mov     $\port, %dx
        mov     $\value, %al
        out     %al, %dx
        .endm

        .code16
        .section .reset, "ax"
        .global entry
entry:  ljmp    $ROM, $main - BASE
        .balign 16

        .section .text
main:   cli
        cld
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $STACK, %sp
        mov     %ax, FAILED
        call    serial
        mov     $text - BASE, %si
        mov     $text_end - text, %cx
        mov     $COM1, %dx
        rep     outsb %cs:(%si), %dx

# Arithmetic. 1: ADD, ADC, SBB over 32 bits. 2: INC keeps CF, and overflows. 3: NEG, NOT. 4: MUL, IMUL, DIV, IDIV.
        mov     $0xffff, %ax
        mov     $0x1234, %dx
        add     $2, %ax
        adc     $0, %dx
        sub     $3, %ax
        sbb     $0x0200, %dx
        cmp     $0x1034, %dx
        jne     1f
        cmp     $0xfffe, %ax
1:      expect  e, 1
        mov     $0x7fff, %ax
        stc
        inc     %ax
        jnc     1f
        jno     1f
        cmp     $0x8000, %ax
1:      expect  e, 2
        mov     $1, %ax
        neg     %ax
        jnc     1f
        not     %ax
        test    %ax, %ax
        jnz     1f
        negb    %al
1:      expect  nc, 3
        mov     $1234, %ax
        mov     $567, %bx
        mul     %bx
        mov     $568, %bx
        div     %bx                     # 699678 = 568 * 1231 + 470
        cmp     $1231, %ax
        jne     1f
        cmp     $470, %dx
        jne     1f
        mov     $-100, %ax
        mov     $7, %bl
        idiv    %bl
        cmp     $0xfef2, %ax            # -14, and -2 over
        jne     1f
        imul    $-3, %ax, %ax
        cmp     $0x032a, %ax
1:      expect  e, 4

# Decimal numbers. 5: DAA, DAS. 6: AAA, AAS. 7: AAM, AAD.
        mov     $0x79, %al
        add     $0x35, %al
        daa
        jnc     1f
        cmp     $0x14, %al
        jne     1f
        sub     $0x25, %al
        das
        cmp     $0x89, %al
1:      expect  e, 5
        mov     $0x0008, %ax
        add     $0x09, %al
        aaa
        cmp     $0x0107, %ax
        jne     1f
        sub     $0x08, %al
        aas
        cmp     $0x0009, %ax
1:      expect  e, 6
        mov     $63, %al
        aam
        cmp     $0x0603, %ax
        jne     1f
        aad
        cmp     $63, %ax
1:      expect  e, 7

# 8: shifts and rotations. 9: bits. 10: conversions, XLAT, LAHF and SAHF.
        mov     $0x8001, %ax
        rol     $1, %ax
        stc
        rcr     $1, %ax
        mov     $4, %cl
        sar     %cl, %ax
        cmp     $0xf800, %ax
        jne     1f
        mov     $0x1234, %dx
        shld    $8, %ax, %dx
        cmp     $0x34f8, %dx
1:      expect  e, 8
        mov     $0x0810, %ax
        bsf     %ax, %bx
        bsr     %ax, %cx
        shl     $8, %cx
        or      %cx, %bx
        btc     $4, %ax
        jnc     1f
        cmp     $0x0800, %ax
        jne     1f
        cmp     $0x0b04, %bx
1:      expect  e, 9
        mov     $0x80, %al
        cbw
        cwd
        cmp     $-1, %dx
        jne     1f
        movzx   %al, %bx
        movsx   %al, %cx
        add     %bx, %cx
        jnz     1f
        movw    $0x5544, WORK
        mov     $WORK, %bx
        mov     $1, %al
        xlat
        cmp     $0x55, %al
        jne     1f
        mov     $0x41, %ah
        sahf
        jnz     1f
        lahf
        cmp     $0x43, %ah
1:      expect  e, 10

# Memory. 11: every way to address it. 12: BP means the stack segment, and other segments by prefix. 13: strings. 14: backwards.
        movw    $0x1111, WORK + 0x10
        movw    $0x2222, WORK + 0x20
        movw    $0x4444, WORK + 0x30
        mov     $WORK, %bx
        mov     $0x10, %si
        mov     $0x20, %di
        mov     $WORK - 8, %bp
        mov     (%bx,%si), %ax
        add     (%bx,%di), %ax
        add     0x28(%bp,%si), %ax
        sub     0x18(%bp), %ax
        sub     WORK(%di), %ax
        sub     0x20(%bx,%si), %ax
        cmp     $0x0000, %ax
        jne     1f
        mov     $WORK + 0x20, %si
        lodsw
        cmp     $0x2222, %ax
1:      expect  e, 11
        movw    $0x7777, 0x40
        mov     $WORK >> 4, %ax
        mov     %ax, %es
        mov     %ax, %ss
        mov     $0x10, %bp
        mov     (%bp), %ax
        xor     %bx, %bx
        mov     %bx, %ss
        mov     %es:0x20, %cx
        mov     %ds:0x30(%bp), %dx
        mov     %bx, %es
        add     %cx, %ax
        cmp     $0x3333, %ax
        jne     1f
        cmp     $0x7777, %dx
1:      expect  e, 12
        mov     $WORK, %di
        mov     $0xabcd, %ax
        mov     $8, %cx
        rep     stosw
        mov     $WORK, %si
        mov     $WORK + 0x40, %di
        mov     $16, %cx
        rep     movsb
        mov     $WORK, %si
        mov     $WORK + 0x40, %di
        mov     $8, %cx
        repe    cmpsw
        jne     1f
        movb    $7, WORK + 0x47
        mov     $WORK + 0x40, %di
        mov     $7, %al
        mov     $16, %cx
        repne   scasb
        cmp     $8, %cx
        jne     1f
        cmp     $WORK + 0x48, %di
1:      expect  e, 13
        std
        mov     $WORK + 2, %si
        mov     $WORK + 4, %di
        movl    $0x22221111, WORK
        mov     $2, %cx
        rep     movsw
        cld
        cmpw    $0x1111, WORK + 2
        jne     1f
        cmpw    $0x2222, WORK + 4
        jne     1f
        cmp     $WORK - 2, %si
1:      expect  e, 14

# The stack. 15: PUSHA, POPA, PUSHF. 16: ENTER and LEAVE. 17: far calls, and RET that drops parameters. 18: LDS and LES, far jumps
# by memory.
        mov     $0x1234, %bx
        mov     %sp, %bp
        pusha
        mov     %sp, %di
        mov     %bp, %ax
        sub     %di, %ax
        cmp     $16, %ax
        jne     1f
        cmp     %bp, 6(%di)
        jne     1f
        xor     %bx, %bx
        popa
        cmp     $0x1234, %bx
        jne     1f
        pushw   $0x0cd7
        popf
        pushf
        pop     %ax
        cld
        and     $0x0fff, %ax
        cmp     $0x0cd7, %ax
1:      mov     $STACK, %sp
        expect  e, 15
        mov     %sp, %si
        mov     $0x77, %bp
        enter   $8, $0
        mov     %sp, %ax
        leave
        add     $10, %ax
        cmp     %si, %ax
        jne     1f
        cmp     $0x77, %bp
1:      expect  e, 16
        mov     %sp, %si
        pushw   $5
        pushw   $6
        lcall   $ROM, $far_sum - BASE
        cmp     $11, %ax
        jne     1f
        cmp     %si, %sp
1:      expect  e, 17
        movw    $0x99, WORK + 0x10
        movw    $0x10, WORK
        movw    $WORK >> 4, WORK + 2
        lds     WORK, %si
        mov     (%si), %bx
        xor     %ax, %ax
        mov     %ax, %ds
        les     WORK, %di
        add     %es:(%di), %bx
        mov     %ax, %es
        movw    $1f - BASE, WORK
        movw    $ROM, WORK + 2
        ljmp    *WORK
        mov     $0, %bx
1:      cmp     $0x132, %bx
        expect  e, 18

# 19: loops and jumps on CX. 20: 32-bit operands and addresses. 21: x87.
        mov     $5, %cx
        xor     %ax, %ax
1:      add     %cx, %ax
        loop    1b
        jcxz    2f
        inc     %ax
2:      mov     $10, %cx
3:      cmp     $7, %cx
        loopne  3b
        add     %cx, %ax
        cmp     $15 + 6, %ax
        expect  e, 19
        mov     $0x12345678, %eax
        imul    $0x10001, %eax, %eax
        mov     $WORK - 0x100, %ebx
        mov     $0x40, %ecx
        mov     %eax, (%ebx,%ecx,4)
        cmpl    $0x68ac5678, WORK
        jne     1f
        mov     $0x12345678, %esp       # only SP counts
        mov     $STACK, %sp
        push    %eax
        pop     %edx
        cmp     %eax, %edx
        jne     1f
        cmp     $0x12340000 + STACK, %esp
1:      mov     $STACK, %esp
        expect  e, 20
        fninit
        movw    $-6, WORK
        filds   WORK
        fimuls  WORK
        fistps  WORK
        fwait
        cmpw    $36, WORK
        expect  e, 21

# Interrupts. 22: INT by the table: flags, CS and IP are saved; 23: IF and TF are off in the handler, and come back. 24: INT3, INTO.
        vector  0x60, on_int
        vector  3, on_int
        vector  4, on_int
        movw    $0, COUNT
        sti
        int     $0x60
1:      pushf
        pop     %ax
        cli
        test    $0x200, %ax
        jz      2f
        cmpw    $1b - BASE, SAVED_IP
        jne     2f
        cmpw    $ROM, SAVED_CS
        jne     2f
        testw   $0x200, SAVED_FLAGS
        jz      2f
        cmpw    $1, COUNT
2:      expect  e, 22
        testw   $0x300, WORK
        expect  z, 23
        movw    $0, COUNT
        int3
        xor     %ax, %ax
        into
        mov     $0x7fff, %ax
        inc     %ax
        into
1:      cmpw    $2, COUNT
        jne     2f
        cmpw    $1b - BASE, SAVED_IP
2:      expect  e, 24

# Exceptions; what is saved is the instruction itself. 25: #DE. 26: #UD. 27: BOUND, #BR. 28: #GP, a word across the end of a segment.
# 29: #SS, the same on the stack. 30: #NM.
        vector  0, on_fault
        vector  5, on_fault
        vector  6, on_fault
        vector  7, on_fault
        vector  12, on_fault
        vector  13, on_fault
        .macro  faults n, label, resume
        cmpw    $\label - BASE, SAVED_IP
        expect  e, \n
        .endm
        movw    $2f - BASE, RESUME
        xor     %bx, %bx
1:      div     %bx
2:      faults  25, 1b
        movw    $2f - BASE, RESUME
1:      ud2
2:      faults  26, 1b
        movw    $2f - BASE, RESUME
        movl    $0x00050001, WORK
        mov     $5, %ax
        bound   %ax, WORK
        mov     $6, %ax
1:      bound   %ax, WORK
2:      faults  27, 1b
        movw    $2f - BASE, RESUME
        mov     $0xffff, %bx
1:      mov     (%bx), %ax
2:      faults  28, 1b
        movw    $2f - BASE, RESUME
        mov     $0xffff, %bp
1:      mov     (%bp), %ax
2:      faults  29, 1b
        movw    $2f - BASE, RESUME
        mov     %cr0, %eax
        or      $CR0_TS, %al
        mov     %eax, %cr0
1:      fnop
2:      clts
        faults  30, 1b

# 31: single step: one trap behind each instruction.
        vector  1, on_int
        movw    $0, COUNT
        pushf
        pop     %ax
        or      $0x100, %ax
        push    %ax
        popf
        nop
        nop
        pushf
        and     $0xfeff, %ax
        push    %ax
        popf
        pop     %bx
        cmpw    $6, COUNT
        expect  e, 31

# 32: addresses go on above 1 MiB. 33: SMSW, SGDT, SIDT. 34: CPUID, and BSWAP of what it tells.
        mov     $0xffff, %ax
        mov     %ax, %es
        movw    $0x1234, %es:0x10 + WORK
        movw    $0x4321, WORK
        cmpw    $0x1234, %es:0x10 + WORK
        xor     %ax, %ax
        mov     %ax, %es
        expect  e, 32
        smsw    %ax
        test    $1, %al
        jnz     1f
        sidt    WORK
        lidtl   %cs:idt_real - BASE
        sidt    WORK + 8
        cmpw    $0x3ff, WORK + 8
        jne     1f
        cmpl    $0, WORK + 10
        jne     1f
        lgdtl   %cs:gdt_pointer - BASE
        sgdt    WORK
        cmpw    $gdt_end - gdt - 1, WORK
1:      expect  e, 33
        xor     %eax, %eax
        cpuid
        bswap   %eax
        shr     $24, %eax
        jz      1f
        cmp     $1, %al
        ja      1f
        stc
1:      expect  nc, 34

# 35: protected mode with 16-bit segments, and back: the new limits stay. 36: so that all of memory can be reached. 37: devices too.
        mov     %cr0, %eax
        or      $CR0_PE, %al
        mov     %eax, %cr0
        mov     $S_DATA32, %bx
        mov     %bx, %ds
        mov     %bx, %es
        str     %cx                     # exists in protected mode only
        and     $~CR0_PE, %al
        mov     %eax, %cr0
        ljmp    $ROM, $1f - BASE
1:      xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     $HIGH, %ebx
        movl    $0x13572468, (%ebx)
        cmpl    $0x13572468, (%ebx)
        expect  e, 35
        mov     $WORK, %esi
        mov     $HIGH + 0x100, %edi
        movl    $0x11223344, WORK
        mov     $4, %ecx
        addr32 rep movsb
        cmpl    $0x11223344, -4(%edi)
        jne     1f
        cmp     $HIGH + 0x104, %edi
1:      expect  e, 36
        mov     $0xfed00000, %ebx
        cmpw    $0x8086, 2(%ebx)
        expect  e, 37

# 38: an interrupt of the 8254 wakes from HLT, vector 8, as PCs began. The local APIC lets it through.
        mov     $0xfee00000, %ebx
        movl    $0x1ff, APIC_SPURIOUS(%ebx)
        movl    $0x700, APIC_LVT_LINT0(%ebx)
        vector  8, on_tick
        outb    0x11, PIC_MASTER
        outb    0x08, PIC_MASTER + 1
        outb    0x04, PIC_MASTER + 1
        outb    0x01, PIC_MASTER + 1
        outb    0xfe, PIC_MASTER + 1
        outb    0x34, PIT + 3
        outb    1193 & 0xff, PIT
        outb    1193 >> 8, PIT
        movw    $0, COUNT
1:      sti
        hlt
2:      cli
        cmpw    $3, COUNT
        jb      1b
        outb    0xff, PIC_MASTER + 1
        sti
        nop
        nop
        cli
        cmpw    $2b - BASE, SAVED_IP
        je      3f
        cmpw    $4, COUNT               # one more was on its way
3:      expect  e, 38

# 39: 32-bit protected mode with its own interrupts, and back. 40: real mode's own work again.
        call    to_32
        cmpl    $0x600df00d, WORK
        expect  e, 39
        movw    $0, COUNT
        int     $0x60
        cmpw    $1, COUNT
        expect  e, 40

# 41: 64-bit mode, and back. 42: as above. 43: LMSW enters protected mode and cannot leave it.
        movl    $0, WORK
        movl    $0, WORK + 4
        call    to_64
        cmpl    $0x89abcdef, WORK
        jne     1f
        cmpl    $0x01234567, WORK + 4
1:      expect  e, 41
        movw    $0, COUNT
        int     $0x60
        cmpw    $1, COUNT
        expect  e, 42
        smsw    %ax
        or      $1, %al
        lmsw    %ax
        and     $0xfe, %al
        lmsw    %ax
        smsw    %bx
        mov     %cr0, %eax
        and     $~CR0_PE, %al
        mov     %eax, %cr0
        ljmp    $ROM, $1f - BASE
1:      test    $1, %bl
        expect  nz, 43

        cmpw    $0, FAILED
        mov     $EXIT_PASS, %eax
        mov     $text_passed - BASE, %si
        je      1f
        mov     $EXIT_FAIL, %eax
        mov     $text_failed - BASE, %si
1:      call    puts
        mov     $DEBUG_EXIT, %dx
        out     %eax, %dx
2:      cli
        hlt
        jmp     2b

# Two words on the stack: AX is their sum.
far_sum:
        push    %bp
        mov     %sp, %bp
        mov     6(%bp), %ax
        add     8(%bp), %ax
        pop     %bp
        lret    $4

# Notes where it was called from, and with what flags it runs itself.
on_int: push    %bp
        mov     %sp, %bp
        push    %ax
        mov     2(%bp), %ax
        mov     %ax, SAVED_IP
        mov     4(%bp), %ax
        mov     %ax, SAVED_CS
        mov     6(%bp), %ax
        mov     %ax, SAVED_FLAGS
        pushf
        pop     %ax
        mov     %ax, WORK
        incw    COUNT
        pop     %ax
        pop     %bp
        iret

# Notes where an exception came from, and goes on at RESUME.
on_fault:
        push    %bp
        mov     %sp, %bp
        push    %ax
        mov     2(%bp), %ax
        mov     %ax, SAVED_IP
        mov     RESUME, %ax
        mov     %ax, 2(%bp)
        pop     %ax
        pop     %bp
        iret

on_tick:
        push    %bp
        mov     %sp, %bp
        push    %ax
        mov     2(%bp), %ax
        mov     %ax, SAVED_IP
        incw    COUNT
        mov     $0x20, %al
        out     %al, $PIC_MASTER
        pop     %ax
        pop     %bp
        iret

# 32-bit protected mode: fetches a number by way of an interrupt gate.
to_32:  lgdtl   %cs:gdt_pointer - BASE
        mov     %cr0, %eax
        or      $CR0_PE, %al
        mov     %eax, %cr0
        ljmpl   $S_CODE32, $1f
        .code32
1:      mov     $S_DATA32, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        movzwl  %sp, %esp
        movl    $on_gate, %eax
        mov     %ax, IDT + 0x30 * 8
        movw    $S_CODE32, IDT + 0x30 * 8 + 2
        movw    $0x8e00, IDT + 0x30 * 8 + 4
        shr     $16, %eax
        mov     %ax, IDT + 0x30 * 8 + 6
        lidt    idt_pointer
        xor     %eax, %eax
        int     $0x30
        mov     %eax, WORK
# From 32-bit protected mode back to the caller in real mode.
to_real:
        mov     $S_DATA16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        ljmp    $S_CODE16, $1f - BASE
        .code16
1:      mov     %cr0, %eax
        and     $~CR0_PE, %al
        mov     %eax, %cr0
        ljmp    $ROM, $1f - BASE
1:      xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        lidtl   %cs:idt_real - BASE
        ret

        .code32
on_gate:
        mov     $0x600df00d, %eax
        iret

# 64-bit mode, with a GiB mapped one to one.
        .code16
to_64:  lgdtl   %cs:gdt_pointer - BASE
        mov     %cr0, %eax
        or      $CR0_PE, %al
        mov     %eax, %cr0
        ljmpl   $S_CODE32, $1f
        .code32
1:      mov     $S_DATA32, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        movzwl  %sp, %esp
        mov     $TABLES, %edi
        mov     $3 * 1024, %ecx
        xor     %eax, %eax
        rep     stosl
        movl    $TABLES + 0x1000 + 3, TABLES
        movl    $TABLES + 0x2000 + 3, TABLES + 0x1000
        movl    $0x83, TABLES + 0x2000
        mov     %cr4, %eax
        or      $CR4_PAE_OSFXSR, %eax
        mov     %eax, %cr4
        mov     $TABLES, %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $1 << 8, %eax
        wrmsr
        mov     %cr0, %eax
        or      $CR0_WP_PG, %eax
        mov     %eax, %cr0
        ljmp    $S_CODE64, $1f
        .code64
1:      movabs  $0x0123456789abcdef, %r8
        mov     $WORK, %r9d
        push    %r8
        popq    (%r9)
        ljmp    *2f(%rip)
2:      .long   1f
        .word   S_CODE32
        .code32
1:      mov     %cr0, %eax
        and     $~CR0_WP_PG, %eax
        mov     %eax, %cr0
        mov     $MSR_EFER, %ecx
        rdmsr
        and     $~(1 << 8), %eax
        wrmsr
        xor     %eax, %eax
        mov     %eax, %cr3
        jmp     to_real

        .code16
# 115200 baud, 8 data bits, no parity, FIFOs on.
serial: mov     $serial_setup - BASE, %si
1:      lodsw   %cs:(%si), %ax
        mov     $COM1, %dx
        cmp     $0xff, %al
        je      2f
        add     %al, %dl
        mov     %ah, %al
        out     %al, %dx
        jmp     1b
2:      ret

# CS:SI: a NUL-terminated string.
puts:   push    %ax
        push    %dx
1:      lodsb   %cs:(%si), %al
        test    %al, %al
        jz      2f
        call    putc
        jmp     1b
2:      pop     %dx
        pop     %ax
        ret

putc:   push    %dx
        push    %ax
        mov     $COM1 + 5, %dx
1:      in      %dx, %al
        test    $0x20, %al
        jz      1b
        pop     %ax
        mov     $COM1, %dx
        out     %al, %dx
        pop     %dx
        ret

# The number of a check is on the stack, and is taken off. Keep all registers.
ok:     push    %si
        mov     $text_ok - BASE, %si
        jmp     1f
fail:   push    %si
        movw    $1, FAILED
        mov     $text_fail - BASE, %si
1:      push    %bp
        mov     %sp, %bp
        push    %ax
        call    puts
        mov     6(%bp), %ax
        aam
        add     $0x3030, %ax
        xchg    %al, %ah
        cmp     $'0', %al
        je      2f
        call    putc
2:      mov     %ah, %al
        call    putc
        mov     $'\n', %al
        call    putc
        pop     %ax
        pop     %bp
        pop     %si
        ret     $2

        .section .rodata
serial_setup:
        .byte   3, 0x83, 0, 1, 1, 0, 3, 0x03, 1, 0, 2, 0x07, 4, 0x03, 0xff, 0xff
        .balign 8
gdt:    .quad   0
        .quad   0x00009b0f0000ffff      # code, 16 bits, the ROM
        .quad   0x000093000000ffff      # data, 16 bits
        .quad   0x00cf9b000000ffff      # code, 32 bits
        .quad   0x00cf93000000ffff      # data, 32 bits
        .quad   0x00af9b000000ffff      # code, 64 bits
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
idt_real:
        .word   0x3ff
        .long   0
idt_pointer:
        .word   0x31 * 8 - 1
        .long   IDT
text:   .ascii  "skep: real mode\n"
text_end:
text_ok:
        .asciz  "ok "
text_fail:
        .asciz  "FAIL "
text_passed:
        .asciz  "skep: passed\n"
text_failed:
        .asciz  "skep: FAILED\n"
