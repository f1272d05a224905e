// Packed weights times activation rows: the kernels where nearly all the time goes.
//
// Weights W[rows][width] lie in panels of 32 rows, so that a thread reads one sequential stream:
//   [rows/32][width/G][32][G] with G = 1 float, 2 bfloat16 or 4 bytes (q + 128, one scale for each row);
//   bfloat16 mostly in 12 bits, see compact.h, from which the same registers are filled.
// A step is 128 bytes: for 32 outputs, the 4 bytes that G neighbouring inputs meet. Activations lie in tiles of up to
// 12 lines, [width/G][lines][G] in the same formats, so that they too are one stream, each read 32 times at once.
// The order of additions of an output is the same in every tile: a row's result never depends on the other rows.
#pragma once
#include <algorithm>
#include <span>
#include <type_traits>

#include "compact.h"

enum Kind : long { F32, BF16, INT8, COMPACT };  // of the weights; COMPACT: bfloat16 in 12 bits
enum Then { STORE, ADD, GELU, GELU_NEW };  // what happens to a product: written, added to what is there, or through gelu

constexpr long PANEL = 32, MOST = 12;  // 12 lines x 2 vectors are 24 of 32 registers: 14 loads for 24 products
constexpr long NEAR = 4096, FAR = 12288;  // bytes that the stream of weights is fetched ahead, see product()

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

constexpr long turn(long kind) { return kind == COMPACT ? 192 : 128; }      // bytes that are multiplied at once ...
constexpr long unpacked(long kind) { return kind == COMPACT ? 256 : 128; }  // ... and what they would be in 16 bits

struct Matrix {
    const char *weights;
    const float *scale, *bias;  // scale in int8 only; bias may be null
    long rows, width;           // rows: with padding, a multiple of 32
    const Rest *rest;           // COMPACT only: of panel p from rest_of[p] to rest_of[p + 1]
    const int32_t *rest_of;
    std::span<const Rest> rest_in(long p) const { return {rest + rest_of[p], rest + rest_of[p + 1]}; }
    template <int KIND> const char *panel(long p) const {
        return weights + p * (KIND == COMPACT ? compact_bytes(width) : width / group(KIND) * 128);
    }
};

// ---- activations -------------------------------------------------------------------------------------------------
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

// Write x as line i of `in`, one of `lines` in its tile, beginning at `to`.
inline void quantise(const Input &in, long i, const float *x, int32_t *to, long lines) {
    const float bound = far_bound(x, in.width), scale = bound / 127, inverse = bound > 0 ? 127 / bound : 0;
    float most = 0;
    Far *far = in.far_of(i);
    long count = 0, far_sum = 0;
    __m512i sum = _mm512_setzero_si512();
    for (long k = 0; k < in.width; k += 16) {
        const Vec v = load(x + k);
        const __mmask16 near = _mm512_cmp_ps_mask(_mm512_abs_ps(v), all(bound), _CMP_LE_OQ);  // none if bound is NaN
        const __mmask16 out = _mm512_cmp_ps_mask(_mm512_abs_ps(v), all(bound), _CMP_GT_OQ);
        const __m512i q = _mm512_maskz_cvtps_epi32(near, _mm512_mul_ps(v, all(inverse)));
        sum = _mm512_add_epi32(sum, q);
        alignas(16) int32_t quads[4];
        _mm_store_si128((__m128i *)quads, _mm512_cvtepi32_epi8(q));
        for (int j = 0; j < 4; j++) to[(k / 4 + j) * lines] = quads[j];
        for (unsigned left = out; left; left &= left - 1) {
            const long at = k + __builtin_ctz(left);
            most = std::max(most, std::fabs(x[at]));
            far[count++] = {(int32_t)at, 0};
        }
    }
    for (long j = 0; j < count; j++) {
        const long at = far[j].step, digit = std::lround(x[at] * (127 / most));
        far[j] = {(int32_t)(at / 4), (int32_t)((uint32_t)(uint8_t)digit << 8 * (at % 4))};
        far_sum += digit;
    }
    in.scale[i] = scale, in.far_scale[i] = most / 127, in.far_count[i] = (int32_t)count;
    in.offset[i] = 128 * _mm512_reduce_add_epi32(sum), in.far_offset[i] = (int32_t)(128 * far_sum);
}

