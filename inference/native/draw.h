// Draw a token from a row of logits: what torch needs many calls and passes for, a few passes here.
// The rules are those of inference/sampling.py, which also says what they mean.
#pragma once
#include <algorithm>
#include <bit>
#include <iterator>
#include <vector>

#include "penalties.h"
#include "vector.h"

constexpr long GROUP = 64;  // neighbours whose greatest or sum is looked at first: most groups are never looked into

inline __mmask16 lanes(long i, long n) { return n - i >= 16 ? 0xffff : n > i ? (1 << (n - i)) - 1 : 0; }  // of i to i + 15
inline Vec logits_at(const float *z, long i, long n) { return _mm512_mask_loadu_ps(all(-INFINITY), lanes(i, n), z + i); }
inline __mmask16 at_least(Vec x, float least) { return _mm512_cmp_ps_mask(x, all(least), _CMP_GE_OQ); }

// Room for one row at a time.
struct DrawRoom {
    struct Entry { float value; long id; };
    struct alignas(64) Line { float at[16]; };
    std::vector<float> peaks, order;  // of the groups, as they lie; numbers to find the least that matters
    std::vector<float> raw;  // what penalties have changed
    std::vector<Entry> found;
    std::vector<Line> lines, some;  // the weights of a row, and those among which top_p is reached
    std::vector<double> masses;     // of the groups
    float *weights() { return lines[0].at; }
    long size() const { return lines.size() * 16; }  // of weights: whole groups
};

// The greatest of n logits, NaN left out; -inf where there are none.
inline float peak(const float *z, long n) {
    Vec most[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};  // max_ps gives the second for NaN
    for (long i = 0; i < n; i += GROUP)
        for (long k = 0; k < 4; k++) most[k] = _mm512_max_ps(logits_at(z, i + 16 * k, n), most[k]);
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
}

// Leave in `room.found` the `count` greatest of z[0..n) and where they are, falling, equals by rising place; NaN is left
// out, and there are fewer if there are not so many numbers.
inline void find_greatest(const float *z, long n, long count, DrawRoom &room) {
    const long groups = (n + GROUP - 1) / GROUP;
    room.peaks.resize(groups);
    for (long g = 0; g < groups; g++) room.peaks[g] = peak(z + g * GROUP, std::min(GROUP, n - g * GROUP));
    float least = -INFINITY;
    if (count <= groups) room.order = room.peaks;  // at least `count` numbers reach the count-th greatest peak
    else room.order.clear(), std::copy_if(z, z + n, std::back_inserter(room.order), [](float x) { return x == x; });
    if (count <= (long)room.order.size()) {
        std::nth_element(room.order.begin(), room.order.begin() + count - 1, room.order.end(), std::greater<>());
        least = room.order[count - 1];
    }
    room.found.clear();
    for (long g = 0; g < groups; g++) {
        if (room.peaks[g] < least) continue;
        for (long i = g * GROUP; i < (g + 1) * GROUP; i += 16)
            for (unsigned left = lanes(i, n) & at_least(logits_at(z, i, n), least); left; left &= left - 1)
                room.found.push_back({z[i + __builtin_ctz(left)], i + __builtin_ctz(left)});
    }
    const long here = std::min<long>(count, room.found.size());
    std::partial_sort(room.found.begin(), room.found.begin() + here, room.found.end(), [](const auto &a, const auto &b) {
        return a.value > b.value || (a.value == b.value && a.id < b.id);
    });
    room.found.resize(here);
}

struct Knobs { double u, temperature, top_p, min_p, top_k; };  // u: the random number, from 0 to 1

constexpr long SPARE = 8;  // logits beyond top_k that are looked at, to see that none of them ties with the k-th
constexpr long FEW_LEFT = 64;  // weights among which top_p is reached, few enough to sort
constexpr long UNSETTLED = -1, UNSOUND = -2;

// Where the sum of n weights passes `target`; the last one that has weight if rounding never lets it.
template <class T> long place(const T *weights, long n, double target) {
    long last = 0;
    double sum = 0;
    for (long i = 0; i < n; i++) {
        if ((sum += weights[i]) > target) return i;
        if (weights[i] > 0) last = i;
    }
    return last;
}
inline double below(double part, double mass) { return std::min(part * mass, std::nextafter(mass, 0.0)); }

