/* Optimizer steps: one pass over memory for all the tensors of a parameter group.

   Each function takes `count` tensors as rows of SLOTS addresses (parameter, gradient, up to three
   tensors of state, step counter), their numbers of elements, and the options of the group. A step
   counter is a float32 that is counted up here; what follows from it is computed in double
   precision, as torch does in Python. The formulas are those of torch.optim, whose pages name the
   papers. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { SLOTS = 6, STEP = 5, CHUNK = 16384, COEFFICIENTS = 10 };

typedef struct {
    float *restrict param;
    const float *restrict grad;
    float *restrict a, *restrict b, *restrict c; /* state */
    float k[COEFFICIENTS];
} Tensor;

typedef void (*Kernel)(const Tensor *tensor, int64_t from, int64_t to);

static void fill(Tensor *tensor, void *const *row) {
    tensor->param = row[0];
    tensor->grad = row[1];
    tensor->a = row[2];
    tensor->b = row[3];
    tensor->c = row[4];
}

static double count_step(void *const *row) {
    float *step = row[STEP];
    *step += 1;
    return *step;
}

/* Work is handed out in chunks of elements, so that one large tensor and many small ones are both
   shared among the threads. */
static int run(Kernel kernel, const Tensor *tensors, const int64_t *sizes, int64_t count,
               int threads) {
    int64_t chunks = 0;
    for (int64_t i = 0; i < count; i++) chunks += (sizes[i] + CHUNK - 1) / CHUNK;
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) kernel(tensors + i, 0, sizes[i]);
        return 0;
    }
    struct Part { int64_t tensor, from; } *parts = malloc((size_t)(chunks + 1) * sizeof *parts);
    if (!parts) return -1;
    int64_t filled = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t from = 0; from < sizes[i]; from += CHUNK)
            parts[filled++] = (struct Part){i, from};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < chunks; part++) {
        int64_t tensor = parts[part].tensor, from = parts[part].from;
        int64_t to = from + CHUNK < sizes[tensor] ? from + CHUNK : sizes[tensor];
        kernel(tensors + tensor, from, to);
    }
    free(parts);
    return 0;
}

/* A function for Python: prepares every tensor's coefficients k from the options o, then runs what
   `choose` gives. Returns 0, or -1 without memory. */
#define OPTIMIZER(name, choose)                                                                   \
    int name(void *const *rows, const int64_t *sizes, int64_t count, const double *o,             \
             int threads) {                                                                       \
        Tensor *tensors = malloc((size_t)(count + 1) * sizeof *tensors);                          \
        if (!tensors) return -1;                                                                  \
        for (int64_t i = 0; i < count; i++) {                                                     \
            fill(tensors + i, rows + i * SLOTS);                                                  \
            prepare(tensors + i, o);                                                              \
            name##_prepare(tensors + i, rows + i * SLOTS, o);                                     \
        }                                                                                         \
        int failed = run(choose, tensors, sizes, count, threads);                                 \
        free(tensors);                                                                            \
        return failed;                                                                            \
    }

/* What all of them have in common. Options: 0 learning rate, 1 weight decay, 2 whether it is
   decoupled, 3 maximize. Coefficients: 0 turns the gradient around, 1 adds weight decay to it, 2
   shrinks the parameter. */
static void prepare(Tensor *tensor, const double *o) {
    tensor->k[0] = o[3] ? -1 : 1;
    tensor->k[1] = o[2] ? 0 : (float)o[1];
    tensor->k[2] = o[2] ? (float)(1 - o[0] * o[1]) : 1;
}

/* For each element: p is the parameter, g the gradient, a, b and c the state. */
#define LOOP(name, ...)                                                                           \
    static void name(const Tensor *t, int64_t from, int64_t to) {                                 \
        float *restrict param = t->param, *restrict a = t->a, *restrict b = t->b,                 \
              *restrict c = t->c;                                                                 \
        const float *restrict grad = t->grad;                                                     \
        const float sign = t->k[0], decay = t->k[1], keep = t->k[2], k3 = t->k[3], k4 = t->k[4],  \
                    k5 = t->k[5], k6 = t->k[6], k7 = t->k[7], k8 = t->k[8], k9 = t->k[9];         \
        (void)a, (void)b, (void)c, (void)k4, (void)k5, (void)k6, (void)k7, (void)k8, (void)k9;    \
        (void)k3;                                                                                 \
        for (int64_t i = from; i < to; i++) {                                                     \
            float p = param[i] * keep, g = sign * grad[i] + decay * param[i];                     \
            __VA_ARGS__                                                                           \
            param[i] = p;                                                                         \
        }                                                                                         \
    }

