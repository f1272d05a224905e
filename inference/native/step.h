// A GPT-2 forward pass over ragged rows in one call: prefill, decode and any mix of the two.
//
// Read it after team.h (threads), vector.h (maths), activations.h and product.h (matrices), attention.h (the cache) and
// rows.h. What a row computes is the same alone or in any step, on any number of threads, bit for bit: only the sharing out
// of work differs.
// No global state; weights and cache belong to the caller.
#pragma once
#include <numeric>

#include "attention.h"
#include "logprobs.h"
#include "product.h"
#include "rows.h"
#include "screen.h"
#include "team.h"

constexpr long ROWS = 512;    // rows computed at once; a longer step is cut into such parts, which changes no result
constexpr long FEW = 2;       // so many rows are prepared by every thread for itself, which costs less than to meet

struct Layer {
    const float *norm1, *norm1_bias, *norm2, *norm2_bias;  // biases may be null
    Matrix qkv, out, up, down;
};
struct Model {
    long layers, heads, width, vocabulary, block, slots, kind, gelu_new, threads;
    const float *positions, *norm, *norm_bias;
    Matrix tokens, head;  // the same when tied
    Screen screen;
    const Layer *layer;
    void *cache;  // see attention.h; floats for F32, else halves; pages are touched when they are used
};

struct Own {  // of one thread
    InputRoom input;
    Room<float> rows, scores;  // of a tile's lines; of attention
    DrawRoom room;
    Own(long width, long span) : input(FEW, 4 * width), rows(MOST * width), scores(NEIGHBOURS * span) {}
};

// The step that follows the one that is computed, but for its tokens: those of the rows of results that it names.
struct Following {
    std::vector<long> after, token, slot, position, want;
    long below = 0;                  // what all tokens must be, else it is not begun
    std::atomic<bool> given{false};  // by the caller, until it is begun or forgotten
};

// What is done with each of `rows` rows of finished logits.
struct After {
    long rows = 0;
    std::function<void(long, DrawRoom &)> work;
};

struct Step {
    const Model m;
    const long size, span, wide;          // of a head; positions a slot has room for; floats from row to row of x
    Room<float> x, y, h;                  // [ROWS]: the residual stream, queries keys and values, the MLP's inner layer
    InputRoom shared;
    std::vector<std::unique_ptr<Own>> own;
    Rows all_rows, wanted_rows;           // of this step
    std::vector<long> want;               // of all_rows, rising
    std::vector<const char *> blocks;     // of the cache that they attend to, each at its beginning
    std::vector<long> token;
    float *logits, *hidden;               // where results go; hidden states instead of logits unless null
    long *best;
    std::unique_ptr<Look> look;           // null: nothing is screened
    bool plain = false, looks = false;    // in this part of a step nobody wants the logits; they are not computed
    std::vector<long> told[2];            // `best` of steps that were begun, by their numbers' last bits
    long asked = 0;                       // the number of the step that was begun and not asked for yet, else 0
    std::atomic<long> followed{0};        // of the last step that the team has begun by itself
    Following following;
    bool foretold = false;                // the caller has said what follows the step that is `asked` for
    After after;                          // its rows are 0 while there are rows to compute
    Team team;                            // last: its threads use the rest

    explicit Step(const Model &m)
        : m(m), size(m.width / m.heads), span(up_to(m.block, BLOCK)), wide(up_to(m.width, PANEL)), x(ROWS * wide),
          y(ROWS * up_to(3 * m.width, PANEL)), h(ROWS * 4 * m.width), shared(ROWS, 4 * m.width),
          own(m.threads), team(m.threads, [this](Member &me) { work(me); }, [this](long number) { return goes_on(number); }) {
        for (auto &o : own) o = std::make_unique<Own>(m.width, span);
        for (auto &of_step : told) of_step.resize(ROWS);
        if (SCREENS && m.screen.head.weights) look = std::make_unique<Look>(this->m.screen, m.vocabulary, m.threads);
    }

    template <class E> Head<E> head_of(long layer, long slot, long head) const {
        const long one = 2 * BLOCK * size, block = m.layers * m.heads * one;
        return {(E *)m.cache + slot * (span / BLOCK) * block + (layer * m.heads + head) * one, size, block};
    }

