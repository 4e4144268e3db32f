/* The gradient of a table of which rows were looked up and added up in bags: zeros, and the gradient
   of each bag in the rows that it was made of. Nothing is sorted: each thread clears a share of the
   table, then adds to rows of its own in the order of the lookups, so that the sums do not depend on
   the number of threads. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    int64_t rows, width;
    float *table;             /* rows x width, written */
    int64_t lookups;
    const int64_t *looked_up; /* a row for each lookup */
    const int64_t *bags;      /* its bag */
    const int64_t *counts;    /* lookups of each bag, for means; null for sums */
    const float *factors;     /* of each lookup; null for 1 */
    const float *gradient;    /* bags x width */
    int64_t bag_count, left_out; /* a row that was not added */
    int64_t threads;
} Bags;

static void add_rows(const Bags *b, int64_t thread, int64_t threads) {
    for (int64_t i = 0; i < b->lookups; i++) {
        int64_t row = b->looked_up[i], bag = b->bags[i];
        if (row % threads != thread || row == b->left_out) continue;
        float factor = b->factors ? b->factors[i] : 1.0f;
        if (b->counts && b->counts[bag]) factor /= (float)b->counts[bag];
        float *restrict sum = b->table + row * b->width;
        const float *restrict gradient = b->gradient + bag * b->width;
        for (int64_t j = 0; j < b->width; j++) sum[j] += factor * gradient[j];
    }
}

/* 0, or -1 if a lookup is in no row or no bag: then nothing is written. */
int embedding_bags(const Bags *b) {
    for (int64_t i = 0; i < b->lookups; i++)
        if ((uint64_t)b->looked_up[i] >= (uint64_t)b->rows ||
            (uint64_t)b->bags[i] >= (uint64_t)b->bag_count)
            return -1;
#pragma omp parallel num_threads((int)b->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t from = b->rows * thread / threads, to = b->rows * (thread + 1) / threads;
        memset(b->table + from * b->width, 0, (size_t)((to - from) * b->width) * sizeof(float));
#pragma omp barrier
        add_rows(b, thread, threads);
    }
    return 0;
}
