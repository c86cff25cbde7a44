# Several processors: INIT and start-up IPIs, locked operations, IPIs to and fro, cross-modifying code. The command
# line names the number of processors: cpus=N, 2 if it does not.
        .include "macros.inc"

        .set    ROUNDS, 100000

        .code64
        .section .text
        .global main
main:   print   "skep: "
        call    read_count
        call    print_number
        print   " processors\n"

# 1: all others start after INIT and two start-up IPIs, of which the second does nothing.
        mov     $other, %edi
        call    start_others
        expect  e, 1

# 2: they have IDs of their own.
        mov     $known, %edi
        call    wait_for_others
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

# What the others do, stage by stage.
other:  mov     LAPIC + APIC_ID, %eax
        shr     $24, %eax
        lock    bts %eax, ids(%rip)
        lock    incl known(%rip)

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

        .section .bss
        .balign 16
wide:   .skip   16
ids:    .skip   8
known:  .skip   4
stage:  .skip   4
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
