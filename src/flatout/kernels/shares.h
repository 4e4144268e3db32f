/* Split the elements of many arrays into equal shares, one for each thread. */

#ifndef FLATOUT_SHARES_H
#define FLATOUT_SHARES_H

#include <stdint.h>

static inline int64_t elements_of(const int64_t *sizes, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += sizes[i];
    return total;
}

/* Call `visit` for each contiguous run of 32-bit elements that belongs to share `part` of
   `parts`. */
static inline void visit_share(void *const *arrays, const int64_t *sizes, int64_t count, int part,
                               int parts, void (*visit)(void *, int64_t, void *), void *with) {
    int64_t total = elements_of(sizes, count);
    int64_t from = total * part / parts, to = total * (part + 1) / parts, start = 0;
    for (int64_t i = 0; i < count && start < to; start += sizes[i], i++) {
        int64_t first = from > start ? from - start : 0;
        int64_t last = to - start < sizes[i] ? to - start : sizes[i];
        if (first < last) visit((uint32_t *)arrays[i] + first, last - first, with);
    }
}

#endif
