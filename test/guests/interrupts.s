# Interrupts and timers of one processor: 8254 through the 8259, the local APIC's timer, IPIs to itself, priorities,
# the I/O APIC, NMI, HPET and the ACPI timer.
        .include "macros.inc"

        .code64
        .section .text
        .global main
main:
# The processor as firmware leaves it: local APIC on, LINT0 to the 8259s.
        apic_write APIC_SPURIOUS, 0x1ff
        apic_write APIC_LVT_LINT0, 0x700

# 1: ten ticks of the 8254 by way of the 8259s, whose lines are at vectors 0x20 to 0x2f; only line 0 is open.
        gate    0x20, on_pic
        outb    0x11, PIC_MASTER
        outb    0x11, PIC_SLAVE
        outb    0x20, PIC_MASTER + 1
        outb    0x28, PIC_SLAVE + 1
        outb    0x04, PIC_MASTER + 1
        outb    0x02, PIC_SLAVE + 1
        outb    0x01, PIC_MASTER + 1
        outb    0x01, PIC_SLAVE + 1
        outb    0xfe, PIC_MASTER + 1
        outb    0xff, PIC_SLAVE + 1
        call    pit_start
        mov     $10, %edi
        call    wait_ticks
        expect  ae, 1

# 2: while interrupts are off, none comes.
        cli
        mov     ticks(%rip), %ebx
        call    pit_pass
        cmp     ticks(%rip), %ebx
        expect  e, 2

# 3: a masked line stays quiet.
        outb    0xff, PIC_MASTER + 1
        sti
        mov     ticks(%rip), %ebx
        call    pit_pass
        mov     ticks(%rip), %eax
        sub     %ebx, %eax
        cmp     $1, %eax                # one may have been on its way
        expect  be, 3
        cli

# 4: the local APIC's timer, once. 5: it then stands at 0. 6: five times. The clock is divided by 16.
        gate    0x40, on_apic
        apic_write APIC_TIMER_DIVIDE, 3
        apic_write APIC_LVT_TIMER, 0x40
        movl    $0, ticks(%rip)
        apic_write APIC_TIMER_INITIAL, 100000
        mov     $1, %edi
        call    wait_ticks
        call    pit_pass
        cmpl    $1, ticks(%rip)
        expect  e, 4
        cmpl    $0, LAPIC + APIC_TIMER_CURRENT
        expect  e, 5
        movl    $0, ticks(%rip)
        apic_write APIC_LVT_TIMER, 0x40 | 1 << 17
        apic_write APIC_TIMER_INITIAL, 100000
        mov     $5, %edi
        call    wait_ticks
        expect  ae, 6
        apic_write APIC_LVT_TIMER, 1 << 16
        apic_write APIC_TIMER_INITIAL, 0
        cli

# 7: the timer by TSC deadline, where there is one.
        mov     $1, %eax
        cpuid
        bt      $24, %ecx
        jc      1f
        push    $7
        call    skip
        jmp     2f
1:      movl    $0, ticks(%rip)
        apic_write APIC_LVT_TIMER, 0x40 | 2 << 17
        mfence
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        add     $1000000, %rax
        mov     %rax, %rbx
        mov     %rax, %rdx
        shr     $32, %rdx
        mov     $MSR_TSC_DEADLINE, %ecx
        wrmsr
        mov     $1, %edi
        call    wait_ticks
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        cmp     %rbx, %rax              # not before its time
        expect  ae, 7
        cli
        apic_write APIC_LVT_TIMER, 1 << 16
2:
# 8: an IPI to itself waits for STI. 9: it then comes, behind the next instruction.
        gate    0x51, on_apic
        movl    $0, ticks(%rip)
        apic_write APIC_ICR_LOW, 0x51 | 1 << 18
        call    ipi_sent
        call    pit_pass
        cmpl    $0, ticks(%rip)
        expect  e, 8
        sti
        nop
        nop
        cli
        cmpl    $1, ticks(%rip)
        expect  e, 9

# 10: one whose class the task priority shuts out waits for CR8 to fall. 11: it then comes at once.
        mov     $5, %eax
        mov     %rax, %cr8
        sti
        apic_write APIC_ICR_LOW, 0x51 | 1 << 18
        call    ipi_sent
        call    pit_pass
        cmpl    $1, ticks(%rip)
        expect  e, 10
        xor     %eax, %eax
        mov     %rax, %cr8
        call    pit_pass
        cmpl    $2, ticks(%rip)
        expect  e, 11
        cli

