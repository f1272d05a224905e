"""What the next step will be, as far as the one that is computed tells: all but the tokens, while all rows are greedy.

Prepared while the runner is at work, so that as soon as the greatest logits are known it can begin the next step:
what else a step takes in Python, 0.2 ms for one request and 0.3 for 16, then passes beside it. A guess: a runner
forgets what it has begun when the scheduler's step is another one, as with a draft. Pure Python; owned by the
engine's thread.
"""

from dataclasses import dataclass

from inference.scheduler import Step


@dataclass(frozen=True)
class Lookahead:
    """The rows of the next step, beside their tokens: which row of the results each follows, and what would end it."""

    after: list[int]
    slots: list[int]
    positions: list[int]
    want: list[int]
    stop_ids: list[frozenset[int]]

    def tokens(self, greatest: list[int], vocab_size: int) -> list[int] | None:
        """Return the rows' tokens; None where one ends its sequence or is none."""
        tokens = [greatest[row] for row in self.after]
        if any(token >= vocab_size or token in ends for token, ends in zip(tokens, self.stop_ids, strict=True)):
            return None
        return tokens


def look_ahead(step: Step, running: int) -> Lookahead | None:
    """Return what follows a step of all `running` sequences; None where more than its tokens is still open."""
    rows = []
    for row, share in enumerate(step.shares):
        sequence = share.sequence
        if share.samples != 1 or share.scores or sequence.slot is None or not sequence.plain:
            return None
        if len(sequence.output_ids) + 1 < sequence.output_limit:
            rows.append((sequence.slot, row, sequence.computed + share.count, sequence.stop_ids))
    if not rows or len(step.shares) < running:
        return None
    slots, after, positions, stop_ids = map(list, zip(*sorted(rows, key=lambda row: row[0]), strict=True))
    return Lookahead(after, slots, positions, list(range(len(rows))), stop_ids)
