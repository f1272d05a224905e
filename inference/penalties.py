"""What changes logits before a choice: biases, penalties, and no end before its time, for a whole batch at once.

They touch few tokens, so they are gathered from all rows and applied in a few sparse operations.
"""

import math
from array import array
from collections import Counter

import torch
from torch import Tensor

from inference.sequence import Sequence


class Entries:
    """(row, token id, value) triples of a batch."""

    def __init__(self) -> None:
        # arrays, because a tensor of a list is made number by number
        self.rows, self.ids, self.values = array("q"), array("q"), array("f")

    def add(self, row: int, ids: list[int], values: list[float]) -> None:
        self.rows.extend([row] * len(ids))
        self.ids.extend(ids)
        self.values.extend(values)

    def places(self, logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the index of the entries in `logits` and their values."""
        rows, ids = (torch.frombuffer(x, dtype=torch.long).to(logits.device) for x in (self.rows, self.ids))
        return (rows, ids), torch.frombuffer(self.values, dtype=torch.float32).to(logits)


def penalize(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Return logits (n, V) with all changes in their order; the same tensor when no row has any."""
    biases, repeated, counted, masked = Entries(), Entries(), Entries(), Entries()
    for row, s in enumerate(sequences):
        p = s.params
        if p.logit_bias:
            biases.add(row, [i for i, _ in p.logit_bias], [bias for _, bias in p.logit_bias])
        if p.repetition_penalty != 1.0:
            seen = list({*s.prompt_ids, *s.output_ids})
            repeated.add(row, seen, [p.repetition_penalty] * len(seen))
        if p.presence_penalty != 0.0 or p.frequency_penalty != 0.0:
            counts = Counter(s.output_ids)
            counted.add(row, list(counts), [p.presence_penalty + p.frequency_penalty * n for n in counts.values()])
        if len(s.output_ids) < p.min_tokens:
            masked.add(row, list(s.stop_ids), [-math.inf] * len(s.stop_ids))
    if not (biases.rows or repeated.rows or counted.rows or masked.rows):
        return logits
    logits = logits.clone()
    if biases.rows:
        place, values = biases.places(logits)
        logits.index_put_(place, values, accumulate=True)
    if repeated.rows:
        place, values = repeated.places(logits)
        old = logits[place]
        logits[place] = torch.where(old > 0, old / values, old * values)
    if counted.rows:
        place, values = counted.places(logits)
        logits[place] -= values
    if masked.rows:
        place, values = masked.places(logits)
        logits[place] = values
    return logits
