// What a step is about: its rows, the pieces of their attention, and room for their activations.
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <vector>

#include "attention.h"
#include "product.h"

inline long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// Scratch memory, aligned and freed with its owner. In large pages if it is large: how small ones happen to lie in the caches
// made the same step 3 % faster or slower.
template <class T> struct Room {
    static constexpr long LARGE = 1 << 21;
    T *at;
    explicit Room(long n) {
        const long bytes = std::max<long>(n * sizeof(T), 64), unit = bytes < LARGE / 4 ? 64 : LARGE;
        at = (T *)std::aligned_alloc(unit, up_to(bytes, unit));
        if (!at) throw std::bad_alloc();
        if (unit == LARGE) madvise(at, up_to(bytes, unit), MADV_HUGEPAGE);
    }
    ~Room() { std::free(at); }
    Room(const Room &) = delete;
    operator T *() const { return at; }
};

// Room for the activations of `lines` rows of up to `width` numbers.
struct InputRoom {
    Room<int32_t> data;
    Room<float> scale, far_scale;
    Room<int32_t> offset, far_offset, far_count;
    Room<Far> far;
    InputRoom(long lines, long width)
        : data(lines * width), scale(lines), far_scale(lines), offset(lines), far_offset(lines), far_count(lines),
          far(lines * width / 16) {}
    Input input(long count, long width) const {
        return {data, scale, far_scale, offset, far_offset, far_count, far, count, width};
    }
};

// Rows of a step, and the pieces of their attention: one head of up to four neighbouring rows of a sequence. A sequence's
// heads follow each other as they do in memory (decode reads one stream), and within a head its rows (prefill reads it
// again from the cache).
struct Rows {
    struct Piece { long head, first, count; };
    std::vector<long> slot, position;
    std::vector<Piece> pieces;
    long count() const { return slot.size(); }
    void add(long s, long p) { slot.push_back(s), position.push_back(p); }
    void clear() { slot.clear(), position.clear(), pieces.clear(); }
    void cut(long heads) {
        for (long start = 0, end; start < count(); start = end) {
            for (end = start + 1; end < count() && slot[end] == slot[start] && position[end] == position[end - 1] + 1;) end++;
            for (long head = 0; head < heads; head++)
                for (long i = start; i < end; i += NEIGHBOURS) pieces.push_back({head, i, std::min(NEIGHBOURS, end - i)});
        }
    }
};
