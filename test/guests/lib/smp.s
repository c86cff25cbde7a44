# Starting the other processors. The command line names the number of all: cpus=N, 2 if it does not.
        .include "macros.inc"

        .set    TRAMPOLINE, 0x8000      # start-up vector 8

        .code64
        .section .text
        .global read_count, start_others, wait_for_others, ipi_sent, pause_a_while, barrier, cpus

# Looks for cpus=N: EDI.
read_count:
        mov     $2, %edi
        mov     command_line(%rip), %rsi
        test    %rsi, %rsi
        jz      3f
1:      mov     (%rsi), %eax
        test    %al, %al
        jz      3f
        inc     %rsi
        cmp     $0x73757063, %eax       # "cpus"
        jne     1b
        add     $4, %rsi
        xor     %edi, %edi
2:      movzbl  (%rsi), %eax
        sub     $'0', %eax
        cmp     $9, %eax
        ja      3f
        imul    $10, %edi, %edi
        add     %eax, %edi
        inc     %rsi
        jmp     2b
3:      mov     %edi, cpus(%rip)
        ret

# EDI: what each of the others shall do in 64-bit mode, on a stack of its own, interrupts off, its local APIC on. INIT, and
# two start-up IPIs, of which the second does nothing. ZF if all have started. Masks the 8259s.
start_others:
        mov     %edi, task(%rip)
        apic_write APIC_SPURIOUS, 0x1ff
        outb    0xff, PIC_MASTER + 1    # only IPIs are wanted
        outb    0xff, PIC_SLAVE + 1
        mov     $trampoline, %esi
        mov     $TRAMPOLINE, %edi
        mov     $trampoline_end - trampoline, %ecx
        rep     movsb
        apic_write APIC_ICR_LOW, 0xc4500
        call    ipi_sent
        call    pause_a_while
        apic_write APIC_ICR_LOW, 0xc4600 | TRAMPOLINE >> 12
        call    ipi_sent
        call    pause_a_while
        apic_write APIC_ICR_LOW, 0xc4600 | TRAMPOLINE >> 12
        call    ipi_sent
        mov     $started, %edi

# EDI: a counter that each other processor raises; waits for all, and compares.
wait_for_others:
        mov     cpus(%rip), %eax
        dec     %eax
1:      pause
        cmp     %eax, (%rdi)
        jb      1b
        cmp     %eax, (%rdi)
        ret

# Waits until the xAPIC has sent its IPI.
ipi_sent:
        testl   $1 << 12, LAPIC + APIC_ICR_LOW
        jnz     ipi_sent
        ret

# Some milliseconds by port reads, each of which takes about a microsecond on hardware.
pause_a_while:
        mov     $10000, %ecx
1:      in      $0x61, %al
        loop    1b
        ret

# Waits for all cpus, with interrupts as they are. Keeps all registers.
barrier:
        push    %rax
        push    %rbx
        mov     generation(%rip), %ebx
        mov     $1, %eax
        lock    xadd %eax, arrived(%rip)
        inc     %eax
        cmp     cpus(%rip), %eax
        jne     1f
        movl    $0, arrived(%rip)
        incl    generation(%rip)
1:      pause
        cmp     generation(%rip), %ebx
        je      1b
        pop     %rbx
        pop     %rax
        ret

# Where the others come to 64-bit mode.
another:
        mov     $1, %eax
        lock    xadd %eax, stacks(%rip)
        inc     %eax
        shl     $12, %eax
        lea     other_stacks(%rip), %rsp
        add     %rax, %rsp
        call    traps_load
        apic_write APIC_SPURIOUS, 0x1ff
        lock    incl started(%rip)
        mov     task(%rip), %eax
        jmp     *%rax

# Real mode at TRAMPOLINE, to protected mode with the tables of the boot processor.
        .code16
trampoline:
        cli
        cld
        xor     %ax, %ax
        mov     %ax, %ds
        lgdtl   trampoline_gdt - trampoline + TRAMPOLINE
        mov     %cr0, %eax
        or      $CR0_PE, %eax
        mov     %eax, %cr0
        ljmpl   $CODE32, $1f
trampoline_gdt:
        .word   GDT_SIZE - 1
        .long   gdt
trampoline_end:

        .code32
1:      mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $another, %edi
        jmp     enter_long

        .section .bss
        .balign 4
cpus:   .skip   4
task:   .skip   4
started:
        .skip   4
stacks: .skip   4
arrived:
        .skip   4
generation:
        .skip   4
        .balign 4096
other_stacks:
        .skip   64 * 0x1000
