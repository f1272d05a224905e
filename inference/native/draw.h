// Draw a token from a row of logits: what torch needs twenty calls and some passes for, one or two passes here.
// The rules are those of inference/sampling.py, which also says what they mean.
#pragma once
#include <algorithm>
#include <span>
#include <vector>

#include "vector.h"

constexpr long GROUP = 64;  // neighbours whose greatest is looked at first: most groups are never looked into

inline __mmask16 lanes(long i, long n) { return n - i >= 16 ? 0xffff : n > i ? (1 << (n - i)) - 1 : 0; }  // of i to i + 15

// Room for one row at a time.
struct DrawRoom {
    struct Entry { float value; long id; };
    std::vector<float> peaks, order;  // of the groups: as they lie, and to find the least that matters
    std::vector<Entry> found;
    std::vector<double> weights;
};

// Leave in `room.found` the `count` greatest of z[0..n) and where they are, falling, equals by rising place; NaN is left
// out, and there are fewer if there are not so many numbers.
inline void find_greatest(const float *z, long n, long count, DrawRoom &room) {
    const long groups = (n + GROUP - 1) / GROUP;
    room.peaks.resize(groups);
    for (long g = 0; g < groups; g++) {
        Vec most = all(-INFINITY);  // max_ps gives its second operand for NaN
        for (long i = g * GROUP; i < (g + 1) * GROUP; i += 16)
            most = _mm512_max_ps(_mm512_mask_loadu_ps(all(-INFINITY), lanes(i, n), z + i), most);
        room.peaks[g] = _mm512_reduce_max_ps(most);
    }
    float least = -INFINITY;  // at least `count` numbers reach the count-th greatest peak
    if (count <= groups) {
        room.order = room.peaks;
        std::nth_element(room.order.begin(), room.order.begin() + count - 1, room.order.end(), std::greater<>());
        least = room.order[count - 1];
    }
    room.found.clear();
    for (long g = 0; g < groups; g++) {
        if (room.peaks[g] < least) continue;
        for (long i = g * GROUP; i < (g + 1) * GROUP; i += 16) {
            const Vec x = _mm512_mask_loadu_ps(all(-INFINITY), lanes(i, n), z + i);
            for (unsigned left = _mm512_mask_cmp_ps_mask(lanes(i, n), x, all(least), _CMP_GE_OQ); left; left &= left - 1)
                room.found.push_back({z[i + __builtin_ctz(left)], i + __builtin_ctz(left)});
        }
    }
    const long here = std::min<long>(count, room.found.size());
    std::partial_sort(room.found.begin(), room.found.begin() + here, room.found.end(), [](const auto &a, const auto &b) {
        return a.value > b.value || (a.value == b.value && a.id < b.id);
    });
    room.found.resize(here);
}

struct Knobs { double u, temperature, top_p, min_p, top_k; };  // u: the random number, from 0 to 1

constexpr long SPARE = 8;   // logits beyond top_k that are looked at, to see that none of them ties with the k-th
constexpr long TAIL = 256;  // logits that are looked at where top_p or min_p cut the tail without top_k
constexpr long UNSETTLED = -1, UNSOUND = -2;

// Where the sum of falling or other weights passes `target`; the last one that has weight if rounding never lets it.
template <class Weights> long place(const Weights &weights, double target) {
    long last = 0;
    double sum = 0;
    for (long i = 0; i < (long)weights.size(); i++) {
        if ((sum += weights[i]) > target) return i;
        if (weights[i] > 0) last = i;
    }
    return last;
}
inline double below(double part, double mass) { return std::min(part * mass, std::nextafter(mass, 0.0)); }

// Draw from the first `count` of room.found, what top_p and min_p cut left out; `total` is the mass of the row, 0: theirs.
// UNSETTLED where they are not `whole` and nothing was cut, so that others may have a chance.
inline long draw_found(long count, bool whole, double total, const Knobs &knobs, DrawRoom &room) {
    auto &weights = room.weights;
    weights.clear();
    for (long i = 0; i < count; i++)
        weights.push_back(std::exp(((double)room.found[i].value - room.found[0].value) / knobs.temperature));
    if (total == 0) for (double w : weights) total += w;
    double before = 0, mass = 0;
    for (double &w : weights) {  // the greatest always stays
        const bool gone = &w != &weights[0] && ((knobs.top_p < 1 && before >= knobs.top_p * total) || w < knobs.min_p);
        before += w;
        if (gone) w = 0, whole = true;
        mass += w;
    }
    return whole ? room.found[place(weights, below(knobs.u, mass))].id : UNSETTLED;
}

// e^((z - best) / temperature) of 16 logits, 0 past the end
inline Vec weights_of(const float *z, long i, long n, Vec best, Vec temperature) {
    const Vec x = _mm512_mask_loadu_ps(all(-INFINITY), lanes(i, n), z + i);
    return exponential(_mm512_div_ps(_mm512_sub_ps(x, best), temperature));
}

// Return the mass of a row, and leave that of each group in room.weights.
inline double masses(const float *z, long n, Vec best, Vec temperature, DrawRoom &room) {
    double total = 0;
    room.weights.clear();
    for (long g = 0; g < n; g += GROUP) {
        Vec sum = _mm512_setzero_ps();
        for (long i = g; i < g + GROUP; i += 16) sum = _mm512_add_ps(sum, weights_of(z, i, n, best, temperature));
        room.weights.push_back(_mm512_reduce_add_ps(sum)), total += room.weights.back();
    }
    return total;
}

// Draw from all of a row: first the group, then the token in it.
inline long draw_any(const float *z, long n, double total, Vec best, Vec temperature, double u, DrawRoom &room) {
    double target = below(u, total);
    const long group = place(room.weights, target);
    for (long g = 0; g < group; g++) target -= room.weights[g];
    float inside[GROUP];
    for (long i = 0; i < GROUP; i += 16) store(inside + i, weights_of(z, group * GROUP + i, n, best, temperature));
    return group * GROUP + place(std::span(inside), target);
}

// Return the token drawn from a row of n logits; UNSETTLED where it takes a look at more of them than is taken here,
// UNSOUND where the greatest is no finite number.
inline long draw(const float *z, long n, const Knobs &knobs, DrawRoom &room) {
    const bool limited = knobs.top_k > 0, cut = knobs.top_p < 1 || knobs.min_p > 0;
    const long k = limited ? std::min<long>(knobs.top_k, n) : cut ? std::min(TAIL, n) : 1;
    find_greatest(z, n, limited ? std::min(k + SPARE, n) : k, room);
    const auto &found = room.found;
    if (found.empty() || !std::isfinite(found[0].value)) return UNSOUND;
    const long here = found.size();
    if (limited) {
        const float least = found[std::min(k, here) - 1].value;
        if (here < n && found[here - 1].value == least) return UNSETTLED;
        long count = std::min(k, here);
        while (count < here && found[count].value == least) count++;
        return draw_found(count, true, 0, knobs, room);
    }
    const Vec best = all(found[0].value), temperature = all(knobs.temperature);
    const double total = masses(z, n, best, temperature, room);
    return cut ? draw_found(here, here == n, total, knobs, room) : draw_any(z, n, total, best, temperature, knobs.u, room);
}
