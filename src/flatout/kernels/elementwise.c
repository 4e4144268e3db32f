/* Elementwise functions: tanh, the tanh-based GELU and its derivative, and magnitudes of complex
   numbers. Each element is read once and written once; the arithmetic is float32. */

#include "elementary.h"
#include "half.h"

enum { SPAN = 512, GRAIN = 64 }; /* elements in a span, and consecutive spans of one thread */

enum { TANH, GELU };

/* D. Hendrycks, K. Gimpel: Gaussian error linear units. https://arxiv.org/abs/1606.08415 */
static inline float inner(float x) { return 0.79788456f * (x + 0.044715f * x * x * x); }

static void apply(float *x, int64_t count, int function) {
    if (function == TANH)
        for (int64_t i = 0; i < count; i++) x[i] = hyperbolic_tangent(x[i]);
    else /* (1 + tanh(u)) / 2 = sigmoid(2 u) */
        for (int64_t i = 0; i < count; i++) x[i] *= sigmoid(2.0f * inner(x[i]));
}

/* Multiply the derivative by the gradient. With s = sigmoid(2 u), its derivative s (1 - s) becomes
   0 before the derivative of 2 u overflows, so this order of multiplications keeps the result
   finite wherever torch's is. */
static void derive_gelu(float *x, const float *gradient, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float s = sigmoid(2.0f * inner(x[i])), square = x[i] * x[i];
        float slope = 2.0f * 0.79788456f * (1.0f + 3.0f * 0.044715f * square);
        x[i] = gradient[i] * (s + x[i] * (s * (1.0f - s)) * slope);
    }
}

/* Write the function of each element, or, if `gradient` is not null, its derivative times
   `gradient`, which is supported for GELU only. */
void activation(int function, const void *x, const void *gradient, void *to, int64_t count,
                int is_bf16, int threads) {
    _Pragma("omp parallel for schedule(static, GRAIN) num_threads(threads) if (threads > 1)")
    for (int64_t at = 0; at < count; at += SPAN) {
        float span[SPAN], outer[SPAN];
        int64_t width = count - at < SPAN ? count - at : SPAN;
        load_span(span, x, at, width, is_bf16);
        if (gradient) {
            load_span(outer, gradient, at, width, is_bf16);
            derive_gelu(span, outer, width);
        } else {
            apply(span, width, function);
        }
        store_span(to, at, span, width, is_bf16);
    }
}

/* Magnitudes of complex numbers, given as pairs of float32. Squares in float64 neither overflow nor
   underflow. If one part is infinite, the magnitude is infinite, even if the other part is NaN
   (C11, annex F.10.4.3). */
void magnitude(const float *pairs, float *to, int64_t count, int threads) {
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
    for (int64_t i = 0; i < count; i++) {
        double real = pairs[2 * i], imaginary = pairs[2 * i + 1];
        double root = sqrt(real * real + imaginary * imaginary);
        to[i] = (float)(fabs(real) == INFINITY || fabs(imaginary) == INFINITY ? INFINITY : root);
    }
}
