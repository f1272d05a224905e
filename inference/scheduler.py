"""Who computes what in the next step: waiting and running sequences, and the rows they want.

A sequence waits, then runs in a slot until it is removed. A step carries one token of every
sequence that decodes, with its draft where rows are to spare, and as many prompt tokens of those in prefill as
budget.py grants. Pure Python, no torch; owned by the engine's thread.
"""

from collections import Counter, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from inference.budget import PrefillBudget
from inference.sequence import Sequence, Token
from inference.slots import Slots
from inference.speculation import Speculation

LOGPROB_PREFILL = 128  # at most this many with prompt log-probabilities: each wants a row of logits


@dataclass(frozen=True)
class Share:
    """One sequence's part of a step, and which logits it wants of it."""

    sequence: Sequence
    count: int  # neighbouring rows
    decodes: bool  # the rows of an output token and its draft
    scores: int  # wanted logits that predict prompt tokens
    samples: int  # rows at the end whose logits are wanted to choose tokens: of the last known one and its draft
    draft: Items[int] = ()  # tokens that may follow

    @property
    def over(self) -> bool:
        """Say whether its sequence has ended since the step was made."""
        return self.sequence.finish_reason is not None

    def accept(self, chosen: list[Token | None]) -> list[Token | None]:
        """Return the chosen tokens up to the first that a draft has not foreseen; the rows after it are forgotten."""
        for i, drafted in enumerate(self.draft):
            token = chosen[i]
            if token is None or token.token_id != drafted or drafted in self.sequence.stop_ids:
                self.sequence.computed -= len(self.draft) - i
                return chosen[: i + 1]
        return chosen


@dataclass(frozen=True)
class Step:
    """The rows of one call of `ModelRunner.rows`, and whose they are.

    The wanted logits come in the order of `shares`: for each its `scores`, then its `samples`. Of a sequence that
    `embeds` every row is wanted.
    """

    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    want: list[int] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)

    def add(self, sequence: Sequence, slot: int, count: int, draft: Items[int] = ()) -> None:
        """Add the next `count` tokens of a sequence; of one that decodes there is one, and its draft."""
        count += len(draft)
        first, start, end = len(self.tokens), sequence.computed, sequence.computed + count
        prompt = len(sequence.prompt_ids)
        decodes = start >= prompt
        samples = 1 + len(draft) if end >= prompt and sequence.output_limit > 0 else 0
        scores = 0
        if sequence.params.prompt_logprobs and not decodes:
            scores = min(end, prompt - 1) - start  # row i predicts prompt token i + 1
        if sequence.embeds:
            scores, samples = 0, 0
            self.want.extend(range(first, first + count))
        known = [sequence.output_ids[start - prompt]] if decodes else sequence.prompt_ids[start:end]
        self.tokens.extend(known)
        self.tokens.extend(draft)
        self.slots.extend([slot] * count)
        self.positions.extend(range(start, end))
        self.want.extend(range(first, first + scores))
        self.want.extend(range(first + count - samples, first + count))
        self.shares.append(Share(sequence, count, decodes, scores, samples, draft))

    @property
    def rows(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return what a runner is asked for."""
        return self.tokens, self.slots, self.positions, self.want

    @property
    def plain(self) -> bool:
        """Say whether all that is wanted of it is where its greatest logits are."""
        return all(share.scores == 0 and (share.samples == 0 or share.sequence.plain) for share in self.shares)

    def advance(self) -> None:
        """Note that the rows were computed."""
        for share in self.shares:
            share.sequence.computed += share.count

    @property
    def over(self) -> bool:
        """Say whether nobody waits for it any more."""
        return all(share.over for share in self.shares)

    @property
    def decoding(self) -> int:
        """Return how many sequences decode."""
        return sum(share.decodes for share in self.shares)

    @property
    def drafts(self) -> bool:
        """Say whether some of its rows are drafted tokens."""
        return any(share.draft for share in self.shares)

    @property
    def prefilled(self) -> int:
        """Return how many prompt tokens are computed."""
        return sum(share.count for share in self.shares if not share.decodes)


class Scheduler:
    """Give slots to waiting sequences, evenly among owners and else in the order they came, and build steps."""

    def __init__(self, slots: Slots, prefill_tokens: int, most_drafting: int = 0):
        self.slots, self.budget = slots, PrefillBudget(prefill_tokens)
        self.speculation = Speculation(most_drafting)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order they started

    @property
    def busy(self) -> bool:
        """Say whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot."""
        self.waiting.append(sequence)

    def admit(self, now: float) -> list[Sequence]:
        """Give slots to waiting sequences as long as there is room, and return those that now run."""
        started = []
        while self.waiting and not self.slots.full and self.slots.enter(sequence := self._next()):
            self.waiting.remove(sequence)
            sequence.started_at = now
            self.running.append(sequence)
            started.append(sequence)
        return started

    def _next(self) -> Sequence:
        """Return the first waiting sequence of the owner that has fewest slots, of several owners the first."""
        first = {sequence.owner: sequence for sequence in reversed(self.waiting)}
        if len(first) == 1:
            return self.waiting[0]
        held = Counter(sequence.owner for sequence in self.running)
        return min((s for s in self.waiting if first[s.owner] is s), key=lambda s: held[s.owner])

    def next_step(self) -> Step | None:
        """Return the rows to compute next, or None when nothing runs that wants tokens."""
        step = Step()
        prefill: list[tuple[Sequence, int]] = []
        decode: list[tuple[int, Sequence]] = []
        for sequence in self.running:
            if sequence.slot is None:
                raise AssertionError(f"{sequence.id} runs without a slot")
            if sequence.embeds:
                continue
            if sequence.in_prefill:
                if self.slots.ready(sequence):
                    prefill.append((sequence, sequence.slot))
            else:
                decode.append((sequence.slot, sequence))
        drafts = {} if prefill else self.speculation.drafts(sequence for _, sequence in decode)
        for slot, sequence in sorted(decode, key=lambda pair: pair[0]):  # runners like neighbouring slots
            step.add(sequence, slot, 1, drafts.get(sequence, ()))
        # nobody is held up who has had no more than a first token: such requests have come together
        streams = any(len(s.output_ids) > 1 for _, s in decode)
        left = 0 if not prefill else self.budget.beside(len(decode)) if streams else self.budget.alone()
        for sequence, slot in prefill:
            count = min(left, len(sequence.prompt_ids) - sequence.computed)
            if sequence.params.prompt_logprobs:
                count = min(count, LOGPROB_PREFILL)
            if count > 0:
                step.add(sequence, slot, count)
                left -= count
        return step if step.shares else None

    def next_embedding(self, decoding: bool) -> Step | None:
        """Return the rows of sequences that embed: a step of their own, bounded as prompts beside others are."""
        step, left = Step(), self.budget.embedding(decoding)
        for sequence in self.running:
            if sequence.embeds and sequence.slot is not None and left > 0:
                count = min(left, len(sequence.prompt_ids) - sequence.computed)
                step.add(sequence, sequence.slot, count)
                left -= count
        return step if step.shares else None

    def remove(self, sequence: Sequence, keep: bool = True) -> None:
        """Take a sequence out, waiting or running, and free its slot; `keep` what its cache holds for others."""
        if sequence.started_at is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self.speculation.forget(sequence)
        if sequence.slot is not None:
            self.slots.leave(sequence, keep)
