// What bench/cpu.mjs runs in the guest and natively: small kernels, a stop-watch for whole programs, and the loop that takes
// orders on standard input. One static program, the same everywhere.
//
//   guest serve CPUS                 obeys lines like those below, and says "@status N" after each
//   guest kernel MS NAME             runs a kernel for at least MS milliseconds
//   guest program MS PATH [ARG]...   runs a program over and over for at least MS milliseconds
//   guest list                       prints the kernels: name, group, unit
//
// Time is measured between the lines "@begin" and "@end NS OPERATIONS FIRST CPU", which tell the nanoseconds by this machine's
// clock, the operations, the nanoseconds of a program's first run, which is not counted, and those of processor time.
// "@skip REASON" stands for both.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define NOINLINE __attribute__((noinline))
/// Makes the compiler believe that the value is used, and may have changed.
#define OPAQUE(value) __asm__ volatile("" : "+r"(value))
#define CLOBBER() __asm__ volatile("" ::: "memory")

enum { PAGE = 4096, LINE = 64, WORDS = 1024, NUMBERS = 1 << 14, FAULTS = 1024 };
/// Calls that fib(15) makes, itself among them.
enum { FIB_CALLS = 1973 };

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/// Processor time of this process and of its children that have ended.
static uint64_t processor_time(void) {
    uint64_t sum = 0;
    for (int who = RUSAGE_CHILDREN; who <= RUSAGE_SELF; who++) {
        struct rusage usage;
        getrusage(who, &usage);
        sum += (uint64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000u;
        sum += (uint64_t)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000u;
    }
    return sum;
}

static _Noreturn void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static void *pages(size_t size, int protection) {
    void *memory = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    return memory;
}

static uint32_t next_random(uint32_t *state) {
    uint32_t x = *state;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return *state = x;
}

// --- Integers ---

static void k_alu(uint64_t n) {
    uint64_t a = n, b = 0x9e3779b97f4a7c15u;
    for (uint64_t i = 0; i < n; i++) {
        a += b;
        a ^= a >> 29;
        b = (b << 7) | (b >> 57);
        a -= i;
        OPAQUE(a);
    }
    OPAQUE(b);
}

static void k_divide(uint64_t n) {
    uint64_t a = 0xfedcba9876543210u, sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        sum += a / (i | 0x10001);
        OPAQUE(a);
    }
    OPAQUE(sum);
}

static uint8_t sieve[1 << 16];

static void k_sieve(uint64_t n) {
    for (uint64_t done = 0; done < n; done += sizeof sieve) {
        memset(sieve, 1, sizeof sieve);
        for (size_t i = 2; i * i < sizeof sieve; i++) {
            if (!sieve[i]) continue;
            for (size_t j = i * i; j < sizeof sieve; j += i) sieve[j] = 0;
        }
        CLOBBER();
    }
}

static uint32_t crc_table[256];
static uint8_t text[PAGE];

static void s_text(void) {
    uint32_t state = 1;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320u ^ (value >> 1) : value >> 1;
        crc_table[i] = value;
    }
    for (size_t i = 0; i < sizeof text; i++) text[i] = (uint8_t)next_random(&state);
}

static void k_crc32(uint64_t n) {
    uint32_t crc = ~0u;
    for (uint64_t i = 0; i < n; i++) crc = crc_table[(crc ^ text[i % sizeof text]) & 0xff] ^ (crc >> 8);
    OPAQUE(crc);
}

static uint64_t *table;
enum { TABLE = 1 << 20 };

static void s_hash(void) {
    table = pages(TABLE * sizeof *table, PROT_READ | PROT_WRITE);
    for (size_t i = 0; i < TABLE; i++) table[i] = i;
}

static void k_hash(uint64_t n) {
    uint64_t key = 12345;
    for (uint64_t i = 0; i < n; i++) {
        key = key * 6364136223846793005u + 1442695040888963407u;
        table[key >> 44]++;
    }
    CLOBBER();
}