template <int KIND> void write_line(const Input &in, long i, const float *x) {
    const long tile = ((i + 1) * in.tiles() - 1) / in.count, first = in.first(tile), lines = in.first(tile + 1) - first;
    int32_t *to = in.line<KIND>(first) + (i - first);
    if constexpr (KIND == INT8 && INT8_QUADS) quantise(in, i, x, to, lines);
#ifdef __AVX512BF16__
    else if constexpr (group(KIND) == 2)
        for (long k = 0; k < in.width; k += 16) {
            alignas(32) int32_t pairs[8];
            _mm256_store_si256((__m256i *)pairs, (__m256i)_mm512_cvtneps_pbh(load(x + k)));
            for (int j = 0; j < 8; j++) to[(k / 2 + j) * lines] = pairs[j];
        }
#endif
    else
        for (long k = 0; k < in.width; k++) std::memcpy(to + k * lines, x + k, 4);
}

// ---- kernels -----------------------------------------------------------------------------------------------------
// The g-th of a group of weights as floats, for processors that do not multiply the kind as it is stored.
template <int KIND> inline Vec widen(__m512i v, int g) {
    if (KIND == F32) return (Vec)v;
    if (group(KIND) == 2) return (Vec)(g ? _mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(v, 16));
    const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(v, 8 * g), _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(byte, _mm512_set1_epi32(128)));
}

// sum + weights times inputs, in each of 16 lanes. A sum keeps the type that its instruction gives: with any other, gcc 12
// copies it in every turn, at up to three times the cost.
typedef int32_t Ints __attribute__((vector_size(64)));
inline Vec add_product(Vec sum, Vec w, __m512i x) { return _mm512_fmadd_ps(w, (Vec)x, sum); }
#ifdef __AVX512BF16__
inline Vec add_product(Vec sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
#endif
#ifdef __AVX512VNNI__
inline Ints add_product(Ints sum, __m512i w, __m512i x) { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, w, x); }
#endif
template <int KIND> using Sum = std::conditional_t<KIND == INT8 && INT8_QUADS, Ints, Vec>;

// What is fetched into the second cache while something else is multiplied: from `at` on, `stride` bytes a turn.
struct Fetch {
    const char *at;
    long stride;
};

