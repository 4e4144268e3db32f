/* Optimizer steps that take one pass over memory for all tensors of a parameter group.

   Each function takes `count` rows of SLOTS addresses (parameter, gradient, up to three state
   tensors, step counter), the number of elements of each row's tensors, and the options of the
   group. No two tensors may share memory. A step counter is a float32, which is incremented here;
   coefficients that depend on it are computed in double precision, as torch does in Python. The
   formulas are those of torch.optim, whose documentation cites the papers.

   The operations are those of torch's functions for single tensors, in the same order, and each is
   rounded where torch rounds it (this file is compiled without contraction). So infinities, NaNs
   and zeros have the same signs and occur in the same places. In particular, a weight decay of 0 is
   not multiplied with a parameter, which may be infinite. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { SLOTS = 6, STEP = 5, CHUNK = 16384, COEFFICIENTS = 11, NUMBERS = 2 };

enum { DONE = 0, NO_MEMORY = -1, NOT_FINITE = 1 }; /* return values of the functions for Python */

typedef struct {
    float *restrict param;
    const float *restrict grad;
    float *restrict a, *restrict b, *restrict c; /* state */
    struct { float *at, value; } numbers[NUMBERS]; /* new values of step counters and the like */
    int decays;        /* whether weight decay is added to the gradient */
    int from_grad;     /* whether means are interpolated starting from the gradient */
    int is_not_finite; /* whether a coefficient is not finite */
    float k[COEFFICIENTS];
} Tensor;

typedef struct { int64_t tensor, from; } Part;

typedef void (*Kernel)(const Tensor *tensor, int64_t from, int64_t to);

/* x * y + z, rounded once if the processor supports that, as in torch's vectorised kernels. */
static inline float multiply_add(float x, float y, float z) {
#ifdef FP_FAST_FMAF
    return fmaf(x, y, z);
#else
    return x * y + z;
#endif
}

static Tensor tensor_of(void *const *row) {
    float *step = row[STEP];
    return (Tensor){.param = row[0], .grad = row[1], .a = row[2], .b = row[3], .c = row[4],
                    .numbers[0] = {step, step ? *step + 1 : 1}};
}

static double step_of(const Tensor *t) { return t->numbers[0].value; }

static void set(Tensor *t, int coefficient, double value) {
    t->k[coefficient] = (float)value;
    if (!isfinite(t->k[coefficient])) t->is_not_finite = 1;
}

/* The bias correction of a running mean that started at 0; the mean is divided by it. */
static double correction(Tensor *t, double beta) {
    double power = pow(beta, step_of(t));
    if (!isfinite(power)) t->is_not_finite = 1;
    return 1 - power;
}

/* Run a kernel on all tensors. The work is divided into chunks of elements, so that both one large
   tensor and many small ones are spread over all threads. */
static void run(Kernel kernel, const Tensor *tensors, const int64_t *sizes, int64_t count,
                Part *parts, int threads) {
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) kernel(tensors + i, 0, sizes[i]);
        return;
    }
    int64_t chunks = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t from = 0; from < sizes[i]; from += CHUNK) parts[chunks++] = (Part){i, from};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < chunks; part++) {
        int64_t tensor = parts[part].tensor, from = parts[part].from;
        int64_t to = from + CHUNK < sizes[tensor] ? from + CHUNK : sizes[tensor];
        kernel(tensors + tensor, from, to);
    }
}

/* Define a function for Python. It computes the coefficients k of each tensor from the options o,
   and runs the kernel that `choose` selects. It returns DONE, NO_MEMORY, or NOT_FINITE if a
   coefficient is not finite (for most of these, torch raises an error of its own). If it does not
   return DONE, nothing has been written. With no threads, nothing is written in any case: it is only
   found out whether all coefficients are finite. */
