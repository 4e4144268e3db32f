/* One direction of one layer of a gated recurrent unit, all time steps in one call.

   K. Cho et al.: Learning phrase representations using RNN encoder-decoder for statistical machine
   translation. EMNLP 2014, https://arxiv.org/abs/1406.1078, in the form of torch.nn.GRU:

       r = sigmoid(i_r + h_r), z = sigmoid(i_z + h_z), n = tanh(i_n + r h_n),
       state' = (state - n) z + n

   where i are the matmuls of the input, which the caller has computed, and h the matmuls of the
   state with `weight`, plus `bias`. The rows of a batch are independent, so each thread takes some
   of them through all time steps without waiting for the others. */

#include "elementary.h"

enum { ROWS = 4, COLUMNS = 64 };

typedef struct {
    int64_t steps, batch, width;
    const float *inputs;     /* steps x batch x 3 width: i_r, i_z, i_n */
    const float *first;      /* batch x width: the state before the first step */
    const float *weight;     /* 3 width x width */
    const float *transposed; /* the transpose of weight, width x 3 width; for the forward pass */
    const float *bias;       /* 3 width, or null */
    float *states;           /* steps x batch x width */
    float *kept;             /* steps x batch x 4 width: r, z, n, h_n, for the backward pass */
    int32_t reverse;         /* whether to go from the last step to the first */
    int32_t threads;
} Layer;

/* out[rows x columns] += left[rows x depth] * right[depth x columns]; the rows of `out` and `left`
   are `out_stride` and `left_stride` apart. */
static void add_matmul(float *restrict out, int64_t out_stride, const float *restrict left,
                       int64_t left_stride, const float *restrict right, int64_t rows,
                       int64_t depth, int64_t columns) {
    for (int64_t column = 0; column < columns; column += COLUMNS) {
        int64_t width = columns - column < COLUMNS ? columns - column : COLUMNS;
        for (int64_t row = 0; row < rows; row += ROWS) {
            int64_t height = rows - row < ROWS ? rows - row : ROWS;
            float sums[ROWS][COLUMNS] = {{0.0f}};
            if (height == ROWS && width == COLUMNS) {
                for (int64_t k = 0; k < depth; k++)
                    for (int r = 0; r < ROWS; r++)
                        for (int c = 0; c < COLUMNS; c++)
                            sums[r][c] += left[(row + r) * left_stride + k] *
                                          right[k * columns + column + c];
            } else {
                for (int64_t k = 0; k < depth; k++)
                    for (int64_t r = 0; r < height; r++)
                        for (int64_t c = 0; c < width; c++)
                            sums[r][c] += left[(row + r) * left_stride + k] *
                                          right[k * columns + column + c];
            }
            for (int64_t r = 0; r < height; r++)
                for (int64_t c = 0; c < width; c++)
                    out[(row + r) * out_stride + column + c] += sums[r][c];
        }
    }
}

static inline const float *state_before(const Layer *l, int64_t step) {
    int64_t before = l->reverse ? step + 1 : step - 1;
    return before < 0 || before >= l->steps ? l->first : l->states + before * l->batch * l->width;
}

static void forward_rows(const Layer *l, int64_t from, int64_t to, float *gates) {
    int64_t width = l->width, all = 3 * width;
    for (int64_t index = 0; index < l->steps; index++) {
        int64_t step = l->reverse ? l->steps - 1 - index : index;
        const float *before = state_before(l, step);
        for (int64_t row = from; row < to; row++) {
            float *g = gates + (row - from) * all;
            if (l->bias)
                memcpy(g, l->bias, (size_t)all * sizeof *g);
            else
                memset(g, 0, (size_t)all * sizeof *g);
        }
        add_matmul(gates, all, before + from * width, width, l->transposed, to - from, width, all);
        for (int64_t row = from; row < to; row++) {
            const float *restrict g = gates + (row - from) * all;
            const float *restrict i = l->inputs + (step * l->batch + row) * all;
            const float *restrict h = before + row * width;
            float *restrict out = l->states + (step * l->batch + row) * width;
            float *restrict kept = l->kept + (step * l->batch + row) * 4 * width;
            _Pragma("omp simd")
            for (int64_t c = 0; c < width; c++) {
                float r = sigmoid(i[c] + g[c]);
                float z = sigmoid(i[width + c] + g[width + c]);
                float n = hyperbolic_tangent(i[2 * width + c] + r * g[2 * width + c]);
                out[c] = (h[c] - n) * z + n;
                kept[c] = r;
                kept[width + c] = z;
                kept[2 * width + c] = n;
                kept[3 * width + c] = g[2 * width + c];
            }
        }
    }
}

/* Write `states` and `kept`. `scratch` has batch x 3 width elements. */
void gru_forward(const Layer *layer, float *scratch) {
    const Layer l = *layer;
    int64_t count = l.threads < l.batch ? l.threads : l.batch;
    _Pragma("omp parallel for schedule(static) num_threads(l.threads) if (count > 1)")
    for (int64_t part = 0; part < count; part++) {
        int64_t from = l.batch * part / count, to = l.batch * (part + 1) / count;
        forward_rows(&l, from, to, scratch + from * 3 * l.width);
    }
}

static void backward_rows(const Layer *l, int64_t from, int64_t to, const float *gradients,
                          float *of_state, float *of_inputs, float *of_matmuls) {
    int64_t width = l->width, all = 3 * width;
    for (int64_t index = l->steps - 1; index >= 0; index--) {
        int64_t step = l->reverse ? l->steps - 1 - index : index;
        const float *before = state_before(l, step);
        for (int64_t row = from; row < to; row++) {
            int64_t at = step * l->batch + row;
            const float *restrict kept = l->kept + at * 4 * width;
            const float *restrict h = before + row * width;
            const float *restrict g = gradients + at * width;
            float *restrict s = of_state + row * width;
            float *restrict i = of_inputs + at * all;
            float *restrict p = of_matmuls + at * all;
            _Pragma("omp simd")
            for (int64_t c = 0; c < width; c++) {
                float r = kept[c], z = kept[width + c], n = kept[2 * width + c];
                float d = g[c] + s[c];
                float of_n = d * (1.0f - z) * (1.0f - n * n);
                float of_z = d * (h[c] - n) * z * (1.0f - z);
                float of_r = of_n * kept[3 * width + c] * r * (1.0f - r);
                i[c] = p[c] = of_r;
                i[width + c] = p[width + c] = of_z;
                i[2 * width + c] = of_n;
                p[2 * width + c] = of_n * r;
                s[c] = d * z;
            }
        }
        add_matmul(of_state + from * width, width, of_matmuls + (step * l->batch + from) * all,
                    all, l->weight, to - from, all, width);
    }
}

/* Compute the gradients of the inputs and of the matmuls of the state from those of the states.
   `of_state` holds a further gradient of the last state before the call, and the gradient of the
   state before the first step after it. */
void gru_backward(const Layer *layer, const float *gradients, float *of_state, float *of_inputs,
                  float *of_matmuls) {
    const Layer l = *layer;
    int64_t count = l.threads < l.batch ? l.threads : l.batch;
    _Pragma("omp parallel for schedule(static) num_threads(l.threads) if (count > 1)")
    for (int64_t part = 0; part < count; part++) {
        int64_t from = l.batch * part / count, to = l.batch * (part + 1) / count;
        backward_rows(&l, from, to, gradients, of_state, of_inputs, of_matmuls);
    }
}
