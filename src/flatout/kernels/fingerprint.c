/* A 64-bit hash of memory, in one pass that only reads. Every step is invertible, so a change of a
   single word always changes the hash; any other change goes unnoticed with probability 2^-64. The
   steps are like those of XXH64, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md,
   with LANES accumulators. */

#include <stdint.h>
#include <string.h>

enum { LANES = 32, CHUNK = 1 << 13 }; /* in 64-bit words */

#define PRIME UINT64_C(0x9E3779B97F4A7C15)

/* Add a word to a hash. Without the rotation, changes of the highest bits (signs) of two words
   would cancel. */
static inline uint64_t mix(uint64_t sum, uint64_t word) {
    uint64_t x = sum ^ word;
    return (x << 31 | x >> 33) * PRIME;
}

static uint64_t hash_chunk(const uint8_t *from, int64_t bytes, int64_t offset) {
    uint64_t lanes[LANES], words[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = (uint64_t)i + 1;
    int64_t at = 0;
    for (; at + (int64_t)sizeof words <= bytes; at += (int64_t)sizeof words) {
        memcpy(words, from + at, sizeof words);
        for (int i = 0; i < LANES; i++) lanes[i] = mix(lanes[i], words[i]);
    }
    if (at < bytes) {
        memset(words, 0, sizeof words);
        memcpy(words, from + at, (size_t)(bytes - at));
        for (int i = 0; i < LANES; i++) lanes[i] = mix(lanes[i], words[i]);
    }
    uint64_t all = mix((uint64_t)offset, (uint64_t)bytes);
    for (int i = 0; i < LANES; i++) all = mix(all, lanes[i]);
    return all;
}

uint64_t fingerprint(const void *memory, int64_t bytes, int threads) {
    const int64_t chunk = CHUNK * (int64_t)sizeof(uint64_t);
    uint64_t hash = (uint64_t)bytes;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(+ : hash)
    for (int64_t at = 0; at < bytes; at += chunk) {
        int64_t rest = bytes - at < chunk ? bytes - at : chunk;
        hash += hash_chunk((const uint8_t *)memory + at, rest, at);
    }
    return hash;
}