#define OPTIMIZER(name, choose)                                                                   \
    int name(void *const *rows, const int64_t *sizes, int64_t count, const double *o,             \
             int threads) {                                                                       \
        int64_t chunks = 1;                                                                       \
        for (int64_t i = 0; i < count; i++) chunks += (sizes[i] + CHUNK - 1) / CHUNK;             \
        Tensor *tensors = malloc((size_t)(count + 1) * sizeof *tensors);                          \
        Part *parts = malloc((size_t)chunks * sizeof *parts);                                     \
        int status = tensors && parts ? DONE : NO_MEMORY;                                         \
        for (int64_t i = 0; i < count && status == DONE; i++) {                                   \
            tensors[i] = tensor_of(rows + i * SLOTS);                                             \
            prepare(tensors + i, o);                                                              \
            name##_prepare(tensors + i, o);                                                       \
            if (tensors[i].is_not_finite) status = NOT_FINITE;                                    \
        }                                                                                         \
        const int steps = status == DONE && threads > 0;                                          \
        for (int64_t i = 0; i < count && steps; i++)                                              \
            for (int n = 0; n < NUMBERS; n++)                                                     \
                if (tensors[i].numbers[n].at)                                                     \
                    *tensors[i].numbers[n].at = tensors[i].numbers[n].value;                      \
        if (steps) run(choose, tensors, sizes, count, parts, threads);                            \
        free(parts);                                                                              \
        free(tensors);                                                                            \
        return status;                                                                            \
    }

/* The coefficients that all optimizers have. Options: 0 learning rate, 1 weight decay, 2 whether it
   is decoupled, 3 maximize. Coefficients: 0 sign of the gradient, 1 weight decay added to the
   gradient, 2 factor of the parameter by decoupled weight decay. */
static void prepare(Tensor *t, const double *o) {
    t->is_not_finite = !(step_of(t) >= 1);
    t->decays = !o[2] && o[1] != 0;
    set(t, 0, o[3] ? -1 : 1);
    set(t, 1, t->decays ? o[1] : 0);
    set(t, 2, o[2] ? 1 - o[0] * o[1] : 1);
}

/* Coefficient 3 of optimizers with a running mean: the weight of the gradient, or that weight - 1,
   as in torch.lerp. */
static void prepare_mean(Tensor *t, double weight) {
    t->from_grad = !(fabsf((float)weight) < 0.5f);
    set(t, 3, t->from_grad ? (float)weight - 1 : (float)weight);
}

/* Define a kernel from its operations on one element: p is the parameter, g the gradient, and a, b
   and c are the state. */
#define LOOP(name, ...)                                                                           \
    static void name(const Tensor *t, int64_t from, int64_t to) {                                 \
        float *restrict param = t->param, *restrict a = t->a, *restrict b = t->b,                 \
              *restrict c = t->c;                                                                 \
        const float *restrict grad = t->grad;                                                     \
        const int decays = t->decays, from_grad = t->from_grad;                                   \
        const float sign = t->k[0], decay = t->k[1], keep = t->k[2], k3 = t->k[3], k4 = t->k[4],  \
                    k5 = t->k[5], k6 = t->k[6], k7 = t->k[7], k8 = t->k[8], k9 = t->k[9],         \
                    k10 = t->k[10];                                                               \
        (void)a, (void)b, (void)c, (void)k3, (void)k4, (void)k5, (void)k6, (void)k7, (void)k8;    \
        (void)k9, (void)k10, (void)from_grad;                                                     \
        for (int64_t i = from; i < to; i++) {                                                     \
            float p = param[i], g = sign * grad[i];                                               \
            g = decays ? multiply_add(decay, p, g) : g;                                           \
            p *= keep;                                                                            \
            __VA_ARGS__                                                                           \
            param[i] = p;                                                                         \
        }                                                                                         \
    }

/* Update of the running mean a by g, with coefficient k3. */
#define MEAN(a) multiply_add(k3, g - (a), from_grad ? g : (a))

/* Update of the running mean of squares b by g^2, with coefficients k4 and k5. */
#define SQUARE(b) multiply_add(k5 * g, g, (b) * k4)

