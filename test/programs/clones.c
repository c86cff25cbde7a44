// A program that goes by the model of the processor: a function that the compiler has made several times, each for one processor with all
// that it uses by itself there. Where the processor is not what it seems, the one that is chosen ends with SIGILL. It prints which
// processor the compiler's library sees, and whether what was chosen computes what the plain function does.
#pragma GCC optimize("O3")
#include <stdint.h>
#include <stdio.h>

enum { N = 1000 };

static uint32_t a[N], b[N];
static float x[N];
static int8_t s[N];
static uint8_t u[N];

/** Population counts, bits out of two words, products of bytes, multiplications and additions: loops for vectors. */
#define SUMS(NAME)                                                                                                     \
    uint32_t NAME(void) {                                                                                              \
        uint32_t bits = 0, joined = 0, products = 0;                                                                   \
        float sum[8] = {0};                                                                                            \
        for (int i = 0; i < N; i++) bits += __builtin_popcount(a[i]);                                                  \
        for (int i = 0; i < N; i++) joined ^= a[i] << 7 | b[i] >> 25;                                                  \
        for (int i = 0; i < N; i++) products += s[i] * u[i];                                                           \
        for (int i = 0; i < N; i += 8)                                                                                 \
            for (int k = 0; k < 8; k++) sum[k] = sum[k] * 0.5f + x[i + k];                                             \
        for (int k = 0; k < 8; k++) bits += (int)(sum[k] * 1024);                                                      \
        return bits ^ joined ^ products;                                                                               \
    }

__attribute__((target_clones("default", "arch=core2", "arch=nehalem", "arch=westmere", "arch=sandybridge",
                             "arch=ivybridge", "arch=haswell", "arch=broadwell", "arch=skylake", "arch=skylake-avx512",
                             "arch=cascadelake", "arch=cannonlake", "arch=icelake-client", "arch=icelake-server",
                             "arch=bdver4", "arch=btver2", "arch=znver1", "arch=znver2"))) SUMS(chosen) SUMS(plain)

int main(void) {
    __builtin_cpu_init();
    const char *name = __builtin_cpu_is("core2")            ? "core2"
                       : __builtin_cpu_is("nehalem")        ? "nehalem"
                       : __builtin_cpu_is("haswell")        ? "haswell"
                       : __builtin_cpu_is("skylake-avx512") ? "skylake-avx512"
                       : __builtin_cpu_is("cascadelake")    ? "cascadelake"
                       : __builtin_cpu_is("icelake-server") ? "icelake-server"
                                                            : "another";
    puts(name);
    fflush(stdout);
    for (int i = 0; i < N; i++) a[i] = i * 2654435761u, b[i] = ~a[i] * 3, x[i] = i & 15, s[i] = a[i] >> 9, u[i] = b[i] >> 11;
    puts(chosen() == plain() ? "right" : "wrong");
}