static int compare(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

static void k_sort(uint64_t n) {
    static int numbers[NUMBERS];
    uint32_t state = 7;
    for (uint64_t done = 0; done < n; done += NUMBERS) {
        for (size_t i = 0; i < NUMBERS; i++) numbers[i] = (int)next_random(&state);
        qsort(numbers, NUMBERS, sizeof *numbers, compare);
        CLOBBER();
    }
}

static void k_strings(uint64_t n) {
    char line[128];
    size_t found = 0;
    for (uint64_t i = 0; i < n; i++) {
        snprintf(line, sizeof line, "item %d of %s has %5.2f, 0x%lx", (int)i, "the list of things", (double)i / 3, i);
        found += strstr(line, "has") != NULL;
    }
    OPAQUE(found);
}

// --- Calls and jumps ---

static NOINLINE uint64_t fib(uint64_t n) {
    // A call the compiler cannot turn into a loop.
    CLOBBER();
    return n < 2 ? 1 : fib(n - 1) + fib(n - 2);
}

static void k_calls(uint64_t n) {
    for (uint64_t done = 0; done < n; done += FIB_CALLS) fib(15);
}

static NOINLINE uint64_t f_add(uint64_t x) { return x + 3; }
static NOINLINE uint64_t f_mul(uint64_t x) { return x * 5; }
static NOINLINE uint64_t f_xor(uint64_t x) { return x ^ 0x5555; }
static NOINLINE uint64_t f_shift(uint64_t x) { return x >> 1; }

static void k_indirect(uint64_t n) {
    static uint64_t (*volatile functions[])(uint64_t) = {f_add, f_mul, f_xor, f_shift, f_mul, f_add, f_shift, f_xor};
    uint64_t x = n;
    for (uint64_t i = 0; i < n; i++) x = functions[i & 7](x);
    OPAQUE(x);
}

static void k_bytecode(uint64_t n) {
    static const uint8_t code[] = {0, 1, 2, 0, 3, 4, 2, 1, 3, 0, 4, 2, 5};
    static const void *labels[] = {&&add, &&sub, &&mul, &&xor_, &&swap, &&again};
    uint64_t a = 1, b = 2, done = 0;
    const uint8_t *pc = code;
#define NEXT() goto *labels[*pc++]
    NEXT();
add:
    a += b;
    NEXT();
sub:
    a -= 7;
    NEXT();
mul:
    a *= 3;
    NEXT();
xor_:
    b ^= a;
    NEXT();
swap: {
    uint64_t t = a;
    a = b;
    b = t;
    NEXT();
}
again:
    done += sizeof code;
    pc = code;
    if (done < n) NEXT();
    OPAQUE(a);
    OPAQUE(b);
}

// --- Memory ---

static void **chain;

/// One cycle through all lines of a buffer, in random order.
static void make_chain(size_t size) {
    size_t count = size / LINE;
    uint8_t *memory = pages(size, PROT_READ | PROT_WRITE);
    uint32_t *order = malloc(count * sizeof *order), state = 3;
    for (size_t i = 0; i < count; i++) order[i] = (uint32_t)i;
    for (size_t i = count - 1; i > 0; i--) {
        size_t j = next_random(&state) % i;
        uint32_t t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (size_t i = 0; i < count; i++)
        *(void **)(memory + (size_t)order[i] * LINE) = memory + (size_t)order[(i + 1) % count] * LINE;
    free(order);
    chain = (void **)memory;
}

static void s_chase_16k(void) { make_chain(16 << 10); }
static void s_chase_1m(void) { make_chain(1 << 20); }
static void s_chase_64m(void) { make_chain(64 << 20); }

static void k_chase(uint64_t n) {
    void **at = chain;
    for (uint64_t i = 0; i < n; i++) at = *at;
    OPAQUE(at);
    chain = at;
}

static void k_read(uint64_t n) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t word = table[i % (32 << 10)];
        OPAQUE(word);
        sum += word;
    }
    OPAQUE(sum);
}

static uint8_t *from, *to;

static void s_copy(void) {
    from = pages(1 << 20, PROT_READ | PROT_WRITE);
    to = pages(1 << 20, PROT_READ | PROT_WRITE);
    memset(from, 1, 1 << 20);
    memset(to, 2, 1 << 20);
}

