"""Prompt-lookup speculation: draft a sequence's next tokens from its own text, so that one step may give several.

Text that repeats (code, edits of the prompt, lists) tends to go on as it went on before. Drafted tokens are rows of
the step that computes the sequence's last token; those that the model chooses itself are accepted, the rest are
forgotten. A decode step reads all weights however few rows it has, so rows up to ROWS cost little: of GPT-2 124M on
2 cores, 12 rows of one request take 1.2 (bf16) to 1.3 times (int8) as long as one. Never changes a token: only for
greedy sequences, on runners whose rows are independent of the step, bit for bit. Pure Python, no torch; owned by the
engine's thread.
"""

from collections.abc import Iterable

from inference.sequence import Sequence
from inference.slots import BLOCK

ROWS = 12  # of a step with drafts: one tile of native/product.h; 16 take 1.5 to 1.6 times as long as one
LENGTHS = (6, 2)  # tokens that must come before alike; six first: 1.15 times as fast at edits as two alone
SMALL, FEW = 30_000_000, 3  # parameters that the caches hold; sequences of such a model that draft: see `most_drafting`
PRICE = 0.125  # of a drafted row, in steps: more than it costs when memory is slow, less than when it is fast
CREDIT = 2.0  # steps that drafts of a sequence may cost more than they save before it pauses
PAUSE, LONGEST_PAUSE = 8, 256  # tokens; each pause is twice as long as the one before, until drafts pay again


def most_drafting(parameters: int) -> int:
    """Return how many sequences of a model may decode in a step with drafts.

    A small model's step has no reading to hide rows behind, and Python between steps, which drafts need, is long beside
    it: the bundled one is twice as fast for one sequence, 1.3 times for three and no faster for four, 0.83 times for
    six. GPT-2 124M: 1.1 to 1.5 for six, 1.0 to 1.2 for eight.
    """
    return FEW if parameters <= SMALL else ROWS


class Drafter:
    """Draft one sequence's tokens: as many as were right of late, and none for a while where they do not pay."""

    def __init__(self, sequence: Sequence):
        self._sequence = sequence
        self._ids = list(sequence.prompt_ids)
        self._followed: dict[tuple[int, ...], int] = {}  # where in _ids each run of LENGTHS tokens was followed last
        self._known = 0  # places in _ids up to which _followed is complete
        self._length, self._credit = 4, CREDIT
        self._wait, self._pause = 0, PAUSE

    def draft(self) -> list[int]:
        """Return the tokens that may come after the last one, none when nothing like them has been."""
        sequence = self._sequence
        left = sequence.output_limit - len(sequence.output_ids) - 1  # the last token comes without a draft
        block = BLOCK - 1 - sequence.computed % BLOCK  # no block for drafts alone: `Slots` would not count it
        if self._wait > 0:
            self._wait -= 1
            return []
        return self._look_up(min(self._length, left, block))

    def learn(self, drafted: int, accepted: int) -> None:
        """Note how many of the drafted tokens were right."""
        self._credit = min(self._credit + accepted - PRICE * drafted, CREDIT)
        if accepted == drafted:
            self._length = min(2 * self._length, ROWS - 1)
        else:
            self._length = max(accepted, self._length // 2, 1)
        if self._credit <= 0:
            self._wait, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            self._length, self._credit = 1, 2 * PRICE  # two rows to try again
        elif self._credit == CREDIT:
            self._pause = PAUSE

    def _look_up(self, most: int) -> list[int]:
        """Return what followed the last place that ends like the text, at most `most`; past the end it repeats."""
        ids = self._ids
        ids.extend(self._sequence.output_ids[len(ids) - len(self._sequence.prompt_ids) :])
        for place in range(self._known, len(ids)):
            for n in LENGTHS:
                if place >= n:
                    self._followed[tuple(ids[place - n : place])] = place
        self._known = len(ids)
        for n in LENGTHS:
            followed = self._followed.get(tuple(ids[-n:]))
            if followed is not None:
                return [ids[followed + i % (len(ids) - followed)] for i in range(most)]
        return []


class Speculation:
    """The drafters of a model's sequences, and how many of their tokens were right.

    At most `most` sequences draft beside each other; 0 is off.
    """

    def __init__(self, most: int):
        self.most = most
        self.drafted = self.accepted = 0  # tokens
        self._drafters: dict[Sequence, Drafter] = {}

    def drafts(self, decoding: Iterable[Sequence]) -> dict[Sequence, list[int]]:
        """Return drafts for sequences that decode in one step, as long as there are rows to spare."""
        sequences = list(decoding)
        spare = ROWS - len(sequences)
        if len(sequences) > self.most or spare <= 0:
            return {}
        drafts = {sequence: self._drafter(sequence).draft() for sequence in sequences if sequence.takes_greatest}
        for _ in range(sum(map(len, drafts.values())) - spare):
            max(drafts.values(), key=len).pop()
        return drafts

    def _drafter(self, sequence: Sequence) -> Drafter:
        if sequence not in self._drafters:
            self._drafters[sequence] = Drafter(sequence)
        return self._drafters[sequence]

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Note how many of a sequence's drafted tokens were right."""
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
        self._drafters[sequence].learn(drafted, accepted)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is known of a sequence that leaves."""
        self._drafters.pop(sequence, None)
