/* What lies between the matrix products of attention: mask, softmax and dropout of a block of
   scores, forward and backward; and whole heads that fit into the cache, products and all.

   The backward pass computes the probabilities again from the scores and the logarithm of each
   row's sum, so they are never stored:
   T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Re: FlashAttention. NeurIPS 2022,
   https://arxiv.org/abs/2205.14135, algorithms 2 and 4.

   Each element is kept with probability keep / 2^16; the half word that decides it is a function of
   the key and of its place in the whole matrix alone. Of whole heads, which elements were kept is
   stored, a bit each: drawing takes longer than reading. */

#include "elementary.h"
#include "half.h"
#include "kept.h"
#include "products.h"

#ifdef _OPENMP
#include <omp.h>
static inline int thread_number(void) { return omp_get_thread_num(); }
#else
static inline int thread_number(void) { return 0; }
#endif

enum { ALWAYS = 1 << 16, PART = 16, PIECE = 64 };

typedef struct {
    int64_t heads, rows, columns;    /* of this block */
    int64_t first_head, first_row;   /* its place in the whole */
    int64_t all_rows, all_columns;   /* of one head */
    int64_t heads_per_batch;
    const float *bias;               /* added to the scaled scores, or null */
    int64_t bias_batch, bias_head, bias_row, bias_column; /* its strides */
    uint64_t key;
    uint16_t *kept;                  /* bits of all rows; null: they are drawn row by row */
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

static inline int64_t masks_in(const Block *b) { return (b->all_columns + MASK - 1) / MASK; }

/* `count` masks of the whole matrix, from number `first` on. */
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

/* What `width` columns from `column` on, SPAN at most, are multiplied with: 0, or 1 / the
   probability of keeping. */
static inline void dropout_span(const Block *b, float *factors, int64_t head, int64_t row,
                                int64_t column, int64_t width) {
    uint16_t drawn[MASKS];
    const uint16_t *masks = drawn;
    float kept = (float)ALWAYS / (float)b->keep;
    int64_t place = (b->first_head + head) * b->all_rows + b->first_row + row;
    int64_t first = place * masks_in(b) + column / MASK, count = (width + MASK - 1) / MASK;
    if (b->kept) masks = b->kept + first;
    else draw(b, first, count, drawn);
    factors_of(masks, count, kept, factors);
}

static inline int64_t padded(int64_t width) { return (width + TILE - 1) / TILE * TILE; }

static inline void fill_rest(float *row, int64_t from, int64_t to, float with) {
    for (int64_t i = from; i < to; i++) row[i] = with;
}

/* Where to end with a row of scores that has room for `width`: whole TILEs, for the sake of speed. */
static inline int64_t end_of(int64_t count, int64_t width) {
    return padded(count) < width ? padded(count) : width;
}

/* The sum of the numbers in a lane, half upon half. */
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

/* Rows of scores, `width` numbers each, to what is their dropped probabilities times the sum of the
   exponentials; what is not seen becomes 0. `inverses` gets 1 / the sums, `logarithms` theirs,
   infinity where nothing is seen. Each loop over rows does what the next rows need not wait for. */
static void to_exponentials(const Block *b, float *restrict scores, int64_t width, int64_t head,
                            int64_t first, int64_t rows, float *restrict logarithms,
                            float *restrict inverses) {
    const int is_apart = b->bias || b->scale <= 0.0f; /* else scaling does not change the order */
    float tops[PIECE], sums[PIECE], scale = is_apart ? 1.0f : b->scale;
    for (int64_t row = 0; row < rows; row++) {
        float *s = scores + row * width, most = -INFINITY;
        int64_t count = seen(b, first + row), end = end_of(count, width);
        if (is_apart) scale_row(b, s, head, first + row, count);
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

/* A row of scores, with room for `width`, to its dropped probabilities, and the gradients of these to
   those of the scores, by what the forward pass has returned and the product of the output with its
   gradient. What is not seen becomes 0. */
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

/* Scores to dropped probabilities; `scores` is overwritten. `sums` gets the logarithm of the sum
   of each row, infinity where nothing is seen. */
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

/* Scores, the `sums` of the forward pass, the gradient of the dropped probabilities and `means`,
   for each row the product of the output and its gradient, to the dropped probabilities and the
   gradient of the scores. `scores` and `gradients` are overwritten. */
void attention_backward(const Block *block, float *scores, const float *sums, const float *means,
                        float *gradients, void *dropped, void *score_gradients) {
    const Block b = *block;
    _Pragma("omp parallel for schedule(static, 8) num_threads(b.threads) if (b.threads > 1)")
    for (int64_t index = 0; index < b.heads * b.rows; index++) {
        int64_t at = index * b.columns;
        to_gradients(&b, scores + at, gradients + at, b.columns, index / b.rows, index % b.rows,
                     sums[index], means[index]);
        store_span(dropped, at, scores + at, b.columns, b.is_bf16);
        store_span(score_gradients, at, gradients + at, b.columns, b.is_bf16);
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
            dropout_span(&b, span, index / b.rows, index % b.rows, column, width);
            memcpy(factors + index * b.columns + column, span, (size_t)width * sizeof *span);
        }
}

/* Whole heads. Rows are of a multiple of TILE numbers, with zeros at the end. All is float32 in here,
   but the factors of products where tensors are bfloat16 and the processor multiplies that. */

/* Rows of a matrix for each head; what lies in a row is adjacent. */
typedef struct {
    void *at;
    int64_t batch, head, row; /* its strides, in elements */
    int64_t width;
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

/* Whether what would be multiplied with a probability or a gradient of 0 stays 0. */
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

/* The block as it is for one head, without columns at the end that no row sees, padding, and without
   a bias that does nothing else. */
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

/* Draw which probabilities of a head are kept. */
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

/* `to` = the transpose of `from`[rows x width], which is padded; its own rows are as well. */
static void transpose(const float *from, int64_t rows, int64_t width, float *to) {
    int64_t stride = padded(rows), from_stride = padded(width);
    for (int64_t column = 0; column < width; column++) {
        float *here = to + column * stride;
        for (int64_t row = 0; row < rows; row++) here[row] = from[row * from_stride + column];
        for (int64_t row = rows; row < stride; row++) here[row] = 0.0f;
    }
}

/* How many floats, or pairs, a thread needs: no less than what each of the functions below takes.
   Forward, scores are there for PIECE rows at a time. */
int64_t heads_scratch(const Heads *h, int backwards) {
    int64_t n = h->block.rows, m = h->block.columns;
    int64_t wide = padded(h->query.width), tall = padded(h->value.width), across = padded(m);
    if (!backwards)
        return (m + 1) * (wide + tall) + wide * across + PIECE * (wide + tall + 2 * across);
    return 2 * (n + m + 1) * (wide + tall) + (wide + tall + 3 * n + 1) * across;
}

static float *taken(float **memory, int64_t count) {
    float *here = *memory;
    *memory += count;
    return here;
}

/* Rows `first` to `first + rows` of left turned, as far as they see columns; `depth` is the width of
   `left`, which begins with row `first`, as does `out`. */
static void seen_products(const Block *b, float *out, const float *left, int64_t left_stride,
                          const float *turned, int64_t depth, int64_t first, int64_t rows) {
    int64_t across = padded(b->columns);
    for (int64_t row = 0; row < rows; row += PART) {
        int64_t part = rows - row < PART ? rows - row : PART;
        float_product(out + row * across, across, left + row * left_stride, left_stride, 1, turned,
                      across, part, depth, padded(seen(b, first + row + part - 1)));
    }
}

static void head_forward(const Heads *h, int64_t head, float *memory) {
    const Block own = seen_by(h, head), *b = &own;
    int64_t n = b->rows, m = b->columns, across = padded(m);
    int64_t wide = padded(h->query.width), tall = padded(h->value.width);
    float *key = taken(&memory, m * wide), *value = taken(&memory, m * tall);
    float *turned = taken(&memory, wide * across), *query = taken(&memory, PIECE * wide);
    float *scores = taken(&memory, PIECE * across), *output = taken(&memory, PIECE * tall);
    float inverses[PIECE];
    load_rows(b, &h->key, head, 0, m, key);
    load_rows(b, &h->value, head, 0, m, value);
    transpose(key, m, h->key.width, turned);
    for (int64_t first = 0; first < n; first += PIECE) {
        int64_t rows = n - first < PIECE ? n - first : PIECE;
        load_rows(b, &h->query, head, first, rows, query);
        seen_products(b, scores, query, wide, turned, h->key.width, first, rows);
        to_exponentials(b, scores, across, head, first, rows, h->sums + head * n + first, inverses);
        for (int64_t row = 0; row < rows; row += PART) {
            int64_t part = rows - row < PART ? rows - row : PART;
            float_product(output + row * tall, tall, scores + row * across, across, 1, value, tall,
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
    float *query = taken(&memory, n * wide), *key = taken(&memory, m * wide);
    float *value = taken(&memory, m * tall), *turned = taken(&memory, wide * across);
    float *turned_value = taken(&memory, tall * across);
    float *output = taken(&memory, n * tall), *of_output = taken(&memory, n * tall);
    float *scores = taken(&memory, n * across), *gradients = taken(&memory, n * across);
    float *of_query = taken(&memory, n * wide), *of_key = taken(&memory, all * wide);
    float *of_value = taken(&memory, all * tall);
    load_rows(b, &h->query, head, 0, n, query);
    load_rows(b, &h->key, head, 0, m, key);
    load_rows(b, &h->value, head, 0, m, value);
    load_rows(b, &h->output, head, 0, n, output);
    load_rows(b, &h->of_output, head, 0, n, of_output);
    transpose(key, m, h->key.width, turned);
    transpose(value, m, h->value.width, turned_value);
    seen_products(b, scores, query, wide, turned, h->key.width, 0, n);
    seen_products(b, gradients, of_output, tall, turned_value, h->value.width, 0, n);
    for (int64_t row = 0; row < n; row++) {
        float *s = scores + row * across, *g = gradients + row * across, together = 0.0f;
        for (int64_t i = 0; i < tall; i++)
            together += output[row * tall + i] * of_output[row * tall + i];
        to_gradients(b, s, g, across, head, row, h->sums[head * n + row], together);
    }
    float_product(of_value, tall, scores, 1, across, of_output, tall, m, n, tall);
    for (int64_t row = 0; row < n; row += PART) {
        int64_t rows = n - row < PART ? n - row : PART;
        float_product(of_query + row * wide, wide, gradients + row * across, across, 1, key, wide,
                      rows, seen(b, row + rows - 1), wide);
    }
    float_product(of_key, wide, gradients, 1, across, query, wide, m, n, wide);
    fill_rest(of_key, m * wide, all * wide, 0.0f);
    fill_rest(of_value, m * tall, all * tall, 0.0f);
    store_rows(b, &h->of_query, head, 0, n, of_query);
    store_rows(b, &h->of_key, head, 0, all, of_key);
    store_rows(b, &h->of_value, head, 0, all, of_value);
}

#ifdef __AVX512BF16__

/* Matrices of pairs: words of two bfloat16 that are neighbours in a row, or in a column. */

static inline int64_t pairs_in(int64_t count) { return (count + 1) / 2; }

/* `count` numbers, without a call for each row. */
static inline void copy_halves(uint16_t *restrict to, const uint16_t *restrict from,
                               int64_t count) {
    for (int64_t i = 0; i < count; i += 2 * TILE) {
        __mmask32 there = count - i < 2 * TILE ? (1u << (count - i)) - 1 : ~0u;
        _mm512_mask_storeu_epi16(to + i, there, _mm512_maskz_loadu_epi16(there, from + i));
    }
}

/* `rows` rows from `first` on, pairs of neighbours in a row. */
static void load_row_pairs(const Block *b, const Rows *r, int64_t head, int64_t first,
                           int64_t rows, Pair *to) {
    const uint16_t *from = (const uint16_t *)r->at + start_of(b, r, head) + first * r->row;
    int64_t stride = pairs_in(r->width);
    for (int64_t row = 0; row < rows; row++) {
        to[(row + 1) * stride - 1] = 0;
        copy_halves((uint16_t *)(to + row * stride), from + row * r->row, r->width);
    }
}

/* Words of numbers of one row and those below them, of which there may be none. */
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

/* All `rows` rows, pairs of neighbours in a column. */
static void load_column_pairs(const Block *b, const Rows *r, int64_t head, int64_t rows,
                              Pair *to) {
    const uint16_t *from = (const uint16_t *)r->at + start_of(b, r, head);
    int64_t stride = padded(r->width);
    for (int64_t row = 0; row < rows; row += 2) {
        const uint16_t *low = from + row * r->row;
        to_pairs(to + row / 2 * stride, low, row + 1 < rows ? low + r->row : NULL, r->width);
    }
}

/* `to`[pairs x columns] of `from`[columns x pairs]; its rows are padded. */
static void transpose_pairs(const Pair *from, int64_t columns, int64_t pairs, Pair *to) {
    int64_t stride = padded(columns);
    for (int64_t pair = 0; pair < pairs; pair++) {
        Pair *here = to + pair * stride;
        for (int64_t c = 0; c < columns; c++) here[c] = from[c * pairs + pair];
        memset(here + columns, 0, (size_t)(stride - columns) * sizeof *here);
    }
}

/* Rows of float32, of a multiple of TILE numbers, to pairs of neighbours in a row. Subnormal numbers
   become 0, as the processor takes them in products anyway. */
static void to_row_pairs(const float *from, int64_t rows, int64_t columns, Pair *to) {
    for (int64_t i = 0; i < rows * columns; i += TILE)
        _mm256_storeu_si256((__m256i *)(to + i / 2),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

/* The same, to pairs of neighbours in a column. */
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

static void seen_pairs(const Block *b, float *out, const Pair *left, int64_t pairs,
                       const Pair *turned, int64_t first, int64_t rows) {
    int64_t across = padded(b->columns);
    for (int64_t row = 0; row < rows; row += PART) {
        int64_t part = rows - row < PART ? rows - row : PART;
        pairs_product(out + row * across, across, left + row * pairs, pairs, 1, turned, across,
                      part, pairs, padded(seen(b, first + row + part - 1)));
    }
}

static void head_forward_pairs(const Heads *h, int64_t head, float *memory) {
    const Block own = seen_by(h, head), *b = &own;
    int64_t n = b->rows, m = b->columns, across = padded(m);
    int64_t wide = pairs_in(h->query.width), tall = padded(h->value.width);
    Pair *key = (Pair *)taken(&memory, m * wide);
    Pair *turned = (Pair *)taken(&memory, wide * across);
    Pair *value = (Pair *)taken(&memory, pairs_in(m) * tall);
    Pair *query = (Pair *)taken(&memory, PIECE * wide);
    Pair *dropped = (Pair *)taken(&memory, PIECE * across / 2);
    float *scores = taken(&memory, PIECE * across), *output = taken(&memory, PIECE * tall);
    float inverses[PIECE];
    load_row_pairs(b, &h->key, head, 0, m, key);
    load_column_pairs(b, &h->value, head, m, value);
    transpose_pairs(key, m, wide, turned);
    for (int64_t first = 0; first < n; first += PIECE) {
        int64_t rows = n - first < PIECE ? n - first : PIECE;
        load_row_pairs(b, &h->query, head, first, rows, query);
        seen_pairs(b, scores, query, wide, turned, first, rows);
        to_exponentials(b, scores, across, head, first, rows, h->sums + head * n + first, inverses);
        to_row_pairs(scores, rows, across, dropped);
        for (int64_t row = 0; row < rows; row += PART) {
            int64_t part = rows - row < PART ? rows - row : PART;
            pairs_product(output + row * tall, tall, dropped + row * across / 2, across / 2, 1,
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
    float *scores = taken(&memory, n * across), *gradients = taken(&memory, n * across);
    float *of_query = taken(&memory, n * wide), *of_key = taken(&memory, all * wide);
    float *of_value = taken(&memory, all * tall);
    Pair *rows = (Pair *)taken(&memory, (n > m ? n : m) * (wide + tall) / 2);
    Pair *turned = (Pair *)taken(&memory, (wide + tall) / 2 * across);
    Pair *columns = (Pair *)taken(&memory, pairs_in(n > m ? n : m) * (wide + tall));
    Pair *turned_value = turned + wide_pairs * across;
    Pair *of_output = rows + n * wide_pairs;
    load_row_pairs(b, &h->key, head, 0, m, rows);
    transpose_pairs(rows, m, wide_pairs, turned);
    load_row_pairs(b, &h->value, head, 0, m, rows);
    transpose_pairs(rows, m, tall_pairs, turned_value);
    load_row_pairs(b, &h->query, head, 0, n, rows);
    load_row_pairs(b, &h->of_output, head, 0, n, of_output);
    seen_pairs(b, scores, rows, wide_pairs, turned, 0, n);
    seen_pairs(b, gradients, of_output, tall_pairs, turned_value, 0, n);
    float *output = taken(&memory, tall), *exact = taken(&memory, tall);
    for (int64_t row = 0; row < n; row++) {
        float *s = scores + row * across, *g = gradients + row * across, together = 0.0f;
        load_rows(b, &h->output, head, row, 1, output);
        load_rows(b, &h->of_output, head, row, 1, exact);
        for (int64_t i = 0; i < h->value.width; i++) together += output[i] * exact[i];
        to_gradients(b, s, g, across, head, row, h->sums[head * n + row], together);
    }
    Pair *left = (Pair *)taken(&memory, pairs_in(n) * across);
    to_column_pairs(scores, n, across, left);
    load_column_pairs(b, &h->of_output, head, n, columns);
    pairs_product(of_value, tall, left, 1, across, columns, tall, m, pairs_in(n), tall);
    to_column_pairs(gradients, n, across, left);
    load_column_pairs(b, &h->query, head, n, columns);
    pairs_product(of_key, wide, left, 1, across, columns, wide, m, pairs_in(n), wide);
    to_row_pairs(gradients, n, across, left);
    load_column_pairs(b, &h->key, head, m, columns);
    for (int64_t row = 0; row < n; row += PART) {
        int64_t part = n - row < PART ? n - row : PART;
        pairs_product(of_query + row * wide, wide, left + row * across / 2, across / 2, 1, columns,
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

/* All heads, forward or backward. */
void attention_heads(const Heads *heads, int backwards) {
    const Heads h = *heads;
    int64_t each = heads_scratch(&h, backwards);
    _Pragma("omp parallel num_threads(h.block.threads) if (h.block.threads > 1)")
    {
        float *memory = h.scratch + thread_number() * each;
        _Pragma("omp for schedule(static)")
        for (int64_t head = 0; head < h.block.heads; head++) {
            if (backwards) {
                (h.block.is_bf16 ? head_backward_pairs : head_backward)(&h, head, memory);
            } else {
                draw_head(&h.block, head);
                (h.block.is_bf16 ? head_forward_pairs : head_forward)(&h, head, memory);
            }
        }
    }
}
