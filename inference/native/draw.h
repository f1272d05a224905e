// Draw a token from a row of logits: what torch needs many calls and passes for, a few passes here.
// The rules are those of inference/sampling.py, which also says what they mean.
#pragma once
#include <algorithm>
#include <bit>
#include <iterator>
#include <numbers>
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
    std::vector<float> sample;      // of the weights
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
constexpr long SAMPLE = 16;  // of so many groups one tells about where top_p is reached
constexpr float AROUND = 1.1f;  // by this factor less and more
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

// 2^t for t up to 0, to 2 units in the last place; 1 for 0, 0 far below it; NaN stays NaN. Cheaper than exponential(), as
// its t is scaled before: a polynomial of the least relative error in t - n, 2^n by scaling.
inline Vec power_of_two(Vec t) {
    t = _mm512_max_ps(all(-160.f), t);
    const Vec n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(t, n);
    Vec p = all(1.32647273e-3f);
    for (const float c : {9.67151273e-3f, 5.55073374e-2f, .240222421f, .693146978f, 1.f}) p = _mm512_fmadd_ps(p, r, all(c));
    return _mm512_scalef_ps(p, n);
}

// Fill room.weights with e^((z - best) / temperature), 0 past the end, and room.masses with the sum of each group; return
// the sum of all. Sums of few are kept in float, those of many in double.
inline double weigh(const float *z, long n, float best, double temperature, DrawRoom &room) {
    const Vec scale = all(std::numbers::log2e / temperature);
    const long groups = (n + GROUP - 1) / GROUP;
    double total = 0;
    room.lines.resize(groups * GROUP / 16), room.masses.resize(groups);
    for (long g = 0; g < groups; g++) {
        Vec sum = _mm512_setzero_ps();
        for (long i = g * GROUP; i < (g + 1) * GROUP; i += 16) {
            const Vec w = power_of_two(_mm512_mul_ps(_mm512_sub_ps(logits_at(z, i, n), all(best)), scale));
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

// A sum of floats, kept in double.
struct Total {
    __m512d low = _mm512_setzero_pd(), high = low;
    void add(Vec x) {
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    }
    operator double() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

// What of n weights, whole groups, reaches `least`: how many, and their sum.
struct Part { long count; double mass; };
inline Part part_from(const float *w, long n, float least) {
    long count = 0;
    Total mass;
    for (long i = 0; i < n; i += GROUP) {
        Vec sum = _mm512_setzero_ps();
        for (long k = i; k < i + GROUP; k += 16) {
            const __mmask16 in = at_least(load(w + k), least);
            sum = _mm512_add_ps(sum, _mm512_maskz_mov_ps(in, load(w + k))), count += __builtin_popcount(in);
        }
        mass.add(sum);
    }
    return {count, mass};
}

// Keep of n weights, whole groups, those from `least` to below `limit`, in their order and filled up with zeros to whole
// groups; `to` may be `w`. Return how many and their sum, how many there are with the zeros, and the sum above them.
struct Kept { long count, size; double mass, above; };
inline Kept keep_between(const float *w, long n, float least, float limit, float *to) {
    long kept = 0;
    Total mass, above;
    for (long i = 0; i < n; i += GROUP) {
        Vec within = _mm512_setzero_ps(), beyond = within;
        for (long k = i; k < i + GROUP; k += 16) {
            const Vec x = load(w + k);
            const __mmask16 over = at_least(x, limit), in = at_least(x, least) & ~over;
            within = _mm512_add_ps(within, _mm512_maskz_mov_ps(in, x));
            beyond = _mm512_add_ps(beyond, _mm512_maskz_mov_ps(over, x));
            store(to + kept, _mm512_maskz_compress_ps(in, x)), kept += __builtin_popcount(in);
        }
        mass.add(within), above.add(beyond);
    }
    const long size = (kept + GROUP - 1) / GROUP * GROUP;
    std::fill(to + kept, to + size, 0.f);
    return {kept, size, mass, above};
}

struct Border { float least; long ties; };  // weights above `least` stay, and the first `ties` of its equals

// Find where the falling ones of n weights, whole groups, reach `goal`, which is from `low` to `high`: halves the weights
// in question by their bits, which are in the order of the weights, and drops what is settled as soon as that is half.
inline Border border(const float *w, long n, double goal, float low, float high, DrawRoom &room) {
    constexpr auto value = [](uint32_t bits) { return std::bit_cast<float>(bits); };
    uint32_t least = std::bit_cast<uint32_t>(low), limit = std::bit_cast<uint32_t>(high) + 1;
    long count = n, above = 0;  // of w at most so many reach `least`, and so many reach `limit`
    double before = 0;          // the mass of greater ones that were dropped
    float *some = room.some[0].at;
    const auto narrow = [&] {
        const Kept kept = keep_between(w, n, value(least), value(limit), some);
        w = some, n = kept.size, count = kept.count, above = 0, before += kept.above;
    };
    while (limit - least > 1 && count - above > FEW_LEFT) {
        if (2 * (count - above) <= n) narrow();
        const uint32_t middle = least + (limit - least) / 2;
        const Part part = part_from(w, n, value(middle));
        if (before + part.mass >= goal) least = middle, count = part.count;
        else limit = middle, above = part.count;
    }
    narrow();
    if (limit - least > 1) std::sort(some, some + count, std::greater<>());  // else all are equal
    Border found{value(least), 0};
    for (long i = 0; i < count && before < goal; before += w[i++])
        found = {w[i], i && w[i] == found.least ? found.ties + 1 : 1};
    return found;
}

// Find where the falling weights of a row reach the part top_p of their sum `mass`: among those around where a sample does
// if the distribution is flat, else, or if it is not there, among all.
inline Border reach(double top_p, double mass, DrawRoom &room) {
    const double goal = std::max(top_p * mass, 1e-9);        // the greatest always stays
    const float low = (1 - top_p) * mass / room.size() / 2;  // all below are less than half of what may be cut
    room.some.resize(room.lines.size());
    if (mass * GROUP > room.size()) {
        double part = 0;
        room.sample.clear();
        for (long g = 0; g < (long)room.masses.size(); part += room.masses[g], g += SAMPLE)
            room.sample.insert(room.sample.end(), room.weights() + g * GROUP, room.weights() + (g + 1) * GROUP);
        const float guess = border(room.sample.data(), room.sample.size(), top_p * part, low, 1, room).least;
        const float from = guess / AROUND, to = guess * AROUND;
        const Kept kept = keep_between(room.weights(), room.size(), from, to, room.some[0].at);
        if (kept.above < goal && kept.above + kept.mass >= goal)
            return border(room.some[0].at, kept.size, goal - kept.above, from, to, room);
    }
    return border(room.weights(), room.size(), goal, low, 1, room);
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
        const Border found = reach(knobs.top_p, mass, room);
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
