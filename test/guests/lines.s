# Interrupts from devices, and how processors take them: edges and levels through the I/O APIC, messages, 8259s, the task
# priority, NMI, shadows and HLT. The HPET's timer 0 is the source of most. The command line names the processors: cpus=N.
        .include "macros.inc"

        .set    PIN, 10                 # of the I/O APIC, with nothing else on it
        .set    LOW_PIN, 20             # one that is wired active low
        .set    COM2, 0x2f8
        .set    RTC, 0x70

# HPET timer configuration.
        .set    T_LEVEL, 1 << 1
        .set    T_ON, 1 << 2
        .set    T_PERIODIC, 1 << 3 | 1 << 6     # and the next value is both the first and the period
        .set    T_PIN, PIN << 9
        .set    T_LOW_PIN, LOW_PIN << 9
        .set    T_MESSAGE, 1 << 14

# I/O APIC redirection entry.
        .set    E_NMI, 4 << 8
        .set    E_LOGICAL, 1 << 11
        .set    E_LOW, 1 << 13
        .set    E_REMOTE_IRR, 1 << 14
        .set    E_LEVEL, 1 << 15
        .set    E_MASKED, 1 << 16

# Programs \pin of the I/O APIC with \low, and this processor as destination.
        .macro  route pin, low
        mov     $\pin, %edi
        mov     $\low, %esi
        call    set_route
        .endm

# Lets timer 0, configured as \config, expire. Behind it, it has.
        .macro  expire config
        mov     $\config, %edi
        call    start_timer
        call    expired
        .endm

# Checks, as \n, that \count interrupts have come since the last time.
        .macro  came n, count
        cmpl    $\count, ticks(%rip)
        movl    $0, ticks(%rip)
        expect  e, \n
        .endm

        .code64
        .section .text
        .global main
main:   call    read_count
        mov     $other, %edi
        call    start_others
        mov     LAPIC + APIC_ID, %eax
        shr     $24, %eax
        mov     %eax, me(%rip)
        apic_write APIC_LVT_LINT0, 1 << 16
        gate    0x50, on_edge
        gate    0x51, on_level
        gate    0x52, on_count
        gate    0x61, on_nesting
        gate    0x62, on_second
        gate    0x71, on_third
        gate    2, on_nmi

# Edges. 1: each is one interrupt, with interrupts on; 2: or off, in which case it comes later. 3: TMR says edge. 4: an edge at
# a masked pin is lost. 5: two before the first is taken are one.
        route   PIN, 0x50
        sti
        expire  T_ON | T_PIN
        expire  T_ON | T_PIN
        cli
        came    1, 2
        expire  T_ON | T_PIN
        cmpl    $0, ticks(%rip)
        jne     1f
        call    let_in
        cmpl    $1, ticks(%rip)
1:      movl    $0, ticks(%rip)
        expect  e, 2
        testl   $1 << 16, saw_tmr(%rip)
        expect  z, 3
        route   PIN, 0x50 | E_MASKED
        expire  T_ON | T_PIN
        route   PIN, 0x50
        call    let_in
        came    4, 0
        expire  T_ON | T_PIN
        expire  T_ON | T_PIN
        call    let_in
        came    5, 1

# Levels. 6: while the line is asserted, the interrupt is sent again after each EOI: the handler lets go at the third. 7: in
# the handler remote IRR is set, 8: and TMR; 9: behind it, remote IRR is not.
        route   PIN, 0x51 | E_LEVEL
        movl    $3, release_at(%rip)
        sti
        expire  T_ON | T_PIN | T_LEVEL
        call    settle
        cli
        came    6, 3
        testl   $E_REMOTE_IRR, saw_entry(%rip)
        expect  nz, 7
        testl   $1 << 17, saw_tmr(%rip)
        expect  nz, 8
        mov     $PIN, %edi
        call    get_route
        test    $E_REMOTE_IRR, %eax
        expect  z, 9

# 10: a line that let go before it was taken is still one interrupt. 11: one that is asserted while its pin is masked comes
# when the mask falls. 12: an active-low pin.
        movl    $1, release_at(%rip)
        expire  T_ON | T_PIN | T_LEVEL
        movl    $1, HPET + 0x20
        call    let_in
        came    10, 1
        route   PIN, 0x51 | E_LEVEL | E_MASKED
        expire  T_ON | T_PIN | T_LEVEL
        call    let_in
        cmpl    $0, ticks(%rip)
        jne     1f
        route   PIN, 0x51 | E_LEVEL
        call    let_in
        cmpl    $1, ticks(%rip)
