// AVX-512 state across context switches and signals: processes fill all vector and opmask registers with numbers of their own, and
// look whether they hold them still while timers interrupt them and the others run. Then what masked accesses must not touch.
#define _GNU_SOURCE
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512cd")))

struct state {
    uint64_t zmm[32][8];
    uint64_t k[8];
} __attribute__((aligned(64)));

#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define UPPER(DO) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
#define HIGH(DO) DO(16) DO(17) DO(18) DO(19) DO(20) DO(21) DO(22) DO(23) DO(24) DO(25) DO(26) DO(27) DO(28) DO(29) DO(30) DO(31)
#define ALL(DO) EACH(DO) UPPER(DO) HIGH(DO)
#define LOAD(n) "vmovdqu64 64*" #n "(%0), %%zmm" #n "\n"
#define STORE(n) "vmovdqu64 %%zmm" #n ", 64*" #n "(%1)\n"
#define LOAD_K(n) "kmovq 2048+8*" #n "(%0), %%k" #n "\n"
#define STORE_K(n) "kmovq %%k" #n ", 2048+8*" #n "(%1)\n"

static volatile sig_atomic_t signals;

// Leaves other numbers in every register behind.
WIDE static void on_alarm(int number) {
    (void)number;
    signals++;
    asm volatile("vpternlogd $0xff, %%zmm0, %%zmm0, %%zmm0\n vmovdqa64 %%zmm0, %%zmm9\n vmovdqa64 %%zmm0, %%zmm31\n"
                 "kxnorq %%k1, %%k1, %%k1\n kmovq %%k1, %%k7\n vzeroupper" ::: "memory");
}

// Loads everything, lets time pass, stores everything.
static void hold(const struct state *in, struct state *out, uint64_t turns) {
    asm volatile(ALL(LOAD) EACH(LOAD_K) "1: dec %2\n jnz 1b\n" ALL(STORE) EACH(STORE_K)
                 : "+r"(in), "+r"(out), "+r"(turns)
                 :
                 : "memory", "cc");
}

// As many signals as are wanted, and no register changed by them.
static int holds(uint64_t seed, int wanted) {
    static struct state in, out;
    uint64_t *words = (uint64_t *)&in;
    for (unsigned i = 0; i < sizeof in / 8; i++) words[i] = seed = seed * 6364136223846793005u + 1442695040888963407u;
    struct sigaction action = {.sa_handler = on_alarm};
    struct itimerval often = {{0, 2000}, {0, 2000}}, never = {{0, 0}, {0, 0}};
    sigaction(SIGALRM, &action, 0);
    setitimer(ITIMER_REAL, &often, 0);
    int same = 1;
    while (signals < wanted && same) {
        hold(&in, &out, 200000);
        same = memcmp(&in, &out, sizeof in) == 0;
    }
    setitimer(ITIMER_REAL, &never, 0);
    return same;
}

// Masked accesses next to memory that is not there: only what the mask selects is touched.
WIDE static int suppressed(void) {
    uint8_t *page = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(page + 4096, 4096);
    uint32_t *end = (uint32_t *)(page + 4096) - 5;
    for (int i = 0; i < 5; i++) end[i] = 100 + i;
    __m512i some = _mm512_maskz_loadu_epi32(0x1f, end);
    int sum = _mm512_reduce_add_epi32(some);
    _mm512_mask_storeu_epi32(end, 0x0a, _mm512_set1_epi32(7));
    __m512i indices = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i gathered = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0x1f, indices, end, 4);
    return sum == 510 && end[0] == 100 && end[1] == 7 && end[2] == 102 && end[3] == 7 && end[4] == 104 &&
           _mm512_reduce_add_epi32(gathered) == 320;
}

// The kernel's own copies and comparisons of all lengths, and the C library's, which use the widest registers there are.
static int copies(void) {
    static char from[5000], to[5000];
    for (int i = 0; i < 5000; i++) from[i] = 'a' + i % 23;
    for (int length = 1; length < 4500; length += 1 + length / 9) {
        memset(to, 0, sizeof to);
        memcpy(to + length % 64, from + length % 7, length);
        if (memcmp(to + length % 64, from + length % 7, length) || strlen(to + length % 64) != (size_t)length) return 0;
        if (memchr(to + length % 64, 0, 5000 - length % 64) != to + length % 64 + length) return 0;
    }
    return 1;
}

int main(int count, char **arguments) {
    int wanted = count > 1 ? atoi(arguments[1]) : 50;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) {
        puts("no AVX-512");
        return 0;
    }
    for (int i = 0; i < 4; i++)
        if (fork() == 0) _exit(holds(i + 1, wanted) ? 0 : 1);
    int status, bad = 0;
    while (wait(&status) > 0) bad += status != 0;
    printf("registers %s\n", bad ? "CHANGED" : "kept");
    printf("masked accesses %s\n", suppressed() ? "suppressed" : "WRONG");
    printf("strings %s\n", copies() ? "right" : "WRONG");
    return 0;
}