/* torch.maximum: a NaN wins. */
static inline float larger(float x, float y) { return x > y || x != x ? x : y; }

/* SGD. Options: 4 momentum, 5 dampening, 6 nesterov. State: momentum. */
static void sgd_prepare(Tensor *t, const double *o) {
    set(t, 3, o[0]);
    set(t, 4, o[4]);
    set(t, 5, 1 - o[5]);
}
#define MOMENTUM(a) multiply_add(k5, g, (a) * k4)
LOOP(sgd_plain, p = multiply_add(-k3, g, p);)
LOOP(sgd_momentum, float m = MOMENTUM(a[i]); a[i] = m; p = multiply_add(-k3, m, p);)
LOOP(sgd_nesterov,
     float m = MOMENTUM(a[i]);
     a[i] = m;
     p = multiply_add(-k3, multiply_add(k4, m, g), p);)
OPTIMIZER(sgd, o[4] == 0 ? sgd_plain : o[6] ? sgd_nesterov : sgd_momentum)

/* Adam, AdamW. Options: 4 beta1, 5 beta2, 6 epsilon, 7 amsgrad. State: mean, square, largest. */
static void adam_prepare(Tensor *t, const double *o) {
    prepare_mean(t, 1 - o[4]);
    set(t, 4, o[5]);
    set(t, 5, 1 - o[5]);
    set(t, 6, sqrt(correction(t, o[5])));
    set(t, 7, o[6]);
    set(t, 8, o[0] / correction(t, o[4]));
}
LOOP(adam_plain,
     float m = MEAN(a[i]), v = SQUARE(b[i]);
     a[i] = m;
     b[i] = v;
     p -= k8 * m / (sqrtf(v) / k6 + k7);)
LOOP(adam_amsgrad,
     float m = MEAN(a[i]), v = SQUARE(b[i]), w = larger(c[i], v);
     a[i] = m;
     b[i] = v;
     c[i] = w;
     p -= k8 * m / (sqrtf(w) / k6 + k7);)
OPTIMIZER(adam, o[7] ? adam_amsgrad : adam_plain)

/* RMSprop. Options: 4 alpha, 5 epsilon, 6 momentum, 7 centered. State: square, mean, momentum. */
static void rmsprop_prepare(Tensor *t, const double *o) {
    prepare_mean(t, 1 - o[4]);
    set(t, 4, o[4]);
    set(t, 5, 1 - o[4]);
    set(t, 6, o[5]);
    set(t, 7, o[6]);
    set(t, 8, o[0]);
}
LOOP(rmsprop_plain,
     float v = SQUARE(a[i]);
     a[i] = v;
     p -= k8 * g / (sqrtf(v) + k6);)
LOOP(rmsprop_momentum,
     float v = SQUARE(a[i]), m = c[i] * k7 + g / (sqrtf(v) + k6);
     a[i] = v;
     c[i] = m;
     p = multiply_add(-k8, m, p);)
LOOP(rmsprop_centered,
     float v = SQUARE(a[i]), u = MEAN(b[i]);
     a[i] = v;
     b[i] = u;
     p -= k8 * g / (sqrtf(multiply_add(-u, u, v)) + k6);)
LOOP(rmsprop_centered_momentum,
     float v = SQUARE(a[i]), u = MEAN(b[i]);
     float m = c[i] * k7 + g / (sqrtf(multiply_add(-u, u, v)) + k6);
     a[i] = v;
     b[i] = u;
     c[i] = m;
     p = multiply_add(-k8, m, p);)
OPTIMIZER(rmsprop, o[7] ? (o[6] > 0 ? rmsprop_centered_momentum : rmsprop_centered)
                        : (o[6] > 0 ? rmsprop_momentum : rmsprop_plain))

/* Adagrad. Options: 4 decay of the learning rate, 5 epsilon. State: sum of squares. */
static void adagrad_prepare(Tensor *t, const double *o) {
    set(t, 3, o[0] / (1 + (step_of(t) - 1) * o[4]));
    set(t, 4, o[5]);
}
LOOP(adagrad_plain,
     float v = multiply_add(g, g, a[i]);
     a[i] = v;
     p -= k3 * g / (sqrtf(v) + k4);)
