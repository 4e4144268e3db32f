/* Elementary functions of float32, written so that compilers vectorise them. */

#ifndef FLATOUT_ELEMENTARY_H
#define FLATOUT_ELEMENTARY_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x for x <= 0, with an error of at most 2 units in the last place if the result is a normal
   number; below that, the result is the smallest normal number or 0. The polynomial is Taylor's, on
   [-ln(2)/2, ln(2)/2]. */
static inline float exponential(float x) {
    float clamped = x < -88.0f ? -88.0f : x;
    float n = rintf(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    float y = 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return y * power;
}

/* ln x for normal numbers and NaN, with an error of at most 2 units in the last place. The
   polynomial is that of logf in S. L. Moshier's Cephes, https://www.netlib.org/cephes/, for
   mantissas from sqrt(1/2) on. */
static inline float logarithm(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int32_t exponent = (bits - 0x3F3504F3) >> 23; /* of x / sqrt(1/2) */
    bits -= exponent << 23;
    float m, n = (float)exponent;
    memcpy(&m, &bits, sizeof m);
    m -= 1.0f;
    float y = 7.0376836292e-2f;
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * m * m + n * -2.12194440e-4f - 0.5f * m * m;
    return m + y + n * 0.693359375f + (x - x); /* NaN stays NaN */
}

static inline float sigmoid(float x) {
    float e = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* tanh x: close to 0, where the quotient would lose digits, by Taylor's series. */
static inline float hyperbolic_tangent(float x) {
    float size = x < 0.0f ? -x : x, square = x * x;
    float e = exponential(-2.0f * size);
    float quotient = (1.0f - e) / (1.0f + e);
    float series = 62.0f / 2835;
    series = series * square - 17.0f / 315;
    series = series * square + 2.0f / 15;
    series = series * square - 1.0f / 3;
    series = x * (1.0f + square * series); /* keeps the sign of 0 */
    return size < 0.3f ? series : x < 0.0f ? -quotient : quotient;
}

#endif