1:      movl    $0, ticks(%rip)
        expect  e, 11
        route   PIN, 0x51 | E_MASKED
        route   LOW_PIN, 0x51 | E_LEVEL | E_LOW
        movl    $2, release_at(%rip)
        sti
        expire  T_ON | T_LOW_PIN | T_LEVEL
        call    settle
        cli
        route   LOW_PIN, 0x51 | E_MASKED
        came    12, 2

# 13: EOIs that are not broadcast, where the APIC can, leave remote IRR set. 14: and the interrupt away. 15: the I/O APIC's own
# EOI register ends it, which sends the next.
        testl   $1 << 24, LAPIC + APIC_VERSION
        jnz     1f
        push    $13
        call    skip
        push    $14
        call    skip
        push    $15
        call    skip
        jmp     2f
1:      apic_write APIC_SPURIOUS, 0x11ff
        route   PIN, 0x51 | E_LEVEL
        movl    $2, release_at(%rip)
        sti
        expire  T_ON | T_PIN | T_LEVEL
        call    settle
        cli
        mov     $PIN, %edi
        call    get_route
        test    $E_REMOTE_IRR, %eax
        expect  nz, 13
        cmpl    $1, ticks(%rip)
        expect  e, 14
        apic_write APIC_SPURIOUS, 0x1ff
        movl    $0x51, IOAPIC + 0x40
        call    let_in
        call    settle
        came    15, 2
2:      route   PIN, 0x51 | E_MASKED

# 16: a logical destination, lowest priority, by which this processor alone is meant. 17: one that means nobody.
        apic_write APIC_DFR, 0xffffffff
        apic_write APIC_LDR, 0x80000000
        mov     $PIN, %edi
        mov     $0x50 | 1 << 8 | E_LOGICAL, %esi
        mov     $0x80, %edx
        call    set_route_to
        expire  T_ON | T_PIN
        call    let_in
        came    16, 1
        mov     $PIN, %edi
        mov     $0x50 | E_LOGICAL, %esi
        mov     $0x40, %edx
        call    set_route_to
        expire  T_ON | T_PIN
        call    let_in
        came    17, 0

# The task priority. 18: its class and those below wait, 19: in IRR; 20: one above does not. 21: they come when it falls. 22: CR8
# and TPR are one.
        route   PIN, 0x50
        mov     $5, %eax
        mov     %rax, %cr8
        sti
        expire  T_ON | T_PIN
        cmpl    $0, ticks(%rip)
        expect  e, 18
        testl   $1 << 16, LAPIC + APIC_IRR + 0x20
        expect  nz, 19
        apic_write APIC_ICR_LOW, 1 << 18 | 0x71
        call    ipi_sent
        call    settle
        cmpl    $0x71, order(%rip)
        expect  e, 20
        movl    $0, order(%rip)
        mov     $4, %eax
        mov     %rax, %cr8
        nop
        cli
        came    21, 1
        apic_write APIC_TPR, 0x93
        mov     %cr8, %rax
        mov     %rax, %rbx
        mov     $3, %eax
        mov     %rax, %cr8
        mov     LAPIC + APIC_TPR, %eax
        shl     $8, %ebx
        or      %ebx, %eax
        cmp     $0x930, %eax
        expect  e, 22
        xor     %eax, %eax
        mov     %rax, %cr8

# 23: in a handler that lets interrupts in, its own class waits, and a higher one does not.
        apic_write APIC_ICR_LOW, 1 << 18 | 0x61
        call    ipi_sent
        call    let_in
        cmpl    $0x617162, order(%rip)
        movl    $0, order(%rip)
        expect  e, 23

# Messages. 24: from the HPET to this processor. 25: with APICs off by SVR they are lost; 26: but not NMIs.
        mov     me(%rip), %eax
        mov     $0x52, %ecx
        call    set_message
        expire  T_ON | T_MESSAGE
        call    let_in
        came    24, 1
        apic_write APIC_SPURIOUS, 0xff
        expire  T_ON | T_MESSAGE
        apic_write APIC_SPURIOUS, 0x1ff
        call    let_in
        came    25, 0
        apic_write APIC_SPURIOUS, 0xff
        mov     me(%rip), %eax
        mov     $E_NMI, %ecx
        call    set_message
        expire  T_ON | T_MESSAGE
        apic_write APIC_SPURIOUS, 0x1ff
        came    26, 1