// result[r] = a panel's 32 rows times line r, for the R lines of a tile. Fetches weights NEAR bytes ahead into the first
// cache; tiles of more than a few lines have time for two other streams, compact ones of few for none. Of a compact panel
// the unpacked form is kept in `copy` unless it is null.
template <int KIND, int R>
void multiply(const char *w, long steps, const int32_t *a, std::span<const Rest> rest, char *copy, Fetch next, Fetch later,
              Sum<KIND> (*result)[2]) {
    Sum<KIND> sum[R][2];  // its own, so that it stays in registers
    for (auto &s : sum) s[0] = s[1] = Sum<KIND>{};
    const auto add = [&](auto low, auto high) {
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const __m512i x = _mm512_set1_epi32(a[r]);
            sum[r][0] = add_product(sum[r][0], low, x);
            sum[r][1] = add_product(sum[r][1], high, x);
        }
        a += R;
    };
    const auto add_step = [&](__m512i low, __m512i high) {
        if constexpr (narrow(KIND)) add(low, high);
        else
            for (int g = 0; g < words(KIND); g++) add(widen<KIND>(low, g), widen<KIND>(high, g));
    };
    const auto fetch = [&] {
        for (long k = 0; k < turn(KIND); k += 64) _mm_prefetch(w + NEAR + k, _MM_HINT_T0);
        if (R > 4 || KIND != COMPACT) {
            for (long k = 0; k < turn(KIND); k += 64) _mm_prefetch(next.at + k, _MM_HINT_T1);
            next.at += next.stride;
        }
        if (R > 4 && later.at) {
            for (long k = 0; k < 128; k += 64) _mm_prefetch(later.at + k, _MM_HINT_T1);
            later.at += later.stride;
        }
        w += turn(KIND);
    };
    const int32_t *first = a;
    _mm_prefetch(rest.data(), _MM_HINT_T0);
    if constexpr (KIND == COMPACT) {
        const Exponents exponents(w);
        w += 64;
        for (long i = 0; i < steps; i += 2) {
            __m512i four[4];
            exponents.unpack(w, four);
            if (copy)
                for (int j = 0; j < 4; j++, copy += 64) _mm512_store_si512(copy, four[j]);
            fetch();
            add_step(four[0], four[1]);
            add_step(four[2], four[3]);
        }
    } else
        for (long i = 0; i < steps; i++) {
            const __m512i low = _mm512_load_si512(w), high = _mm512_load_si512(w + 64);
            fetch();
            add_step(low, high);
        }
    if constexpr (group(KIND) == 2)
        for (const Rest &one : rest) {
            a = first + one.step * words(KIND) * R;
            add_step(one.of_rows(0), one.of_rows(16));
        }
    for (int r = 0; r < R; r++) result[r][0] = sum[r][0], result[r][1] = sum[r][1];
}
template <int KIND>
constexpr decltype(&multiply<KIND, 1>) TILES[MOST] = {
    multiply<KIND, 1>, multiply<KIND, 2>, multiply<KIND, 3>, multiply<KIND, 4>,  multiply<KIND, 5>,  multiply<KIND, 6>,
    multiply<KIND, 7>, multiply<KIND, 8>, multiply<KIND, 9>, multiply<KIND, 10>, multiply<KIND, 11>, multiply<KIND, 12>};

// out = what the sums of line i stand for: in int8 with its scale and far values
inline void interpret(const char *, const Input &, long, const Vec (&sum)[2], Vec (&out)[2]) { out[0] = sum[0], out[1] = sum[1]; }
#ifdef __AVX512VNNI__
inline void interpret(const char *w, const Input &in, long i, const Ints (&sum)[2], Vec (&out)[2]) {
    Ints far[2] = {Ints{} - in.far_offset[i], Ints{} - in.far_offset[i]};
    const Far *f = in.far_of(i);
    for (long n = in.far_count[i]; n > 0; n--, f++)
        for (int h = 0; h < 2; h++)
            far[h] = add_product(far[h], _mm512_load_si512(w + f->step * 128L + 64 * h), _mm512_set1_epi32(f->digits));
    for (int h = 0; h < 2; h++) {
        const Vec near = _mm512_cvtepi32_ps((__m512i)(sum[h] - in.offset[i])), apart = _mm512_cvtepi32_ps((__m512i)far[h]);
        out[h] = _mm512_fmadd_ps(apart, all(in.far_scale[i]), _mm512_mul_ps(near, all(in.scale[i])));
    }
}
#endif

// Memory that is read after some products: runs of `bytes` each, `offset` behind the addresses. Thought of as one, each
// thread will read its share of it, of which it fetches, while it multiplies its share of panels, from eleventh `from` to `to`.
struct Later {
    std::span<const char *const> addresses;
    long offset = 0, bytes = 1, threads = 1, from = 0, to = 0;
    Fetch part(long i, long n, long turns) const {
        const long share = (long)addresses.size() * bytes / threads, thread = threads * i / n;
        const long at = share * thread + share * (from * n + (to - from) * (threads * i - thread * n)) / (11 * n);
        return {addresses[at / bytes] + offset + at % bytes, std::min(share * threads * (to - from) / (11 * n * turns), 128L)};
    }
};

