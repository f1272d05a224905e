// Sixteen floats at a time: loads from the cache's formats, exp, both gelus, layer norm, the greatest.
// Every result depends on its own input only, never on what else is in the step.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

typedef __m512 Vec;
typedef uint16_t Half;  // IEEE half precision, the cache's format beside float

inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
inline Vec load(const Half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(Half *p, Vec v) {  // beyond half precision's range the largest number is kept, never infinity
    v = _mm512_min_ps(all(65504.f), _mm512_max_ps(all(-65504.f), v));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// e^x to 2 units in the last place: x = n ln 2 + r, a polynomial in r, 2^n by scaling. Below -87 it is 0; NaN stays NaN.
inline Vec exponential(Vec x) {
    const __mmask16 live = _mm512_cmp_ps_mask(x, all(-87.f), _CMP_NLT_UQ);
    x = _mm512_min_ps(all(88.f), x);
    const Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec r = _mm512_fnmadd_ps(n, all(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), r);
    Vec p = all(1.f / 720);
    for (const float c : {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = _mm512_fmadd_ps(p, r, all(c));
    return _mm512_maskz_scalef_ps(live, p, n);
}

// gelu in its tanh form: x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
inline Vec gelu_new(Vec x) {
    const float c = -2 * 0.7978845608f;
    const Vec u = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), all(c * 0.044715f), all(c)));
    return _mm512_div_ps(x, _mm512_add_ps(all(1.f), exponential(u)));
}

// gelu: x (1 + erf(x / sqrt 2)) / 2 with erf from Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7
inline Vec gelu(Vec x) {
    const Vec z = _mm512_mul_ps(_mm512_abs_ps(x), all(0.70710678f));
    const Vec t = _mm512_div_ps(all(1.f), _mm512_fmadd_ps(z, all(0.3275911f), all(1.f)));
    Vec p = all(1.061405429f);
    for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = _mm512_fmadd_ps(p, t, all(c));
    const Vec tail = _mm512_mul_ps(_mm512_mul_ps(p, t), exponential(_mm512_mul_ps(z, _mm512_sub_ps(_mm512_setzero_ps(), z))));
    const Vec half = _mm512_mul_ps(x, all(.5f));  // x/2 (1 + sign(x) (1 - tail)) = x/2 + |x/2| (1 - tail)
    return _mm512_fmadd_ps(_mm512_abs_ps(half), _mm512_sub_ps(all(1.f), tail), half);
}

// layer norm of n floats, in two passes; bias may be null
inline void norm(const float *x, const float *weight, const float *bias, float *out, long n) {
    Vec sum = _mm512_setzero_ps(), square = sum;
    for (long i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, load(x + i));
    const Vec mean = all(_mm512_reduce_add_ps(sum) / n);
    for (long i = 0; i < n; i += 16) {
        const Vec d = _mm512_sub_ps(load(x + i), mean);
        square = _mm512_fmadd_ps(d, d, square);
    }
    const Vec scale = all(1.f / std::sqrt(_mm512_reduce_add_ps(square) / n + 1e-5f));
    for (long i = 0; i < n; i += 16) {
        const Vec v = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(load(x + i), mean), scale), load(weight + i));
        store(out + i, bias ? _mm512_add_ps(v, load(bias + i)) : v);
    }
}

// Where the greatest of n numbers is; the first of equals. n where one is NaN or the greatest is not finite.
inline long greatest(const float *z, long n) {
    Vec most = all(-INFINITY);
    unsigned nan = 0;
    for (long i = 0; i < n; i += 16) {
        const Vec x = _mm512_mask_loadu_ps(all(-INFINITY), n - i >= 16 ? 0xffff : (1 << (n - i)) - 1, z + i);
        nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), most = _mm512_max_ps(most, x);
    }
    const Vec top = all(_mm512_reduce_max_ps(most));
    if (nan || !std::isfinite(_mm512_cvtss_f32(top))) return n;
    for (long i = 0; i < n; i += 16) {
        const unsigned equal = _mm512_mask_cmp_ps_mask(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1, load(z + i), top, _CMP_EQ_OQ);
        if (equal) return i + __builtin_ctz(equal);
    }
    return 0;
}