static void copy(uint64_t n, size_t size) {
    for (uint64_t i = 0; i < n; i++) {
        // The size is not known to the compiler, so this is the C library's.
        size_t bytes = size;
        OPAQUE(bytes);
        memcpy(to, from, bytes);
        CLOBBER();
    }
}

static void k_memcpy_256(uint64_t n) { copy(n, 256); }
static void k_memcpy_1m(uint64_t n) { copy(n, 1 << 20); }

static void k_rep_movsb(uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        void *d = to, *s = from;
        uint64_t count = PAGE;
        __asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(count)::"memory");
    }
}

static void k_rep_stosq(uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        void *d = to;
        uint64_t count = PAGE / 8;
        __asm__ volatile("rep stosq" : "+D"(d), "+c"(count) : "a"(i) : "memory");
    }
}

// --- Floating point and vectors ---

static double doubles[WORDS], others[WORDS];
static int32_t ints[WORDS];

static void s_vectors(void) {
    for (int i = 0; i < WORDS; i++) {
        doubles[i] = 1.0 + i * 0.25;
        others[i] = 0.5;
        ints[i] = i * 77;
    }
}

static void k_double(uint64_t n) {
    volatile double seed = 1.5;
    double x = seed, y = 0.75;
    for (uint64_t i = 0; i < n; i++) {
        x = x * 0.99 + y;
        y = sqrt(x) - y / (x + 1.0);
    }
    seed = x + y;
}

static void k_x87(uint64_t n) {
    volatile long double seed = 1.5L;
    long double x = seed;
    for (uint64_t i = 0; i < n; i++) x = x * 0.99L + 0.01L;
    seed = x;
}

// Operations of these are elements of a buffer in the first-level cache.

static void k_sse_double(uint64_t n) {
    const __m128d factor = _mm_set1_pd(0.999), more = _mm_set1_pd(0.001);
    for (uint64_t done = 0; done < n; done += WORDS) {
        for (int i = 0; i < WORDS; i += 2) {
            __m128d x = _mm_add_pd(_mm_mul_pd(_mm_loadu_pd(doubles + i), factor), more);
            _mm_storeu_pd(doubles + i, _mm_max_pd(x, _mm_loadu_pd(others + i)));
        }
        CLOBBER();
    }
}

static void k_sse_int(uint64_t n) {
    const __m128i more = _mm_set1_epi32(0x01020304);
    for (uint64_t done = 0; done < n; done += WORDS) {
        for (int i = 0; i < WORDS; i += 4) {
            __m128i x = _mm_loadu_si128((const __m128i *)(ints + i));
            x = _mm_xor_si128(_mm_add_epi32(x, more), _mm_shuffle_epi32(x, 0x1b));
            _mm_storeu_si128((__m128i *)(ints + i), _mm_unpacklo_epi8(x, _mm_srli_epi32(x, 3)));
        }
        CLOBBER();
    }
}

static const char *needs_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? NULL : "no AVX2";
}

__attribute__((target("avx2,fma"))) static void k_avx2_fma(uint64_t n) {
    const __m256d factor = _mm256_set1_pd(0.999), more = _mm256_set1_pd(0.001);
    for (uint64_t done = 0; done < n; done += WORDS) {
        for (int i = 0; i < WORDS; i += 4) {
            __m256d x = _mm256_fmadd_pd(_mm256_loadu_pd(doubles + i), factor, more);
            _mm256_storeu_pd(doubles + i, _mm256_max_pd(x, _mm256_loadu_pd(others + i)));
        }
        CLOBBER();
    }
}

__attribute__((target("avx2"))) static void k_avx2_int(uint64_t n) {
    const __m256i more = _mm256_set1_epi32(0x01020304);
    for (uint64_t done = 0; done < n; done += WORDS) {
        for (int i = 0; i < WORDS; i += 8) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(ints + i));
            x = _mm256_xor_si256(_mm256_add_epi32(x, more), _mm256_shuffle_epi32(x, 0x1b));
            _mm256_storeu_si256((__m256i *)(ints + i), _mm256_unpacklo_epi8(x, _mm256_srli_epi32(x, 3)));
        }
        CLOBBER();
    }
}

// The same in registers alone, as Mandelbrot sets are drawn; operations are iterations.

