# The interrupt descriptor table, the task state segment, and exceptions that a test expects.
        .include "macros.inc"

        .code64
        .section .text
        .global traps_init, traps_load, trapped, set_gate, set_user_gate, compare_trap

# Fills in the tables and loads them.
traps_init:
        lea     stubs(%rip), %rsi
        xor     %edi, %edi
1:      call    set_gate
        add     $STUB_SIZE, %rsi
        inc     %edi
        cmp     $32, %edi
        jb      1b

        mov     $tss, %eax
        mov     $gdt + TASK, %edi
        movw    $0x67, (%rdi)
        mov     %ax, 2(%rdi)
        shr     $16, %eax
        mov     %al, 4(%rdi)
        movb    $0x89, 5(%rdi)
        mov     %ah, 7(%rdi)
        mov     $kernel_stack_end, %eax
        mov     %rax, tss + 4
        mov     $TASK, %eax
        ltr     %ax
# Every processor loads the same IDT.
traps_load:
        lidt    idt_pointer(%rip)
        ret

# EDI: vector, RSI: handler. Keeps all registers.
set_gate:
        push    %rax
        push    %rdx
        mov     $0x8e, %dl
1:      mov     %edi, %eax
        shl     $4, %eax
        add     $idt, %eax
        push    %rsi
        mov     %si, (%rax)
        movw    $CODE64, 2(%rax)
        movb    $0, 4(%rax)
        mov     %dl, 5(%rax)
        shr     $16, %rsi
        mov     %si, 6(%rax)
        shr     $16, %rsi
        mov     %rsi, 8(%rax)
        pop     %rsi
        pop     %rdx
        pop     %rax
        ret

# The same for a gate that user mode may call.
set_user_gate:
        push    %rax
        push    %rdx
        mov     $0xee, %dl
        jmp     1b

# One stub per exception: makes every frame have an error code, and pushes the vector.
        .set    STUB_SIZE, 16
        .balign STUB_SIZE
stubs:
        .set    vector, 0
        .rept   32
        .balign STUB_SIZE
        .if     (0x60227d00 >> vector) & 1      # 8, 10-14, 17, 21, 29, 30 push one themselves
        .else
        push    $0
        .endif
        push    $vector
        jmp     trapped
        .set    vector, vector + 1
        .endr
        .balign STUB_SIZE

# On the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. All registers are kept for a look at them, by their numbers.
trapped:
        push    %rax
        mov     %rcx, trap_registers + 8(%rip)
        mov     %rdx, trap_registers + 16(%rip)
        mov     %rbx, trap_registers + 24(%rip)
        mov     %rbp, trap_registers + 40(%rip)
        mov     %rsi, trap_registers + 48(%rip)
        mov     %rdi, trap_registers + 56(%rip)
        mov     %r8, trap_registers + 64(%rip)
        mov     %r9, trap_registers + 72(%rip)
        mov     %r10, trap_registers + 80(%rip)
        mov     %r11, trap_registers + 88(%rip)
        mov     %r12, trap_registers + 96(%rip)
        mov     %r13, trap_registers + 104(%rip)
        mov     %r14, trap_registers + 112(%rip)
        mov     %r15, trap_registers + 120(%rip)
        mov     (%rsp), %rax
        mov     %rax, trap_registers(%rip)
        mov     48(%rsp), %rax
        mov     %rax, trap_registers + 32(%rip)
        mov     40(%rsp), %rax
        mov     %rax, trap_flags(%rip)
        mov     8(%rsp), %rax
        mov     %eax, trap_vector(%rip)
        mov     16(%rsp), %rax
        mov     %rax, trap_error(%rip)
        mov     24(%rsp), %rax
        mov     %rax, trap_rip(%rip)
        mov     32(%rsp), %rax
        mov     %rax, trap_cs(%rip)
        mov     %cr2, %rax
        mov     %rax, trap_cr2(%rip)
        mov     resume_rip(%rip), %rax
        test    %rax, %rax
        jz      unexpected
        movq    $0, resume_rip(%rip)
        push    $DATA
        push    resume_rsp(%rip)
        push    $2
        push    $CODE64
        push    %rax
        iretq

unexpected:
        print   "unexpected exception "
        mov     trap_vector(%rip), %edi
        call    print_number
        print   ", error code "
        mov     trap_error(%rip), %rdi
        call    print_hex
        print   ", at "
        mov     trap_rip(%rip), %rdi
        call    print_hex
        print   ", cr2 "
        mov     trap_cr2(%rip), %rdi
        call    print_hex
        print   "\n"
        mov     $EXIT_TRAP, %edi
        jmp     exit

# EDI: vector, ESI: error code, RAX: instruction; ZF if the last exception was this one.
compare_trap:
        cmp     %edi, trap_vector(%rip)
        jne     1f
        mov     %esi, %edi
        cmp     %rdi, trap_error(%rip)
        jne     1f
        cmp     %rax, trap_rip(%rip)
1:      ret

        .section .rodata
idt_pointer:
        .word   0xfff
        .quad   idt

        .section .bss
        .global trap_vector, trap_error, trap_rip, trap_cs, trap_cr2, resume_rip, resume_rsp, trap_registers, trap_flags, idt, tss
        .balign 4096
idt:    .skip   0x1000
tss:    .skip   0x68
        .balign 16
        .skip   0x1000
kernel_stack_end:
trap_registers:
        .skip   16 * 8
trap_flags:
        .skip   8
trap_error:
        .skip   8
trap_rip:
        .skip   8
trap_cs:
        .skip   8
trap_cr2:
        .skip   8
resume_rip:
        .skip   8
resume_rsp:
        .skip   8
trap_vector:
        .skip   4
