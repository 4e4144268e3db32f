/* A counter-based generator of random words: Philox4x32-7.

   J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel random numbers: as easy as 1, 2, 3.
   SC 2011, https://doi.org/10.1145/2063384.2063405. Multipliers and Weyl constants are from this
   paper. Seven rounds are the fewest that pass all tests of TestU01's BigCrush; the usual ten leave
   a margin that dropout does not need.

   A block consists of the words of LANES counters, four words each. Word j of lane l of block b is
   word 4 * LANES * b + LANES * j + l of a key's stream. */

#ifndef FLATOUT_PHILOX_H
#define FLATOUT_PHILOX_H

#include <stdint.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { LANES = 16, BLOCK = 4 * LANES, ROUNDS = 7 };

/* `Lanes` holds LANES words of 32 bits. Intrinsics are used because gcc and clang do not find the
   instruction that multiplies 32 by 32 bits to 64. */
#if defined(__AVX512F__)

typedef __m512i Lanes;

static inline Lanes all(uint32_t x) { return _mm512_set1_epi32((int)x); }
static inline Lanes xor(Lanes x, Lanes y, Lanes z) {
    return _mm512_ternarylogic_epi32(x, y, z, 0x96);
}
static inline Lanes load(const uint32_t *from) { return _mm512_loadu_si512(from); }
static inline void store(uint32_t *to, Lanes x) { _mm512_storeu_si512(to, x); }
static inline void multiply(Lanes x, Lanes by, Lanes *high, Lanes *low) {
    Lanes even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
    *low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
    *high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
}

#elif defined(__AVX2__)

typedef struct { __m256i half[2]; } Lanes;

static inline Lanes all(uint32_t x) {
    __m256i half = _mm256_set1_epi32((int)x);
    return (Lanes){{half, half}};
}
static inline Lanes xor(Lanes x, Lanes y, Lanes z) {
    for (int h = 0; h < 2; h++)
        x.half[h] = _mm256_xor_si256(_mm256_xor_si256(x.half[h], y.half[h]), z.half[h]);
    return x;
}
static inline Lanes load(const uint32_t *from) {
    const __m256i *halves = (const __m256i *)from;
    return (Lanes){{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
}
static inline void store(uint32_t *to, Lanes x) {
    _mm256_storeu_si256((__m256i *)to, x.half[0]);
    _mm256_storeu_si256((__m256i *)to + 1, x.half[1]);
}
static inline void multiply(Lanes x, Lanes by, Lanes *high, Lanes *low) {
    for (int h = 0; h < 2; h++) {
        __m256i even = _mm256_mul_epu32(x.half[h], by.half[h]);
        __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x.half[h], 32), by.half[h]);
        low->half[h] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
        high->half[h] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    }
}

#else

typedef struct { uint32_t lane[LANES]; } Lanes;

static inline Lanes all(uint32_t x) {
    Lanes lanes;
    for (int l = 0; l < LANES; l++) lanes.lane[l] = x;
    return lanes;
}
static inline Lanes xor(Lanes x, Lanes y, Lanes z) {
    for (int l = 0; l < LANES; l++) x.lane[l] ^= y.lane[l] ^ z.lane[l];
    return x;
}
static inline Lanes load(const uint32_t *from) {
    Lanes lanes;
    for (int l = 0; l < LANES; l++) lanes.lane[l] = from[l];
    return lanes;
}
static inline void store(uint32_t *to, Lanes x) {
    for (int l = 0; l < LANES; l++) to[l] = x.lane[l];
}
static inline void multiply(Lanes x, Lanes by, Lanes *high, Lanes *low) {
    for (int l = 0; l < LANES; l++) {
        uint64_t product = (uint64_t)x.lane[l] * by.lane[l];
        high->lane[l] = (uint32_t)(product >> 32);
        low->lane[l] = (uint32_t)product;
    }
}

#endif

/* Write the words of a block of a key's stream. */
static inline void philox(uint64_t key, uint64_t block, uint32_t *restrict words) {
    uint32_t low[LANES], high[LANES];
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int l = 0; l < LANES; l++) {
        uint64_t counter = block * LANES + (uint64_t)l;
        low[l] = (uint32_t)counter;
        high[l] = (uint32_t)(counter >> 32);
    }
    Lanes a = load(low), b = load(high), c = all(0), d = all(0);
    Lanes by_a = all(0xD2511F53u), by_c = all(0xCD9E8D57u);
    for (int round = 0; round < ROUNDS; round++) {
        Lanes high_a, low_a, high_c, low_c;
        multiply(a, by_a, &high_a, &low_a);
        multiply(c, by_c, &high_c, &low_c);
        a = xor(high_c, b, all(k0));
        c = xor(high_a, d, all(k1));
        b = low_c;
        d = low_a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    store(words, a);
    store(words + LANES, b);
    store(words + 2 * LANES, c);
    store(words + 3 * LANES, d);
}

#endif
