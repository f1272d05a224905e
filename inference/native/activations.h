// Activation rows as products read them: tiles of up to 12 lines, [width/G][lines][G] in the weights' format (product.h),
// so that they too are one stream, each read 32 times at once.
#pragma once
#include <algorithm>

#include "vector.h"

enum Kind : long { F32, BF16, INT8, COMPACT };  // of the weights; COMPACT: bfloat16 in 12 bits

constexpr long MOST = 12;  // lines of a tile: 12 x 2 vectors of sums are 24 of 32 registers, 14 loads for 24 products

// Does the processor multiply this kind as it is stored? Otherwise weights are widened and multiplied as floats.
#ifdef __AVX512BF16__
constexpr bool BF16_PAIRS = true;
#else
constexpr bool BF16_PAIRS = false;
#endif
#ifdef __AVX512VNNI__
constexpr bool INT8_QUADS = true;
#else
constexpr bool INT8_QUADS = false;
#endif
constexpr long group(long kind) { return kind == F32 ? 1 : kind == INT8 ? 4 : 2; }
constexpr bool narrow(long kind) { return kind == F32 ? false : kind == INT8 ? INT8_QUADS : BF16_PAIRS; }
constexpr long words(long kind) { return narrow(kind) ? 1 : group(kind); }  // 4-byte words of an activation line per step


// Per-line quantisation to 8 bits loses the line to its few largest values, as trained models have them. So values far
// out (beyond 4 times the others' root mean square) are left out of the line and multiplied apart, step by step.
struct Far {
    int32_t step, digits;  // four bytes, most of them 0
};
struct Input {
    int32_t *data;
    float *scale, *far_scale;      // int8: of each line, and of its far values
    int32_t *offset, *far_offset;  // 128 x the sum of the quantised values, which the + 128 in the weights adds
    int32_t *far_count;
    Far *far;  // room for width / 16 of each line
    long count, width;
    long tiles() const { return (count + MOST - 1) / MOST; }
    long first(long tile) const { return count * tile / tiles(); }
    template <int KIND> int32_t *line(long i) const { return data + i * (width / group(KIND)) * words(KIND); }
    Far *far_of(long i) const { return far + i * (width / 16); }
};

// The value beyond which a value is far: 4 times the root mean square of those that are not far themselves.
// At most width / 16 values are: by Chebyshev for 4 times the mean of all, which is taken if the closer bound has more.
inline float far_bound(const float *x, long width) {
    Vec square = _mm512_setzero_ps(), top = square;
    for (long i = 0; i < width; i += 16) {
        const Vec v = load(x + i);
        square = _mm512_fmadd_ps(v, v, square);
        top = _mm512_max_ps(top, _mm512_abs_ps(v));
    }
    const float most = _mm512_reduce_max_ps(top), wide = 4 * std::sqrt(_mm512_reduce_add_ps(square) / width);
    if (!std::isfinite(wide)) return NAN;  // and so are the products
    if (most <= wide) return most;
    long near = 0, far = 0;
    square = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        const Vec v = load(x + i);
        const __mmask16 in = _mm512_cmp_ps_mask(_mm512_abs_ps(v), all(wide), _CMP_LE_OQ);
        square = _mm512_mask3_fmadd_ps(v, v, square, in);
        near += __builtin_popcount(in);
    }
    const float close = 4 * std::sqrt(_mm512_reduce_add_ps(square) / near);
    for (long i = 0; i < width; i += 16)
        far += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_abs_ps(load(x + i)), all(close), _CMP_GT_OQ));
    return far <= width / 16 ? close : wide;
}

// A line on its way to 8 bits.
struct Quantised {
    float bound = 0, inverse = 0, most = 0;  // values beyond the bound are far; 127 / bound; the farthest
    long far = 0;                            // how many are
    __m512i sum = _mm512_setzero_si512();
};

inline Quantised begin(const float *x, long width) {
    const float bound = far_bound(x, width);
    return {bound, bound > 0 ? 127 / bound : 0};
}

