// Signals in computations: a timer as fast as it goes, faults that a handler mends or jumps out of, alternate stacks, code that is written as it runs.
#define _GNU_SOURCE
#include <fenv.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static volatile sig_atomic_t ticks, faults, divisions, traps;
static char *pages;
enum { PAGES = 64, SIZE = 4096 };
static sigjmp_buf back;
static volatile int jump;

static void on_alarm(int n) {
    (void)n;
    // Uses what the computation uses.
    volatile double x = 1.5 * ticks;
    char bytes[256];
    memset(bytes, ticks, sizeof bytes);
    x = sqrt(x) + bytes[7];
    ticks++;
}

static void on_fault(int n, siginfo_t *info, void *context) {
    (void)n, (void)context;
    faults++;
    if (jump) siglongjmp(back, 1);
    char *page = (char *)((uintptr_t)info->si_addr & ~(uintptr_t)(SIZE - 1));
    if (page < pages || page >= pages + PAGES * SIZE) _exit(3);
    mprotect(page, SIZE, PROT_READ | PROT_WRITE);
}

static void on_division(int n, siginfo_t *info, void *context) {
    (void)n, (void)info;
    divisions++;
    // The divisor is in RCX: by one instead.
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RCX] = 1;
}

static void on_trap(int n, siginfo_t *info, void *context) {
    (void)n, (void)info, (void)context;
    traps++;
}

static void handle(int n, void (*handler)(int, siginfo_t *, void *), int flags) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    sigaction(n, &action, 0);
}

// General registers, all of them, with carries.
static uint64_t integers(int rounds) {
    uint64_t a = 1, b = 2, c = 3, d = 5, e = 7, f = 11, g = 13, h = 17;
    for (int i = 0; i < rounds; i++) {
        a += b * 31 + (c >> 3);
        b ^= a << 7 | a >> 57;
        c -= d ^ e;
        d = d * 6364136223846793005ull + 1442695040888963407ull;
        e += __builtin_popcountll(d) + (f < g);
        unsigned __int128 wide = (unsigned __int128)d * a;
        f ^= (uint64_t)(wide >> 64) + (uint64_t)wide;
        g = g % 1000003 + f / (e | 1);
        h += g ^ b;
    }
    return a ^ b ^ c ^ d ^ e ^ f ^ g ^ h;
}

static double doubles(int rounds) {
    double x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int i = 0; i < rounds; i++)
        for (int k = 0; k < 8; k++) x[k] = x[k] * 0.999 + x[(k + 3) & 7] * 0.001 + 1.0 / (i + k + 1);
    double sum = 0;
    for (int k = 0; k < 8; k++) sum += x[k] * (k + 1);
    return sum;
}

static long double extended(int rounds) {
    long double x = 1;
    for (int i = 1; i < rounds; i++) x = x * 0.5L + 1.0L / i + (long double)(i & 7) * 1e-3L;
    return x;
}

static uint32_t recursion(int depth) { return depth == 0 ? 1 : recursion(depth - 1) * 3 + (uint32_t)depth; }

static uint64_t faulting(int round) {
    mprotect(pages, PAGES * SIZE, PROT_NONE);
    uint64_t sum = 0;
    for (int i = 0; i < PAGES; i++) pages[i * SIZE + (i * 61 + round) % SIZE] += (char)i;
    memmove(pages + 3, pages, PAGES * SIZE - 3);
    mprotect(pages, PAGES * SIZE, PROT_READ);
    for (int i = 0; i < PAGES * SIZE; i += 977) pages[i]++;
    for (int i = 0; i < PAGES * SIZE; i++) sum = sum * 31 + (unsigned char)pages[i];
    return sum;
}

static uint64_t divide(void) {
    uint64_t low, zero = 0, high = 0;
    __asm__ volatile("mov $12345, %%eax; xor %%edx, %%edx; div %%rcx" : "=a"(low), "+d"(high), "+c"(zero) : : "cc");
    return low;
}

// Code that is made, run and made anew.
static uint32_t generated(int rounds) {
    static unsigned char *code;
    if (!code) code = mmap(0, SIZE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t sum = 0;
    for (int i = 0; i < rounds; i++) {
        unsigned char *at = code + i % 100 * 8;
        at[0] = 0xb8;
        memcpy(at + 1, &i, 4);
        at[5] = 0xc3;
        sum = sum * 7 + ((uint32_t(*)(void))at)();
    }
    return sum;
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 30;
    setvbuf(stdout, 0, _IONBF, 0);
    pages = mmap(0, PAGES * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&stack, 0);
    handle(SIGSEGV, on_fault, SA_ONSTACK);
    handle(SIGFPE, on_division, SA_ONSTACK);
    handle(SIGTRAP, on_trap, 0);

    // Once in peace, then in the storm.
    uint64_t expected[8], got[8];
    for (int storm = 0; storm <= rounds; storm++) {
        uint64_t *to = storm ? got : expected;
        if (storm == 1) {
            struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART | SA_ONSTACK};
            sigaction(SIGALRM, &action, 0);
            struct itimerval timer = {{0, 200}, {0, 200}};
            setitimer(ITIMER_REAL, &timer, 0);
        }
        memset(pages, 0, 0);
        double d;
        long double l;
        to[0] = integers(30000);
        d = doubles(5000);
        memcpy(&to[1], &d, 8);
        l = extended(30000);
        d = (double)l;
        memcpy(&to[2], &d, 8);
        to[3] = recursion(10000);
        mprotect(pages, PAGES * SIZE, PROT_READ | PROT_WRITE);
        memset(pages, 1, PAGES * SIZE);
        to[4] = faulting(1);
        to[5] = divide();
        to[6] = generated(3000);
        jump = 1;
        volatile int out = 0;
        for (volatile int i = 0; i < 50; i++) {
            if (sigsetjmp(back, 1) == 0)
                *(volatile char *)16 = 1;
            else
                out++;
        }
        jump = 0;
        to[7] = (uint64_t)out;
        __asm__ volatile("int3");
        if (storm && memcmp(expected, got, sizeof got) != 0) {
            for (int k = 0; k < 8; k++)
                if (expected[k] != got[k]) printf("FAIL result %d in round %d: %llx, not %llx\n", k, storm, (long long)got[k], (long long)expected[k]);
            return 1;
        }
    }
    struct itimerval none = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &none, 0);
    if (traps != rounds + 1 || divisions != rounds + 1 || ticks < rounds / 10) {
        printf("FAIL traps %d, divisions %d, ticks %d\n", traps, divisions, ticks);
        return 1;
    }
    for (int k = 0; k < 8; k++) printf("result %d %016llx\n", k, (unsigned long long)expected[k]);
    puts("done");
}
