/* Attention, forward and backward, in two forms. The first computes mask, softmax and dropout of a
   block of scores, while torch computes the matmuls. The second computes whole heads that fit into
   the cache, including their matmuls.

   The probabilities are never stored. The backward pass recomputes them from the scores and the
   logarithm of each row's sum of exponentials: T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Re:
   FlashAttention. NeurIPS 2022, https://arxiv.org/abs/2205.14135, algorithms 2 and 4.

   Dropout keeps each element with probability keep / 2^16. The 16 random bits that decide depend
   only on the key and on the position of the element in the whole matrix. For whole heads, one bit
   per element is stored for the backward pass, because drawing takes longer than reading. */

#include "elementary.h"
#include "half.h"
#include "kept.h"
#include "matmul.h"

#ifdef _OPENMP
#include <omp.h>
static inline int thread_number(void) { return omp_get_thread_num(); }
#else
static inline int thread_number(void) { return 0; }
#endif

/* `keep` = ALWAYS means no dropout. Scores of whole heads are computed for PIECE rows at a time,
   and matmuls for PART rows, so that under a causal mask columns that no row sees can be
   skipped. */
enum { ALWAYS = 1 << 16, PART = 16, PIECE = 64 };

typedef struct {
    int64_t heads, rows, columns;    /* of this block */
    int64_t first_head, first_row;   /* the position of the block in the whole tensor */
    int64_t all_rows, all_columns;   /* of one head */
    int64_t heads_per_batch;
    const float *bias;               /* added to the scaled scores; may be null */
    int64_t bias_batch, bias_head, bias_row, bias_column; /* the strides of bias */
    uint64_t key;                    /* of the random numbers */
    uint16_t *kept;                  /* masks of all rows; null: they are drawn row by row */
    float scale;                     /* factor of the scores */
    uint32_t keep;                   /* probability of keeping, times ALWAYS */
    int32_t causal;                  /* whether row r sees only columns 0 to r */
    int32_t is_bf16;                 /* whether all but the scores is bfloat16, else float32 */
    int32_t threads;
} Block;

/* How many columns a row sees. */
static inline int64_t seen(const Block *b, int64_t row) {
    int64_t last = b->first_row + row + 1;
    return b->causal && last < b->columns ? last : b->columns;
}

/* scores = scores * scale + bias, for `count` columns of a row. */
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

static inline int64_t masks_in(const Block *b) { return (b->all_columns + MASK - 1) / MASK; }

/* Draw `count` masks of the whole matrix, from mask `first` on. */
static inline void draw(const Block *b, int64_t first, int64_t count, uint16_t *masks) {
    for (int64_t span = first / MASKS; span * MASKS < first + count; span++) {
        uint32_t bits[SPAN / 32];
        uint16_t drawn[MASKS];
        kept_bits(b->key, (uint64_t)span, b->keep, bits);
        memcpy(drawn, bits, sizeof drawn);
        for (int i = 0; i < MASKS; i++) {
            int64_t at = span * MASKS + i - first;
            if (at >= 0 && at < count) masks[at] = b->keep < ALWAYS ? drawn[i] : UINT16_MAX;
        }
    }
}

/* Write the dropout factors of at most SPAN columns from `column` on: 0, or 1 / the probability of
   keeping. */
static inline void dropout_span(const Block *b, float *factors, int64_t head, int64_t row,
                                int64_t column, int64_t width) {
    uint16_t drawn[MASKS];
    const uint16_t *masks = drawn;
    float kept = (float)ALWAYS / (float)b->keep;
    int64_t position = (b->first_head + head) * b->all_rows + b->first_row + row;
    int64_t first = position * masks_in(b) + column / MASK, count = (width + MASK - 1) / MASK;
    if (b->kept) masks = b->kept + first;
    else draw(b, first, count, drawn);
    factors_of(masks, count, kept, factors);
}

static inline int64_t padded(int64_t width) { return (width + TILE - 1) / TILE * TILE; }

