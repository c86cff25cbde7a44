# The first program of a guest: puts a number into a register and ends by an invalid instruction, whereupon the kernel shows both. A
# system call would say more, but a paravirtual KVM carries it out without leaving user mode.
        .globl  _start
_start: mov     $0x736b6570, %eax
        ud2