// Draw from room.found, what top_p and min_p cut left out, in its order.
inline long draw_found(const Knobs &knobs, DrawRoom &room) {
    auto &weights = room.masses;
    weights.clear();
    double total = 0, before = 0, mass = 0;
    for (const auto &entry : room.found) {
        weights.push_back(std::exp(((double)entry.value - room.found[0].value) / knobs.temperature));
        total += weights.back();
    }
    for (double &w : weights) {  // the greatest always stays
        const bool gone = &w != &weights[0] && ((knobs.top_p < 1 && before >= knobs.top_p * total) || w < knobs.min_p);
        before += w;
        if (gone) w = 0;
        mass += w;
    }
    return room.found[place(weights.data(), weights.size(), below(knobs.u, mass))].id;
}

// Draw from the top_k greatest, and those that tie with the last of them.
inline long draw_top(const float *z, long n, const Knobs &knobs, DrawRoom &room) {
    const long k = std::min<long>(knobs.top_k, n);
    find_greatest(z, n, std::min(k + SPARE, n), room);
    auto &found = room.found;
    if (found.empty() || !std::isfinite(found[0].value)) return UNSOUND;
    const long here = found.size();
    const float least = found[std::min(k, here) - 1].value;
    if (here < n && found[here - 1].value == least) return UNSETTLED;
    while (found.back().value < least) found.pop_back();
    return draw_found(knobs, room);
}

// Fill room.weights with e^((z - best) / temperature), 0 past the end, and room.masses with the sum of each group; return
// the sum of all. Sums of few are kept in float, those of many in double.
inline double weigh(const float *z, long n, float best, float temperature, DrawRoom &room) {
    const long groups = (n + GROUP - 1) / GROUP;
    double total = 0;
    room.lines.resize(groups * GROUP / 16), room.masses.resize(groups);
    for (long g = 0; g < groups; g++) {
        Vec sum = _mm512_setzero_ps();
        for (long i = g * GROUP; i < (g + 1) * GROUP; i += 16) {
            const Vec x = _mm512_div_ps(_mm512_sub_ps(logits_at(z, i, n), all(best)), all(temperature));
            const Vec w = exponential(x);
            store(room.weights() + i, w), sum = _mm512_add_ps(sum, w);
        }
        total += room.masses[g] = _mm512_reduce_add_ps(sum);
    }
    return total;
}

// Draw by room.weights and room.masses, whose sum is `mass`: first the group, then the token in it.
inline long draw_weight(double u, double mass, DrawRoom &room) {
    double target = below(u, mass);
    const long group = place(room.masses.data(), room.masses.size(), target);
    for (long g = 0; g < group; g++) target -= room.masses[g];
    return group * GROUP + place(room.weights() + group * GROUP, GROUP, target);
}

// What of n weights, whole groups, reaches `least`: how many, and their sum.
struct Part { long count; double mass; };
inline Part part_from(const float *w, long n, float least) {
    Part part{};
    __m512d low = _mm512_setzero_pd(), high = low;
    for (long i = 0; i < n; i += GROUP) {
        Vec sum = _mm512_setzero_ps();
        for (long k = i; k < i + GROUP; k += 16) {
            const __mmask16 in = at_least(load(w + k), least);
            sum = _mm512_add_ps(sum, _mm512_maskz_mov_ps(in, load(w + k))), part.count += __builtin_popcount(in);
        }
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1)));
    }
    part.mass = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    return part;
}

// Keep of n weights, whole groups, those from `least` to below `limit`, in their order and filled up with zeros to whole
// groups; `to` may be `w`. Return their number.
inline long keep_between(const float *w, long n, float least, float limit, float *to) {
    long kept = 0;
    for (long i = 0; i < n; i += 16) {
        const Vec x = load(w + i);
        const __mmask16 in = at_least(x, least) & _mm512_cmp_ps_mask(x, all(limit), _CMP_LT_OQ);
        store(to + kept, _mm512_maskz_compress_ps(in, x)), kept += __builtin_popcount(in);
    }
    std::fill(to + kept, to + (kept + GROUP - 1) / GROUP * GROUP, 0.f);
    return kept;
}

