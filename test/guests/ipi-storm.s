# Interrupts between processors, thousands of each kind, all of them sending at once; each must arrive, and arrive once. A
# sender goes on when its last has been counted, and each has a vector of its own, so that none can merge with another's.
# The command line names the number of processors: cpus=N, 2 if it does not, 8 at most.
        .include "macros.inc"

        .set    ROUNDS, 400
        .set    MOST, 8
        .set    VECTOR, 0x50            # of processor 0

        .set    SELF, 1 << 18
        .set    ALL, 2 << 18
        .set    OTHERS, 3 << 18
        .set    LOGICAL, 1 << 11
        .set    LOWEST, 1 << 8
        .set    NMI, 4 << 8

# One kind: check \n. \icr goes to the command register's low half, with the sender's vector; \to is what a processor sends to: its
# successor, the logical ID of its successor or of all, or nothing. \from says which entries of the table each of its
# interrupts raises.
        .macro  storm n, icr, to, raises
        mov     $\icr, %r14d
        lea     \to(%rip), %r13
        lea     \raises(%rip), %r12
        call    phase
        cmpl    $0, %gs:0
        jne     .Lnext\@
        test    %eax, %eax
        expect  z, \n
.Lnext\@:
        call    barrier
        .endm

        .code64
        .section .text
        .global main
main:   call    read_count
        cmp     $MOST, %edi
        jbe     1f
        movl    $MOST, cpus(%rip)
1:      mov     $VECTOR, %edi
        lea     on_ipi(%rip), %rsi
2:      call    set_gate
        add     $ON_IPI_SIZE, %rsi
        inc     %edi
        cmp     $VECTOR + MOST, %edi
        jb      2b
        gate    2, on_nmi
        mov     $other, %edi
        call    start_others
        expect  e, 1

# What all do. GS: the processor's number (0 reports) and its successor's.
        xor     %r15d, %r15d
        jmp     1f
other:  mov     $1, %r15d
        lock    xadd %r15d, numbers(%rip)
        inc     %r15d
1:      mov     %r15d, %eax
        shl     $5, %eax
        lea     locals(%rip), %rbx
        add     %rax, %rbx
        mov     %r15d, (%rbx)
        lea     1(%r15), %eax
        xor     %edx, %edx
        cmp     cpus(%rip), %eax
        cmovae  %edx, %eax
        mov     %eax, 4(%rbx)
        mov     %rbx, %rax
        mov     %rbx, %rdx
        shr     $32, %rdx
        mov     $MSR_GS_BASE, %ecx
        wrmsr
        mov     LAPIC + APIC_ID, %eax
        shr     $24, %eax
        mov     %eax, ids(, %r15, 4)
        mov     %r15d, %ecx
        mov     $1 << 24, %eax
        shl     %cl, %eax
        mov     %eax, LAPIC + APIC_LDR
        shr     $24, %eax
        mov     %eax, logical_ids(, %r15, 4)
        movl    $0xffffffff, LAPIC + APIC_DFR
        call    barrier

# 2: fixed, to the next. 3: to itself. 4: to all but itself. 5: to all. 6: logical, to the next. 7: logical, to all. 8: lowest priority, to any
# of all. 9: NMI, to the next.
        storm   2, 0, next, one_next
        storm   3, SELF, next, one_self
        storm   4, OTHERS, next, each_other
        storm   5, ALL, next, each
        storm   6, LOGICAL, next_logical, one_next
        storm   7, LOGICAL, all_logical, each
        storm   8, LOGICAL|LOWEST, all_logical, any
        storm   9, NMI, next, nmi_next

# The same by x2APIC. 10: fixed. 11: the register that sends to itself. 12: all but itself. 13: all. 14: logical. 15: NMI. 16: to itself by
# the command register.
        mov     $1, %eax
        cpuid
        bt      $21, %ecx
        jc      1f
        cmpl    $0, %gs:0
        jne     5f
        mov     $10, %ebx
2:      push    %rbx
        call    skip
        inc     %ebx
        cmp     $16, %ebx
        jbe     2b
        jmp     4f
1:      mov     $MSR_APIC_BASE, %ecx
        rdmsr
        or      $1 << 10, %eax
        wrmsr
        mov     %gs:0, %r15d
        mov     $MSR_X2APIC + APIC_LDR / 16, %ecx
        rdmsr
        mov     %eax, logical_ids(, %r15, 4)
        movl    $1, x2apic(%rip)
        call    barrier
        storm   10, 0, next, one_next
        storm   11, -1, next, one_self
        storm   12, OTHERS, next, each_other
        storm   13, ALL, next, each
        storm   14, LOGICAL, next_logical, one_next
        storm   15, NMI, next, nmi_next
        storm   16, SELF, next, one_self
        cmpl    $0, %gs:0
        jne     5f
4:      ret
5:      cli
        hlt
        jmp     5b

# Sends ROUNDS interrupts. R14: low half of the command, R13: gives the destination in EDX, R12: EAX is zero if the last has
# been counted wherever it should, by the number of rounds in ECX. EAX: what there is too much or too little of all.
phase:  xor     %ebp, %ebp
        sti
1:      inc     %ebp
        call    *%r13
        call    send
        mov     $1 << 22, %ebx          # and then it has been lost