OPTIMIZER(adagrad, adagrad_plain)

/* Adadelta. Options: 4 rho, 5 epsilon. State: square, square of the changes. */
static void adadelta_prepare(Tensor *t, const double *o) {
    set(t, 3, o[0]);
    set(t, 4, o[4]);
    set(t, 5, 1 - o[4]);
    set(t, 6, o[5]);
}
LOOP(adadelta_plain,
     float v = SQUARE(a[i]), d = sqrtf(b[i] + k6) / sqrtf(v + k6) * g;
     a[i] = v;
     b[i] = multiply_add(k5 * d, d, b[i] * k4);
     p = multiply_add(-k3, d, p);)
OPTIMIZER(adadelta, adadelta_plain)

/* Adamax. Options: 4 beta1, 5 beta2, 6 epsilon. State: mean, largest. */
static void adamax_prepare(Tensor *t, const double *o) {
    prepare_mean(t, 1 - o[4]);
    set(t, 4, o[5]);
    set(t, 5, o[6]);
    set(t, 6, o[0] / correction(t, o[4]));
}
LOOP(adamax_plain,
     float m = MEAN(a[i]), u = larger(b[i] * k4, fabsf(g) + k5);
     a[i] = m;
     b[i] = u;
     p -= k6 * m / u;)
OPTIMIZER(adamax, adamax_plain)

/* NAdam. Options: 4 beta1, 5 beta2, 6 epsilon, 7 momentum decay. State: mean, square, and the
   product of the momenta, a single float32, which is written when all tensors have been
   prepared. */
static void nadam_prepare(Tensor *t, const double *o) {
    double step = step_of(t);
    double mu = o[4] * (1 - 0.5 * pow(0.96, step * o[7]));
    double next = o[4] * (1 - 0.5 * pow(0.96, (step + 1) * o[7]));
    float product = *t->c * (float)mu;
    prepare_mean(t, 1 - o[4]);
    set(t, 4, o[5]);
    set(t, 5, 1 - o[5]);
    set(t, 6, correction(t, o[5]));
    set(t, 7, o[6]);
    set(t, 8, o[0] * (1 - mu) / (1 - (double)product));
    set(t, 9, o[0] * next / (1 - (double)product * next));
    t->numbers[1].at = t->c;
    t->numbers[1].value = product;
}
LOOP(nadam_plain,
     float m = MEAN(a[i]), v = SQUARE(b[i]), root = sqrtf(v / k6) + k7;
     a[i] = m;
     b[i] = v;
     p -= k8 * g / root;
     p -= k9 * m / root;)
OPTIMIZER(nadam, nadam_plain)

/* RAdam. Options: 4 beta1, 5 beta2, 6 epsilon. State: mean, square. While the variance of the step
   size is not tractable, the step uses momentum only. */
static double radam_rectification(double beta2, double step) {
    double power = pow(beta2, step), limit = 2 / (1 - beta2) - 1;
    double rho = limit - 2 * step * power / (1 - power);
    if (!(rho > 5)) return 0;
    return sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho));
}
static void radam_prepare(Tensor *t, const double *o) {
    prepare_mean(t, 1 - o[4]);
    set(t, 4, o[5]);
    set(t, 5, 1 - o[5]);
    set(t, 6, radam_rectification(o[5], step_of(t)));
    set(t, 7, o[6]);
    set(t, 8, correction(t, o[4]));
    set(t, 9, sqrt(correction(t, o[5])));
    set(t, 10, o[0]);
}
LOOP(radam_plain,
     float m = MEAN(a[i]), v = SQUARE(b[i]), step = m / k8 * k10;
     a[i] = m;
     b[i] = v;
     p -= k6 != 0 ? step * (1 / (sqrtf(v) + k7) * k9) * k6 : step;)
OPTIMIZER(radam, radam_plain)