struct Border { float least; long ties; };  // weights above `least` stay, and the first `ties` of its equals

// Find where the falling weights of a row reach `goal`, at `low` or above it: halves the weights in question by their
// bits, which are in the order of the weights, and drops what is settled as soon as that is half.
inline Border border(double goal, float low, DrawRoom &room) {
    constexpr auto value = [](uint32_t bits) { return std::bit_cast<float>(bits); };
    uint32_t least = std::bit_cast<uint32_t>(low), limit = std::bit_cast<uint32_t>(1.f) + 1;
    const float *w = room.weights();
    long size = room.size(), count = size;  // of w, and at most so many reach `least`
    Part above{};                           // what of w reaches `limit`
    double before = 0;                      // the mass of greater ones that were dropped
    room.some.resize(room.lines.size());
    const auto narrow = [&] {
        count = keep_between(w, size, value(least), value(limit), room.some[0].at);
        w = room.some[0].at, size = (count + GROUP - 1) / GROUP * GROUP, before += above.mass, above = {};
    };
    while (limit - least > 1 && count - above.count > FEW_LEFT) {
        if (2 * (count - above.count) <= size) narrow();
        const uint32_t middle = least + (limit - least) / 2;
        const Part part = part_from(w, size, value(middle));
        if (before + part.mass >= goal) least = middle, count = part.count;
        else limit = middle, above = part;
    }
    narrow();
    if (limit - least > 1) std::sort(room.some[0].at, room.some[0].at + count, std::greater<>());  // else all are equal
    Border found{value(least), 0};
    for (long i = 0; i < count && before < goal; before += w[i++])
        found = {w[i], i && w[i] == found.least ? found.ties + 1 : 1};
    return found;
}

// Put the weights of a row beyond the border at 0; return the mass of the rest.
inline double cut(Border border, DrawRoom &room) {
    double total = 0;
    for (long g = 0; g < (long)room.masses.size(); g++) {
        Vec sum = _mm512_setzero_ps();
        for (float *w = room.weights() + g * GROUP; w < room.weights() + (g + 1) * GROUP; w += 16) {
            const Vec x = load(w);
            unsigned ties = _mm512_cmp_ps_mask(x, all(border.least), _CMP_EQ_OQ);
            while (__builtin_popcount(ties) > border.ties) ties &= ~(1u << (31 - __builtin_clz(ties)));
            border.ties -= __builtin_popcount(ties);
            const Vec kept = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(border.least), _CMP_GT_OQ) | ties, x);
            store(w, kept), sum = _mm512_add_ps(sum, kept);
        }
        total += room.masses[g] = _mm512_reduce_add_ps(sum);
    }
    return total;
}

// Draw from all of a row but for what top_p and min_p cut, by place.
inline long draw_any(const float *z, long n, const Knobs &knobs, DrawRoom &room) {
    const float best = peak(z, n);
    if (!std::isfinite(best)) return UNSOUND;
    double mass = weigh(z, n, best, knobs.temperature, room);
    if (!std::isfinite(mass)) return UNSOUND;  // one is NaN
    Border least{(float)knobs.min_p, n};
    if (knobs.top_p < 1) {
        // weights below this are less than half of what may be cut, all together
        const double low = (1 - knobs.top_p) * mass / n / 2;
        const Border found = border(std::max(knobs.top_p * mass, 1e-9), low, room);  // the greatest always stays
        if (found.least >= least.least) least = found;
    }
    if (least.least > 0) mass = cut(least, room);
    return draw_weight(knobs.u, mass, room);
}

// Return the token drawn from a row of n logits; UNSETTLED where it takes a look at more of them than is taken here,
// UNSOUND where the greatest is no finite number.
inline long draw(const float *z, long n, const Knobs &knobs, DrawRoom &room) {
    return knobs.top_k > 0 ? draw_top(z, n, knobs, room) : draw_any(z, n, knobs, room);
}
