// What a sequence's text and parameters change in a row of logits, for a while: see inference/penalties.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

struct Penalties {
    struct Change { float bias, repetition, cut; };
    long count;
    const long *id;  // each once
    const Change *change;

    bool within(long n) const { return std::all_of(id, id + count, [=](long i) { return 0 <= i && i < n; }); }

    // Change the logits of a row; `raw` gets what they were.
    void apply(float *z, std::vector<float> &raw) const {
        raw.resize(count);
        for (long i = 0; i < count; i++) {
            const Change &by = change[i];
            const float x = (raw[i] = z[id[i]]) + by.bias;
            const float repeated = x > 0 ? x / by.repetition : x * by.repetition;
            z[id[i]] = by.cut == INFINITY ? -INFINITY : repeated - by.cut;
        }
    }

    // Put the logits back.
    void undo(float *z, const std::vector<float> &raw) const {
        for (long i = 0; i < count; i++) z[id[i]] = raw[i];
    }
};
