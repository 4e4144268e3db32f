/* Matmuls of small matrices that fit into the cache, on one thread: float_matmul for float32, and,
   on processors with AVX512-BF16, pairs_matmul for pairs of bfloat16 that share a 32-bit word.

   out[rows x columns] = left[rows x depth] right[depth x columns], where columns is a multiple of
   TILE. `row_step` and `depth_step` are the strides of `left`, which may thus be transposed. With
   pairs, `depth` counts pairs: a word of `left` or `right` holds two elements that are adjacent
   along the depth. Sums are float32. */

#ifndef FLATOUT_MATMUL_H
#define FLATOUT_MATMUL_H

#include <stdint.h>

enum { TILE = 16 };

typedef float Lane __attribute__((vector_size(4 * TILE), aligned(4), may_alias));

/* Two bfloat16. `may_alias`, because they may have been written as single numbers. */
typedef uint32_t Pair __attribute__((may_alias));

/* Compute TALL rows and WIDE lanes of columns. */
#define TILE_OF(KIND, Element, ADD, TALL, WIDE)                                                  \
    static inline void KIND##_tile_##TALL##_##WIDE(                                              \
        float *out, int64_t out_stride, const Element *left, int64_t row_step,                   \
        int64_t depth_step, const Element *right, int64_t right_stride, int64_t depth) {         \
        Lane sums[TALL][WIDE];                                                                   \
        for (int r = 0; r < TALL; r++)                                                           \
            for (int c = 0; c < WIDE; c++) sums[r][c] = (Lane){0};                               \
        for (int64_t k = 0; k < depth; k++) {                                                    \
            const Element *across = right + k * right_stride;                                    \
            for (int r = 0; r < TALL; r++) {                                                     \
                Element x = left[r * row_step + k * depth_step];                                 \
                for (int c = 0; c < WIDE; c++) ADD(sums[r][c], x, across + c * TILE);            \
            }                                                                                    \
        }                                                                                        \
        for (int r = 0; r < TALL; r++)                                                           \
            for (int c = 0; c < WIDE; c++) ((Lane *)(out + r * out_stride))[c] = sums[r][c];     \
    }

/* Compute all rows of WIDE lanes of columns. */
#define STRIPE_OF(KIND, Element, TALL, WIDE)                                                     \
    static inline void KIND##_stripe_##WIDE(                                                     \
        float *out, int64_t out_stride, const Element *left, int64_t row_step,                   \
        int64_t depth_step, const Element *right, int64_t right_stride, int64_t rows,            \
        int64_t depth) {                                                                         \
        int64_t row = 0;                                                                         \
        for (; row + TALL <= rows; row += TALL)                                                  \
            KIND##_tile_##TALL##_##WIDE(out + row * out_stride, out_stride,                      \
                                        left + row * row_step, row_step, depth_step, right,      \
                                        right_stride, depth);                                    \
        for (; row < rows; row++)                                                                \
            KIND##_tile_1_##WIDE(out + row * out_stride, out_stride, left + row * row_step,      \
                                 row_step, depth_step, right, right_stride, depth);              \
    }

#define MATMUL_OF(KIND, Element, ADD)                                                           \
    TILE_OF(KIND, Element, ADD, 4, 4)                                                            \
    TILE_OF(KIND, Element, ADD, 1, 4)                                                            \
    TILE_OF(KIND, Element, ADD, 8, 2)                                                            \
    TILE_OF(KIND, Element, ADD, 1, 2)                                                            \
    TILE_OF(KIND, Element, ADD, 8, 1)                                                            \
    TILE_OF(KIND, Element, ADD, 1, 1)                                                            \
    STRIPE_OF(KIND, Element, 4, 4)                                                               \
    STRIPE_OF(KIND, Element, 8, 2)                                                               \
    STRIPE_OF(KIND, Element, 8, 1)                                                               \
    static void KIND##_matmul(float *out, int64_t out_stride, const Element *left,               \
                              int64_t row_step, int64_t depth_step, const Element *right,        \
                              int64_t right_stride, int64_t rows, int64_t depth,                 \
                              int64_t columns) {                                                 \
        int64_t at = 0;                                                                          \
        for (; at + 4 * TILE <= columns; at += 4 * TILE)                                         \
            KIND##_stripe_4(out + at, out_stride, left, row_step, depth_step, right + at,        \
                            right_stride, rows, depth);                                          \
        for (; at + 2 * TILE <= columns; at += 2 * TILE)                                         \
            KIND##_stripe_2(out + at, out_stride, left, row_step, depth_step, right + at,        \
                            right_stride, rows, depth);                                          \
        for (; at < columns; at += TILE)                                                         \
            KIND##_stripe_1(out + at, out_stride, left, row_step, depth_step, right + at,        \
                            right_stride, rows, depth);                                          \
    }

#define ADD_FLOATS(sum, x, lane) (sum) += *(const Lane *)(lane) * (x)
MATMUL_OF(float, float, ADD_FLOATS)

#ifdef __AVX512BF16__
#include <immintrin.h>
#define ADD_PAIRS(sum, x, lane)                                                                  \
    (sum) = (Lane)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)_mm512_set1_epi32((int)(x)),         \
                                   (__m512bh)_mm512_loadu_si512(lane))
MATMUL_OF(pairs, Pair, ADD_PAIRS)
#endif

#endif