static inline void fill_rest(float *row, int64_t from, int64_t to, float value) {
    for (int64_t i = from; i < to; i++) row[i] = value;
}

/* The column at which loops over a row of scores end: `count` rounded up to whole TILEs, which is
   faster, but at most `width`, the memory of the row. */
static inline int64_t end_of(int64_t count, int64_t width) {
    return padded(count) < width ? padded(count) : width;
}

/* The sum of the numbers in a lane, by adding halves. */
static inline float total(Lane x) {
    typedef float Half __attribute__((vector_size(2 * TILE)));
    typedef float Quarter __attribute__((vector_size(TILE)));
    Half halves[2];
    Quarter quarters[2];
    memcpy(halves, &x, sizeof x);
    halves[0] += halves[1];
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

/* Replace rows of scores, `width` numbers each, by their exponentials after dropout; columns that a
   row does not see become 0. `inverses` gets 1 / the sum of each row's exponentials, and
   `logarithms` the logarithm of that sum, infinity for a row that sees nothing. There are several
   loops over the rows, because the processor can then work on several rows at once. */
static void to_exponentials(const Block *b, float *restrict scores, int64_t width, int64_t head,
                            int64_t first, int64_t rows, float *restrict logarithms,
                            float *restrict inverses) {
    /* Without a bias, a positive scale does not change which score is largest, so it can be applied
       later, together with the subtraction of the largest score. */
    const int scales_first = b->bias || b->scale <= 0.0f;
    float tops[PIECE], sums[PIECE], scale = scales_first ? 1.0f : b->scale;
    for (int64_t row = 0; row < rows; row++) {
        float *s = scores + row * width, most = -INFINITY;
        int64_t count = seen(b, first + row), end = end_of(count, width);
        if (scales_first) scale_row(b, s, head, first + row, count);
        fill_rest(s, count, end, -INFINITY);
        _Pragma("omp simd reduction(max:most)")
        for (int64_t i = 0; i < end; i++) most = s[i] > most ? s[i] : most;
        tops[row] = most == -INFINITY ? 0.0f : most;
    }
    for (int64_t row = 0; row < rows; row++) {
        float *s = scores + row * width, top = tops[row];
        int64_t end = end_of(seen(b, first + row), width), i = 0;
        Lane sum = {0};
        for (; i + TILE <= end; i += TILE) {
            for (int k = 0; k < TILE; k++) s[i + k] = exponential((s[i + k] - top) * scale);
            sum += *(const Lane *)(s + i);
        }
        sums[row] = total(sum);
        for (; i < end; i++) sums[row] += s[i] = exponential((s[i] - top) * scale);
        fill_rest(s, end, width, 0.0f);
    }
    for (int64_t row = 0; row < rows; row++) {
        inverses[row] = sums[row] == 0.0f ? 0.0f : 1.0f / sums[row];
        logarithms[row] = sums[row] == 0.0f ? INFINITY : tops[row] * scale + logarithm(sums[row]);
    }
    if (b->keep == ALWAYS) return;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0, count = seen(b, first + row); column < count; column += SPAN) {
            int64_t wide = count - column < SPAN ? count - column : SPAN;
            float factors[SPAN], *s = scores + row * width + column;
            dropout_span(b, factors, head, first + row, column, wide);
            for (int64_t i = 0; i < wide; i++) s[i] *= factors[i];
        }
}

/* Replace a row of scores, with memory for `width` numbers, by its probabilities after dropout, and
   the gradients of these by the gradients of the scores. `logarithm` is that of the forward pass,
   and `product` the dot product of the row's output with its gradient. Columns that the row does
   not see become 0. */