/* torch.maximum: a NaN wins. */
static inline float larger(float x, float y) { return x > y || x != x ? x : y; }

/* SGD. Options: 4 momentum, 5 dampening, 6 nesterov. State: momentum. */
static void sgd_prepare(Tensor *t, void *const *row, const double *o) {
    (void)row;
    t->k[3] = (float)o[0];
    t->k[4] = (float)o[4];
    t->k[5] = (float)(1 - o[5]);
}
LOOP(sgd_plain, p -= k3 * g;)
LOOP(sgd_momentum, float m = a[i] * k4 + g * k5; a[i] = m; p -= k3 * m;)
LOOP(sgd_nesterov, float m = a[i] * k4 + g * k5; a[i] = m; p -= k3 * (g + k4 * m);)
OPTIMIZER(sgd, o[4] == 0 ? sgd_plain : o[6] ? sgd_nesterov : sgd_momentum)

/* Adam, AdamW. Options: 4 beta1, 5 beta2, 6 epsilon, 7 amsgrad. State: mean, square, largest. */
static void adam_prepare(Tensor *t, void *const *row, const double *o) {
    double step = count_step(row);
    t->k[3] = (float)(1 - o[4]);
    t->k[4] = (float)o[5];
    t->k[5] = (float)(1 - o[5]);
    t->k[6] = (float)(1 / sqrt(1 - pow(o[5], step)));
    t->k[7] = (float)o[6];
    t->k[8] = (float)(o[0] / (1 - pow(o[4], step)));
}
LOOP(adam_plain,
     float m = a[i] + (g - a[i]) * k3, v = b[i] * k4 + g * g * k5;
     a[i] = m;
     b[i] = v;
     p -= k8 * m / (sqrtf(v) * k6 + k7);)
LOOP(adam_amsgrad,
     float m = a[i] + (g - a[i]) * k3, v = b[i] * k4 + g * g * k5, w = larger(c[i], v);
     a[i] = m;
     b[i] = v;
     c[i] = w;
     p -= k8 * m / (sqrtf(w) * k6 + k7);)
OPTIMIZER(adam, o[7] ? adam_amsgrad : adam_plain)

/* RMSprop. Options: 4 alpha, 5 epsilon, 6 momentum, 7 centered. State: square, mean, momentum. */
static void rmsprop_prepare(Tensor *t, void *const *row, const double *o) {
    count_step(row);
    t->k[3] = (float)o[0];
    t->k[4] = (float)o[4];
    t->k[5] = (float)(1 - o[4]);
    t->k[6] = (float)o[5];
    t->k[7] = (float)o[6];
}
LOOP(rmsprop_plain,
     float v = a[i] * k4 + g * g * k5;
     a[i] = v;
     p -= k3 * g / (sqrtf(v) + k6);)
LOOP(rmsprop_momentum,
     float v = a[i] * k4 + g * g * k5, m = c[i] * k7 + g / (sqrtf(v) + k6);
     a[i] = v;
     c[i] = m;
     p -= k3 * m;)
LOOP(rmsprop_centered,
     float v = a[i] * k4 + g * g * k5, u = b[i] + (g - b[i]) * k5;
     a[i] = v;
     b[i] = u;
     p -= k3 * g / (sqrtf(v - u * u) + k6);)
LOOP(rmsprop_centered_momentum,
     float v = a[i] * k4 + g * g * k5, u = b[i] + (g - b[i]) * k5;
     float m = c[i] * k7 + g / (sqrtf(v - u * u) + k6);
     a[i] = v;
     b[i] = u;
     c[i] = m;
     p -= k3 * m;)
OPTIMIZER(rmsprop, o[7] ? (o[6] > 0 ? rmsprop_centered_momentum : rmsprop_centered)
                        : (o[6] > 0 ? rmsprop_momentum : rmsprop_plain))