# 27: to each processor in turn, and to no other.
        xor     %ebp, %ebp
        xor     %r12d, %r12d
1:      cmp     me(%rip), %ebp
        je      3f
        mov     %ebp, %eax
        mov     $0x52, %ecx
        call    set_message
        expire  T_ON | T_MESSAGE
        mov     $100000, %ecx
2:      pause
        cmpl    $1, counts(, %rbp, 4)
        je      3f
        in      $0x61, %al
        loop    2b
        inc     %r12d
3:      inc     %ebp
        cmp     cpus(%rip), %ebp
        jb      1b
        call    settle
        xor     %ebp, %ebp
        xor     %eax, %eax
4:      add     counts(, %rbp, 4), %eax
        inc     %ebp
        cmp     cpus(%rip), %ebp
        jb      4b
        inc     %eax
        sub     cpus(%rip), %eax
        or      %r12d, %eax
        expect  z, 27

# NMI. 28: by the I/O APIC, with interrupts off. 29: one that comes in the handler waits for IRET, 30: and only that: an exception's
# handler returns with IRET too.
        route   PIN, E_NMI
        expire  T_ON | T_PIN
        came    28, 1
        movl    $1, nest_nmi(%rip)
        expire  T_ON | T_PIN
        cmpl    $1, deepest(%rip)
        expect  e, 29
        came    30, 2
        gate    3, on_breakpoint
        movl    $2, nest_nmi(%rip)
        expire  T_ON | T_PIN
        cmpl    $2, deepest(%rip)
        expect  e, 31
        came    32, 2

# HLT; RIP is behind it. 33: an NMI wakes, one of many, as it could come too early. 34: an edge, 35: a level, 36: a message.
        mov     $T_ON | T_PIN | T_PERIODIC, %edi
        call    start_timer
        mov     $1000, %ecx
1:      sti
        hlt
2:      cli
        lea     2b(%rip), %rax
        cmp     %rax, came_from(%rip)
        loopne  1b
        sete    %bl
        movl    $0, HPET + 0x10
        movl    $0, HPET + 0x100
        movl    $0, ticks(%rip)
        test    %bl, %bl
        expect  nz, 33
        route   PIN, 0x50
        mov     $T_ON | T_PIN, %edi
        call    start_timer
        sti
        hlt
1:      cli
        lea     1b(%rip), %rax
        cmp     %rax, came_from(%rip)
        expect  e, 34
        route   PIN, 0x51 | E_LEVEL
        movl    $1, release_at(%rip)
        movl    $0, ticks(%rip)
        mov     $T_ON | T_PIN | T_LEVEL, %edi
        call    start_timer
        sti
        hlt
1:      cli
        lea     1b(%rip), %rax
        cmp     %rax, came_from(%rip)
        expect  e, 35
        route   PIN, 0x51 | E_MASKED
        mov     me(%rip), %eax
        mov     $0x52, %ecx
        call    set_message
        mov     $T_ON | T_MESSAGE, %edi
        call    start_timer
        sti
        hlt
1:      cli
        lea     1b(%rip), %rax
        cmp     %rax, came_from(%rip)
        expect  e, 36
        movl    $0, ticks(%rip)

# Shadows. 37: none comes between STI and CLI. 38: STI holds them off for one instruction; 39: that of MOV SS adds one of its own.
        expire  T_ON | T_MESSAGE
        sti
        cli
        sti
        cli
        came    37, 0
        sti
        nop
1:      nop
        cli
        lea     1b(%rip), %rax
        cmp     %rax, came_from(%rip)
        jne     1f
        cmpl    $1, ticks(%rip)
1:      movl    $0, ticks(%rip)
        expect  e, 38
        expire  T_ON | T_MESSAGE
        mov     %ss, %eax
        sti
        mov     %eax, %ss
        nop
1:      nop
        cli
        lea     1b(%rip), %rax
        cmp     %rax, came_from(%rip)
        expect  e, 39
        movl    $0, ticks(%rip)
        movl    $0, HPET + 0x10
        movl    $0, HPET + 0x100

