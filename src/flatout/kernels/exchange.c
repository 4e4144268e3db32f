/* Exchanges between processes of one host through memory that they all have mapped.

   Each process (rank) publishes what it has in rounds: it writes into its own buffers, raises its
   sequence number, waits until all others have raised theirs, and reads their buffers. Buffers
   alternate between rounds: who has seen the others publish a round knows that they have read all of
   the round before, so that its buffers may be written again.

   Sums are formed in the order of the ranks, each part by one rank for all, so that all get the same
   bits. */

#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "half.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum {
    LINE = 128,           /* bytes; processors fetch cache lines of 64 bytes in pairs */
    CHUNK = 1 << 19,      /* bytes of a buffer; those of two ranks fit into third-level caches */
    PIECE = 1 << 15,      /* bytes that one thread moves at a time */
    BLOCK = 256,          /* bytes that are added up at a time */
    ONE_ROUND = 1 << 14,  /* bytes up to which each rank adds up everything by itself */
    SPIN_NS = 50000,      /* about what it costs to sleep and to be woken */
    STREAMED = 1 << 8,    /* bytes from which copies for others go past the caches */
    TURNS = 64,           /* looks at a sequence number for each look at the clock */
};

enum { GATHER, FLOAT32, FLOAT64, BFLOAT16 }; /* what an exchange does; sums by their type */

enum { DONE, WAITING, LEFT, DIFFERENT }; /* statuses */

/* What all know of a rank. The others write only the number of those that sleep. */
struct rank {
    _Alignas(LINE) _Atomic uint32_t sequence; /* of rounds published */
    _Atomic uint32_t has_left;
    _Atomic uint32_t changes; /* of both; the others sleep on it */
    _Atomic uint32_t sleepers;
    uint64_t subject[2]; /* what it exchanges, in odd and in even rounds */
};

/* One exchange, in the memory of its process. `memory.py` has the same. */
struct exchange {
    char *mapping;
    int32_t rank, ranks;
    int32_t kind, threads;
    double factor;          /* sums are multiplied by it */
    char *const *sources;   /* arrays that this rank has */
    char *const *targets;   /* as many; GATHER: those of each rank */
    const int64_t *ends;    /* of each target in the row of its rank, in bytes */
    int64_t count;          /* of the sources */
    int64_t round, rounds;  /* done, and of all; at first 0 */
    int64_t wait_ns;        /* after which `advance` returns WAITING */
    uint32_t first;         /* sequence number before the first round */
};

static int64_t buffers_start(int ranks) { return ((int64_t)ranks * LINE + 4095) / 4096 * 4096; }

int64_t mapping_bytes(int ranks) { return buffers_start(ranks) + (2 + 2 * (int64_t)ranks) * CHUNK; }

static struct rank *rank_of(const struct exchange *x, int rank) {
    return (struct rank *)(x->mapping + (int64_t)rank * LINE);
}

static char *buffer(const struct exchange *x, int64_t number) {
    return x->mapping + buffers_start(x->ranks) + number * CHUNK;
}

/* What a rank has published in a round. */
static char *published(const struct exchange *x, int rank, int64_t round) {
    return buffer(x, 2 + 2 * rank + ((x->first + round) & 1));
}

/* Sums that the ranks have published in a round, each its own part. */
static char *sums(const struct exchange *x, int64_t round) {
    return buffer(x, (x->first + round) & 1);
}

/* Waiting */

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static long futex(_Atomic uint32_t *word, int operation, uint32_t value, const void *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, 0, 0);
}

/* Tell the others of a change. */
static void wake(struct rank *own) {
    atomic_fetch_add(&own->changes, 1);
    if (atomic_load(&own->sleepers)) futex(&own->changes, FUTEX_WAKE, INT32_MAX, 0);
}