    // Bytes of a layer's keys and values in a block of the cache.
    long layer_bytes() const { return 2 * BLOCK * m.width * (m.kind == F32 ? sizeof(float) : sizeof(Half)); }

    // Note which blocks the rows attend to; none if they are fewer than the rows, as in prefill, where attention takes little
    // of the time.
    void list_blocks() {
        const long bytes = m.layers * layer_bytes();
        blocks.clear();
        for (long i = 0; i < all_rows.count(); i++) {
            if (i + 1 < all_rows.count() && all_rows.slot[i + 1] == all_rows.slot[i]) continue;
            const char *first = (const char *)m.cache + all_rows.slot[i] * (span / BLOCK) * bytes;
            for (long b = 0; b <= all_rows.position[i] / BLOCK; b++) blocks.push_back(first + b * bytes);
        }
        if ((long)blocks.size() < all_rows.count()) blocks.clear();
    }

    // Note what a part of at most ROWS rows computes; arrays as in step_rows, beginning with it. Of `plain` ones nobody wants
    // the logits.
    void take(long count, const long *tokens, const long *slots, const long *positions, std::vector<long> wanted, bool unseen) {
        all_rows.clear(), wanted_rows.clear();
        token.assign(tokens, tokens + count), want = std::move(wanted), plain = unseen;
        for (long i = 0; i < count; i++) all_rows.add(slots[i], positions[i]);
        for (const long i : want) wanted_rows.add(slots[i], positions[i]);
        all_rows.cut(m.heads), wanted_rows.cut(m.heads), list_blocks();
        looks = plain && look && look->begin(wanted_rows.count());
    }

    // x = token embedding + position embedding
    template <int KIND> void embed(long i) {
        float *to = x + i * wide;
        const float *position = m.positions + all_rows.position[i] * m.width;
        read_row<KIND>(m.tokens, token[i], to);
        for (long k = 0; k < m.width; k += 16) store(to + k, _mm512_add_ps(load(to + k), load(position + k)));
    }

    // Activations of rows as products read them; row(i, room) gives the floats, in `room` or where they are.
    template <int KIND, class Row> Input prepare(Member &me, long count, long width, Row row) {
        const bool few = count <= FEW;
        const Input in = (few ? own[me.id]->input : shared).input(count, width);
        const auto write = [&](long tile) {
            const float *rows[MOST];
            for (long i = in.first(tile), n = 0; i < in.first(tile + 1); i++, n++) rows[n] = row(i, own[me.id]->rows + n * m.width);
            write_tile<KIND>(in, tile, rows);
        };
        if (!few) me.each(in.tiles(), write);
        else if (!me.skips()) write(0);
        return in;
    }

    // Put the keys and values among a panel's outputs into the cache.
    template <class E> void remember(long layer, long panel) {
        const long stride = up_to(3 * m.width, PANEL);
        for (long n = std::max(panel * PANEL, m.width); n < std::min((panel + 1) * PANEL, 3 * m.width); n += 16) {
            const long column = n % m.width, at = column % size, number = column / size;
            for (long i = 0; i < all_rows.count(); i++) {
                const auto head = head_of<E>(layer, all_rows.slot[i], number);
                if (n < 2 * m.width) head.store_key(all_rows.position[i], at, y + i * stride + n);
                else head.store_value(all_rows.position[i], at, y + i * stride + n);
            }
        }
    }

    // One piece of attention: queries in y become what they attend to.
    template <class E> void attend_piece(Member &me, long layer, const Rows &rows, long i) {
        const long stride = up_to(3 * m.width, PANEL);
        const auto &piece = rows.pieces[i], &next = rows.pieces[std::min(i + 1, (long)rows.pieces.size() - 1)];
        auto head = head_of<E>(layer, rows.slot[piece.first], piece.head);
        head.ahead = head_of<E>(layer, rows.slot[next.first], next.head).first - head.first;
        static constexpr decltype(&attend<E, 1>) sizes[] = {attend<E, 1>, attend<E, 2>, attend<E, 3>, attend<E, 4>};
        static_assert(NEIGHBOURS == 4);
        float *queries = y + piece.first * stride + piece.head * size;
        sizes[piece.count - 1](head, queries, stride, rows.position[piece.first], own[me.id]->scores, span);
    }

