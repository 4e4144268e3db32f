/* What lies between the matrix products of attention: mask, softmax and dropout of a block of
   scores, forward and backward.

   The backward pass computes the probabilities again from the scores and the logarithm of each
   row's sum, and the dropout mask again from the key, so neither is ever stored:
   T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Re: FlashAttention. NeurIPS 2022,
   https://arxiv.org/abs/2205.14135, algorithms 2 and 4.

   Each element is kept with probability keep / 2^16; the half word that decides it is a function of
   the key and of its place in the whole matrix alone. */

#include "elementary.h"
#include "half.h"
#include "philox.h"

enum { SPAN = 2 * BLOCK, ALWAYS = 1 << 16 };

typedef struct {
    int64_t heads, rows, columns;    /* of this block */
    int64_t first_head, first_row;   /* its place in the whole */
    int64_t all_rows, all_columns;   /* of one head */
    int64_t heads_per_batch;
    const float *bias;               /* added to the scaled scores, or null */
    int64_t bias_batch, bias_head, bias_row, bias_column; /* its strides */
    uint64_t key;
    float scale;                     /* of the scores */
    uint32_t keep;
    int32_t causal;                  /* row r sees columns 0 to r */
    int32_t is_bf16;                 /* what is not a score is bfloat16, else float32 */
    int32_t threads;
} Block;

static inline int64_t seen(const Block *b, int64_t row) {
    int64_t last = b->first_row + row + 1;
    return b->causal && last < b->columns ? last : b->columns;
}

/* scores = scores * scale + bias, of `count` columns of a row. */
static inline void scale_row(const Block *b, float *scores, int64_t head, int64_t row,
                             int64_t count) {
    for (int64_t i = 0; i < count; i++) scores[i] *= b->scale;
    if (b->bias) {
        int64_t h = b->first_head + head;
        const float *bias = b->bias + h / b->heads_per_batch * b->bias_batch +
                            h % b->heads_per_batch * b->bias_head +
                            (b->first_row + row) * b->bias_row;
        for (int64_t i = 0; i < count; i++) scores[i] += bias[i * b->bias_column];
    }
}

/* What SPAN columns from `column` on are multiplied with: 0, or 1 / the probability of keeping. */
static inline void dropout_span(const Block *b, float *factors, int64_t head, int64_t row,
                                int64_t column) {
    uint16_t halves[SPAN];
    uint32_t words[BLOCK];
    uint64_t spans = ((uint64_t)b->all_columns + SPAN - 1) / SPAN;
    uint64_t place = (uint64_t)((b->first_head + head) * b->all_rows + b->first_row + row);
    float kept = (float)ALWAYS / (float)b->keep;
    philox(b->key, place * spans + (uint64_t)(column / SPAN), words);
    memcpy(halves, words, sizeof halves);
    for (int i = 0; i < SPAN; i++) factors[i] = halves[i] < b->keep ? kept : 0.0f;
}

/* Scores to dropped probabilities; `scores` is overwritten. `sums` gets the logarithm of the sum
   of each row, infinity where nothing is seen. */
void attention_forward(const Block *block, float *scores, void *dropped, float *sums) {
    const Block b = *block;
    _Pragma("omp parallel for schedule(static, 8) num_threads(b.threads) if (b.threads > 1)")
    for (int64_t index = 0; index < b.heads * b.rows; index++) {
        int64_t head = index / b.rows, row = index % b.rows, at = index * b.columns;
        int64_t count = seen(&b, row);
        float *s = scores + at, most = -INFINITY, sum = 0.0f;
        scale_row(&b, s, head, row, count);
        _Pragma("omp simd reduction(max:most)")
        for (int64_t i = 0; i < count; i++) most = s[i] > most ? s[i] : most;
        if (most == -INFINITY) most = 0.0f;
        _Pragma("omp simd reduction(+:sum)")
        for (int64_t i = 0; i < count; i++) {
            s[i] = exponential(s[i] - most);
            sum += s[i];
        }
        float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        sums[index] = sum == 0.0f ? INFINITY : most + logf(sum);
        for (int64_t column = 0; column < count; column += SPAN) {
            int64_t width = count - column < SPAN ? count - column : SPAN;
            float factors[SPAN];
            if (b.keep < ALWAYS) {
                dropout_span(&b, factors, head, row, column);
                for (int64_t i = 0; i < width; i++) s[column + i] *= factors[i] * inverse;
            } else {
                for (int64_t i = 0; i < width; i++) s[column + i] *= inverse;
            }
            store_span(dropped, at + column, s + column, width, b.is_bf16);
        }
        clear_span(dropped, at + count, b.columns - count, b.is_bf16);
    }
}