static int has_reached(struct rank *other, uint32_t target) {
    return (int32_t)(atomic_load_explicit(&other->sequence, memory_order_acquire) - target) >= 0;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Sleep until a rank publishes or leaves, a signal comes, or for some time. */
static long sleep_on(struct rank *other, uint32_t target, int64_t wait_ns) {
    struct timespec timeout = {wait_ns / 1000000000, wait_ns % 1000000000};
    long failed = 0;
    atomic_fetch_add(&other->sleepers, 1);
    uint32_t seen = atomic_load(&other->changes);
    if (!has_reached(other, target) && !atomic_load(&other->has_left))
        failed = futex(&other->changes, FUTEX_WAIT, seen, &timeout) ? errno : 0;
    atomic_fetch_sub(&other->sleepers, 1);
    return failed;
}

static int await(struct rank *other, uint32_t target, int64_t wait_ns) {
    int64_t start = 0;
    for (;;) {
        for (int turn = 0; turn < TURNS; turn++) {
            if (has_reached(other, target)) return DONE;
            relax();
        }
        if (atomic_load(&other->has_left)) return has_reached(other, target) ? DONE : LEFT;
        int64_t now = now_ns();
        if (!start) start = now;
        if (now - start >= wait_ns) return WAITING;
        if (now - start < SPIN_NS) continue;
        if (sleep_on(other, target, start + wait_ns - now) == EINTR) return WAITING;
    }
}

/* Copy past the caches: another processor reads the copy, and would have to get it from the cache of
   this one, line by line, and this one to get the line back before the next copy. */
static void copy_past_caches(char *to, const char *from, int64_t bytes) {
#ifdef __SSE2__
    int64_t head = -(intptr_t)to & 63;
    if (bytes >= STREAMED) {
        memcpy(to, from, (size_t)head);
        to += head, from += head, bytes -= head;
        for (; bytes >= 64; to += 64, from += 64, bytes -= 64)
            for (int i = 0; i < 64; i += 16)
                _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
    }
#endif
    memcpy(to, from, (size_t)bytes);
}

/* Let what was copied past the caches be seen before what is written from now on. */
static void fence(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* Moving arrays, which are seen as one row of bytes for each rank */

typedef void visitor(const struct exchange *, int64_t round, int rank, char *source, char *target,
                     int64_t offset, int64_t bytes);

/* The number of the first array of a rank: sums have the same for all. */
static int64_t first_array(const struct exchange *x, int rank) {
    return x->kind == GATHER ? rank * x->count : 0;
}

static int64_t row_bytes(const struct exchange *x, int rank) {
    return x->count ? x->ends[first_array(x, rank) + x->count - 1] : 0;
}

static void visit_piece(const struct exchange *x, int64_t round, int rank, int64_t from, int64_t to,
                        visitor *visitor) {
    int64_t at = first_array(x, rank);
    const int64_t *ends = x->ends + at;
    int64_t low = 0, high = x->count; /* the first array that ends after `from` is between them */
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (ends[middle] > from) high = middle;
        else low = middle + 1;
    }
    for (int64_t i = low; from < to; from = ends[i++]) {
        int64_t start = i ? ends[i - 1] : 0, last = ends[i] < to ? ends[i] : to;
        if (from == last) continue;
        char *source = rank == x->rank ? x->sources[i] + (from - start) : 0;
        visitor(x, round, rank, source, x->targets[at + i] + (from - start), from, last - from);
    }
}

/* Visit the bytes from `from` to `to` of the row of a rank, by several threads. */
static void visit(const struct exchange *x, int64_t round, int rank, int64_t from, int64_t to,
                  visitor *visitor) {
    int is_parallel = x->threads > 1 && to - from > 2 * PIECE;
#pragma omp parallel for schedule(static) num_threads(x->threads) if (is_parallel)
    for (int64_t piece = from / PIECE; piece < (to + PIECE - 1) / PIECE; piece++) {
        int64_t first = piece * PIECE > from ? piece * PIECE : from;
        int64_t last = (piece + 1) * PIECE < to ? (piece + 1) * PIECE : to;
        visit_piece(x, round, rank, first, last, visitor);
        fence();
    }
}

/* The bytes of a row that are exchanged in a round. */
struct range {
    int64_t from, to;
};

static struct range chunk(const struct exchange *x, int rank, int64_t round) {
    int64_t bytes = row_bytes(x, rank), from = round * CHUNK, to = (round + 1) * CHUNK;
    struct range range = {from < bytes ? from : bytes, to < bytes ? to : bytes};
    return range;
}

/* The part of a chunk that a rank adds up for all: whole cache lines. */
static struct range part(const struct exchange *x, int rank, int64_t round) {
    struct range all = chunk(x, x->rank, round);
    int64_t share = ((all.to - all.from + x->ranks - 1) / x->ranks + 63) / 64 * 64;
    int64_t from = all.from + rank * share, to = from + share;
    struct range range = {from < all.to ? from : all.to, to < all.to ? to : all.to};
    return range;
}

static void publish(const struct exchange *x, int64_t round, int rank, char *source, char *target,
                    int64_t offset, int64_t bytes) {
    (void)target;
    copy_past_caches(published(x, rank, round) + offset % CHUNK, source, bytes);
}

static void receive(const struct exchange *x, int64_t round, int rank, char *source, char *target,
                    int64_t offset, int64_t bytes) {
    const char *from = rank == x->rank ? source : published(x, rank, round) + offset % CHUNK;
    if (from != target) memcpy(target, from, (size_t)bytes);
}

static void receive_sums(const struct exchange *x, int64_t round, int rank, char *source,
                         char *target, int64_t offset, int64_t bytes) {
    (void)rank, (void)source;
    memcpy(target, sums(x, round + 1) + offset % CHUNK, (size_t)bytes);
}

/* Sums */

/* Blocks are short, so that a processor reads those of all ranks at a time. */
#define ADD_UP(name, type, sum_type, load, store)                                                   \
    static inline __attribute__((always_inline)) void name##_block(                                 \
        const struct exchange *x, const char *source, const char *first, int64_t stride,            \
        type *target, int64_t count) {                                                              \
        sum_type sum[BLOCK / sizeof(type)];                                                         \
        const sum_type factor = (sum_type)x->factor;                                                \
        for (int rank = 0; rank < x->ranks; rank++) {                                               \
            const type *from = (const type *)(rank == x->rank ? source : first + rank * stride);    \
            if (rank)                                                                               \
                for (int64_t i = 0; i < count; i++) sum[i] += load(from[i]);                        \
            else                                                                                    \
                for (int64_t i = 0; i < count; i++) sum[i] = load(from[i]);                         \
        }                                                                                           \
        for (int64_t i = 0; i < count; i++) target[i] = store(sum[i] * factor);                     \
    }                                                                                               \
    static void name(const struct exchange *x, int64_t round, const char *source, char *target,     \
                     char *also, int64_t offset, int64_t bytes) {                                   \
        const char *first = published(x, 0, round) + offset % CHUNK;                                \
        const int64_t stride = published(x, 1, round) - published(x, 0, round);                     \
        int64_t n = BLOCK - offset % BLOCK; /* then whole blocks are aligned */                     \
        for (int64_t at = 0; at < bytes; at += n, n = BLOCK) {                                      \
            if (n > bytes - at) n = bytes - at;                                                     \
            type *to = (type *)(target + at);                                                       \
            if (n == BLOCK)                                                                         \
                name##_block(x, source + at, first + at, stride, to, BLOCK / sizeof(type));         \
            else                                                                                    \
                name##_block(x, source + at, first + at, stride, to, n / (int64_t)sizeof(type));    \
            if (also) copy_past_caches(also + at, target + at, n);                                  \
        }                                                                                           \
    }

