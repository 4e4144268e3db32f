/* Bernoulli numbers from a counter-based generator.

   Element i of a call is a function of the key and of i alone, so the result does not depend on
   the number of threads. */

#include "philox.h"

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