static inline void to_gradients(const Block *b, float *restrict s, float *restrict gradients,
                                int64_t width, int64_t head, int64_t row, float logarithm,
                                float product) {
    int64_t count = seen(b, row), end = end_of(count, width);
    float scale = b->scale;
    scale_row(b, s, head, row, count);
    fill_rest(s, count, end, -INFINITY);
    for (int64_t column = 0; column < end; column += SPAN) {
        int64_t wide = end - column < SPAN ? end - column : SPAN;
        float factors[SPAN], *scores = s + column, *of = gradients + column;
        if (b->keep < ALWAYS)
            dropout_span(b, factors, head, row, column, wide);
        else
            for (int i = 0; i < SPAN; i++) factors[i] = 1.0f;
        for (int64_t i = 0; i < wide; i++) {
            float p = exponential(scores[i] - logarithm);
            scores[i] = p * factors[i];
            of[i] = p * (of[i] * factors[i] - product) * scale;
        }
    }
    fill_rest(s, count, width, 0.0f);
    fill_rest(gradients, count, width, 0.0f);
}

/* Write the probabilities after dropout to `dropped`, and the logarithm of the sum of each row's
   exponentials to `sums`, infinity for a row that sees nothing. `scores` is overwritten. */
void attention_forward(const Block *block, float *scores, void *dropped, float *sums) {
    const Block b = *block;
    _Pragma("omp parallel for schedule(static, 8) num_threads(b.threads) if (b.threads > 1)")
    for (int64_t index = 0; index < b.heads * b.rows; index++) {
        int64_t row = index % b.rows, at = index * b.columns, count = seen(&b, row);
        float inverse;
        to_exponentials(&b, scores + at, b.columns, index / b.rows, row, 1, sums + index, &inverse);
        for (int64_t i = 0; i < count; i++) scores[at + i] *= inverse;
        store_span(dropped, at, scores + at, b.columns, b.is_bf16);
    }
}

/* Write the probabilities after dropout to `dropped`, and the gradients of the scores to
   `score_gradients`. `sums` is that of the forward pass, `products` the dot product of each row's
   output with its gradient, and `gradients` the gradients of the probabilities after dropout.
   `scores` and `gradients` are overwritten. */
void attention_backward(const Block *block, float *scores, const float *sums,
                        const float *products, float *gradients, void *dropped,
                        void *score_gradients) {
    const Block b = *block;
    _Pragma("omp parallel for schedule(static, 8) num_threads(b.threads) if (b.threads > 1)")
    for (int64_t index = 0; index < b.heads * b.rows; index++) {
        int64_t at = index * b.columns;
        to_gradients(&b, scores + at, gradients + at, b.columns, index / b.rows, index % b.rows,
                     sums[index], products[index]);
        store_span(dropped, at, scores + at, b.columns, b.is_bf16);
        store_span(score_gradients, at, gradients + at, b.columns, b.is_bf16);
    }
}

/* sums[r] = the dot product of row r of a and row r of b, which have `width` elements. */
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

/* Write the dropout factors of all heads x rows x columns elements of a block. */
void dropout_factors(const Block *block, float *factors) {
    const Block b = *block;
    for (int64_t index = 0; index < b.heads * b.rows; index++)
        for (int64_t column = 0; column < b.columns; column += SPAN) {
            int64_t width = b.columns - column < SPAN ? b.columns - column : SPAN;
            float span[SPAN];
            dropout_span(&b, span, index / b.rows, index % b.rows, column, width);
            memcpy(factors + index * b.columns + column, span, (size_t)width * sizeof *span);
        }
}

/* Whole heads. In scratch memory, rows are padded with zeros to a multiple of TILE numbers.
   Everything there is float32, except the inputs of matmuls if the tensors are bfloat16 and the
   processor has AVX512-BF16. */

/* A matrix for each head, whose rows are contiguous. */
typedef struct {
    void *at;
    int64_t batch, head, row; /* strides, in elements */
    int64_t width;            /* elements of a row */
} Rows;

typedef struct {
    Block block;              /* all rows and columns of all heads */
    Rows query, key, value, output, of_output, of_query, of_key, of_value;
    float *sums;              /* heads x rows: the logarithm of the sum of each row of scores */
    float *scratch;           /* threads x heads_scratch() */
} Heads;