# ISA devices by the I/O APIC. 40: the second UART wants to send. 41: the RTC, time after time.
        route   3, 0x50
        call    uart_on
        call    let_in
        call    uart_off
        came    40, 1
        route   3, 0x50 | E_MASKED
        route   8, 0x53
        gate    0x53, on_rtc
        mov     $0x0a, %al
        mov     $0x23, %ah              # 8 kHz
        call    rtc_set
        mov     $0x0b, %al
        mov     $0x42, %ah              # periodic, 24 hours
        call    rtc_set
        mov     $0x0c, %al
        out     %al, $RTC
        in      $RTC + 1, %al
1:      sti
        hlt
        cli
        cmpl    $3, ticks(%rip)
        jb      1b
        mov     $0x0b, %al
        mov     $0x02, %ah
        call    rtc_set
        route   8, 0x53 | E_MASKED
        call    let_in                  # one more may have been on its way
        cmpl    $3, ticks(%rip)
        movl    $0, ticks(%rip)
        expect  ae, 41

# By the 8259s and LINT0, as PCs began. 42: the second UART, vector 0x23. 43: which in service holds off a lower one until its end.
        gate    0x23, on_pic
        apic_write APIC_LVT_LINT0, 0x700
        outb    0x11, PIC_MASTER
        outb    0x11, PIC_SLAVE
        outb    0x20, PIC_MASTER + 1
        outb    0x28, PIC_SLAVE + 1
        outb    0x04, PIC_MASTER + 1
        outb    0x02, PIC_SLAVE + 1
        outb    0x01, PIC_MASTER + 1
        outb    0x01, PIC_SLAVE + 1
        outb    0xf7, PIC_MASTER + 1
        outb    0xff, PIC_SLAVE + 1
        call    uart_on
        call    let_in
        cmpl    $1, ticks(%rip)
        expect  e, 42
        call    uart_off
        call    uart_on
        call    let_in
        cmpl    $1, ticks(%rip)
        jne     1f
        outb    0x20, PIC_MASTER
        call    let_in
        cmpl    $2, ticks(%rip)
1:      expect  e, 43
        call    uart_off
        outb    0x20, PIC_MASTER

# 44: a task priority shuts them out no more than NMIs. 45: LINT0's mask does.
        movl    $0, ticks(%rip)
        mov     $15, %eax
        mov     %rax, %cr8
        call    uart_on
        call    let_in
        call    uart_off
        outb    0x20, PIC_MASTER
        xor     %eax, %eax
        mov     %rax, %cr8
        came    44, 1
        apic_write APIC_LVT_LINT0, 0x10700
        call    uart_on
        call    let_in
        came    45, 0
        call    uart_off
        outb    0xff, PIC_MASTER + 1
        ret

# EDI: pin, ESI: low half of its entry. The high half: this processor.
set_route:
        mov     me(%rip), %edx
# EDX: destination.
set_route_to:
        lea     0x11(, %rdi, 2), %eax
        mov     %eax, IOAPIC
        shl     $24, %edx
        mov     %edx, IOAPIC + 0x10
        dec     %eax
        mov     %eax, IOAPIC
        mov     %esi, IOAPIC + 0x10
        ret

# EDI: pin. EAX: low half of its entry.
get_route:
        lea     0x10(, %rdi, 2), %eax
        mov     %eax, IOAPIC
        mov     IOAPIC + 0x10, %eax
        ret

# EAX: APIC ID, ECX: data of timer 0's message.
set_message:
        shl     $12, %eax
        or      $0xfee00000, %eax
        mov     %ecx, HPET + 0x110
        mov     %eax, HPET + 0x114
        ret

# EDI: configuration of timer 0, which expires 100 us from now.
start_timer:
        movl    $0, HPET + 0x10
        movl    $1, HPET + 0x20
        mov     %edi, HPET + 0x100
        xor     %eax, %eax
        mov     %rax, HPET + 0xf0
        mov     $1000, %eax
        mov     %rax, HPET + 0x108
        movl    $1, HPET + 0x10
        ret

# Waits until it has; a register of the HPET that is not its counter has then been read.
expired:
        pause
        cmpl    $1500, HPET + 0xf0
        jb      expired
        mov     HPET + 0x20, %eax
        jmp     ipi_sent

