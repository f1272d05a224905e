// Where a row's greatest logit is, without computing all of them: exactly, for greedy rows, to which nothing else matters.
//
// The head is kept in 8 bits, too. They tell between which two numbers a logit lies, and only panels that may hold the
// greatest are computed as they are: 24 of GPT-2's 1571 for a row. By Cauchy and Schwarz, with x and w as the head reads
// them and x', w' as 8 bits stand for them,
//   |x w - x' w'| <= |x| |w - w'| + |x - x'| |w'|
// and rounding of the sums adds a little of |x| |w|. Where too many panels are left, all logits are computed.
#pragma once
#include <memory>

#include "rows.h"

constexpr bool SCREENS = BF16_PAIRS && INT8_QUADS;
constexpr long SCREENED = 64;                      // rows at most; with more, memory no longer counts
constexpr float SHORT = 1e-10f, LONG = 1e15f;      // norms of rows: beyond these, sums may leave what floats can tell
constexpr long FIRST_PAUSE = 16, LAST_PAUSE = 1024;  // steps without a look, after one in vain

struct Screen {
    Matrix head;                 // int8; no weights: nothing is screened
    const float *lost, *length;  // of each output: |w - w'|; |w| or |w'|, the greater, of padding 0
};

struct Look {
    struct Pair { long row, panel; float most; long at; };  // a panel that may hold a row's greatest logit; what it holds
    const Screen &screen;
    const long vocabulary, panels, width;
    Room<float> rows, norm, error, reach;  // rows as the head reads them; |x|; |x - x'|; the highest that a panel may have
    Room<int32_t> lines;                   // rows as tiles of one line
    std::vector<std::unique_ptr<Room<float>>> sure;  // of each thread and row, in 16 lanes: what the greatest has at least
    InputRoom room;
    std::vector<Pair> pairs;
    bool vain = false;
    long pause = FIRST_PAUSE, rest = 0;

    Look(const Screen &screen, long vocabulary, long threads)
        : screen(screen), vocabulary(vocabulary), panels(screen.head.rows / PANEL), width(screen.head.width),
          rows(SCREENED * width), norm(SCREENED), error(SCREENED), reach(SCREENED * panels), lines(SCREENED * width),
          room(SCREENED, width) {
        for (long i = 0; i < threads; i++) sure.push_back(std::make_unique<Room<float>>(16 * SCREENED));
    }

    // Say whether a step with so many rows is worth a look, and get ready for it.
    bool begin(long count) {
        if (count == 0 || count > SCREENED) return false;
        if (vain) rest = pause, pause = std::min(2 * pause, LAST_PAUSE), vain = false;
        if (rest > 0) return rest--, false;
        for (const auto &of_thread : sure) std::fill_n(of_thread->at, 16 * count, -INFINITY);
        return true;
    }

    Input input(long count) const { return room.input(count, width); }
    Input line(long i) const { return {lines + i * width, {}, {}, {}, {}, {}, {}, 1, width}; }

    // Round row i to what the head reads, as a tile of its own, too.
    template <int KIND> void read(long i) {
        float *const x = rows + i * width;
        Vec square = _mm512_setzero_ps();
        for (long k = 0; k < width; k += 16) {
            const __m256i bits = (__m256i)_mm512_cvtneps_pbh(load(x + k));
            const Vec v = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
            store(x + k, v);
            square = _mm512_fmadd_ps(v, v, square);
        }
        norm[i] = std::sqrt(_mm512_reduce_add_ps(square));
        const float *line_of = x;
        write_tile<KIND>(line(i), 0, &line_of);
    }

