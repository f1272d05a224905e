// Packed weights times activation rows: the kernels where nearly all the time goes.
//
// Weights W[rows][width] lie in panels of 32 rows, so that a thread reads one sequential stream:
//   [rows/32][width/G][32][G] with G = 1 float, 2 bfloat16 or 4 bytes (q + 128, one scale for each row);
//   bfloat16 mostly in 12 bits, see compact.h, from which the same registers are filled.
// A step is 128 bytes: for 32 outputs, the 4 bytes that G neighbouring inputs meet.
// The order of additions of an output is the same in every tile: a row's result never depends on the other rows.
#pragma once
#include <span>
#include <type_traits>

#include "activations.h"
#include "compact.h"

enum Then { STORE, ADD, GELU, GELU_NEW };  // what happens to a product: written, added to what is there, or through gelu

constexpr long PANEL = 32;  // rows that lie together
constexpr long NEAR = 4096, FAR = 12288;  // bytes that the stream of weights is fetched ahead, see product()

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
// cache, and `next`: of few lines the same once more, for what was dropped because too much was under way (one row on one
// thread 1.03 to 1.07 times as fast, on two 1.02). Tiles of more have time for a third stream.
template <int KIND, int R>
void multiply(const char *w, long steps, const int32_t *a, std::span<const Rest> rest, Fetch next, Fetch later,
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
        for (long k = 0; k < turn(KIND); k += 64) _mm_prefetch(next.at + k, _MM_HINT_T1);
        next.at += next.stride;
        if (R > 4 && later.at) {
            for (long k = 0; k < 128; k += 64) _mm_prefetch(later.at + k, _MM_HINT_T1);
            later.at += later.stride;
        }
        w += turn(KIND);
    };
    const int32_t *first = a;
    _mm_prefetch(rest.data(), _MM_HINT_T0);
    if constexpr (KIND == COMPACT) {
        const HighBytes high(w);
        w += 64;
        for (long i = 0; i < steps; i += 2) {
            __m512i four[4];
            high.unpack(w, four);
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
// thread will read its share of it, of which it fetches, while it multiplies its share of panels, from twelfth `from` to `to`.
struct Later {
    std::span<const char *const> addresses;
    long offset = 0, bytes = 1, threads = 1, from = 0, to = 0;
    Fetch part(long i, long n, long turns) const {
        const long share = (long)addresses.size() * bytes / threads, thread = threads * i / n;
        const long at = share * thread + share * (from * n + (to - from) * (threads * i - thread * n)) / (12 * n);
        return {addresses[at / bytes] + offset + at % bytes, std::min(share * threads * (to - from) / (12 * n * turns), 128L)};
    }
};

// Where a product goes, `stride` floats from line to line; or, if `next` is given, to the activations of the next product.
struct Output {
    float *at;
    long stride;
    Then then;
    const Input *next = nullptr;

    // Fetch, to be written, where a tile's outputs of a panel go, whose lines another core has read or written last, while
    // the tile is multiplied: prompts are 1.03 times as fast. (A call of its own gcc 12 leaves out, as one without effect.)
    template <int KIND> [[gnu::always_inline]] void fetch(long panel, long first, long lines) const {
        if (alone(KIND) && next)
            for (long k = 0; k < 16 * lines; k += 16) __builtin_prefetch(next->line<KIND>(first) + panel * 16 * lines + k, 1);
        else
            for (long k = 0; k < 2 * lines; k++) __builtin_prefetch(at + (first + k / 2) * stride + panel * PANEL + k % 2 * 16, 1);
    }
};

// One panel's 32 outputs for every line of `in`: before(first, lines) ahead of each tile, then use(i, first, lines, sums) with
// each of its lines.
// Several tiles fetch the next panel between them, each its part, so that memory is never idle while they multiply
// (13 % of a step of 16 rows), and with it `later`; a single tile of many lines fetches far ahead (20 % at 8 rows, 10 % at 4
// in 12 bits), of few it need not.
template <int KIND, class Before, class Use>
void multiply_panel(const Matrix &m, const Input &in, long panel, const Later &later, Before before, Use use) {
    const char *w = m.panel<KIND>(panel), *next = m.panel<KIND>(panel + 1);
    const long steps = m.width / group(KIND), n = in.tiles(), tiles = m.rows / PANEL * n;
    const std::span<const Rest> rest = KIND == COMPACT ? m.rest_in(panel) : std::span<const Rest>{};
    Sum<KIND> sum[MOST][2];
    for (long t = 0; t < n; t++) {
        const long first = in.first(t), end = in.first(t + 1), turns = steps * 128 / unpacked(KIND);
        const Fetch ahead = n > 1 ? Fetch{next + t * (next - w) / n, (next - w) / n / turns} : Fetch{w + (in.count > (KIND == COMPACT ? 2 : 4) ? FAR : NEAR), turn(KIND)};
        const Fetch after = n > 1 && !later.addresses.empty() ? later.part(panel * n + t, tiles, turns) : Fetch{nullptr, 0};
        before(first, end - first);
        TILES<KIND>[end - first - 1](w, steps, in.line<KIND>(first), rest, ahead, after, sum);
        for (long i = first; i < end; i++) {
            Vec v[2];
            interpret(w, in, i, sum[i - first], v);
            use(i, first, end - first, v);
        }
    }
}

// One panel's 32 outputs for every line of `in`, where they belong.
template <int KIND>
void product(const Matrix &m, const Input &in, long panel, const Output &out, const Later &later) {
    const auto before = [&](long first, long lines) { out.fetch<KIND>(panel, first, lines); };
    multiply_panel<KIND>(m, in, panel, later, before, [&](long i, [[maybe_unused]] long first, [[maybe_unused]] long lines, Vec (&v)[2]) {
        for (int h = 0; h < 2; h++) {
            const long n = panel * PANEL + 16 * h;
            float *to = out.at + i * out.stride + n;
            if (KIND == INT8) v[h] = _mm512_mul_ps(v[h], load(m.scale + n));
            if (m.bias) v[h] = _mm512_add_ps(v[h], load(m.bias + n));
            if (out.then == ADD) v[h] = _mm512_add_ps(v[h], load(to));
            if (out.then == GELU) v[h] = gelu(v[h]);
            if (out.then == GELU_NEW) v[h] = gelu_new(v[h]);
            if (!alone(KIND) || !out.next) store(to, v[h]);
        }
#ifdef __AVX512BF16__
        if constexpr (alone(KIND))
            if (out.next) put<KIND>(*out.next, first, lines, i, panel * PANEL, v[0], v[1]);
#endif
    });
}

// out = row `row` of the matrix as floats: how a token is looked up in the head's own weights, kept once
template <int KIND> void read_row(const Matrix &m, long row, float *out) {
    constexpr long G = group(KIND);
    const char *w = m.panel<KIND>(row / PANEL);
    if constexpr (KIND == COMPACT) {
        const HighBytes high(w);
        const long lane = row % PANEL / 16 * 32 + row % 16 * 2;  // of 64, its first
        for (long k = 0; k < m.width; k += 4) {
            __m512i four[4];
            alignas(64) uint16_t bits[128];
            high.unpack(w + 64 + k * 48, four);
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
