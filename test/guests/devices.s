# A device that uses doorbells, message-signalled interrupts and a resampled line: crates/machine/tests/machine/devices.rs.
# Its registers are a page at 0xfed80000.
        .include "macros.inc"

        .set    DEVICE, 0xfed80000 - (1 << 32)
        .set    BELL, 0x00              # 16 bits, any value: one message
        .set    VALUE_BELL, 0x08        # 32 bits, this value alone: one message
        .set    VALUE, 0x5eed
        .set    LEVEL, 0x10             # write: so many interrupts of the line are due
        .set    ENDED, 0x14             # how often the line's interrupt has ended
        .set    REACHED, 0x18           # writes to the bells that reached the device itself
        .set    ADDRESS, 0x20           # the message
        .set    DATA_WORD, 0x24
        .set    PIN, 20

        .code64
        .section .text
        .global main
main:
        apic_write APIC_SPURIOUS, 0x1ff
        apic_write APIC_LVT_LINT0, 1 << 16
        gate    0x50, on_interrupt
        gate    0x51, on_interrupt

# 1: a bell is a message is an interrupt, each time.
        movl    $0xfee00000, DEVICE + ADDRESS
        movl    $0x50, DEVICE + DATA_WORD
        mov     $100, %r12d
1:      incl    expected(%rip)
        movw    %r12w, DEVICE + BELL
        mov     expected(%rip), %edi
        call    wait_ticks
        dec     %r12d
        jnz     1b
        cmpl    $100, ticks(%rip)
        expect  e, 1

# 2: the bell with a value hears this value, 3: and no other, nor another width.
        movl    $VALUE, DEVICE + VALUE_BELL
        mov     $101, %edi
        call    wait_ticks
        expect  e, 2
        movl    $VALUE + 1, DEVICE + VALUE_BELL
        movw    $VALUE, DEVICE + VALUE_BELL
        call    pass
        cmpl    $101, ticks(%rip)
        expect  e, 3

# 4: those two reached the device, and none of the others.
        cmpl    $2, DEVICE + REACHED
        expect  e, 4

# 5: a masked message waits. 6: it is sent when there is one again.
        movl    $0, DEVICE + ADDRESS
        movw    $1, DEVICE + BELL
        call    pass
        cmpl    $101, ticks(%rip)
        expect  e, 5
        movl    $0xfee00000, DEVICE + ADDRESS
        movw    $1, DEVICE + BELL
        mov     $102, %edi
        call    wait_ticks
        expect  ae, 6
        call    pass
        movl    $0, ticks(%rip)

# 7: level: as many interrupts as the device has to say, 8: one for each end.
        movl    $0x10 + 2 * PIN + 1, IOAPIC
        movl    $0, IOAPIC + 0x10
        movl    $0x10 + 2 * PIN, IOAPIC
        movl    $0x51 | 1 << 13 | 1 << 15, IOAPIC + 0x10
        movl    $5, DEVICE + LEVEL
        mov     $5, %edi
        call    wait_ticks
        expect  e, 7
        call    pass
        cmpl    $5, ticks(%rip)
        expect  e, 8
        cmpl    $5, DEVICE + ENDED
        expect  e, 9
        ret

# Waits until there have been EDI interrupts; flags compare their number with it.
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

# Lets some time pass with interrupts on: 20 ms by the ACPI timer.
pass:
        sti
        mov     $PM_TIMER, %dx
        in      %dx, %eax
        mov     %eax, %ebx
1:      in      %dx, %eax
        sub     %ebx, %eax
        and     $0xffffff, %eax
        cmp     $71590, %eax
        jb      1b
        ret

on_interrupt:
        incl    ticks(%rip)
        apic_write APIC_EOI, 0
        iretq

        .section .bss
        .balign 4
ticks:  .skip   4
expected:
        .skip   4
