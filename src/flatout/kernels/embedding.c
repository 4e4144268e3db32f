/* The gradient of the weight of an embedding bag. It starts from zeros, and the gradient of each
   bag is added to the rows that the bag has looked up. Nothing is sorted: each thread zeroes a
   share of the rows, and then adds only to its own rows, in the order of the lookups, so the sums
   do not depend on the number of threads. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    int64_t rows, width;
    float *weight_gradient;   /* rows x width; the result */
    int64_t lookups;
    const int64_t *indices;   /* the row of each lookup */
    const int64_t *bags;      /* the bag of each lookup */
    const int64_t *counts;    /* the number of lookups of each bag, for means; null for sums */
    const float *factors;     /* the factor of each lookup; null for 1 */
    const float *gradient;    /* the gradient of the output; bags x width */
    int64_t bag_count;
    int64_t padding_idx;      /* a row that is ignored */
    int64_t threads;
} Bags;

static void add_rows(const Bags *b, int64_t thread, int64_t threads) {
    for (int64_t i = 0; i < b->lookups; i++) {
        int64_t row = b->indices[i], bag = b->bags[i];
        if (row % threads != thread || row == b->padding_idx) continue;
        float factor = b->factors ? b->factors[i] : 1.0f;
        if (b->counts && b->counts[bag]) factor /= (float)b->counts[bag];
        float *restrict sum = b->weight_gradient + row * b->width;
        const float *restrict gradient = b->gradient + bag * b->width;
        for (int64_t j = 0; j < b->width; j++) sum[j] += factor * gradient[j];
    }
}

/* Compute the gradient. Returns 0, or -1, with nothing written, if a row or a bag does not
   exist. */
int embedding_bags(const Bags *b) {
    for (int64_t i = 0; i < b->lookups; i++)
        if ((uint64_t)b->indices[i] >= (uint64_t)b->rows ||
            (uint64_t)b->bags[i] >= (uint64_t)b->bag_count)
            return -1;
#pragma omp parallel num_threads((int)b->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t from = b->rows * thread / threads, to = b->rows * (thread + 1) / threads;
        memset(b->weight_gradient + from * b->width, 0,
               (size_t)((to - from) * b->width) * sizeof(float));
#pragma omp barrier
        add_rows(b, thread, threads);
    }
    return 0;
}