# 12: of two that wait the higher vector comes first.
        gate    0x62, on_low
        gate    0x73, on_high
        movl    $0, order(%rip)
        apic_write APIC_ICR_LOW, 0x62 | 1 << 18
        call    ipi_sent
        apic_write APIC_ICR_LOW, 0x73 | 1 << 18
        call    ipi_sent
        sti
        call    pit_pass
        cli
        cmpl    $0x7362, order(%rip)
        expect  e, 12

# 13: the 8254 by way of the I/O APIC: input 2, vector 0x50, edge.
        gate    0x50, on_apic
        apic_write APIC_LVT_LINT0, 1 << 16
        movl    $0x10 + 2 * 2 + 1, IOAPIC
        mov     LAPIC + APIC_ID, %eax
        and     $0xff000000, %eax
        mov     %eax, IOAPIC + 0x10
        movl    $0x10 + 2 * 2, IOAPIC
        movl    $0x50, IOAPIC + 0x10
        movl    $0, ticks(%rip)
        mov     $10, %edi
        call    wait_ticks
        expect  ae, 13
        cli
        movl    $0x10 + 2 * 2, IOAPIC
        movl    $1 << 16, IOAPIC + 0x10

# 14: an NMI comes although interrupts are off. 15: a second one waits for IRET.
        gate    2, on_nmi
        movl    $0, ticks(%rip)
        call    send_nmi
        call    pit_pass
        cmpl    $2, ticks(%rip)
        expect  e, 14
        cmpl    $1, nested(%rip)
        expect  e, 15

# 16: the HPET counts. 17: so does the ACPI timer, with 3.579545 MHz, as the 8254's 1.193182 MHz measure it.
        movl    $1, HPET + 0x10
        mov     HPET + 0xf0, %rbx
        call    pit_pass
        cmp     %rbx, HPET + 0xf0
        expect  a, 16
        mov     $PM_TIMER, %edx
        in      %dx, %eax
        mov     %eax, %ebx
        call    pit_pass
        mov     $PM_TIMER, %edx
        in      %dx, %eax
        sub     %ebx, %eax
        cmp     $7000, %eax             # two of the 8254's milliseconds
        expect  ae, 17
        ret

# The 8254's counter 0 at 1 kHz, mode 2.
pit_start:
        outb    0x34, PIT + 3
        outb    1193 & 0xff, PIT
        outb    1193 >> 8, PIT
        ret

# Lets at least two periods of the 8254 go by, as its counter tells. Keeps all registers but RAX.
pit_pass:
        push    %rcx
        push    %rdx
        mov     $3, %ecx
1:      call    pit_read
        mov     %eax, %edx
2:      pause
        call    pit_read
        cmp     %edx, %eax
        ja      3f                      # it wrapped
        mov     %eax, %edx
        jmp     2b
3:      loop    1b
        pop     %rdx
        pop     %rcx
        ret

pit_read:
        outb    0x00, PIT + 3
        in      $PIT, %al
        mov     %al, %ah
        in      $PIT, %al
        xchg    %al, %ah
        movzwl  %ax, %eax
        ret

# EDI: ticks to sleep for; flags compare the ticks with it.
wait_ticks:
        cli
        cmp     %edi, ticks(%rip)
        jae     1f
        sti
        hlt
        jmp     wait_ticks
1:      sti
        cmp     %edi, ticks(%rip)
        ret

ipi_sent:
        testl   $1 << 12, LAPIC + APIC_ICR_LOW
        jnz     ipi_sent
        ret

send_nmi:
        mov     LAPIC + APIC_ID, %eax
        and     $0xff000000, %eax
        mov     %eax, LAPIC + APIC_ICR_HIGH
        apic_write APIC_ICR_LOW, 4 << 8
        jmp     ipi_sent

on_pic: incl    ticks(%rip)
        push    %rax
        outb    0x20, PIC_MASTER
        pop     %rax
        iretq

on_apic:
        incl    ticks(%rip)
        apic_write APIC_EOI, 0
        iretq

on_low: shll    $8, order(%rip)
        orl     $0x62, order(%rip)
        apic_write APIC_EOI, 0
        iretq
on_high:
        shll    $8, order(%rip)
        orl     $0x73, order(%rip)
        apic_write APIC_EOI, 0
        iretq

# The first sends a second, which must not nest.
on_nmi: push    %rax
        incl    ticks(%rip)
        incl    depth(%rip)
        mov     depth(%rip), %eax
        cmp     nested(%rip), %eax
        jbe     1f
        mov     %eax, nested(%rip)
1:      cmpl    $1, ticks(%rip)
        jne     2f
        call    send_nmi
        call    pit_pass
2:      decl    depth(%rip)
        pop     %rax
        iretq

        .section .bss
        .balign 4
ticks:  .skip   4
order:  .skip   4
depth:  .skip   4
nested: .skip   4