# Lets what waits in.
let_in: sti
        nop
        nop
        cli
        ret

# Gives what is on its way some time.
settle: mov     $100, %ecx
1:      in      $0x61, %al
        loop    1b
        ret

uart_on:
        outb    0x08, COM2 + 4          # OUT2 lets interrupts out
        outb    0x02, COM2 + 1          # transmitter empty
        ret
uart_off:
        outb    0x00, COM2 + 1
        ret

# AL: register of the RTC, AH: value.
rtc_set:
        out     %al, $RTC
        mov     %ah, %al
        out     %al, $RTC + 1
        ret

# What the handlers share: where they came from.
        .macro  enter_handler
        push    %rax
        mov     8(%rsp), %rax
        mov     %rax, came_from(%rip)
        .endm

on_edge:
        enter_handler
        incl    ticks(%rip)
        mov     LAPIC + APIC_TMR + 0x20, %eax
        mov     %eax, saw_tmr(%rip)
        apic_write APIC_EOI, 0
        pop     %rax
        iretq

on_level:
        enter_handler
        push    %rdi
        incl    ticks(%rip)
        mov     LAPIC + APIC_TMR + 0x20, %eax
        mov     %eax, saw_tmr(%rip)
        mov     $PIN, %edi
        call    get_route
        mov     %eax, saw_entry(%rip)
        mov     ticks(%rip), %eax
        cmp     release_at(%rip), %eax
        jb      1f
        movl    $1, HPET + 0x20
1:      apic_write APIC_EOI, 0
        pop     %rdi
        pop     %rax
        iretq

# On every processor.
on_count:
        enter_handler
        mov     LAPIC + APIC_ID, %eax
        shr     $24, %eax
        cmp     me(%rip), %eax
        jne     1f
        incl    ticks(%rip)
        jmp     2f
1:      lock    incl counts(, %rax, 4)
2:      apic_write APIC_EOI, 0
        pop     %rax
        iretq

on_nesting:
        orl     $0x61, order(%rip)
        apic_write APIC_ICR_LOW, 1 << 18 | 0x62
        call    ipi_sent
        apic_write APIC_ICR_LOW, 1 << 18 | 0x71
        call    ipi_sent
        sti
        nop
        nop
        cli
        apic_write APIC_EOI, 0
        iretq
on_second:
        shll    $8, order(%rip)
        orl     $0x62, order(%rip)
        apic_write APIC_EOI, 0
        iretq
on_third:
        shll    $8, order(%rip)
        orl     $0x71, order(%rip)
        apic_write APIC_EOI, 0
        iretq

# nest_nmi 1: send another from the handler; 2: and then meet a breakpoint, whose IRET ends the blocking.
on_nmi: enter_handler
        push    %rdi
        incl    ticks(%rip)
        incl    depth(%rip)
        mov     depth(%rip), %eax
        cmp     deepest(%rip), %eax
        jbe     1f
        mov     %eax, deepest(%rip)
1:      mov     nest_nmi(%rip), %edi
        movl    $0, nest_nmi(%rip)
        test    %edi, %edi
        jz      2f
        push    %rdi
        mov     $T_ON | T_PIN, %edi
        call    start_timer
        call    expired
        pop     %rdi
        cmp     $2, %edi
        jne     2f
        int3
2:      decl    depth(%rip)
        pop     %rdi
        pop     %rax
        iretq

on_breakpoint:
        iretq

on_rtc: push    %rax
        incl    ticks(%rip)
        mov     $0x0c, %al
        out     %al, $RTC
        in      $RTC + 1, %al
        apic_write APIC_EOI, 0
        pop     %rax
        iretq

# Reads what identifies the interrupt, which lets go of the line. The end is the caller's.
on_pic: push    %rax
        push    %rdx
        incl    ticks(%rip)
        mov     $COM2 + 2, %edx
        in      %dx, %al
        pop     %rdx
        pop     %rax
        iretq

# What the other processors do.
other:  sti
        hlt
        jmp     other

        .section .bss
        .balign 8
came_from:
        .skip   8
me:     .skip   4
ticks:  .skip   4
order:  .skip   4
saw_tmr:
        .skip   4
saw_entry:
        .skip   4
release_at:
        .skip   4
nest_nmi:
        .skip   4
depth:  .skip   4
deepest:
        .skip   4
counts: .skip   256 * 4