/* Adagrad. Options: 4 decay of the learning rate, 5 epsilon. State: sum of squares. */
static void adagrad_prepare(Tensor *t, void *const *row, const double *o) {
    double step = count_step(row);
    t->k[3] = (float)(o[0] / (1 + (step - 1) * o[4]));
    t->k[4] = (float)o[5];
}
LOOP(adagrad_plain,
     float v = a[i] + g * g;
     a[i] = v;
     p -= k3 * g / (sqrtf(v) + k4);)
OPTIMIZER(adagrad, adagrad_plain)

/* Adadelta. Options: 4 rho, 5 epsilon. State: square, square of the changes. */
static void adadelta_prepare(Tensor *t, void *const *row, const double *o) {
    count_step(row);
    t->k[3] = (float)o[0];
    t->k[4] = (float)o[4];
    t->k[5] = (float)(1 - o[4]);
    t->k[6] = (float)o[5];
}
LOOP(adadelta_plain,
     float v = a[i] * k4 + g * g * k5, d = sqrtf(b[i] + k6) / sqrtf(v + k6) * g;
     a[i] = v;
     b[i] = b[i] * k4 + d * d * k5;
     p -= k3 * d;)
OPTIMIZER(adadelta, adadelta_plain)

/* Adamax. Options: 4 beta1, 5 beta2, 6 epsilon. State: mean, largest. */
static void adamax_prepare(Tensor *t, void *const *row, const double *o) {
    double step = count_step(row);
    t->k[3] = (float)(o[0] / (1 - pow(o[4], step)));
    t->k[4] = (float)(1 - o[4]);
    t->k[5] = (float)o[5];
    t->k[6] = (float)o[6];
}
LOOP(adamax_plain,
     float m = a[i] + (g - a[i]) * k4, u = larger(b[i] * k5, fabsf(g) + k6);
     a[i] = m;
     b[i] = u;
     p -= k3 * m / u;)
OPTIMIZER(adamax, adamax_plain)

/* NAdam. Options: 4 beta1, 5 beta2, 6 epsilon, 7 decay of the momentum. State: mean, square, and a
   single float32, the product of the momenta. */
static void nadam_prepare(Tensor *t, void *const *row, const double *o) {
    double step = count_step(row);
    double mu = o[4] * (1 - 0.5 * pow(0.96, step * o[7]));
    double next = o[4] * (1 - 0.5 * pow(0.96, (step + 1) * o[7]));
    *t->c *= (float)mu;
    double product = *t->c;
    t->k[3] = (float)(1 - o[4]);
    t->k[4] = (float)o[5];
    t->k[5] = (float)(1 - o[5]);
    t->k[6] = (float)(1 / (1 - pow(o[5], step)));
    t->k[7] = (float)o[6];
    t->k[8] = (float)(o[0] * (1 - mu) / (1 - product));
    t->k[9] = (float)(o[0] * next / (1 - product * next));
}
LOOP(nadam_plain,
     float m = a[i] + (g - a[i]) * k3, v = b[i] * k4 + g * g * k5;
     a[i] = m;
     b[i] = v;
     p -= (k8 * g + k9 * m) / (sqrtf(v * k6) + k7);)
OPTIMIZER(nadam, nadam_plain)

/* RAdam. Options: 4 beta1, 5 beta2, 6 epsilon. State: mean, square. While the variance is not
   tractable, the step is one of momentum alone. */
static double radam_rectification(double beta2, double step) {
    double power = pow(beta2, step), limit = 2 / (1 - beta2) - 1;
    double rho = limit - 2 * step * power / (1 - power);
    if (!(rho > 5)) return 0;
    return sqrt((1 - power) * (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho));
}
static void radam_prepare(Tensor *t, void *const *row, const double *o) {
    double step = count_step(row);
    t->k[3] = (float)(1 - o[4]);
    t->k[4] = (float)o[5];
    t->k[5] = (float)(1 - o[5]);
    t->k[6] = (float)radam_rectification(o[5], step);
    t->k[7] = (float)o[6];
    t->k[8] = (float)(o[0] / (1 - pow(o[4], step)));
}
LOOP(radam_plain,
     float m = a[i] + (g - a[i]) * k3, v = b[i] * k4 + g * g * k5;
     a[i] = m;
     b[i] = v;
     p -= k8 * m * (k6 != 0 ? k6 / (sqrtf(v) + k7) : 1);)
OPTIMIZER(radam, radam_plain)
