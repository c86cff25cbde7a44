# The first program of a guest: says that it runs, and restarts the machine.
        .globl  _start
_start: mov     $1, %eax                # write
        mov     $1, %edi
        lea     text(%rip), %rsi
        mov     $length, %edx
        syscall
        mov     $169, %eax              # reboot
        mov     $0xfee1dead, %edi
        mov     $0x28121969, %esi
        mov     $0x01234567, %edx
        syscall
1:      jmp     1b
text:   .ascii  "<user mode>\n"
        .set    length, . - text