    // Keep only the wanted rows of x and of the queries, moved to the front; `want` rises, so nothing is overwritten.
    void narrow_to_wanted(Member &me) {
        const long stride = up_to(3 * m.width, PANEL);
        me.each(m.width / 16, [&](long part) {
            for (long i = 0; i < wanted_rows.count(); i++) {
                store(x + i * wide + 16 * part, load(x + want[i] * wide + 16 * part));
                store(y + i * stride + 16 * part, load(y + want[i] * stride + 16 * part));
            }
        });
    }

    template <int KIND> void forward(Member &me) {
        using E = std::conditional_t<KIND == F32, float, Half>;
        const long C = m.width, stride = up_to(3 * C, PANEL);
        const Rows *rows = &all_rows;
        const auto multiply = [&](const Matrix &w, const Input &in, const Output &out, const Later &later) {
            me.each(w.rows / PANEL, [&](long panel) { product<KIND>(w, in, panel, out, later); });
        };
        const auto normed = [&](const float *weight, const float *bias) {
            return [=, this](long i, float *room) { return norm(x + i * wide, weight, bias, room, C), room; };
        };
        // Many rows are bound by arithmetic in products and by memory in attention: so a layer's keys and values are fetched
        // during the products before it, in parts as large as these are (7 to 9 % of a step of 16 rows at 100 positions); the
        // first layer's during the head before, because the next step mostly has the same sequences
        const auto cache_of = [&](long layer, long from, long to) {
            return layer < m.layers ? Later{blocks, layer * layer_bytes(), layer_bytes(), m.threads, from, to} : Later{};
        };
        me.each(rows->count(), [&](long i) { embed<KIND>(i); });
        for (long l = 0; l < m.layers; l++) {
            const Layer &L = m.layer[l];
            Input in = prepare<KIND>(me, rows->count(), C, normed(L.norm1, L.norm1_bias));
            me.each(L.qkv.rows / PANEL, [&](long panel) {
                product<KIND>(L.qkv, in, panel, {y, stride, STORE}, cache_of(l, 9, 12));
                remember<E>(l, panel);
            });
            if (l == m.layers - 1) {  // the last layer's keys and values stand: other rows than the wanted end here
                rows = &wanted_rows;
                if (rows->count() == 0) return;
                if (rows->count() < all_rows.count()) narrow_to_wanted(me);
            }
            me.each(rows->pieces.size(), [&](long i) { attend_piece<E>(me, l, *rows, i); });
            in = prepare<KIND>(me, rows->count(), C, [&](long i, float *) { return y + i * stride; });
            multiply(L.out, in, {x, wide, ADD}, cache_of(l + 1, 0, 1));
            in = prepare<KIND>(me, rows->count(), C, normed(L.norm2, L.norm2_bias));
            const Then gelu = m.gelu_new ? GELU_NEW : GELU;
            if constexpr (alone(KIND)) {
                const Input inner{(int32_t *)h.at, {}, {}, {}, {}, {}, {}, rows->count(), 4 * C};
                multiply(L.up, in, {nullptr, 0, gelu, &inner}, cache_of(l + 1, 1, 5));
                in = inner;
            } else {
                multiply(L.up, in, {h, 4 * C, gelu}, cache_of(l + 1, 1, 5));
                in = prepare<KIND>(me, rows->count(), 4 * C, [&](long i, float *) { return h + i * 4 * C; });
            }
            multiply(L.down, in, {x, wide, ADD}, cache_of(l + 1, 5, 9));
        }
        if (hidden) return me.each(rows->count(), [&](long i) { norm(x + i * wide, m.norm, m.norm_bias, hidden + i * C, C); });
        if constexpr (SCREENS && alone(KIND))
            if (looks && found<KIND>(me, rows->count(), cache_of(0, 0, 9))) return;
        const Input in = prepare<KIND>(me, rows->count(), C, normed(m.norm, m.norm_bias));
        multiply(m.head, in, {logits, m.head.rows, STORE}, cache_of(0, 0, 9));
        me.each(rows->count(), [&](long i) { best[i] = greatest(logits + i * m.head.rows, m.vocabulary); });
    }

