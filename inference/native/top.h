// The greatest of many numbers, sorted, for sampling: what torch needs ten passes and calls for, one pass here.
#pragma once
#include <algorithm>

#include "vector.h"

constexpr long GROUP = 64;  // neighbours whose greatest is looked at first: most groups are never looked into

// Room for one row at a time.
struct TopRoom {
    struct Entry { float value; long id; };
    std::vector<float> peaks, order;  // of the groups: as they lie, and to find the least that matters
    std::vector<Entry> found;
};

// Put the `count` greatest of z[0..n) and where they are into `values` and `ids`, falling, equals by rising place.
// NaN is left out; -inf at place 0 fills up.
inline void greatest_of(const float *z, long n, long count, float *values, long *ids, TopRoom &room) {
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
    for (long i = 0; i < count; i++) values[i] = i < here ? room.found[i].value : -INFINITY, ids[i] = i < here ? room.found[i].id : 0;
}