static inline int64_t start_of(const Block *b, const Rows *r, int64_t head) {
    return head / b->heads_per_batch * r->batch + head % b->heads_per_batch * r->head;
}

/* Whether rows `first` to `last` are finite, so that multiplying them with a probability or a
   gradient of 0 gives 0. */
static int are_finite(const Block *b, const Rows *r, int64_t head, int64_t first, int64_t last) {
    float sum = 0.0f;
    for (int64_t row = first; row < last; row++) {
        int64_t at = start_of(b, r, head) + row * r->row;
        for (int64_t i = 0; i < r->width; i++)
            sum += 0.0f * (b->is_bf16 ? from_bf16(((const uint16_t *)r->at)[at + i])
                                      : ((const float *)r->at)[at + i]);
    }
    return sum == 0.0f;
}

/* The block for one head, without columns at the end that the bias hides from all rows (padding),
   and without a bias that does nothing else. */
static Block seen_by(const Heads *h, int64_t head) {
    const Block *b = &h->block;
    Block own = *b;
    if (b->bias && b->bias_row == 0) {
        const float *bias = b->bias + head / b->heads_per_batch * b->bias_batch +
                            head % b->heads_per_batch * b->bias_head;
        while (own.columns > 0 && bias[(own.columns - 1) * b->bias_column] == -INFINITY)
            own.columns--;
        if (!are_finite(b, &h->key, head, own.columns, b->columns) ||
            !are_finite(b, &h->value, head, own.columns, b->columns) ||
            (own.columns == 0 && !are_finite(b, &h->query, head, 0, b->rows)))
            own.columns = b->columns;
        int64_t zeros = 0;
        while (zeros < own.columns && bias[zeros * b->bias_column] == 0.0f) zeros++;
        if (zeros == own.columns) own.bias = NULL;
    }
    return own;
}

static void scale_rows(float *rows, int64_t count, int64_t width, const float *factors) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < width; i++) rows[row * width + i] *= factors[row];
}

/* Draw the masks of a head. */
static void draw_head(const Block *b, int64_t head) {
    int64_t count = b->all_rows * masks_in(b);
    if (b->kept) draw(b, head * count, count, b->kept + head * count);
}

static void load_rows(const Block *b, const Rows *r, int64_t head, int64_t first, int64_t rows,
                      float *to) {
    int64_t stride = padded(r->width), start = start_of(b, r, head) + first * r->row;
    for (int64_t row = 0; row < rows; row++) {
        float *here = to + row * stride;
        load_span(here, r->at, start + row * r->row, r->width, b->is_bf16);
        for (int64_t i = r->width; i < stride; i++) here[i] = 0.0f;
    }
}

static void store_rows(const Block *b, const Rows *r, int64_t head, int64_t first, int64_t rows,
                       const float *from) {
    int64_t start = start_of(b, r, head) + first * r->row;
    for (int64_t row = 0; row < rows; row++)
        store_span(r->at, start + row * r->row, from + row * padded(r->width), r->width,
                   b->is_bf16);
}

/* `to` = the transpose of `from`[rows x width]; the rows of both are padded. */
static void transpose(const float *from, int64_t rows, int64_t width, float *to) {
    int64_t stride = padded(rows), from_stride = padded(width);
    for (int64_t column = 0; column < width; column++) {
        float *here = to + column * stride;
        for (int64_t row = 0; row < rows; row++) here[row] = from[row * from_stride + column];
        for (int64_t row = rows; row < stride; row++) here[row] = 0.0f;
    }
}

/* How many floats (or pairs, which have the same size) of scratch memory a thread needs: at least
   as many as each of the functions below allocates. */
int64_t heads_scratch(const Heads *h, int is_backward) {
    int64_t n = h->block.rows, m = h->block.columns;
    int64_t wide = padded(h->query.width), tall = padded(h->value.width), across = padded(m);
    if (!is_backward)
        return (m + 1) * (wide + tall) + wide * across + PIECE * (wide + tall + 2 * across);
    return 2 * (n + m + 1) * (wide + tall) + (wide + tall + 3 * n + 1) * across;
}