    // Find where the greatest logits are without computing all; return whether that was possible. See screen.h.
    template <int KIND> bool found(Member &me, long count, const Later &later) {
        const Input in = look->input(count);
        me.each(in.tiles(), [&](long tile) {
            const float *rows[MOST];
            for (long i = in.first(tile); i < in.first(tile + 1); i++) {
                rows[i - in.first(tile)] = look->rows + i * m.width;
                norm(x + i * wide, m.norm, m.norm_bias, look->rows + i * m.width, m.width);
                look->read<KIND>(i);
            }
            write_tile<INT8>(in, tile, rows);
            for (long i = in.first(tile); i < in.first(tile + 1); i++) look->compare(in, i);
        });
        me.each(look->panels, [&](long panel) { look->bound(in, panel, me.id, later); });
        me.each(1, [&](long) { look->choose(count); });
        if (look->vain) return false;
        me.each(look->pairs.size(), [&](long i) { look->compute<KIND>(m.head, look->pairs[i]); });
        me.each(1, [&](long) { look->tell(count, best); });
        return true;
    }

    void work(Member &me) {
        if (after.rows) return me.each(after.rows, [&](long i) { after.work(i, own[me.id]->room); });
        if (m.kind == F32) forward<F32>(me);
        else if (m.kind == BF16) forward<BF16>(me);
        else if (m.kind == COMPACT) forward<COMPACT>(me);
        else forward<INT8>(me);
    }

    // Let nothing follow, and wait until nobody works; `drop`: for results that nobody wants any more.
    void settle(bool drop) {
        following.given = false;
        team.settle(drop);
        if (drop) asked = 0, foretold = false;
    }

    // Note what follows the step that was begun; slots and positions are within bounds.
    void follow(long count, const long *after, const long *slots, const long *positions, long below) {
        following.after.assign(after, after + count), following.want.resize(count);
        following.slot.assign(slots, slots + count), following.position.assign(positions, positions + count);
        std::iota(following.want.begin(), following.want.end(), 0);
        following.below = below, foretold = true;
        following.given.store(true, std::memory_order_release);
    }

    // Make what follows step `number`, whose results are there, the next one; return whether there is such. The steps of
    // greedy rows need Python for nothing else, which takes 0.15 to 0.25 ms from one to the next, as its memory is cold.
    bool goes_on(long number) try {
        if (!following.given.exchange(false, std::memory_order_acquire)) return false;
        Following &f = following;
        f.token.clear();
        for (const long row : f.after) f.token.push_back(best[row]);
        if (!std::all_of(f.token.begin(), f.token.end(), [&](long t) { return t >= 0 && t < f.below; })) return false;
        take(f.token.size(), f.token.data(), f.slot.data(), f.position.data(), f.want, plain);
        best = told[(number + 1) % 2].data();
        followed.store(number + 1, std::memory_order_relaxed);
        return true;
    } catch (const std::bad_alloc &) {
        return false;
    }

    // Whether the step that was begun, and is not asked for yet, is this one.
    bool is(long count, const long *tokens, const long *slots, const long *positions, long wanted, const long *wants, bool unseen) const {
        const auto same = [](const std::vector<long> &a, const long *b, long n) { return std::equal(a.begin(), a.end(), b, b + n); };
        return asked && !foretold && same(token, tokens, count) && same(all_rows.slot, slots, count) &&
               same(all_rows.position, positions, count) && same(want, wants, wanted) && plain == unseen;
    }

    // Do work(0, room) to work(count - 1, room) with rows of finished logits, shared out to the threads.
    void after_rows(long count, std::function<void(long, DrawRoom &)> work) {
        if (count == 0) return;
        settle(false);
        after = {count, std::move(work)};
        team.run();
        after.rows = 0;
    }
};