static void k_sse_mandel(uint64_t n) {
    const __m128d cr = _mm_set_pd(-0.4, 0.1), ci = _mm_set_pd(0.6, 0.2), two = _mm_set1_pd(2.0);
    __m128d r = cr, i = ci;
    for (uint64_t done = 0; done < n; done++) {
        __m128d squares = _mm_sub_pd(_mm_mul_pd(r, r), _mm_mul_pd(i, i));
        i = _mm_add_pd(_mm_mul_pd(_mm_mul_pd(two, r), i), ci);
        r = _mm_add_pd(squares, cr);
    }
    _mm_storeu_pd(doubles, _mm_add_pd(r, i));
}

__attribute__((target("avx2,fma"))) static void k_avx2_mandel(uint64_t n) {
    const __m256d cr = _mm256_set_pd(-0.4, 0.1, -0.5, 0.3), ci = _mm256_set_pd(0.6, 0.2, 0.5, 0.1);
    const __m256d two = _mm256_set1_pd(2.0);
    __m256d r = cr, i = ci;
    for (uint64_t done = 0; done < n; done++) {
        __m256d squares = _mm256_fmsub_pd(r, r, _mm256_fmsub_pd(i, i, cr));
        i = _mm256_fmadd_pd(_mm256_mul_pd(two, r), i, ci);
        r = squares;
    }
    _mm256_storeu_pd(doubles, _mm256_add_pd(r, i));
}

// --- Several processors' instructions, clocks ---

static void k_xadd(uint64_t n) {
    static uint64_t counter;
    for (uint64_t i = 0; i < n; i++) __atomic_fetch_add(&counter, i, __ATOMIC_SEQ_CST);
}

static void k_mutex(uint64_t n) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    for (uint64_t i = 0; i < n; i++) {
        pthread_mutex_lock(&mutex);
        pthread_mutex_unlock(&mutex);
    }
}

static void k_rdtsc(uint64_t n) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) sum += __builtin_ia32_rdtsc();
    OPAQUE(sum);
}

static void k_clock(uint64_t n) {
    for (uint64_t i = 0; i < n; i++) now();
}

// --- The kernel ---

static void k_getppid(uint64_t n) {
    for (uint64_t i = 0; i < n; i++) syscall(SYS_getppid);
}

static int file = -1;

static void s_file(void) {
    file = open("/proc/self/exe", O_RDONLY);
    if (file < 0) fail("/proc/self/exe");
}

static void k_pread(uint64_t n) {
    static char buffer[PAGE];
    for (uint64_t i = 0; i < n; i++)
        if (pread(file, buffer, PAGE, (off_t)(i % 64) * PAGE) != PAGE) fail("pread");
}

static void k_open(uint64_t n) {
    for (uint64_t i = 0; i < n; i++) close(open("/dev/null", O_RDONLY));
}

static void k_fault(uint64_t n) {
    for (uint64_t done = 0; done < n; done += FAULTS) {
        uint8_t *memory = pages(FAULTS * PAGE, PROT_READ | PROT_WRITE);
        madvise(memory, FAULTS * PAGE, MADV_NOHUGEPAGE);
        for (size_t i = 0; i < FAULTS; i++) memory[i * PAGE] = 1;
        munmap(memory, FAULTS * PAGE);
    }
}

static void k_mmap(uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        uint8_t *memory = pages(PAGE, PROT_READ | PROT_WRITE);
        *memory = 1;
        munmap(memory, PAGE);
    }
}

static void k_mprotect(uint64_t n) {
    uint8_t *memory = pages(PAGE, PROT_READ | PROT_WRITE);
    for (uint64_t i = 0; i < n; i++) {
        *memory = 1;
        mprotect(memory, PAGE, PROT_READ);
        mprotect(memory, PAGE, PROT_READ | PROT_WRITE);
    }
    munmap(memory, PAGE);
}

static volatile sig_atomic_t caught;

static void on_signal(int number) {
    (void)number;
    caught++;
}

static void k_signal(uint64_t n) {
    signal(SIGUSR1, on_signal);
    for (uint64_t i = 0; i < n; i++) kill(getpid(), SIGUSR1);
}

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    // Over the instruction below.
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
}

