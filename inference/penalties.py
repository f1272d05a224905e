"""What changes a sequence's logits before a choice: biases, penalties, and no end before its time. No torch.

They touch few token ids, those of the sequence's own text and parameters, and change little from step to step:
so which they are, and how, is kept beside the text and grows with it.
"""

import math
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference.sequence import SamplingParams


class Penalties:
    """Which token ids' logits change, and how: z to r(z + bias) - cut, or to -inf where the cut is inf.

    r(z) is z / repetition where z is positive, else z * repetition. The engine's thread owns it.
    """

    def __init__(self, params: "SamplingParams", prompt_ids: list[int], stop_ids: frozenset[int]):
        self.ids = array("q")  # each once
        self.values = array("f")  # bias, repetition and cut of each id
        self._params = params
        self._held_back = stop_ids if params.min_tokens > 0 else frozenset[int]()
        self._places: dict[int, int] = {}  # in `ids`
        self._counts: dict[int, int] = {}  # in the output
        self._counted = 0
        for token_id, bias in params.logit_bias:
            self.values[3 * self._place(token_id)] += bias
        for token_id in prompt_ids if params.repetition_penalty != 1.0 else ():
            self.values[3 * self._place(token_id) + 1] = params.repetition_penalty

    def grow(self, output_ids: list[int]) -> None:
        """Count the tokens by which the output has grown since the last call."""
        fresh = output_ids[self._counted :]
        self._counted = len(output_ids)
        for token_id in fresh:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
            self.values[3 * self._place(token_id) + 1] = self._params.repetition_penalty
        for token_id in {*fresh, *self._held_back}:
            self.values[3 * self._place(token_id) + 2] = self._cut(token_id)

    def _cut(self, token_id: int) -> float:
        p, count = self._params, self._counts.get(token_id, 0)
        if token_id in self._held_back and self._counted < p.min_tokens:
            return math.inf
        return p.presence_penalty + p.frequency_penalty * count if count else 0.0

    def _place(self, token_id: int) -> int:
        """Return where an id is among `ids`; a new one changes nothing so far."""
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.values.extend((0.0, 1.0, 0.0))
        return place