ADD_UP(add_up_float32, float, float, , )
ADD_UP(add_up_float64, double, double, , )
ADD_UP(add_up_bfloat16, uint16_t, float, from_bf16, to_bf16)

static void add_up(const struct exchange *x, int64_t round, const char *source, char *target,
                   char *also, int64_t offset, int64_t bytes) {
    if (x->kind == FLOAT32) add_up_float32(x, round, source, target, also, offset, bytes);
    if (x->kind == FLOAT64) add_up_float64(x, round, source, target, also, offset, bytes);
    if (x->kind == BFLOAT16) add_up_bfloat16(x, round, source, target, also, offset, bytes);
}

static void add_up_for_itself(const struct exchange *x, int64_t round, int rank, char *source,
                              char *target, int64_t offset, int64_t bytes) {
    (void)rank;
    add_up(x, round, source, target, 0, offset, bytes);
}

/* Add up the own part of what was published in a round, and publish the sums in the next one. */
static void add_up_for_all(const struct exchange *x, int64_t round, int rank, char *source,
                           char *target, int64_t offset, int64_t bytes) {
    (void)rank;
    char *also = sums(x, round + 1) + offset % CHUNK;
    add_up(x, round, source, target, also, offset, bytes);
}

/* Rounds */

static int is_one_round(const struct exchange *x) {
    return x->kind != GATHER && row_bytes(x, x->rank) <= ONE_ROUND;
}