static void k_sigsegv(uint64_t n) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    void *nowhere = pages(PAGE, PROT_NONE);
    for (uint64_t i = 0; i < n; i++) __asm__ volatile(".byte 0x8a, 0x07" ::"D"(nowhere) : "eax", "memory");
    munmap(nowhere, PAGE);
}

static void k_pingpong(uint64_t n) {
    int there[2], back[2];
    char byte = 0;
    if (pipe(there) || pipe(back)) fail("pipe");
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1) break;
        _exit(0);
    }
    for (uint64_t i = 0; i < n; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1) fail("pipe");
    close(there[1]);
    close(there[0]);
    close(back[0]);
    close(back[1]);
    waitpid(child, NULL, 0);
}

static void k_fork(uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        pid_t child = fork();
        if (child < 0) fail("fork");
        if (child == 0) _exit(0);
        waitpid(child, NULL, 0);
    }
}

static void k_exec(uint64_t n) {
    char *arguments[] = {"guest", "true", NULL}, *environment[] = {NULL};
    for (uint64_t i = 0; i < n; i++) {
        pid_t child;
        if (posix_spawn(&child, "/proc/self/exe", NULL, NULL, arguments, environment)) fail("posix_spawn");
        int status;
        if (waitpid(child, &status, 0) != child || status != 0) fail("the program that was run");
    }
}

// --- Code that changes ---

static uint8_t *code;
enum { ARENA = 1 << 20 };

static void s_code(void) { code = pages(ARENA, PROT_READ | PROT_WRITE | PROT_EXEC); }

typedef uint32_t function(void);

/// Puts `mov eax, NUMBER; ret` after some instructions that do nothing much; 61 bytes.
static void emit(uint8_t *at, uint32_t number) {
    for (int i = 0; i < 11; i++) {
        // add eax, imm32
        *at++ = 0x05;
        memcpy(at, &number, 4);
        at += 4;
    }
    *at++ = 0xb8;
    memcpy(at, &number, 4);
    at[4] = 0xc3;
}

static void k_patch(uint64_t n) {
    emit(code, 0);
    for (uint64_t i = 0; i < n; i++) {
        uint32_t number = (uint32_t)i;
        memcpy(code + 56, &number, 4);
        if (((function *)(void *)code)() != number) fail("old code was run");
    }
}

static void k_new_code(uint64_t n) {
    static uint64_t used;
    for (uint64_t i = 0; i < n; i++) {
        uint8_t *at = code + used++ % (ARENA / LINE) * LINE;
        emit(at, (uint32_t)used);
        if (((function *)(void *)at)() != (uint32_t)used) fail("old code was run");
    }
}

