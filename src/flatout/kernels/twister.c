/* Bernoulli numbers of torch's generator on the CPU, the same bit for bit, but many at once.

   The generator is a Mersenne Twister: M. Matsumoto, T. Nishimura: Mersenne Twister: a 623-
   dimensionally equidistributed uniform pseudo-random number generator. ACM TOMACS 8 (1998),
   https://doi.org/10.1145/272991.272995. Each number is drawn as 53 bits of two words
   (`at::bernoulli_distribution<double>`, ATen/core/DistributionsHelper.h). */

#include <stdint.h>
#include <string.h>

enum { WORDS = 624, SHIFT = 397 };

/* The beginning of what `torch.Generator.get_state` returns (`CPUGeneratorImplStateLegacy` in
   ATen/CPUGeneratorImpl.cpp). `left` is one more than the number of words that are left. */
struct state {
    uint64_t seed;
    int32_t left;
    int32_t seeded;
    uint64_t next;
    uint64_t words[WORDS];
};

static inline uint32_t twist(uint32_t upper, uint32_t lower) {
    uint32_t mixed = (upper & 0x80000000u) | (lower & 0x7FFFFFFFu);
    return (mixed >> 1) ^ (-(lower & 1u) & 0x9908B0DFu);
}

static void next_words(uint32_t *restrict words) {
    _Pragma("GCC ivdep")
    for (int i = 0; i < WORDS - SHIFT; i++)
        words[i] = words[i + SHIFT] ^ twist(words[i], words[i + 1]);
    _Pragma("GCC ivdep")
    for (int i = WORDS - SHIFT; i < 2 * (WORDS - SHIFT); i++)
        words[i] = words[i - (WORDS - SHIFT)] ^ twist(words[i], words[i + 1]);
    _Pragma("GCC ivdep")
    for (int i = 2 * (WORDS - SHIFT); i < WORDS - 1; i++)
        words[i] = words[i - (WORDS - SHIFT)] ^ twist(words[i], words[i + 1]);
    words[WORDS - 1] = words[SHIFT - 1] ^ twist(words[WORDS - 1], words[0]);
}

static inline uint32_t temper(uint32_t x) {
    x ^= x >> 11;
    x ^= (x << 7) & 0x9D2C5680u;
    x ^= (x << 15) & 0xEFC60000u;
    return x ^ (x >> 18);
}

/* Write `one` or 0 for `count` numbers of which each has two words. */
#define WRITE(BITS)                                                                           \
    static void write_##BITS(const uint32_t *words, int64_t count, uint64_t below,             \
                             uint##BITS##_t one, uint##BITS##_t *to) {                         \
        for (int64_t i = 0; i < count; i++) {                                                  \
            uint64_t drawn = (uint64_t)words[2 * i] << 32 | words[2 * i + 1];                  \
            to[i] = (drawn & ((UINT64_C(1) << 53) - 1)) < below ? one : 0;                     \
        }                                                                                      \
    }

WRITE(8)
WRITE(16)
WRITE(32)
WRITE(64)

static void write(const uint32_t *words, int64_t count, uint64_t below, uint64_t one, int bytes,
                  char *to) {
    switch (bytes) {
        case 1: write_8(words, count, below, (uint8_t)one, (uint8_t *)to); break;
        case 2: write_16(words, count, below, (uint16_t)one, (uint16_t *)to); break;
        case 4: write_32(words, count, below, (uint32_t)one, (uint32_t *)to); break;
        default: write_64(words, count, below, one, (uint64_t *)to);
    }
}

/* Draw `count` numbers, and write those from `start` on and before `stop`: `one` if the 53 bits are
   less than `below`, else 0. `one` has `bytes` bytes. Returns 0 if the state is none that the
   generator comes to by itself, and 1 otherwise. */
int twister_bernoulli(struct state *state, int64_t count, int64_t start, int64_t stop,
                       uint64_t below, uint64_t one, int bytes, char *to) {
    if (state->left != 1 && state->left + (int64_t)state->next != WORDS + 1) return 0;
    uint32_t words[WORDS], drawn[WORDS + 1];
    for (int i = 0; i < WORDS; i++) words[i] = (uint32_t)state->words[i];
    int at = state->left == 1 ? WORDS : (int)state->next, kept = 0;
    for (int64_t done = 0; done < count;) {
        if (at == WORDS) {
            next_words(words);
            at = 0;
        }
        int64_t wanted = 2 * (count - done) - kept;
        int taken = wanted < WORDS - at ? (int)wanted : WORDS - at;
        int64_t here = (kept + taken) / 2;
        if (done + here > start && done < stop) {
            for (int i = 0; i < taken; i++) drawn[kept + i] = temper(words[at + i]);
            int64_t from = start > done ? start - done : 0;
            int64_t until = stop < done + here ? stop - done : here;
            write(drawn + 2 * from, until - from, below, one, bytes,
                  to + (done + from - start) * bytes);
        } else if (taken) {
            drawn[kept + taken - 1] = temper(words[at + taken - 1]);
        }
        drawn[0] = drawn[kept + taken - 1];
        kept = (kept + taken) % 2;
        at += taken;
        done += here;
    }
    if (count > 0) {
        for (int i = 0; i < WORDS; i++) state->words[i] = words[i];
        state->next = (uint64_t)at;
        state->left = WORDS + 1 - at;
    }
    return 1;
}
