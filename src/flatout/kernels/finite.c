/* Whether arrays of float32 are finite, in one pass that only reads. */

#include <stdint.h>

enum { INFINITE = 0x7f800000 }; /* IEEE 754: no larger number is finite, sign apart */

static int are_finite(const uint32_t *bits, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t size = bits[i] & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return largest < INFINITE;
}

/* 1 if all `count` arrays, of these numbers of elements, are finite, else 0. Each thread takes an
   equal share of the elements, whatever array they are in. */
int finite(const uint32_t *const *arrays, const int64_t *sizes, int64_t count, int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += sizes[i];
    int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad)
    for (int part = 0; part < threads; part++) {
        int64_t from = total * part / threads, to = total * (part + 1) / threads, start = 0;
        for (int64_t i = 0; i < count && start < to; start += sizes[i], i++) {
            int64_t first = from > start ? from - start : 0;
            int64_t last = to - start < sizes[i] ? to - start : sizes[i];
            if (first < last) bad |= !are_finite(arrays[i] + first, last - first);
        }
    }
    return !bad;
}