static const struct kernel {
    const char *name, *group, *unit;
    /// Does a multiple of `batch` operations.
    void (*run)(uint64_t);
    uint64_t batch;
    void (*setup)(void);
    const char *(*needs)(void);
} kernels[] = {
    {"alu", "integer", "round", k_alu, 1, NULL, NULL},
    {"divide", "integer", "division", k_divide, 1, NULL, NULL},
    {"sieve", "integer", "byte", k_sieve, sizeof sieve, NULL, NULL},
    {"crc32", "integer", "byte", k_crc32, 1, s_text, NULL},
    {"hash", "integer", "access", k_hash, 1, s_hash, NULL},
    {"sort", "integer", "element", k_sort, NUMBERS, NULL, NULL},
    {"strings", "integer", "line", k_strings, 1, NULL, NULL},
    {"calls", "jumps", "call", k_calls, FIB_CALLS, NULL, NULL},
    {"indirect", "jumps", "call", k_indirect, 1, NULL, NULL},
    {"bytecode", "jumps", "operation", k_bytecode, 13, NULL, NULL},
    {"chase-16k", "memory", "load", k_chase, 1, s_chase_16k, NULL},
    {"chase-1m", "memory", "load", k_chase, 1, s_chase_1m, NULL},
    {"chase-64m", "memory", "load", k_chase, 1, s_chase_64m, NULL},
    {"read", "memory", "word", k_read, 1, s_hash, NULL},
    {"memcpy-256", "memory", "copy", k_memcpy_256, 1, s_copy, NULL},
    {"memcpy-1m", "memory", "copy", k_memcpy_1m, 1, s_copy, NULL},
    {"rep-movsb", "memory", "page", k_rep_movsb, 1, s_copy, NULL},
    {"rep-stosq", "memory", "page", k_rep_stosq, 1, s_copy, NULL},
    {"double", "float", "round", k_double, 1, NULL, NULL},
    {"x87", "float", "round", k_x87, 1, NULL, NULL},
    {"sse-double", "vector", "element", k_sse_double, WORDS, s_vectors, NULL},
    {"sse-int", "vector", "element", k_sse_int, WORDS, s_vectors, NULL},
    {"sse-mandel", "vector", "iteration", k_sse_mandel, 1, NULL, NULL},
    {"avx2-fma", "vector", "element", k_avx2_fma, WORDS, s_vectors, needs_avx2},
    {"avx2-int", "vector", "element", k_avx2_int, WORDS, s_vectors, needs_avx2},
    {"avx2-mandel", "vector", "iteration", k_avx2_mandel, 1, NULL, needs_avx2},
    {"atomic-add", "atomic", "addition", k_xadd, 1, NULL, NULL},
    {"mutex", "atomic", "lock", k_mutex, 1, NULL, NULL},
    {"rdtsc", "system", "reading", k_rdtsc, 1, NULL, NULL},
    {"clock", "system", "reading", k_clock, 1, NULL, NULL},
    {"getppid", "system", "call", k_getppid, 1, NULL, NULL},
    {"pread", "system", "page", k_pread, 1, s_file, NULL},
    {"open", "system", "file", k_open, 1, NULL, NULL},
    {"page-fault", "system", "page", k_fault, FAULTS, NULL, NULL},
    {"mmap", "system", "mapping", k_mmap, 1, NULL, NULL},
    {"mprotect", "system", "pair", k_mprotect, 1, NULL, NULL},
    {"signal", "system", "signal", k_signal, 1, NULL, NULL},
    {"sigsegv", "system", "fault", k_sigsegv, 1, NULL, NULL},
    {"ping-pong", "system", "round trip", k_pingpong, 1, NULL, NULL},
    {"fork", "system", "process", k_fork, 1, NULL, NULL},
    {"exec", "system", "process", k_exec, 1, NULL, NULL},
    {"patch-code", "code", "patch", k_patch, 1, s_code, NULL},
    {"new-code", "code", "function", k_new_code, 1, s_code, NULL},
};

// --- The stop-watch ---

static void say(const char *text) {
    size_t length = strlen(text);
    if (write(STDOUT_FILENO, text, length) != (ssize_t)length) exit(1);
}

static uint64_t begun, begun_processor;

/// What was printed is on the line when the clock starts.
static void begin(void) {
    say("@begin\n");
    tcdrain(STDOUT_FILENO);
    begun_processor = processor_time();
    begun = now();
}

static void end(uint64_t operations, uint64_t first) {
    char line[120];
    uint64_t took = now() - begun, processor = processor_time() - begun_processor;
    snprintf(line, sizeof line, "@end %lu %lu %lu %lu\n", took, operations, first, processor);
    say(line);
}

static uint64_t timed(const struct kernel *kernel, uint64_t count) {
    uint64_t started = now();
    kernel->run(count);
    return now() - started;
}

static int run_kernel(uint64_t wanted, const char *name) {
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        const struct kernel *kernel = &kernels[i];
        if (strcmp(kernel->name, name) != 0) continue;
        const char *missing = kernel->needs ? kernel->needs() : NULL;
        if (missing) {
            printf("@skip %s\n", missing);
            return 0;
        }
        if (kernel->setup) kernel->setup();
        // Counts grow until one takes long enough to tell how many fill the time, even where other work delays some.
        uint64_t batches = 1, took = timed(kernel, kernel->batch);
        for (;;) {
            if (took >= wanted / 8) {
                for (int i = 0; i < 2; i++) {
                    uint64_t again = timed(kernel, batches * kernel->batch);
                    if (again < took) took = again;
                }
                if (took >= wanted / 8) break;
            }
            uint64_t scale = took == 0 ? 16 : wanted / 4 / took + 1;
            batches *= scale > 16 ? 16 : scale < 2 ? 2 : scale;
            took = timed(kernel, batches * kernel->batch);
        }
        uint64_t count = ((uint64_t)((double)batches * (double)wanted / (double)took) + 1) * kernel->batch;
        begin();
        kernel->run(count);
        end(count, 0);
        return 0;
    }
    fprintf(stderr, "there is no kernel %s\n", name);
    return 2;
}

