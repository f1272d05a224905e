// Attention over the cache. Keys lie as [head][span/16][size][16], so that 16 positions' scores grow in one vector with no
// sum across it; values as [head][span][size]. Up to 4 neighbouring rows of a sequence share each key and value read.
#pragma once
#include "vector.h"

constexpr int NEIGHBOURS = 4;

// The keys and values of one head of one sequence, in floats or half precision.
template <class E> struct Head {
    E *keys, *values;
    long size;
    // Store 16 of this head's numbers, from `at` on, of a key or of a value.
    void store_key(long position, long at, const float *x) const {
        E *to = keys + position / 16 * 16 * size + at * 16 + position % 16, block[16];
        store(block, load(x));
        for (int i = 0; i < 16; i++) to[i * 16] = block[i];
    }
    void store_value(long position, long at, const float *x) const { store(values + position * size + at, load(x)); }
};

// scores[r][t] = q[r] . key t / sqrt(size) for t up to position + r, and -infinity to the next multiple of 64
template <class E, int R>
void score(const Head<E> &head, float *const (&q)[R], long position, float *const (&scores)[R]) {
    const Vec scale = all(1.f / std::sqrt((float)head.size));
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (long t = 0; t < position + R; t += 64) {
        Vec sum[R][4];
        for (auto &s : sum) s[0] = s[1] = s[2] = s[3] = _mm512_setzero_ps();
        const E *k = head.keys + t * head.size;
        for (long d = 0; d < head.size; d++)
            for (int j = 0; j < 4; j++) {
                const Vec key = load(k + (j * head.size + d) * 16);
                for (int r = 0; r < R; r++) sum[r][j] = _mm512_fmadd_ps(all(q[r][d]), key, sum[r][j]);
            }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 4; j++) {
                const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32((int)(t + 16 * j)));
                const __mmask16 live = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32((int)position + r));
                store(scores[r] + t + 16 * j, _mm512_mask_mul_ps(all(-INFINITY), live, sum[r][j], scale));
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
    const auto add = [&](long t, int r) {
        for (int j = 0; j < J; j++)
            sum[r][j] = _mm512_fmadd_ps(all(weights[r][t]), load(head.values + t * head.size + at + 16 * j), sum[r][j]);
    };
    for (long t = 0; t <= position; t++)
        for (int r = 0; r < R; r++) add(t, r);
    for (int late = 1; late < R; late++)  // what only the later rows see, so that not even a NaN reaches the earlier ones
        for (int r = late; r < R; r++) add(position + late, r);
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
