/* Bernoulli numbers and dropout with a counter-based generator.

   Element i of a call depends only on the key and on i, so the result does not depend on the number
   of threads. */

#include "half.h"
#include "kept.h"

/* Write the words of the first `blocks` blocks; used by tests of the generator. */
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

/* `to[i] = from[i]` times `scale` if its bit is set, else times 0; float32 or bfloat16. */
static inline void scale_kept(const void *from, void *to, int64_t at, int64_t width,
                              const uint32_t *bits, float scale, int is_bf16) {
    float span[SPAN] = {0}, factors[SPAN];
    uint16_t masks[MASKS];
    memcpy(masks, bits, sizeof masks);
    load_span(span, from, at, width, is_bf16);
    factors_of(masks, MASKS, scale, factors);
    for (int i = 0; i < SPAN; i++) span[i] *= factors[i];
    store_span(to, at, span, width, is_bf16);
}

/* Dropout that keeps each element with probability limit / 2^16, where 0 < limit < 2^16. `bits` has
   a bit for each element, set if it is kept, in four words for SPAN elements. The bits are drawn if
   `draw` is not 0, and otherwise used as they are. */
void dropout(const void *from, void *to, uint32_t *bits, int64_t count, uint32_t limit,
             float scale, uint64_t key, int draw, int is_bf16, int threads) {
    int64_t spans = (count + SPAN - 1) / SPAN;
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
    for (int64_t index = 0; index < spans; index++) {
        uint32_t *here = bits + index * (SPAN / 32);
        int64_t left = count - index * SPAN, width = left < SPAN ? left : SPAN;
        if (draw) kept_bits(key, (uint64_t)index, limit, here);
        scale_kept(from, to, index * SPAN, width, here, scale, is_bf16);
    }
}
