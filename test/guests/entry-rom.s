# Entry from the reset vector: real mode, CS base 0xffff0000. The ROM is also seen under 1 MiB, and goes on there.
        .include "constants.inc"

        .set    BASE, 0xf0000

        .code16
        .section .reset, "ax"
        .global entry
entry:  ljmp    $BASE >> 4, $real - BASE
        .balign 16

        .section .text
real:   cli
        cld
        mov     %cs, %ax
        mov     %ax, %ds
        lgdtl   rom_gdt_pointer - BASE
        mov     %cr0, %eax
        or      $CR0_PE, %eax
        mov     %eax, %cr0
        ljmpl   $CODE32, $1f

        .code32
1:      mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $name, %edx
        xor     %ebx, %ebx
        jmp     start32

        .section .rodata
rom_gdt_pointer:
        .word   GDT_SIZE - 1
        .long   gdt_template
name:   .asciz  "the reset vector"
