/* Bernoulli numbers from a counter-based generator: Philox4x32-10.

   J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel random numbers: as easy as 1, 2, 3.
   SC 2011, https://doi.org/10.1145/2063384.2063405. Multipliers and Weyl constants are theirs.

   Element i of a call is a function of the key and of i alone, so the result does not depend on
   the number of threads. A block is what LANES counters give, four words each; word j of lane l of
   block b is element 4 * LANES * b + LANES * j + l. */

#include <stdint.h>

enum { LANES = 16, BLOCK = 4 * LANES };

static inline void philox(uint64_t key, uint64_t block, uint32_t *restrict words) {
    uint32_t a[LANES], b[LANES], c[LANES], d[LANES];
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int l = 0; l < LANES; l++) {
        uint64_t counter = block * LANES + (uint64_t)l;
        a[l] = (uint32_t)counter;
        b[l] = (uint32_t)(counter >> 32);
        c[l] = 0;
        d[l] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int l = 0; l < LANES; l++) {
            uint64_t x = (uint64_t)a[l] * 0xD2511F53u;
            uint64_t y = (uint64_t)c[l] * 0xCD9E8D57u;
            uint32_t next_a = (uint32_t)(y >> 32) ^ b[l] ^ k0;
            uint32_t next_c = (uint32_t)(x >> 32) ^ d[l] ^ k1;
            b[l] = (uint32_t)y;
            d[l] = (uint32_t)x;
            a[l] = next_a;
            c[l] = next_c;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int l = 0; l < LANES; l++) {
        words[l] = a[l];
        words[LANES + l] = b[l];
        words[2 * LANES + l] = c[l];
        words[3 * LANES + l] = d[l];
    }
}

/* The words of the first `blocks` blocks, for tests of the generator itself. */
void philox_words(uint32_t *out, uint64_t blocks, uint64_t key) {
    for (uint64_t block = 0; block < blocks; block++)
        philox(key, block, out + block * BLOCK);
}

/* `out[i] = one` with probability limit / 2^32, else 0. */
#define BERNOULLI(BITS)                                                                          \
    void bernoulli_##BITS(uint##BITS##_t *out, uint64_t count, uint64_t limit, uint##BITS##_t one, \
                          uint64_t key, int threads) {                                           \
        uint64_t whole = count / BLOCK;                                                          \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (uint64_t block = 0; block < whole; block++) {                                       \
            uint32_t words[BLOCK];                                                               \
            philox(key, block, words);                                                           \
            uint##BITS##_t *to = out + block * BLOCK;                                            \
            if (limit >> 32)                                                                     \
                for (int i = 0; i < BLOCK; i++) to[i] = one;                                     \
            else                                                                                 \
                for (int i = 0; i < BLOCK; i++) to[i] = words[i] < (uint32_t)limit ? one : 0;    \
        }                                                                                        \
        if (whole * BLOCK < count) {                                                             \
            uint32_t words[BLOCK];                                                               \
            philox(key, whole, words);                                                           \
            for (uint64_t i = whole * BLOCK; i < count; i++)                                     \
                out[i] = words[i - whole * BLOCK] < limit ? one : 0;                             \
        }                                                                                        \
    }

BERNOULLI(8)
BERNOULLI(16)
BERNOULLI(32)
BERNOULLI(64)
