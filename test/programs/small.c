// 32-bit code without a library, as a Linux program for i386: digests, recursion, arithmetic of 64 bits in pairs of registers, a
// thread area in GS, indirect calls, code that is written as it runs. It prints what it prints when it is compiled for
// 64 bits.
#include <stddef.h>
#include <stdint.h>

#ifdef __i386__
enum { EXIT = 1, WRITE = 4, MPROTECT = 125, SET_THREAD_AREA = 243 };

static long call(long n, long a, long b, long c) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}
#else
enum { EXIT = 60, WRITE = 1, MPROTECT = 10 };

static long call(long n, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
#endif

void *memcpy(void *to, const void *from, size_t n) {
    for (char *t = to, *f = (char *)from; n > 0; n--) *t++ = *f++;
    return to;
}

void *memset(void *to, int byte, size_t n) {
    for (char *t = to; n > 0; n--) *t++ = byte;
    return to;
}

static void say(const char *name, uint32_t value) {
    char line[64];
    int n = 0;
    while (*name) line[n++] = *name++;
    line[n++] = ' ';
    for (int shift = 28; shift >= 0; shift -= 4) line[n++] = "0123456789abcdef"[value >> shift & 15];
    line[n++] = '\n';
    call(WRITE, 1, (long)line, n);
}

static uint32_t rotate(uint32_t x, int by) { return x >> by | x << (32 - by); }

/** SHA-256 of a run of blocks, without padding, with constants that are not the book's: the first word. */
static uint32_t digest(const uint8_t *bytes, int blocks) {
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    for (; blocks > 0; blocks--, bytes += 64) {
        uint32_t w[64], s[8];
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)bytes[4 * i] << 24 | bytes[4 * i + 1] << 16 | bytes[4 * i + 2] << 8 | bytes[4 * i + 3];
        for (int i = 16; i < 64; i++)
            w[i] = w[i - 16] + w[i - 7] + (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3) +
                   (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10);
        memcpy(s, state, sizeof s);
        for (int i = 0; i < 64; i++) {
            uint32_t one = s[7] + (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) +
                           w[i] + 0x9e3779b9u * (i + 1);
            uint32_t two = (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
            for (int k = 7; k > 0; k--) s[k] = s[k - 1];
            s[4] += one;
            s[0] = one + two;
        }
        for (int i = 0; i < 8; i++) state[i] += s[i];
    }
    return state[0];
}

static uint32_t fibonacci(uint32_t n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

/** 64-bit arithmetic, of which 32-bit code makes pairs. */
static uint32_t pairs(void) {
    uint64_t a = 0x123456789abcdefu, sum = 0;
    for (int i = 0; i < 300000; i++) {
        a = a * 6364136223846793005u + 1442695040888963407u;
        sum += (a >> (i & 31)) ^ (sum << 3);
        sum -= (int64_t)a >> 17;
    }
    return (uint32_t)(sum ^ sum >> 32);
}

static uint32_t twice(uint32_t x) { return 2 * x; }
static uint32_t next(uint32_t x) { return x + 1; }
static uint32_t mixed(uint32_t x) { return x * 31 ^ x >> 5; }

static uint32_t indirect(void) {
    static uint32_t (*volatile const table[])(uint32_t) = {twice, next, mixed};
    uint32_t x = 1;
    for (int i = 0; i < 300000; i++) x = table[(x >> 3) % 3](x);
    return x;
}

static uint32_t sorted(void) {
    static uint32_t numbers[4000];
    uint32_t seed = 1, sum = 0;
    for (int i = 0; i < 4000; i++) numbers[i] = seed = seed * 1664525 + 1013904223;
    for (int gap = 2000; gap > 0; gap /= 2)
        for (int i = gap; i < 4000; i++)
            for (int k = i; k >= gap && numbers[k - gap] > numbers[k]; k -= gap) {
                uint32_t other = numbers[k];
                numbers[k] = numbers[k - gap];
                numbers[k - gap] = other;
            }
    for (int i = 0; i < 4000; i++) sum = sum * 31 + numbers[i];
    return sum;
}

/** MOV EAX, n; RET, with another n each time. */
static uint32_t written(void) {
    static uint8_t page[8192];
    uint8_t *code = (uint8_t *)(((uintptr_t)page + 4095) & ~(uintptr_t)4095);
    call(MPROTECT, (long)code, 4096, 7);
    uint32_t sum = 0;
    for (uint32_t i = 0; i < 3000; i++) {
        code[0] = 0xb8;
        memcpy(code + 1, &i, 4);
        code[5] = 0xc3;
        sum += ((uint32_t(*)(void))code)() * (i | 1);
    }
    return sum;
}

/** Words of a thread area, counted up. */
static uint32_t thread(void) {
    static uint32_t area[64];
#ifdef __i386__
    uint32_t wanted[4] = {-1u, (uint32_t)(area + 32), 0xfffff, 0x51};
    if (call(SET_THREAD_AREA, (long)wanted, 0, 0) != 0) return 0;
    __asm__ volatile("mov %w0, %%gs" : : "r"(wanted[0] << 3 | 3));
    for (uint32_t i = 0; i < 300000; i++) {
        uint32_t *at = (uint32_t *)(4 * (i & 31));
        __asm__ volatile("addl %1, %%gs:(%0); incl %%gs:-4" : : "r"(at), "r"(i) : "memory", "cc");
    }
#else
    for (uint32_t i = 0; i < 300000; i++) area[32 + (i & 31)] += i, area[31]++;
#endif
    uint32_t sum = 0;
    for (int i = 0; i < 64; i++) sum = sum * 31 + area[i];
    return sum;
}

__attribute__((force_align_arg_pointer)) void _start(void) {
    static uint8_t bytes[64 * 1024];
    uint32_t last = 0;
    for (int i = 0; i < (int)sizeof bytes; i++) bytes[i] = i * 7 ^ i >> 8;
    for (int i = 0; i < 16; i++) last = last * 31 + digest(bytes + 64 * i, sizeof bytes / 64 - i);
    say("digest", last);
    say("fibonacci", fibonacci(24));
    say("pairs", pairs());
    say("indirect", indirect());
    say("sorted", sorted());
    say("written", written());
    say("thread", thread());
    call(EXIT, 0, 0, 0);
    for (;;) {}
}