/* Scores, the `sums` of the forward pass, the gradient of the dropped probabilities and `means`,
   for each row the product of the output and its gradient, to the dropped probabilities and the
   gradient of the scores. `scores` is overwritten. */
void attention_backward(const Block *block, float *scores, const float *sums, const float *means,
                        const float *gradients, void *dropped, void *score_gradients) {
    const Block b = *block;
    _Pragma("omp parallel for schedule(static, 8) num_threads(b.threads) if (b.threads > 1)")
    for (int64_t index = 0; index < b.heads * b.rows; index++) {
        int64_t head = index / b.rows, row = index % b.rows, at = index * b.columns;
        int64_t count = seen(&b, row);
        float *s = scores + at, logarithm = sums[index], mean = means[index];
        scale_row(&b, s, head, row, count);
        for (int64_t column = 0; column < count; column += SPAN) {
            int64_t width = count - column < SPAN ? count - column : SPAN;
            float factors[SPAN], gradient[SPAN], kept[SPAN];
            if (b.keep < ALWAYS)
                dropout_span(&b, factors, head, row, column);
            else
                for (int i = 0; i < SPAN; i++) factors[i] = 1.0f;
            for (int64_t i = 0; i < width; i++) {
                float p = exponential(s[column + i] - logarithm);
                kept[i] = p * factors[i];
                gradient[i] = p * (gradients[at + column + i] * factors[i] - mean) * b.scale;
            }
            store_span(dropped, at + column, kept, width, b.is_bf16);
            store_span(score_gradients, at + column, gradient, width, b.is_bf16);
        }
        clear_span(dropped, at + count, b.columns - count, b.is_bf16);
        clear_span(score_gradients, at + count, b.columns - count, b.is_bf16);
    }
}

/* sums[r] = the product of row r of a and of b, `width` wide. */
void row_products(const void *a, const void *b, float *sums, int64_t rows, int64_t width,
                  int is_bf16, int threads) {
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
    for (int64_t row = 0; row < rows; row++) {
        float sum = 0.0f, x[BLOCK], y[BLOCK];
        for (int64_t column = 0; column < width; column += BLOCK) {
            int64_t count = width - column < BLOCK ? width - column : BLOCK;
            load_span(x, a, row * width + column, count, is_bf16);
            load_span(y, b, row * width + column, count, is_bf16);
            _Pragma("omp simd reduction(+:sum)")
            for (int64_t i = 0; i < count; i++) sum += x[i] * y[i];
        }
        sums[row] = sum;
    }
}

/* What each element of `heads` * `rows` * `columns` is multiplied with. */
void dropout_factors(const Block *block, float *factors) {
    const Block b = *block;
    for (int64_t index = 0; index < b.heads * b.rows; index++)
        for (int64_t column = 0; column < b.columns; column += SPAN) {
            int64_t width = b.columns - column < SPAN ? b.columns - column : SPAN;
            float span[SPAN];
            dropout_span(&b, span, index / b.rows, index % b.rows, column);
            memcpy(factors + index * b.columns + column, span, (size_t)width * sizeof *span);
        }
}