static void run_once(char **arguments) {
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        int null = open("/dev/null", O_RDWR);
        if (null < 0) fail("/dev/null");
        dup2(null, STDIN_FILENO);
        dup2(null, STDOUT_FILENO);
        // The same everywhere, so that a host's settings change nothing.
        char *environment[] = {"PATH=/usr/bin:/bin", "HOME=/tmp", "LC_ALL=C", NULL};
        execve(arguments[0], arguments, environment);
        fail(arguments[0]);
    }
    int status;
    if (waitpid(child, &status, 0) != child) fail("waitpid");
    if (WIFSIGNALED(status)) fprintf(stderr, "%s was ended by signal %d\n", arguments[0], WTERMSIG(status));
    else if (status != 0) fprintf(stderr, "%s ended with status %d\n", arguments[0], WEXITSTATUS(status));
    if (status != 0) exit(1);
}

static int run_program(uint64_t wanted, char **arguments) {
    uint64_t started = now();
    run_once(arguments);
    uint64_t first = now() - started, count = 0;
    begin();
    do {
        run_once(arguments);
        count++;
    } while (now() - begun < wanted);
    end(count, first);
    return 0;
}

/// As many processors as the guests have: the last ones, since the first is the busiest.
static void restrict_to(int count) {
    cpu_set_t allowed, chosen;
    CPU_ZERO(&chosen);
    if (sched_getaffinity(0, sizeof allowed, &allowed)) fail("sched_getaffinity");
    for (int cpu = CPU_SETSIZE - 1; cpu >= 0 && count > 0; cpu--) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        CPU_SET(cpu, &chosen);
        count--;
    }
    if (sched_setaffinity(0, sizeof chosen, &chosen)) fail("sched_setaffinity");
}

static int serve(int cpus) {
    char line[1024];
    restrict_to(cpus);
    // Orders must not come back as an echo.
    struct termios terminal;
    if (tcgetattr(STDIN_FILENO, &terminal) == 0) {
        terminal.c_lflag &= ~(tcflag_t)(ECHO | ISIG);
        tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
    }
    say("@ready\n");
    while (fgets(line, sizeof line, stdin)) {
        char *arguments[64] = {"guest"};
        size_t count = 1;
        for (char *word = strtok(line, " \r\n"); word && count < 63; word = strtok(NULL, " \r\n"))
            arguments[count++] = word;
        if (count == 1) continue;
        pid_t child = fork();
        if (child < 0) fail("fork");
        if (child == 0) {
            int null = open("/dev/null", O_RDONLY);
            dup2(null, STDIN_FILENO);
            execv("/proc/self/exe", arguments);
            fail("/proc/self/exe");
        }
        int status = 0;
        while (waitpid(child, &status, 0) != child)
            if (errno != EINTR) fail("waitpid");
        char answer[32];
        snprintf(answer, sizeof answer, "@status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
        say(answer);
    }
    return 0;
}

int main(int count, char **arguments) {
    if (count == 2 && strcmp(arguments[1], "true") == 0) return 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (count == 2 && strcmp(arguments[1], "list") == 0) {
        for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
            printf("%s\t%s\t%s\n", kernels[i].name, kernels[i].group, kernels[i].unit);
        return 0;
    }
    if (count == 3 && strcmp(arguments[1], "serve") == 0) return serve(atoi(arguments[2]));
    uint64_t wanted = count > 2 ? strtoul(arguments[2], NULL, 10) * 1000000 : 0;
    if (count == 4 && strcmp(arguments[1], "kernel") == 0) return run_kernel(wanted, arguments[3]);
    if (count >= 4 && strcmp(arguments[1], "program") == 0) return run_program(wanted, arguments + 3);
    fprintf(stderr, "usage: guest serve CPUS | kernel MS NAME | program MS PATH [ARG]... | list\n");
    return 2;
}