static int64_t count_rounds(const struct exchange *x) {
    int64_t bytes = 0;
    for (int rank = 0; rank < (x->kind == GATHER ? x->ranks : 1); rank++)
        if (row_bytes(x, rank) > bytes) bytes = row_bytes(x, rank);
    int64_t chunks = bytes ? (bytes + CHUNK - 1) / CHUNK : 1;
    return x->kind == GATHER || is_one_round(x) ? chunks : chunks + 1;
}

static void visit_parts_of_others(const struct exchange *x, int64_t round, visitor *visitor) {
    struct range all = chunk(x, x->rank, round), own = part(x, x->rank, round);
    visit(x, round, x->rank, all.from, own.from, visitor);
    visit(x, round, x->rank, own.to, all.to, visitor);
}

static void begin_round(const struct exchange *x, int64_t round) {
    struct range all = chunk(x, x->rank, round);
    if (x->kind == GATHER || is_one_round(x)) {
        visit(x, round, x->rank, all.from, all.to, publish);
        return;
    }
    visit_parts_of_others(x, round, publish);
    if (round) {
        struct range own = part(x, x->rank, round - 1);
        visit(x, round - 1, x->rank, own.from, own.to, add_up_for_all);
    }
}

static void end_round(const struct exchange *x, int64_t round) {
    if (x->kind == GATHER) {
        for (int rank = 0; rank < x->ranks; rank++) {
            struct range of = chunk(x, rank, round);
            visit(x, round, rank, of.from, of.to, receive);
        }
    } else if (is_one_round(x)) {
        struct range all = chunk(x, x->rank, round);
        visit(x, round, x->rank, all.from, all.to, add_up_for_itself);
    } else if (round) {
        visit_parts_of_others(x, round - 1, receive_sums);
    }
}

/* Ranks whose hashes differ do not exchange the same. */
static uint64_t hash_of_sizes(const struct exchange *x) {
    uint64_t hash = (uint64_t)x->kind;
    for (int rank = 0; rank < x->ranks; rank++)
        hash = (hash << 9 ^ hash >> 55 ^ (uint64_t)row_bytes(x, rank)) * UINT64_C(0x9E3779B97F4A7C15);
    return hash;
}

/* Go on with an exchange until it is done. All ranks must make the same exchanges. */
int advance(struct exchange *x) {
    struct rank *own = rank_of(x, x->rank);
    if (!x->rounds) {
        x->first = atomic_load(&own->sequence);
        x->rounds = count_rounds(x);
    }
    const uint64_t subject = hash_of_sizes(x);
    for (; x->round < x->rounds; x->round++) {
        uint32_t target = x->first + (uint32_t)x->round + 1;
        if (atomic_load(&own->sequence) != target) {
            begin_round(x, x->round);
            own->subject[target & 1] = subject;
            atomic_store(&own->sequence, target);
            wake(own);
        }
        for (int i = 1; i < x->ranks; i++) {
            struct rank *other = rank_of(x, (x->rank + i) % x->ranks);
            int status = await(other, target, x->wait_ns);
            if (status != DONE) return status;
            if (other->subject[target & 1] != subject) return DIFFERENT;
        }
        end_round(x, x->round);
    }
    return DONE;
}

/* Tell the others that this rank exchanges nothing more. */
void leave(char *mapping, int rank) {
    struct rank *own = (struct rank *)(mapping + (int64_t)rank * LINE);
    atomic_store(&own->has_left, 1);
    wake(own);
}