    // Note how far row i is from its 8 bits: exactly of near values, of far ones what it can be at most.
    void compare(const Input &in, long i) {
        const float *x = rows + i * width, bound = in.scale[i] * 127, far = 0.501f * in.far_scale[i];
        const Vec scale = all(in.scale[i]), inverse = all(bound > 0 ? 127 / bound : 0);
        Vec square = _mm512_setzero_ps();
        for (long k = 0; k < width; k += 16) {
            const Vec v = load(x + k), digits = _mm512_cvtepi32_ps(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
            const Vec off = _mm512_maskz_fnmadd_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(v), all(bound), _CMP_LE_OQ), digits, scale, v);
            square = _mm512_fmadd_ps(off, off, square);
        }
        const float slack = (width + 64) * 0x1p-22f;  // of rounding, four times what it may be
        error[i] = std::sqrt(_mm512_reduce_add_ps(square) + in.far_count[i] * far * far) + slack * norm[i];
        norm[i] *= 1 + slack;
    }

    // Bound the logits of a panel.
    void bound(const Input &in, long panel, long thread, const Later &later) {
        const long n = panel * PANEL;
        __mmask16 real[2];
        for (long h = 0; h < 2; h++) real[h] = (1u << std::clamp(vocabulary - n - 16 * h, 0L, 16L)) - 1;
        multiply_panel<INT8>(screen.head, in, panel, later, [](long, long) {}, [&](long i, long, long, Vec (&v)[2]) {
            Vec top = all(-INFINITY), least = load(*sure[thread] + 16 * i);
            for (long h = 0; h < 2; h++) {
                const Vec about = _mm512_mul_ps(v[h], load(screen.head.scale + n + 16 * h));
                const Vec off = _mm512_fmadd_ps(all(norm[i]), load(screen.lost + n + 16 * h), _mm512_mul_ps(all(error[i]), load(screen.length + n + 16 * h)));
                top = _mm512_mask_max_ps(top, real[h], top, _mm512_add_ps(about, off));
                least = _mm512_mask_max_ps(least, real[h], least, _mm512_sub_ps(about, off));
            }
            store(*sure[thread] + 16 * i, least);
            reach[panel * in.count + i] = _mm512_reduce_max_ps(top);
        });
    }

    // List the panels that may hold the greatest, by panel; in vain if there are too many, or rows out of bounds.
    void choose(long count) {
        float least[SCREENED];
        const size_t most = panels * (count + 1) / 16;
        pairs.clear();
        for (long i = 0; i < count; i++) {
            Vec v = all(-INFINITY);
            for (const auto &of_thread : sure) v = _mm512_max_ps(v, load(*of_thread + 16 * i));
            least[i] = _mm512_reduce_max_ps(v);
            if (!(norm[i] > SHORT && norm[i] < LONG)) vain = true;
        }
        for (long panel = 0; panel < panels && !vain; panel++) {
            for (long i = 0; i < count; i++)
                if (!(reach[panel * count + i] < least[i])) pairs.push_back({i, panel, 0, 0});
            vain = pairs.size() > most;
        }
        if (!vain) pause = FIRST_PAUSE;
    }

    // Compute one of these panels.
    template <int KIND> void compute(const Matrix &head, Pair &pair) const {
        const char *w = head.panel<KIND>(pair.panel);
        const std::span<const Rest> rest = KIND == COMPACT ? head.rest_in(pair.panel) : std::span<const Rest>{};
        alignas(64) float z[PANEL];
        Sum<KIND> sum[1][2];
        TILES<KIND>[0](w, width / group(KIND), line(pair.row).data, rest, {w + NEAR, turn(KIND)}, {nullptr, 0}, sum);
        store(z, sum[0][0]), store(z + 16, sum[0][1]);
        const long n = pair.panel * PANEL;
        const long at = greatest(z, std::min(PANEL, vocabulary - n));
        pair.most = z[at], pair.at = n + at;
    }

    // Where each row's greatest logit is; the first of equals.
    void tell(long count, long *best) const {
        float most[SCREENED];
        std::fill_n(most, count, -INFINITY);
        for (const Pair &pair : pairs)
            if (pair.most > most[pair.row]) most[pair.row] = pair.most, best[pair.row] = pair.at;
    }
};