// One panel's 32 outputs for every line of `in`: out[line][panel * 32 ...], `stride` floats from line to line.
// Several tiles fetch the next panel between them, each its part, so that memory is never idle while they multiply
// (13 % of a step of 16 rows), and with it `later`; a single tile of many lines fetches far ahead (20 % at 8 rows), of few
// it need not. Only the first tile unpacks a compact panel, into `room`.
template <int KIND>
void product(const Matrix &m, const Input &in, long panel, float *out, long stride, Then then, char *room, const Later &later) {
    constexpr int AGAIN = KIND == COMPACT ? BF16 : KIND;
    const char *w = m.panel<KIND>(panel), *next = m.panel<KIND>(panel + 1);
    const long steps = m.width / group(KIND), n = in.tiles(), tiles = m.rows / PANEL * n;
    const std::span<const Rest> rest = KIND == COMPACT ? m.rest_in(panel) : std::span<const Rest>{};
    Sum<KIND> sum[MOST][2];
    for (long t = 0; t < n; t++) {
        const long first = in.first(t), end = in.first(t + 1), turns = t ? steps : steps * 128 / unpacked(KIND);
        const Fetch ahead = n > 1 ? Fetch{next + t * (next - w) / n, (next - w) / n / turns} : Fetch{w + (in.count > 4 ? FAR : NEAR), turn(KIND)};
        const Fetch after = n > 1 && !later.addresses.empty() ? later.part(panel * n + t, tiles, turns) : Fetch{nullptr, 0};
        const auto tile = (t ? TILES<AGAIN> : TILES<KIND>)[end - first - 1];
        tile(t && KIND == COMPACT ? room : w, steps, in.line<KIND>(first), rest, n > 1 ? room : nullptr, ahead, after, sum);
        for (long i = first; i < end; i++) {
            Vec v[2];
            interpret(w, in, i, sum[i - first], v);
            for (int h = 0; h < 2; h++) {
                const long n = panel * PANEL + 16 * h;
                float *to = out + i * stride + n;
                if (KIND == INT8) v[h] = _mm512_mul_ps(v[h], load(m.scale + n));
                if (m.bias) v[h] = _mm512_add_ps(v[h], load(m.bias + n));
                if (then == ADD) v[h] = _mm512_add_ps(v[h], load(to));
                if (then == GELU) v[h] = gelu(v[h]);
                if (then == GELU_NEW) v[h] = gelu_new(v[h]);
                store(to, v[h]);
            }
        }
    }
}

// out = row `row` of the matrix as floats: how a token is looked up in the head's own weights, kept once
template <int KIND> void read_row(const Matrix &m, long row, float *out) {
    constexpr long G = group(KIND);
    const char *w = m.panel<KIND>(row / PANEL);
    if constexpr (KIND == COMPACT) {
        const Exponents exponents(w);
        const long lane = row % PANEL / 16 * 32 + row % 16 * 2;  // of 64, its first
        for (long k = 0; k < m.width; k += 4) {
            __m512i four[4];
            alignas(64) uint16_t bits[128];
            exponents.unpack(w + 64 + k * 48, four);
            for (int i = 0; i < 4; i++) _mm512_store_si512(bits + 32 * i, four[i]);
            for (int g = 0; g < 4; g++) {
                const uint32_t wide = (uint32_t)bits[g / 2 * 64 + lane + g % 2] << 16;
                std::memcpy(out + k + g, &wide, 4);
            }
        }
        for (const Rest &one : m.rest_in(row / PANEL))
            if (one.row == row % PANEL)
                for (int g = 0; g < 2; g++) {
                    const uint32_t wide = g ? one.pair & 0xffff0000 : one.pair << 16;
                    if (wide) std::memcpy(out + 2 * one.step + g, &wide, 4);
                }
        return;
    }
    w += row % PANEL * 4;
    for (long k = 0; k < m.width; k++) {
        const char *at = w + k / G * 128 + k % G * (4 / G);
        uint32_t bits = 0;
        if constexpr (KIND == INT8) out[k] = ((uint8_t)*at - 128) * m.scale[row];
        else std::memcpy((char *)&bits + 4 - 4 / G, at, 4 / G), std::memcpy(out + k, &bits, 4);
    }
}
