/* Check that arrays of float32 are finite, in one pass that only reads. */

#include "shares.h"

/* IEEE 754: without its sign bit, a number is infinite or NaN if its bits are at least this. */
enum { INFINITE = 0x7f800000 };

static void find_largest(void *array, int64_t count, void *found) {
    const uint32_t *bits = array;
    uint32_t largest = *(uint32_t *)found;
    for (int64_t i = 0; i < count; i++) {
        uint32_t size = bits[i] & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    *(uint32_t *)found = largest;
}

/* Return 1 if all elements of all `count` arrays are finite, else 0. */
int finite(void *const *arrays, const int64_t *sizes, int64_t count, int threads) {
    int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad)
    for (int part = 0; part < threads; part++) {
        uint32_t largest = 0;
        visit_share(arrays, sizes, count, part, threads, find_largest, &largest);
        bad |= largest >= INFINITE;
    }
    return !bad;
}
