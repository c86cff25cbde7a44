# Resets the machine by the keyboard controller: pulse output line 0.
        .include "macros.inc"

        .code64
        .section .text
        .global main
main:   print   "skep: reset by port 0x64\n"
1:      in      $KEYBOARD_COMMAND, %al
        test    $2, %al
        jnz     1b
        outb    0xfe, KEYBOARD_COMMAND
2:      cli
        hlt
        jmp     2b
