# Entry by PVH: an ELF note names the entry point, EBX points to hvm_start_info.
        .include "constants.inc"

        .section .note.pvh, "a", @note
        .long   4, 4, 18                # XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   entry

        .code32
        .section .text
        .global entry
entry:  cli
        cld
        mov     $name_unknown, %edx
        cmpl    $0x336ec578, (%ebx)
        jne     1f
        mov     $name, %edx
1:      mov     24(%ebx), %ebx
        jmp     start32

        .section .rodata
name:   .asciz  "PVH"
name_unknown:
        .asciz  "PVH without its magic number"
