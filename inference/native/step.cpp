// The interface of the native step: plain C, for ctypes. No global state; weights and cache belong to the caller.
#include "step.h"

constexpr long VERSION = 13;  // of the structures and functions that inference/native_runner.py also knows

// The index of the first row out of bounds, or `count` for a wrong `want`, or -1.
static long refused(const Model &m, long count, const long *token, const long *slot, const long *position, long wanted,
                    const long *want) {
    const auto within = [](long n, long bound) { return n >= 0 && n < bound; };
    for (long i = 0; i < count; i++)
        if (!within(token[i], m.vocabulary) || !within(slot[i], m.slots) || !within(position[i], m.block)) return i;
    for (long i = 0; i < wanted; i++)
        if (!within(want[i], count) || (i && want[i] <= want[i - 1])) return count;
    return -1;
}

extern "C" {
#pragma GCC visibility push(default)  // the rest of the library is hidden

// Say whether the caller means the same structures: its version and the size of its Model.
bool step_agrees(long version, long size) { return version == VERSION && size == (long)sizeof(Model); }

// Return an engine for a model (whose weights and cache stay the caller's), or null when memory or threads are short.
Step *step_open(const Model *model) {
    try {
        return new Step(*model);
    } catch (...) {
        return nullptr;
    }
}

void step_close(Step *step) { delete step; }

// Compute `count` rows: token, slot and position of each. `want` lists rows, rising; their logits go to `logits`, one
// after the other with the head's padded rows each, and where the greatest of each is to `best`. Unless `hidden` is null
// what the head would read goes there instead, `width` floats each, and nothing to `logits` and `best`. Where they are
// `plain` nobody wants the logits, which then may be anything.
// Returns -1, or the index of the first row out of bounds, or `count` for a wrong `want`; then nothing was computed.
// Drops what step_begin has begun.
long step_rows(Step *step, long count, const long *token, const long *slot, const long *position, long wanted,
               const long *want, float *logits, long *best, float *hidden, bool plain) {
    const Model &m = step->m;
    step->settle(true);
    if (const long bad = refused(m, count, token, slot, position, wanted, want); bad >= 0) return bad;
    for (long start = 0, done = 0; start < count; start += ROWS) {
        const long end = std::min(start + ROWS, count);
        std::vector<long> part;
        for (long i = done; i < wanted && want[i] < end; i++) part.push_back(want[i] - start);
        step->logits = logits + done * m.head.rows, step->best = best + done;
        step->hidden = hidden ? hidden + done * m.width : nullptr;
        done += part.size();
        step->take(end - start, token + start, slot + start, position + start, std::move(part), plain);
        step->team.run();
    }
    return -1;
}

// Begin what step_rows would compute, and return at once, as it does; step_join ends it, until when `logits` must stay.
// Nothing is begun, and -2 returned, where rows are too many, or no thread is there beside the caller's. What has followed
// by itself goes on if it is just that; else it is dropped.
long step_begin(Step *step, long count, const long *token, const long *slot, const long *position, long wanted,
                const long *want, float *logits, bool plain) {
    if (step->is(count, token, slot, position, wanted, want, plain)) return -1;
    step->settle(true);
    if (count > ROWS || step->team.size == 1) return -2;
    if (const long bad = refused(step->m, count, token, slot, position, wanted, want); bad >= 0) return bad;
    step->logits = logits, step->hidden = nullptr;
    step->take(count, token, slot, position, {want, want + wanted}, plain);
    step->best = step->told[(step->team.next_number()) % 2].data();
    step->asked = step->team.begin();
    return -1;
}

// Say what follows the step that was begun: rows whose tokens are where the greatest logits of its rows of results
// `after` are, if all these are `below`; all are wanted. It begins as soon as they are known, into the same `logits`, which
// are then lost. Returns whether there is such a step, and all is within bounds.
bool step_follow(Step *step, long count, const long *after, const long *slot, const long *position, long below) {
    if (!step->asked || step->foretold || step->team.is_over(step->asked)) return false;
    const Model &m = step->m;
    const long wanted = step->want.size();
    const auto within = [=](const long *n, long bound) { return std::all_of(n, n + count, [=](long x) { return x >= 0 && x < bound; }); };
    if (count < 1 || count > wanted || below > m.vocabulary) return false;
    if (!within(after, wanted) || !within(slot, m.slots) || !within(position, m.block)) return false;
    step->follow(count, after, slot, position, below);
    return true;
}

// Take part in what was begun, if it is not over, until it is; its `best` are written. Then what has followed it is what
// was begun.
void step_join(Step *step, long wanted, long *best) {
    const long number = step->asked;
    if (!number) return;
    step->team.join(number);
    std::copy_n(step->told[number % 2].data(), wanted, best);
    step->asked = step->followed.load(std::memory_order_relaxed) == number + 1 ? number + 1 : 0;
    step->foretold = false;
}

// Wait until nobody works. What was begun can still be joined, unless it is to `drop`.
void step_settle(Step *step, bool drop) { step->settle(drop); }

// Draw a token from each of `count` rows of logits, row[i] * stride apart, by its knobs and penalties; see draw() for
// what is no token. A row with penalties must be there once. Returns whether their ids are within the width; else nothing
// is drawn.
bool step_draw(Step *step, long count, const long *row, long width, long stride, float *logits, const Knobs *knobs,
               const Penalties *penalties, long *chosen) {
    if (!std::all_of(penalties, penalties + count, [=](const Penalties &p) { return p.within(width); })) return false;
    step->after_rows(count, [=](long i, DrawRoom &room) {
        float *z = logits + row[i] * stride;
        penalties[i].apply(z, room.raw);
        chosen[i] = draw(z, width, knobs[i], room);
        penalties[i].undo(z, room.raw);
    });
    return true;
}

// Find log-probabilities in each of `count` rows of logits: of id[i] to own[i], and of the top[i], at most `most`, most
// probable ones to `values` and `ids`, which have room for `most` of each row; see log_probabilities().
void step_logprobs(Step *step, long count, const long *row, long width, long stride, const float *logits, const long *id,
                   const long *top, long most, double *own, double *values, long *ids) {
    step->after_rows(count, [=](long i, DrawRoom &room) {
        own[i] = log_probabilities(logits + row[i] * stride, width, id[i], top[i], values + i * most, ids + i * most, room);
    });
}
#pragma GCC visibility pop
}