/* Allocate `count` floats from scratch memory. */
static float *allocate(float **memory, int64_t count) {
    float *here = *memory;
    *memory += count;
    return here;
}

/* out = left times transposed, for rows `first` to `first + rows` and the columns that they see.
   `left` and `out` begin with row `first`, and `depth` is the width of `left`. */
static void matmul_seen(const Block *b, float *out, const float *left, int64_t left_stride,
                        const float *transposed, int64_t depth, int64_t first, int64_t rows) {
    int64_t across = padded(b->columns);
    for (int64_t row = 0; row < rows; row += PART) {
        int64_t part = rows - row < PART ? rows - row : PART;
        float_matmul(out + row * across, across, left + row * left_stride, left_stride, 1,
                     transposed, across, part, depth, padded(seen(b, first + row + part - 1)));
    }
}

static void head_forward(const Heads *h, int64_t head, float *memory) {
    const Block own = seen_by(h, head), *b = &own;
    int64_t n = b->rows, m = b->columns, across = padded(m);
    int64_t wide = padded(h->query.width), tall = padded(h->value.width);
    float *key = allocate(&memory, m * wide), *value = allocate(&memory, m * tall);
    float *transposed = allocate(&memory, wide * across), *query = allocate(&memory, PIECE * wide);
    float *scores = allocate(&memory, PIECE * across), *output = allocate(&memory, PIECE * tall);
    float inverses[PIECE];
    load_rows(b, &h->key, head, 0, m, key);
    load_rows(b, &h->value, head, 0, m, value);
    transpose(key, m, h->key.width, transposed);
    for (int64_t first = 0; first < n; first += PIECE) {
        int64_t rows = n - first < PIECE ? n - first : PIECE;
        load_rows(b, &h->query, head, first, rows, query);
        matmul_seen(b, scores, query, wide, transposed, h->key.width, first, rows);
        to_exponentials(b, scores, across, head, first, rows, h->sums + head * n + first, inverses);
        for (int64_t row = 0; row < rows; row += PART) {
            int64_t part = rows - row < PART ? rows - row : PART;
            float_matmul(output + row * tall, tall, scores + row * across, across, 1, value, tall,
                          part, seen(b, first + row + part - 1), tall);
        }
        scale_rows(output, rows, tall, inverses);
        store_rows(b, &h->output, head, first, rows, output);
    }
}

static void head_backward(const Heads *h, int64_t head, float *memory) {
    const Block own = seen_by(h, head), *b = &own;
    int64_t n = b->rows, m = b->columns, all = h->block.columns, across = padded(m);
    int64_t wide = padded(h->query.width), tall = padded(h->value.width);
    float *query = allocate(&memory, n * wide), *key = allocate(&memory, m * wide);
    float *value = allocate(&memory, m * tall), *transposed = allocate(&memory, wide * across);
    float *transposed_value = allocate(&memory, tall * across);
    float *output = allocate(&memory, n * tall), *of_output = allocate(&memory, n * tall);
    float *scores = allocate(&memory, n * across), *gradients = allocate(&memory, n * across);
    float *of_query = allocate(&memory, n * wide), *of_key = allocate(&memory, all * wide);
    float *of_value = allocate(&memory, all * tall);
    load_rows(b, &h->query, head, 0, n, query);
    load_rows(b, &h->key, head, 0, m, key);
    load_rows(b, &h->value, head, 0, m, value);
    load_rows(b, &h->output, head, 0, n, output);
    load_rows(b, &h->of_output, head, 0, n, of_output);
    transpose(key, m, h->key.width, transposed);
    transpose(value, m, h->value.width, transposed_value);
    matmul_seen(b, scores, query, wide, transposed, h->key.width, 0, n);
    matmul_seen(b, gradients, of_output, tall, transposed_value, h->value.width, 0, n);
    for (int64_t row = 0; row < n; row++) {
        float *s = scores + row * across, *g = gradients + row * across, product = 0.0f;
        for (int64_t i = 0; i < tall; i++)
            product += output[row * tall + i] * of_output[row * tall + i];
        to_gradients(b, s, g, across, head, row, h->sums[head * n + row], product);
    }
    float_matmul(of_value, tall, scores, 1, across, of_output, tall, m, n, tall);
    for (int64_t row = 0; row < n; row += PART) {
        int64_t rows = n - row < PART ? n - row : PART;
        float_matmul(of_query + row * wide, wide, gradients + row * across, across, 1, key, wide,
                      rows, seen(b, row + rows - 1), wide);
    }
    float_matmul(of_key, wide, gradients, 1, across, query, wide, m, n, wide);
    fill_rest(of_key, m * wide, all * wide, 0.0f);
    fill_rest(of_value, m * tall, all * tall, 0.0f);
    store_rows(b, &h->of_query, head, 0, n, of_query);
    store_rows(b, &h->of_key, head, 0, all, of_key);
    store_rows(b, &h->of_value, head, 0, all, of_value);
}

