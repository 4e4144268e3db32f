/* Which elements are kept, a bit each: those whose half word of a key's stream lies below a limit. */

#ifndef FLATOUT_KEPT_H
#define FLATOUT_KEPT_H

#include <string.h>

#include "philox.h"

/* A block of the stream decides about SPAN elements, whose bits are in masks of MASK each. */
enum { SPAN = 2 * BLOCK, MASK = 16, MASKS = SPAN / MASK };

/* Bit i of `bits` is set where element i of SPAN is kept: with probability limit / 2^16. */
static inline void kept_bits(uint64_t key, uint64_t block, uint32_t limit, uint32_t *bits) {
    uint16_t halves[SPAN];
    uint32_t words[BLOCK];
    philox(key, block, words);
    memcpy(halves, words, sizeof halves);
#if defined(__AVX512BW__)
    for (int w = 0; w < SPAN / 32; w++)
        bits[w] = _mm512_cmplt_epu16_mask(_mm512_loadu_si512(halves + 32 * w),
                                          _mm512_set1_epi16((short)limit));
#else
    for (int w = 0; w < SPAN / 32; w++) {
        bits[w] = 0;
        for (int i = 0; i < 32; i++) bits[w] |= (uint32_t)(halves[32 * w + i] < limit) << i;
    }
#endif
}

/* `factor` for each bit of `count` masks that is set, 0 for the others. */
static inline void factors_of(const uint16_t *masks, int64_t count, float factor, float *factors) {
    for (int64_t m = 0; m < count; m++) {
#ifdef __AVX512F__
        _mm512_storeu_ps(factors + m * MASK, _mm512_maskz_mov_ps(masks[m], _mm512_set1_ps(factor)));
#else
        for (int i = 0; i < MASK; i++) factors[m * MASK + i] = masks[m] >> i & 1 ? factor : 0.0f;
#endif
    }
}

#endif