// Write 16 values from x[k] on as four groups of four bytes, `lines` apart, and note what is far.
inline void quantise(Quantised &q, const float *x, long k, int32_t *to, long lines, Far *far) {
    const Vec v = load(x + k);
    const __mmask16 near = _mm512_cmp_ps_mask(_mm512_abs_ps(v), all(q.bound), _CMP_LE_OQ);  // none if the bound is NaN
    const __mmask16 out = _mm512_cmp_ps_mask(_mm512_abs_ps(v), all(q.bound), _CMP_GT_OQ);
    const __m512i digits = _mm512_maskz_cvtps_epi32(near, _mm512_mul_ps(v, all(q.inverse)));
    q.sum = _mm512_add_epi32(q.sum, digits);
    alignas(16) int32_t quads[4];
    _mm_store_si128((__m128i *)quads, _mm512_cvtepi32_epi8(digits));
    for (int j = 0; j < 4; j++) to[j * lines] = quads[j];
    for (unsigned left = out; left; left &= left - 1) {
        const long at = k + __builtin_ctz(left);
        q.most = std::max(q.most, std::fabs(x[at]));
        far[q.far++] = {(int32_t)at, 0};
    }
}

// Write what line i has beside its digits, and its far values, which are noted by their places.
inline void finish(const Quantised &q, const Input &in, long i, const float *x) {
    Far *far = in.far_of(i);
    long far_sum = 0;
    for (long j = 0; j < q.far; j++) {
        const long at = far[j].step, digit = std::lround(x[at] * (127 / q.most));
        far[j] = {(int32_t)(at / 4), (int32_t)((uint32_t)(uint8_t)digit << 8 * (at % 4))};
        far_sum += digit;
    }
    in.scale[i] = q.bound / 127, in.far_scale[i] = q.most / 127, in.far_count[i] = (int32_t)q.far;
    in.offset[i] = 128 * _mm512_reduce_add_epi32(q.sum), in.far_offset[i] = (int32_t)(128 * far_sum);
}

// Are activations a narrower form of each float alone, so that a product may write the next one's?
constexpr bool alone(long kind) { return narrow(kind) && group(kind) == 2; }

#ifdef __AVX512BF16__
// Write 32 outputs, from n on, of line i of a tile that begins with line `first`.
template <int KIND> void put(const Input &in, long first, long lines, long i, long n, Vec low, Vec high) {
    int32_t *to = in.line<KIND>(first) + n / 2 * lines + i - first;
    alignas(64) int32_t pairs[16];
    _mm512_store_si512(pairs, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    for (int j = 0; j < 16; j++) to[j * lines] = pairs[j];
}
#endif

// Write rows[0], rows[1], ... as the lines of a tile: RUN values of each line by turns, because the tile is larger than the
// first cache.
constexpr long RUN = 256;
template <int KIND> void write_tile(const Input &in, long tile, const float *const *rows) {
    const long first = in.first(tile), lines = in.first(tile + 1) - first;
    int32_t *to = in.line<KIND>(first);
    [[maybe_unused]] Quantised q[MOST];
    if constexpr (KIND == INT8 && INT8_QUADS)
        for (long i = 0; i < lines; i++) q[i] = begin(rows[i], in.width);
    for (long start = 0; start < in.width; start += RUN)
        for (long i = 0; i < lines; i++)
            for (long k = start; k < std::min(start + RUN, in.width); k += 16) {
                int32_t *at = to + k / group(KIND) * words(KIND) * lines + i;
                if constexpr (KIND == INT8 && INT8_QUADS) quantise(q[i], rows[i], k, at, lines, in.far_of(first + i));
#ifdef __AVX512BF16__
                else if constexpr (group(KIND) == 2) {
                    alignas(32) int32_t pairs[8];
                    _mm256_store_si256((__m256i *)pairs, (__m256i)_mm512_cvtneps_pbh(load(rows[i] + k)));
                    for (int j = 0; j < 8; j++) at[j * lines] = pairs[j];
                }
#endif
                else
                    for (int j = 0; j < 16; j++) std::memcpy(at + j * lines, rows[i] + k + j, 4);
            }
    if constexpr (KIND == INT8 && INT8_QUADS)
        for (long i = 0; i < lines; i++) finish(q[i], in, first + i, rows[i]);
}