#ifdef __AVX512BF16__

/* Matrices of pairs: words of two bfloat16 that are adjacent in a row ("row pairs") or in a column
   ("column pairs"). */

static inline int64_t pairs_in(int64_t count) { return (count + 1) / 2; }

/* Copy `count` numbers; inline, because a call of memcpy for each row is slower. */
static inline void copy_halves(uint16_t *restrict to, const uint16_t *restrict from,
                               int64_t count) {
    for (int64_t i = 0; i < count; i += 2 * TILE) {
        __mmask32 there = count - i < 2 * TILE ? (1u << (count - i)) - 1 : ~0u;
        _mm512_mask_storeu_epi16(to + i, there, _mm512_maskz_loadu_epi16(there, from + i));
    }
}

/* Load `rows` rows from `first` on as row pairs. */
static void load_row_pairs(const Block *b, const Rows *r, int64_t head, int64_t first,
                           int64_t rows, Pair *to) {
    const uint16_t *from = (const uint16_t *)r->at + start_of(b, r, head) + first * r->row;
    int64_t stride = pairs_in(r->width);
    for (int64_t row = 0; row < rows; row++) {
        to[(row + 1) * stride - 1] = 0;
        copy_halves((uint16_t *)(to + row * stride), from + row * r->row, r->width);
    }
}

/* Combine the numbers of one row with those of the row below it, which may be null. */
static inline void to_pairs(Pair *restrict to, const uint16_t *restrict low,
                            const uint16_t *restrict high, int64_t width) {
    for (int64_t i = 0; i < padded(width); i += TILE) {
        __mmask16 there = width - i < TILE ? (1u << (width - i)) - 1 : 0xFFFF;
        __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, low + i));
        if (high) {
            __m512i highs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, high + i));
            words = _mm512_or_si512(words, _mm512_slli_epi32(highs, 16));
        }
        _mm512_storeu_si512(to + i, words);
    }
}

/* Load all `rows` rows as column pairs. */
static void load_column_pairs(const Block *b, const Rows *r, int64_t head, int64_t rows,
                              Pair *to) {
    const uint16_t *from = (const uint16_t *)r->at + start_of(b, r, head);
    int64_t stride = padded(r->width);
    for (int64_t row = 0; row < rows; row += 2) {
        const uint16_t *low = from + row * r->row;
        to_pairs(to + row / 2 * stride, low, row + 1 < rows ? low + r->row : NULL, r->width);
    }
}

/* `to`[pairs x columns] = the transpose of `from`[columns x pairs]; the rows of `to` are padded. */
static void transpose_pairs(const Pair *from, int64_t columns, int64_t pairs, Pair *to) {
    int64_t stride = padded(columns);
    for (int64_t pair = 0; pair < pairs; pair++) {
        Pair *here = to + pair * stride;
        for (int64_t c = 0; c < columns; c++) here[c] = from[c * pairs + pair];
        memset(here + columns, 0, (size_t)(stride - columns) * sizeof *here);
    }
}