2:      mov     %ebp, %ecx
        call    *%r12
        test    %eax, %eax
        jz      3f
        pause
        dec     %ebx
        jnz     2b
        lock    incl lost(%rip)
        jmp     4f
3:      cmp     $ROUNDS, %ebp
        jb      1b
4:      call    barrier
        mov     $100, %ecx              # late ones show in the sum
5:      in      $0x61, %al
        loop    5b
        call    barrier
        cli
        cmpl    $0, %gs:0
        jne     7f
# The sum of the table is what all have sent to so many.
        mov     $-1, %ecx
        call    *%r12                   # how many entries each raises
        imul    $ROUNDS, %eax, %eax
        imul    cpus(%rip), %eax
        xor     %edx, %edx
6:      sub     table(, %rdx, 4), %eax
        movl    $0, table(, %rdx, 4)
        inc     %edx
        cmp     $2 * MOST * MOST, %edx
        jb      6b
        or      lost(%rip), %eax
        movl    $0, lost(%rip)
7:      ret

# EDX: where to.
next:   mov     %gs:4, %edx
        mov     ids(, %rdx, 4), %edx
        ret
next_logical:
        mov     %gs:4, %edx
        mov     logical_ids(, %rdx, 4), %edx
        ret
all_logical:
        mov     $0xff, %edx
        ret

# The counts. The table holds, for each sender and receiver, what has come; behind it, for each receiver, NMIs. ECX: the count
# that there should be; -1 asks how many counts there are instead.
one_self:
        mov     %gs:0, %edx
        jmp     1f
one_next:
        mov     %gs:4, %edx
1:      mov     $1, %eax
        cmp     $-1, %ecx
        je      2f
        mov     %gs:0, %eax
        shl     $3, %eax
        add     %edx, %eax
        mov     table(, %rax, 4), %eax
        sub     %ecx, %eax
2:      ret
nmi_next:
        mov     $1, %eax
        cmp     $-1, %ecx
        je      1f
        mov     %gs:4, %edx
        mov     table + 4 * MOST * MOST(, %rdx, 4), %eax
        sub     %ecx, %eax
1:      ret
each_other:
        mov     cpus(%rip), %eax
        dec     %eax
        mov     %gs:0, %esi
        jmp     1f
each:   mov     cpus(%rip), %eax
        mov     $-1, %esi
1:      cmp     $-1, %ecx
        je      4f
        xor     %eax, %eax
        xor     %edx, %edx
2:      cmp     %esi, %edx
        je      3f
        mov     %gs:0, %edi
        lea     (%rdx, %rdi, 8), %edi
        mov     table(, %rdi, 4), %edi
        sub     %ecx, %edi
        or      %edi, %eax
3:      inc     %edx
        cmp     cpus(%rip), %edx
        jb      2b
4:      ret
any:    mov     $1, %eax
        cmp     $-1, %ecx
        je      2f
        mov     %gs:0, %edi
        shl     $3, %edi
        mov     %ecx, %eax
        neg     %eax
        xor     %edx, %edx
1:      add     table(, %rdi, 4), %eax
        inc     %edi
        inc     %edx
        cmp     $MOST, %edx
        jb      1b
2:      ret

# R14: command without vector, -1 for the self-IPI register; EDX: destination.
send:   mov     %gs:0, %eax
        add     $VECTOR, %eax
        cmp     $-1, %r14d
        je      2f
        or      %r14d, %eax
        cmpl    $0, x2apic(%rip)
        jne     1f
        shl     $24, %edx
        mov     %edx, LAPIC + APIC_ICR_HIGH
        mov     %eax, LAPIC + APIC_ICR_LOW
        jmp     ipi_sent
1:      mov     $MSR_X2APIC + APIC_ICR_LOW / 16, %ecx
        wrmsr
        ret
2:      mov     $MSR_X2APIC + 0x3f, %ecx
        xor     %edx, %edx
        wrmsr
        ret

# One handler for each sender: counts what it has sent to this processor.
        .balign 32
on_ipi:
        .set    sender, 0
        .rept   MOST
        .balign 32
        push    %rax
        mov     %gs:0, %eax
        lock    incl table + 4 * MOST * sender(, %rax, 4)
        jmp     end_of_interrupt
        .set    sender, sender + 1
        .endr
        .balign 32
        .set    ON_IPI_SIZE, 32

end_of_interrupt:
        cmpl    $0, x2apic(%rip)
        jne     1f
        apic_write APIC_EOI, 0
        pop     %rax
        iretq
1:      push    %rcx
        push    %rdx
        mov     $MSR_X2APIC + APIC_EOI / 16, %ecx
        xor     %eax, %eax
        xor     %edx, %edx
        wrmsr
        pop     %rdx
        pop     %rcx
        pop     %rax
        iretq

on_nmi: push    %rax
        mov     %gs:0, %eax
        lock    incl table + 4 * MOST * MOST(, %rax, 4)
        pop     %rax
        iretq

        .section .bss
        .balign 32
locals: .skip   32 * MOST
numbers:
        .skip   4
ids:    .skip   4 * MOST
logical_ids:
        .skip   4 * MOST
# For each sender a row of receivers, and one more for NMIs.
table:  .skip   2 * 4 * MOST * MOST
x2apic: .skip   4
lost:   .skip   4
