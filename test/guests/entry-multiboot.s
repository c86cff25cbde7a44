# Entry by Multiboot 1: 32-bit protected mode, EBX points to the information.
        .include "constants.inc"

        .set    MAGIC, 0x1badb002
# Modules page-aligned, memory information; with ADDRESSES also the address fields, for an image that is no ELF.
        .ifdef  ADDRESSES
        .set    FLAGS, 3 | 1 << 16
        .else
        .set    FLAGS, 3
        .endif

        .section .header, "a"
        .balign 4
header: .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
        .long   header, __image_start, __image_end, __bss_end, entry

        .code32
        .section .text
        .global entry
entry:  cli
        cld
        mov     $name_unknown, %edx
        cmp     $0x2badb002, %eax
        jne     1f
        mov     $name, %edx
1:      mov     (%ebx), %eax
        mov     16(%ebx), %ebx
        test    $1 << 2, %eax
        jnz     start32
        xor     %ebx, %ebx
        jmp     start32

        .section .rodata
name:   .asciz  "multiboot"
name_unknown:
        .asciz  "multiboot without its magic number"
