// Log-probabilities in a row of logits: of one token, and of the most probable ones.
#pragma once
#include "draw.h"

// Return the log-probability of token `id` among n; write those of the `top` most probable, falling and equals by id, to
// `values`, and which these are to `ids`. NaN where one logit is NaN or the greatest is not finite; the rest of `ids` is 0
// where there are fewer than `top` numbers.
inline double log_probabilities(const float *z, long n, long id, long top, double *values, long *ids, DrawRoom &room) {
    room.found.clear();
    if (top > 0) find_greatest(z, n, top, room);
    const float best = room.found.empty() ? peak(z, n) : room.found[0].value;
    const double log_mass = best + std::log(weigh(z, n, best, 1, room));
    for (long k = 0; k < top; k++) {
        const bool here = k < (long)room.found.size();
        ids[k] = here ? room.found[k].id : 0;
        values[k] = here ? room.found[k].value - log_mass : NAN;
    }
    return z[id] - log_mass;
}
