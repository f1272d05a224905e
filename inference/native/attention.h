// Attention over the cache.
//
// The cache is cut into blocks of 32 positions: [slot][block][layer][head][key, value][32 positions], so that a short
// sequence touches little memory although the pages are large (1.2 MB for each 32 positions of GPT-2's smallest), and few
// keys are read that are not there yet (blocks of 64: 5 % of a step of 16 rows at 64 or 130 positions).
// Values lie position by position. Keys lie in groups of four numbers by four positions, [size / 4][16][4][4]: a vector
// holds 4 numbers of 4 positions, scores grow without sums across it, and keys are read in one stream.
// Up to 4 neighbouring rows of a sequence share each key and value read.
#pragma once
#include "vector.h"

constexpr long NEIGHBOURS = 4, BLOCK = 32;

// One head's part of a sequence's blocks, floats or half precision.
template <class E> struct Head {
    E *first;             // its keys in the first block; the values follow
    long size, stride;    // of the head; from block to block
    long ahead = 0;       // from here to the head that is read next
    E *keys(long block) const { return first + block * stride; }
    E *values(long block) const { return keys(block) + BLOCK * size; }

    // Fetch what lies where `n` numbers do that are read now, but in the next head, into the second cache: decode reads
    // each head once, too little at once for the processor to see it coming (2 to 4 % of a step of 16 rows).
    [[gnu::always_inline]] void fetch_next(const E *now, long n) const {
        for (long i = 0; i < n; i += 64 / (long)sizeof(E)) _mm_prefetch((const char *)(now + ahead + i), _MM_HINT_T1);
    }

    // Store 16 of the head's numbers, from `at` on, of the key or value of a position.
    void store_key(long position, long at, const float *x) const {
        const long t = position % BLOCK, group = t / 16 * 4 + t % 4, lane = t % 16 / 4;
        E *to = keys(position / BLOCK) + at * BLOCK + group * 16 + lane * 4, four[16];
        store(four, load(x));
        for (int i = 0; i < 4; i++) std::memcpy(to + 4 * BLOCK * i, four + 4 * i, 4 * sizeof(E));
    }
    void store_value(long position, long at, const float *x) const {
        store(values(position / BLOCK) + position % BLOCK * size + at, load(x));
    }
};

// Sum each four neighbours of four vectors; the results of a's first four are the lanes 0, of its second four 4, ...
inline Vec sum_fours(Vec a, Vec b, Vec c, Vec d) {
    const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

// scores[r][t] = q[r] . key t / sqrt(size) for t up to position + r, and -infinity to the end of the block
template <class E, int R> void score(const Head<E> &head, float *const (&q)[R], long position, float *const (&scores)[R]) {
    constexpr int G = R <= 2 ? 8 : 4;  // groups of four positions at once: up to 16 sums
    const Vec scale = all(1.f / std::sqrt((float)head.size));
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (long t = 0; t < position + R; t += 4 * G) {
        Vec sum[R][G];
        for (auto &s : sum)
            for (auto &v : s) v = _mm512_setzero_ps();
        const E *key = head.keys(t / BLOCK) + t % BLOCK * 4;
        for (long d = 0; d < head.size; d += 4, key += 4 * BLOCK) {
            if (R == 1) head.fetch_next(key, 16 * G);
            Vec four[R];
            for (int r = 0; r < R; r++) four[r] = _mm512_broadcast_f32x4(_mm_loadu_ps(q[r] + d));
#pragma GCC unroll 16
            for (int g = 0; g < G; g++) {
                const Vec k = load(key + 16 * g);
                for (int r = 0; r < R; r++) sum[r][g] = _mm512_fmadd_ps(four[r], k, sum[r][g]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int g = 0; g < G; g += 4) {
                const Vec total = sum_fours(sum[r][g], sum[r][g + 1], sum[r][g + 2], sum[r][g + 3]);
                const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32((int)(t + 4 * g)));
                const __mmask16 live = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32((int)position + r));
                store(scores[r] + t + 4 * g, _mm512_mask_mul_ps(all(-INFINITY), live, total, scale));
            }
    }
}

// scores -> e^(score - greatest), in place; returns 1 / their sum
inline float soften(float *scores, long count) {
    Vec top = all(-INFINITY), sum = _mm512_setzero_ps();
    for (long t = 0; t < count; t += 16) top = _mm512_max_ps(top, load(scores + t));
    top = all(_mm512_reduce_max_ps(top));
    for (long t = 0; t < count; t += 16) {
        const Vec e = exponential(_mm512_sub_ps(load(scores + t), top));
        sum = _mm512_add_ps(sum, e);
        store(scores + t, e);
    }
    return 1.f / _mm512_reduce_add_ps(sum);
}

// out[r][16 J numbers from `at`] = the values up to position + r, weighted by weights[r], times inverse[r]
template <class E, int R, int J>
void mix(const Head<E> &head, long position, long at, float *const (&weights)[R], const float (&inverse)[R],
         float *const (&out)[R]) {
    Vec sum[R][J];
    for (auto &s : sum)
        for (auto &v : s) v = _mm512_setzero_ps();
    const auto add = [&](const E *value, long t, int from) {
        if (R == 1) head.fetch_next(value, 16 * J);
        for (int j = 0; j < J; j++) {
            const Vec v = load(value + 16 * j);
            for (int r = from; r < R; r++) sum[r][j] = _mm512_fmadd_ps(all(weights[r][t]), v, sum[r][j]);
        }
    };
    for (long t = 0; t <= position;) {
        const E *value = head.values(t / BLOCK) + at;
        for (const long end = std::min(t + BLOCK, position + 1); t < end; t++, value += head.size) add(value, t, 0);
    }
#pragma GCC unroll 4
    for (int late = 1; late < R; late++) {  // what only the later rows see: not even a NaN may reach the earlier ones
        const long t = position + late;
        add(head.values(t / BLOCK) + t % BLOCK * head.size + at, t, late);
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) store(out[r] + at + 16 * j, _mm512_mul_ps(sum[r][j], all(inverse[r])));
}

// Replace the query of R rows at position, position + 1, ... (stride floats apart) by what it attends to.
// `room` takes R * span floats.
template <class E, int R> void attend(const Head<E> &head, float *rows, long stride, long position, float *room, long span) {
    const long count = position + R;
    float *q[R], *weights[R], inverse[R];
    for (int r = 0; r < R; r++) q[r] = rows + r * stride, weights[r] = room + r * span;
    score<E, R>(head, q, position, weights);
    for (int r = 0; r < R; r++) inverse[r] = soften(weights[r], count);  // positions after its own weigh 0
    long at = 0;
    for (; at + 64 <= head.size; at += 64) mix<E, R, 4>(head, position, at, weights, inverse, q);
    for (; at + 32 <= head.size; at += 32) mix<E, R, 2>(head, position, at, weights, inverse, q);
    for (; at < head.size; at += 16) mix<E, R, 1>(head, position, at, weights, inverse, q);
}
