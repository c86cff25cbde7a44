# Several processors: INIT and start-up IPIs, locked operations, IPIs to and fro, cross-modifying code. The command
# line names the number of processors: cpus=N, 2 if it does not.
        .include "macros.inc"

        .set    TRAMPOLINE, 0x8000      # start-up vector 8
        .set    ROUNDS, 100000

        .code64
        .section .text
        .global main
main:   call    read_count
        print   "skep: "
        mov     cpus(%rip), %edi
        call    print_number
        print   " processors\n"
        apic_write APIC_SPURIOUS, 0x1ff
        outb    0xff, PIC_MASTER + 1    # only IPIs are wanted
        outb    0xff, PIC_SLAVE + 1
        mov     $trampoline, %esi
        mov     $TRAMPOLINE, %edi
        mov     $trampoline_end - trampoline, %ecx
        rep     movsb

# 1: all others start after INIT and two start-up IPIs, of which the second does nothing.
        apic_write APIC_ICR_LOW, 0xc4500
        call    ipi_sent
        call    pause_a_while
        apic_write APIC_ICR_LOW, 0xc4600 | TRAMPOLINE >> 12
        call    ipi_sent
        call    pause_a_while
        apic_write APIC_ICR_LOW, 0xc4600 | TRAMPOLINE >> 12
        call    ipi_sent
        mov     $started, %edi
        call    wait_for_others
        expect  e, 1

# 2: they have IDs of their own.
        mov     LAPIC + APIC_ID, %eax
        shr     $24, %eax
        lock    bts %eax, ids(%rip)
        mov     ids(%rip), %rax
        popcnt  %rax, %rax
        cmp     %eax, cpus(%rip)
        expect  e, 2

# 3: additions that are locked do not get lost; 4: nor do those under a spin lock by exchange; 5: nor by CMPXCHG16B.
        movl    $1, stage(%rip)
        call    contend
        mov     $contended, %edi
        call    wait_for_others
        mov     cpus(%rip), %eax
        imul    $ROUNDS, %eax, %eax
        cmp     %eax, additions(%rip)
        expect  e, 3
        cmp     %eax, guarded(%rip)
        expect  e, 4
        cmp     %rax, wide + 8(%rip)
        expect  e, 5

# 6: an IPI wakes each of them from HLT. 7: each answers with one; those that meet at the boot processor merge.
        gate    0x60, on_call
        gate    0x61, on_answer
        movl    $2, stage(%rip)
        mov     $halting, %edi
        call    wait_for_others
        mov     LAPIC + APIC_ID, %eax
        and     $0xff000000, %eax
        mov     %eax, caller(%rip)
        apic_write APIC_ICR_LOW, 0xc4060
        call    ipi_sent
        sti
        mov     $woken, %edi
        call    wait_for_others
        expect  e, 6
1:      pause
        cmpl    $0, answers(%rip)
        je      1b
        cli
        mov     cpus(%rip), %eax
        cmp     %eax, answers(%rip)
        expect  b, 7

# 8: code that another processor changes takes effect there, after it has been told to serialize.
        movl    $3, stage(%rip)
        mov     $spinning, %edi
        call    wait_for_others
        movb    $123, shared_code + 1(%rip)
        movl    $4, stage(%rip)
        mov     $seen, %edi
        call    wait_for_others
        expect  e, 8
        ret

# EDI: a counter that each other processor raises; waits for all, and compares.
wait_for_others:
        mov     cpus(%rip), %eax
        dec     %eax
1:      pause
        cmp     %eax, (%rdi)
        jb      1b
        cmp     %eax, (%rdi)
        ret

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

# What all processors do at once.
contend:
        mov     $ROUNDS, %ecx
        mov     $1, %ebx
1:      lock    addl $1, additions(%rip)
        mov     $1, %eax
2:      xchg    %eax, guard(%rip)
        test    %eax, %eax
        jz      3f
        pause
        jmp     2b
3:      incl    guarded(%rip)
        movl    $0, guard(%rip)
        push    %rcx
        mov     wide(%rip), %rax
        mov     wide + 8(%rip), %rdx
4:      lea     1(%rax), %rbx
        lea     1(%rdx), %rcx
        lock    cmpxchg16b wide(%rip)
        jnz     4b
        pop     %rcx
        loop    1b
        ret

# What the others do, stage by stage. Each has its own stack.
        .code64
other:  mov     $1, %eax
        lock    xadd %eax, stacks(%rip)
        inc     %eax
        shl     $12, %eax
        lea     other_stacks(%rip), %rsp
        add     %rax, %rsp
        call    traps_load
        apic_write APIC_SPURIOUS, 0x1ff
        mov     LAPIC + APIC_ID, %eax
        shr     $24, %eax
        lock    bts %eax, ids(%rip)
        lock    incl started(%rip)

        mov     $1, %edi
        call    wait_stage
        call    contend
        lock    incl contended(%rip)

        mov     $2, %edi
        call    wait_stage
        cli
        lock    incl halting(%rip)
        sti
        hlt

        mov     $3, %edi
        call    wait_stage
        call    shared_code
        lock    incl spinning(%rip)
        mov     $4, %edi
        call    wait_stage
        xor     %eax, %eax
        cpuid
        call    shared_code
        cmp     $123, %eax
        jne     1f
        lock    incl seen(%rip)
1:      cli
        hlt
        jmp     1b

# EDI: the stage to wait for; meanwhile the code that will be changed is run.
wait_stage:
        call    shared_code
        pause
        cmp     %edi, stage(%rip)
        jb      wait_stage
        ret

        .balign 16
shared_code:
        mov     $1, %eax
        ret

on_call:
        push    %rax
        apic_write APIC_EOI, 0
        mov     caller(%rip), %eax
        mov     %eax, LAPIC + APIC_ICR_HIGH
        apic_write APIC_ICR_LOW, 0x4061
        lock    incl woken(%rip)
        pop     %rax
        iretq

on_answer:
        lock    incl answers(%rip)
        apic_write APIC_EOI, 0
        iretq

# Looks for cpus=N.
read_count:
        movl    $2, cpus(%rip)
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
        ja      4f
        imul    $10, %edi, %edi
        add     %eax, %edi
        inc     %rsi
        jmp     2b
4:      mov     %edi, cpus(%rip)
3:      ret

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
        mov     $other, %edi
        jmp     enter_long

        .section .bss
        .balign 16
wide:   .skip   16
ids:    .skip   8
cpus:   .skip   4
started:
        .skip   4
stage:  .skip   4
stacks: .skip   4
additions:
        .skip   4
guard:  .skip   4
guarded:
        .skip   4
contended:
        .skip   4
halting:
        .skip   4
caller: .skip   4
woken:  .skip   4
answers:
        .skip   4
spinning:
        .skip   4
seen:   .skip   4
        .balign 4096
other_stacks:
        .skip   64 * 0x1000
