# From 32-bit protected mode to 64-bit mode and main.
        .include "constants.inc"

        .code32
        .section .text
# EBX: address of the command line, 0 for none; EDX: name of the boot protocol. Flat segments, interrupts off.
        .global start32
start32:
        cld
        xor     %eax, %eax
        mov     $__bss_start, %edi
        mov     $__bss_end, %ecx
        sub     %edi, %ecx
        rep     stosb
        mov     $stack_end, %esp
        mov     %ebx, command_line
        mov     %edx, protocol

        mov     $gdt_template, %esi
        mov     $gdt, %edi
        mov     $GDT_SIZE, %ecx
        rep     movsb
        lgdt    gdt_pointer

# The low 4 GiB one to one, by 2 MiB pages, and the last of them once more at the end of the address space. The
# upper levels let user mode through, the pages do not.
        movl    $pdpt + 7, pml4
        movl    $pdpt + 7, pml4 + 511 * 8
        movl    $pd + 0x3000 + 7, pdpt + 511 * 8
        mov     $pd + 7, %eax
        mov     $pdpt, %edi
        mov     $4, %ecx
1:      mov     %eax, (%edi)
        add     $0x1000, %eax
        add     $8, %edi
        loop    1b
        mov     $0x83, %eax
        mov     $pd, %edi
        mov     $2048, %ecx
2:      mov     %eax, (%edi)
        add     $0x200000, %eax
        add     $8, %edi
        loop    2b

        .global enter_long
# EDI: where to go on in 64-bit mode. Used by every processor.
        mov     $boot64, %edi
enter_long:
        mov     %cr4, %eax
        or      $CR4_PAE_OSFXSR, %eax
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $EFER_LME_NXE, %eax
        wrmsr
        mov     %cr0, %eax
        or      $CR0_WP_PG | CR0_PE, %eax
        mov     %eax, %cr0
        ljmp    $CODE64, $1f

        .code64
1:      mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        xor     %eax, %eax
        mov     %eax, %fs
        mov     %eax, %gs
        jmp     *%rdi

boot64:
        mov     $stack_end, %esp
        call    serial_init
        call    traps_init
        call    main
        jmp     finish

        .section .rodata
        .global gdt_pointer
        .balign 8
gdt_pointer:
        .word   GDT_SIZE - 1
        .quad   gdt
        .global gdt_template
        .balign 8
gdt_template:
        .quad   0
        .quad   0x00af9b000000ffff      # code, 64 bits
        .quad   0x00cf9b000000ffff      # code, 32 bits
        .quad   0x00cf93000000ffff      # data
        .quad   0x00cff3000000ffff      # user data
        .quad   0x00affb000000ffff      # user code, 64 bits
        .quad   0, 0                    # task, filled in by traps_init
        .quad   0x00cf13000000ffff      # data, not present

        .section .bss
        .global pml4, pdpt, pd, gdt, command_line, protocol
        .balign 4096
pml4:   .skip   0x1000
pdpt:   .skip   0x1000
pd:     .skip   0x4000
        .skip   0x4000
stack_end:
gdt:    .skip   GDT_SIZE
command_line:
        .skip   8
protocol:
        .skip   8
