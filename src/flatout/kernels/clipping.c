/* Clipping of gradients by their norm: the sum of squares of all gradients, and their scaling. */

#include "shares.h"

enum { CHUNK = 4096 }; /* this many squares are summed in float32, and the chunks in float64 */

static void add_squares(void *array, int64_t count, void *sum) {
    const float *x = array;
    double all = 0.0;
    for (int64_t at = 0; at < count; at += CHUNK) {
        int64_t last = at + CHUNK < count ? at + CHUNK : count;
        float some = 0.0f;
        _Pragma("omp simd reduction(+:some)")
        for (int64_t i = at; i < last; i++) some += x[i] * x[i];
        all += some;
    }
    *(double *)sum += all;
}

static void multiply(void *array, int64_t count, void *factor) {
    float *x = array, by = *(const float *)factor;
    for (int64_t i = 0; i < count; i++) x[i] *= by;
}

/* The sum of the squares of all elements of `count` arrays of float32. */
double sum_of_squares(void *const *arrays, const int64_t *sizes, int64_t count, int threads) {
    double sum = 0.0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
    for (int part = 0; part < threads; part++) {
        double own = 0.0;
        visit_share(arrays, sizes, count, part, threads, add_squares, &own);
        sum += own;
    }
    return sum;
}

/* Multiply all elements by `factor`, in place. */
void scale(void *const *arrays, const int64_t *sizes, int64_t count, int threads, float factor) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++)
        visit_share(arrays, sizes, count, part, threads, multiply, &factor);
}
