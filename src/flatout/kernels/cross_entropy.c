/* Cross entropy of rows of logits with class indices as targets, and its gradient. No matrix of
   probabilities is stored: the gradient of a row is written while the row is in the cache.

   With label smoothing e (C. Szegedy et al.: Rethinking the inception architecture. CVPR 2016,
   https://arxiv.org/abs/1512.00567) the loss of a row x with target t is

       log(sum(exp(x))) - (1 - e) x[t] - e mean(x)

   and its gradient softmax(x) - (1 - e) [c = t] - e / classes. */

#include "elementary.h"
#include "half.h"

enum { SPAN = 512 };

typedef struct {
    int64_t rows, classes;
    const void *logits;      /* rows x classes */
    const int64_t *targets;
    int64_t ignored;         /* rows with this target have no loss and no gradient */
    float smoothing;         /* label smoothing */
    float scale;             /* factor of the gradient */
    int32_t is_bf16;         /* whether logits and gradient are bfloat16, else float32 */
    int32_t threads;
} CrossEntropy;

static inline int64_t width_at(const CrossEntropy *c, int64_t column) {
    return c->classes - column < SPAN ? c->classes - column : SPAN;
}

/* The largest logit of a row, and the logarithm of the sum of e^(x - most). They are kept apart,
   because their sum would lose digits when the logits are large. */
typedef struct { float most, log_sum; } Normaliser;

static float row_loss(const CrossEntropy *c, int64_t row, int64_t target, Normaliser *by) {
    float span[SPAN], most = -INFINITY;
    double sum = 0.0, total = 0.0;
    for (int64_t column = 0; column < c->classes; column += SPAN) {
        int64_t width = width_at(c, column);
        load_span(span, c->logits, row * c->classes + column, width, c->is_bf16);
        float part = 0.0f;
        _Pragma("omp simd reduction(max:most) reduction(+:part)")
        for (int64_t i = 0; i < width; i++) {
            most = span[i] > most ? span[i] : most;
            part += span[i];
        }
        total += part;
    }
    for (int64_t column = 0; column < c->classes; column += SPAN) {
        int64_t width = width_at(c, column);
        load_span(span, c->logits, row * c->classes + column, width, c->is_bf16);
        float part = 0.0f;
        _Pragma("omp simd reduction(+:part)")
        for (int64_t i = 0; i < width; i++) part += exponential(span[i] - most);
        sum += part;
    }
    load_span(span, c->logits, row * c->classes + target, 1, c->is_bf16);
    *by = (Normaliser){most, (float)log(sum)};
    float loss = by->log_sum - (1.0f - c->smoothing) * (span[0] - most);
    if (c->smoothing > 0.0f)
        loss -= c->smoothing * (float)(total / (double)c->classes - (double)most);
    return loss;
}

static void row_gradient(const CrossEntropy *c, int64_t row, int64_t target, Normaliser by,
                         void *gradient) {
    float span[SPAN], everywhere = c->smoothing / (float)c->classes;
    for (int64_t column = 0; column < c->classes; column += SPAN) {
        int64_t width = width_at(c, column), at = row * c->classes + column;
        load_span(span, c->logits, at, width, c->is_bf16);
        for (int64_t i = 0; i < width; i++)
            span[i] = c->scale * (exponential(span[i] - by.most - by.log_sum) - everywhere);
        if (target >= column && target < column + width)
            span[target - column] -= c->scale * (1.0f - c->smoothing);
        store_span(gradient, at, span, width, c->is_bf16);
    }
}

/* Write the loss of each row, and, unless `gradient` is null, `scale` times its gradient. Returns
   how many targets are neither a class nor ignored; if there are any, the results are invalid. */
int64_t cross_entropy(const CrossEntropy *arguments, float *losses, void *gradient) {
    const CrossEntropy c = *arguments;
    int64_t wrong = 0;
    _Pragma("omp parallel for schedule(static, 8) num_threads(c.threads) if (c.threads > 1) reduction(+:wrong)")
    for (int64_t row = 0; row < c.rows; row++) {
        int64_t target = c.targets[row];
        if (target != c.ignored && (target < 0 || target >= c.classes)) {
            wrong++;
        } else if (target == c.ignored) {
            losses[row] = 0.0f;
            if (gradient) clear_span(gradient, row * c.classes, c.classes, c.is_bf16);
        } else {
            Normaliser by;
            losses[row] = row_loss(&c, row, target, &by);
            if (gradient) row_gradient(&c, row, target, by, gradient);
        }
    }
    return wrong;
}
