/* Read and write spans of float32 or bfloat16 as float32. */

#ifndef FLATOUT_HALF_H
#define FLATOUT_HALF_H

#include <stdint.h>
#include <string.h>

static inline float from_bf16(uint16_t half) {
    uint32_t word = (uint32_t)half << 16;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
}

/* Round to the nearest bfloat16, ties to even. The processor's instruction is not used, because it
   flushes subnormal numbers to zero. */
static inline uint16_t to_bf16(float x) {
    uint32_t word;
    memcpy(&word, &x, sizeof x);
    uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
    return (uint16_t)(x != x ? 0x7FC0u : rounded);
}

static inline void load_span(float *to, const void *from, int64_t at, int64_t count, int is_bf16) {
    if (is_bf16)
        for (int64_t i = 0; i < count; i++) to[i] = from_bf16(((const uint16_t *)from)[at + i]);
    else
        memcpy(to, (const float *)from + at, (size_t)count * sizeof *to);
}

static inline void store_span(void *to, int64_t at, const float *from, int64_t count, int is_bf16) {
    if (is_bf16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = to_bf16(from[i]);
    else
        memcpy((float *)to + at, from, (size_t)count * sizeof *from);
}

static inline void clear_span(void *to, int64_t at, int64_t count, int is_bf16) {
    size_t width = is_bf16 ? sizeof(uint16_t) : sizeof(float);
    memset((char *)to + (size_t)at * width, 0, (size_t)count * width);
}

#endif
