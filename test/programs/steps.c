// Single steps and debug registers through ptrace: where a traced child stops, instruction by instruction, in code that has run hot before.
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>
#include <signal.h>

extern char code[], code_end[], code_rep[], code_loop[], code_stored[];
long variable;

// RDI: how many times round the loop. What comes out is in RAX.
__asm__(".text\n"
        "code:   xor %eax, %eax\n"
        "        mov %edi, %ecx\n"
        "code_loop:\n"
        "        add $3, %rax\n"
        "        imul $5, %rax, %rdx\n"
        "        mov %rdx, variable(%rip)\n"
        "code_stored:\n"
        "        xor variable(%rip), %rax\n"
        "        push %rax\n"
        "        pushf\n"
        "        pop %rdx\n"
        "        call 1f\n"
        "        pop %rax\n"
        "        dec %ecx\n"
        "        jnz code_loop\n"
        "        lea buffer(%rip), %rdi\n"
        "        mov $5, %ecx\n"
        "code_rep:\n"
        "        rep stosb\n"
        "        movd %eax, %xmm0\n"
        "        paddd %xmm0, %xmm0\n"
        "        movd %xmm0, %ecx\n"
        "        lock xadd %ecx, variable(%rip)\n"
        "code_end:\n"
        "        ret\n"
        "1:      ret\n"
        ".bss\n"
        "buffer: .skip 64\n"
        ".text\n");

static long run(long rounds) {
    long result = rounds;
    __asm__ volatile("call code" : "+D"(result), "=a"(result) : : "rcx", "rdx", "xmm0", "memory", "cc");
    return result;
}

static void check(int good, const char *what, long seen) {
    printf("%s %s (%ld)\n", good ? "ok" : "FAIL", what, seen);
    if (!good) exit(1);
}

static void poke(pid_t child, int n, unsigned long value) {
    if (ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg) + n * sizeof(long), value) != 0) {
        perror("POKEUSER");
        exit(1);
    }
}

static long pc(pid_t child) {
    return ptrace(PTRACE_PEEKUSER, child, offsetof(struct user_regs_struct, rip), 0);
}

static int wait_for(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child) exit(1);
    return status;
}

// The child runs hot, stops, runs 20 rounds, stops, runs hot again, and so on.
static void child_main(void) {
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    for (int i = 0; i < 5; i++) {
        run(200000);
        raise(SIGSTOP);
        run(20);
        raise(SIGSTOP);
    }
    _exit(run(20) == 0);
}

int main(void) {
    setvbuf(stdout, 0, _IONBF, 0);
    pid_t child = fork();
    if (child == 0) child_main();

    // By single steps through the 20 rounds: how many stops are in the code, and what their addresses add up to.
    wait_for(child);
    long in_code = 0, reps = 0;
    uint64_t hash = 1469598103934665603ull;
    for (;;) {
        ptrace(PTRACE_SINGLESTEP, child, 0, 0);
        int status = wait_for(child);
        if (WSTOPSIG(status) == SIGSTOP) break;
        long at = pc(child);
        if (at >= (long)code && at <= (long)code_end) {
            in_code++;
            reps += at == (long)code_rep;
            hash = (hash ^ (uint64_t)(at - (long)code)) * 1099511628211ull;
        }
    }
    // 2 at first, 11 in each round, 2 before REP, which is 5 steps, 4 behind it, and the end.
    check(in_code == 2 + 20 * 11 + 2 + 5 + 4 + 1, "single steps", in_code);
    check(reps == 5, "steps of REP STOSB", reps);
    printf("addresses %016llx\n", (unsigned long long)hash);

    // A breakpoint on an instruction.
    ptrace(PTRACE_CONT, child, 0, 0);
    wait_for(child);
    poke(child, 0, (unsigned long)code_loop);
    poke(child, 7, 1);
    long hits = 0;
    for (;;) {
        ptrace(PTRACE_CONT, child, 0, 0);
        int status = wait_for(child);
        if (WSTOPSIG(status) == SIGSTOP) break;
        hits += pc(child) == (long)code_loop;
    }
    poke(child, 7, 0);
    check(hits == 20, "breakpoint on an instruction", hits);

    // On a store, which is a trap.
    ptrace(PTRACE_CONT, child, 0, 0);
    wait_for(child);
    poke(child, 1, (unsigned long)&variable);
    poke(child, 7, 1ul << 2 | 1ul << 20 | 2ul << 22);
    hits = 0;
    for (;;) {
        ptrace(PTRACE_CONT, child, 0, 0);
        int status = wait_for(child);
        if (WSTOPSIG(status) == SIGSTOP) break;
        long at = pc(child);
        hits += at == (long)code_stored || at == (long)code_end;
    }
    poke(child, 7, 0);
    check(hits == 21, "breakpoint on a store", hits);

    // On loads and stores; 20 of each, and the exchange.
    ptrace(PTRACE_CONT, child, 0, 0);
    wait_for(child);
    poke(child, 1, (unsigned long)&variable);
    poke(child, 7, 1ul << 2 | 3ul << 20 | 2ul << 22);
    hits = 0;
    for (;;) {
        ptrace(PTRACE_CONT, child, 0, 0);
        int status = wait_for(child);
        if (WSTOPSIG(status) == SIGSTOP) break;
        hits++;
    }
    poke(child, 7, 0);
    check(hits == 41, "breakpoint on loads and stores", hits);

    // Hot under a breakpoint that is not met.
    ptrace(PTRACE_CONT, child, 0, 0);
    wait_for(child);
    poke(child, 2, (unsigned long)&hits);
    poke(child, 7, 1ul << 4 | 1ul << 24);
    ptrace(PTRACE_CONT, child, 0, 0);
    int status = wait_for(child);
    check(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP, "breakpoint elsewhere", WSTOPSIG(status));
    ptrace(PTRACE_CONT, child, 0, 0);
    status = wait_for(child);
    check(WIFEXITED(status), "end", status);
    puts("done");
}
