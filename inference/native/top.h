// Draw a token from the greatest logits of a row: what torch needs twenty calls and some passes for, one pass here.
// The rules are those of inference/sampling.py, which also says what they mean.
#pragma once
#include <algorithm>

#include "vector.h"

constexpr long GROUP = 64;  // neighbours whose greatest is looked at first: most groups are never looked into

// Room for one row at a time.
struct TopRoom {
    struct Entry { float value; long id; };
    std::vector<float> peaks, order;  // of the groups: as they lie, and to find the least that matters
    std::vector<Entry> found;
    std::vector<double> weights;
};

// Leave in `room.found` the `count` greatest of z[0..n) and where they are, falling, equals by rising place; NaN is left
// out, and there are fewer if there are not so many numbers.
inline void find_greatest(const float *z, long n, long count, TopRoom &room) {
    const long groups = (n + GROUP - 1) / GROUP;
    const auto some = [&](long i) { return (__mmask16)(n - i >= 16 ? 0xffff : n > i ? (1 << (n - i)) - 1 : 0); };
    room.peaks.resize(groups);
    for (long g = 0; g < groups; g++) {
        Vec most = all(-INFINITY);  // max_ps gives its second operand for NaN
        for (long i = g * GROUP; i < (g + 1) * GROUP; i += 16)
            most = _mm512_max_ps(_mm512_mask_loadu_ps(all(-INFINITY), some(i), z + i), most);
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
            const Vec x = _mm512_mask_loadu_ps(all(-INFINITY), some(i), z + i);
            for (unsigned left = _mm512_mask_cmp_ps_mask(some(i), x, all(least), _CMP_GE_OQ); left; left &= left - 1)
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

constexpr long SPARE = 8;  // logits beyond top_k that are looked at, to see that none of them ties with the k-th
constexpr long UNSETTLED = -1, UNSOUND = -2;

// Return the token drawn from a row of n logits; UNSETTLED where more tie with the top_k-th than are looked at, UNSOUND
// where the greatest is no finite number.
inline long draw(const float *z, long n, const Knobs &knobs, TopRoom &room) {
    const long k = std::min<long>(knobs.top_k, n);
    find_greatest(z, n, std::min(k + SPARE, n), room);
    const auto &found = room.found;
    if (found.empty() || !std::isfinite(found[0].value)) return UNSOUND;
    const long here = found.size();
    const float least = found[std::min(k, here) - 1].value;
    if (here < n && found[here - 1].value == least) return UNSETTLED;
    room.weights.clear();
    double total = 0, before = 0, mass = 0;
    for (long i = 0; i < here && found[i].value >= least; i++) {
        room.weights.push_back(std::exp(((double)found[i].value - found[0].value) / knobs.temperature));
        total += room.weights[i];
    }
    for (double &w : room.weights) {  // the tail that top_p or min_p cut has no weight, the greatest always stays
        const bool gone = &w != &room.weights[0] && ((knobs.top_p < 1 && before >= knobs.top_p * total) || w < knobs.min_p);
        before += w;
        if (gone) w = 0;
        mass += w;
    }
    const double target = std::min(knobs.u * mass, std::nextafter(mass, 0.0));
    double sum = 0;
    for (size_t i = 0; i < room.weights.size(); i++)
        if ((sum += room.weights[i]) > target) return found[i].id;
    return found[0].id;
}