/* Convert padded rows of float32 to row pairs. Subnormal numbers become 0, as they do in the
   processor's bfloat16 matmul instruction in any case. */
static void to_row_pairs(const float *from, int64_t rows, int64_t columns, Pair *to) {
    for (int64_t i = 0; i < rows * columns; i += TILE)
        _mm256_storeu_si256((__m256i *)(to + i / 2),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

/* Convert padded rows of float32 to column pairs. */
static void to_column_pairs(const float *from, int64_t rows, int64_t columns, Pair *to) {
    for (int64_t row = 0; row < rows; row += 2) {
        const float *low = from + row * columns, *high = low + columns;
        Pair *here = to + row / 2 * columns;
        if (row + 1 < rows)
            for (int64_t i = 0; i < columns; i += TILE) {
                __m512i lows = _mm512_cvtepu16_epi32(
                    (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(low + i)));
                __m512i highs = _mm512_cvtepu16_epi32(
                    (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(high + i)));
                _mm512_storeu_si512(here + i,
                                    _mm512_or_si512(lows, _mm512_slli_epi32(highs, 16)));
            }
        else
            for (int64_t i = 0; i < columns; i++) here[i] = to_bf16(low[i]);
    }
}

static void matmul_seen_pairs(const Block *b, float *out, const Pair *left, int64_t pairs,
                       const Pair *transposed, int64_t first, int64_t rows) {
    int64_t across = padded(b->columns);
    for (int64_t row = 0; row < rows; row += PART) {
        int64_t part = rows - row < PART ? rows - row : PART;
        pairs_matmul(out + row * across, across, left + row * pairs, pairs, 1, transposed, across,
                      part, pairs, padded(seen(b, first + row + part - 1)));
    }
}

static void head_forward_pairs(const Heads *h, int64_t head, float *memory) {
    const Block own = seen_by(h, head), *b = &own;
    int64_t n = b->rows, m = b->columns, across = padded(m);
    int64_t wide = pairs_in(h->query.width), tall = padded(h->value.width);
    Pair *key = (Pair *)allocate(&memory, m * wide);
    Pair *transposed = (Pair *)allocate(&memory, wide * across);
    Pair *value = (Pair *)allocate(&memory, pairs_in(m) * tall);
    Pair *query = (Pair *)allocate(&memory, PIECE * wide);
    Pair *dropped = (Pair *)allocate(&memory, PIECE * across / 2);
    float *scores = allocate(&memory, PIECE * across), *output = allocate(&memory, PIECE * tall);
    float inverses[PIECE];
    load_row_pairs(b, &h->key, head, 0, m, key);
    load_column_pairs(b, &h->value, head, m, value);
    transpose_pairs(key, m, wide, transposed);
    for (int64_t first = 0; first < n; first += PIECE) {
        int64_t rows = n - first < PIECE ? n - first : PIECE;
        load_row_pairs(b, &h->query, head, first, rows, query);
        matmul_seen_pairs(b, scores, query, wide, transposed, first, rows);
        to_exponentials(b, scores, across, head, first, rows, h->sums + head * n + first, inverses);
        to_row_pairs(scores, rows, across, dropped);
        for (int64_t row = 0; row < rows; row += PART) {
            int64_t part = rows - row < PART ? rows - row : PART;
            pairs_matmul(output + row * tall, tall, dropped + row * across / 2, across / 2, 1,
                          value, tall, part, pairs_in(seen(b, first + row + part - 1)), tall);
        }
        scale_rows(output, rows, tall, inverses);
        store_rows(b, &h->output, head, first, rows, output);
    }
}

static void head_backward_pairs(const Heads *h, int64_t head, float *memory) {
    const Block own = seen_by(h, head), *b = &own;
    int64_t n = b->rows, m = b->columns, all = h->block.columns, across = padded(m);
    int64_t wide = padded(h->query.width), tall = padded(h->value.width);
    int64_t wide_pairs = pairs_in(h->query.width), tall_pairs = pairs_in(h->value.width);
    float *scores = allocate(&memory, n * across), *gradients = allocate(&memory, n * across);
    float *of_query = allocate(&memory, n * wide), *of_key = allocate(&memory, all * wide);
    float *of_value = allocate(&memory, all * tall);
    Pair *rows = (Pair *)allocate(&memory, (n > m ? n : m) * (wide + tall) / 2);
    Pair *transposed = (Pair *)allocate(&memory, (wide + tall) / 2 * across);
    Pair *columns = (Pair *)allocate(&memory, pairs_in(n > m ? n : m) * (wide + tall));
    Pair *transposed_value = transposed + wide_pairs * across;
    Pair *of_output = rows + n * wide_pairs;
    load_row_pairs(b, &h->key, head, 0, m, rows);
    transpose_pairs(rows, m, wide_pairs, transposed);
    load_row_pairs(b, &h->value, head, 0, m, rows);
    transpose_pairs(rows, m, tall_pairs, transposed_value);
    load_row_pairs(b, &h->query, head, 0, n, rows);
    load_row_pairs(b, &h->of_output, head, 0, n, of_output);
    matmul_seen_pairs(b, scores, rows, wide_pairs, transposed, 0, n);
    matmul_seen_pairs(b, gradients, of_output, tall_pairs, transposed_value, 0, n);
    float *output = allocate(&memory, tall), *exact = allocate(&memory, tall);
    for (int64_t row = 0; row < n; row++) {
        float *s = scores + row * across, *g = gradients + row * across, product = 0.0f;
        load_rows(b, &h->output, head, row, 1, output);
        load_rows(b, &h->of_output, head, row, 1, exact);
        for (int64_t i = 0; i < h->value.width; i++) product += output[i] * exact[i];
        to_gradients(b, s, g, across, head, row, h->sums[head * n + row], product);
    }
    Pair *left = (Pair *)allocate(&memory, pairs_in(n) * across);
    to_column_pairs(scores, n, across, left);
    load_column_pairs(b, &h->of_output, head, n, columns);
    pairs_matmul(of_value, tall, left, 1, across, columns, tall, m, pairs_in(n), tall);
    to_column_pairs(gradients, n, across, left);
    load_column_pairs(b, &h->query, head, n, columns);
    pairs_matmul(of_key, wide, left, 1, across, columns, wide, m, pairs_in(n), wide);
    to_row_pairs(gradients, n, across, left);
    load_column_pairs(b, &h->key, head, m, columns);
    for (int64_t row = 0; row < n; row += PART) {
        int64_t part = n - row < PART ? n - row : PART;
        pairs_matmul(of_query + row * wide, wide, left + row * across / 2, across / 2, 1, columns,
                      wide, part, pairs_in(seen(b, row + part - 1)), wide);
    }
    fill_rest(of_key, m * wide, all * wide, 0.0f);
    fill_rest(of_value, m * tall, all * tall, 0.0f);
    store_rows(b, &h->of_query, head, 0, n, of_query);
    store_rows(b, &h->of_key, head, 0, all, of_key);
    store_rows(b, &h->of_value, head, 0, all, of_value);
}

#else
#define head_forward_pairs head_forward
#define head_backward_pairs head_backward
#endif

/* Compute all heads, forward or backward. */
void attention_heads(const Heads *heads, int is_backward) {
    const Heads h = *heads;
    int64_t each = heads_scratch(&h, is_backward);
    _Pragma("omp parallel num_threads(h.block.threads) if (h.block.threads > 1)")
    {
        float *memory = h.scratch + thread_number() * each;
        _Pragma("omp for schedule(static)")
        for (int64_t head = 0; head < h.block.heads; head++) {
            if (is_backward) {
                (h.block.is_bf16 ? head_backward_pairs : head_backward)(&h, head, memory);
            } else {
                draw_head(&h.block, head);
                (h.block.is_bf16 ? head_forward_pairs : head_forward)(&h, head, memory);
            }
        }
    }
}
