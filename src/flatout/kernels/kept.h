/* Draw which elements dropout keeps, one bit each: those whose 16 random bits are below a limit. */

#ifndef FLATOUT_KEPT_H
#define FLATOUT_KEPT_H

#include <string.h>

#include "philox.h"

/* A block of random words decides about SPAN elements. Their bits are stored in masks of MASK
   bits. */
enum { SPAN = 2 * BLOCK, MASK = 16, MASKS = SPAN / MASK };

/* Set bit i of `bits` if element i of SPAN is kept, which it is with probability limit / 2^16. */
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

/* Write `factor` for each set bit of `count` masks, and 0 for the others. */
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
