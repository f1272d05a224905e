"""The slots of the KV cache: who runs in which, what the free ones still hold, and how much all of them may hold.

A freed slot keeps its keys and values. A sequence whose prompt begins with the tokens of any slot of its scope,
free or running, skips that part: it takes the free slot itself, or a copy of its beginning where more would be
lost than gained. Memory is counted in positions: what running sequences may come to need, and what free slots keep;
the least recently used of these give way. No torch; owned by the engine's thread.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from inference.sequence import Sequence

BLOCK = 64  # positions that are counted together, as the native runner lays them out
LEAST_SHARED = 8  # tokens; fewer are computed as fast as they are found and copied
WORTH_WAITING = 32  # shared tokens for which a sequence waits while another computes them


def whole_blocks(positions: int) -> int:
    """Return how many positions are taken by so many: whole blocks."""
    return -(-positions // BLOCK) * BLOCK


def shared_length(a: list[int], b: list[int], most: int) -> int:
    """Return how many tokens two lists begin with in common, at most `most`; slices compare faster than a loop."""
    low, high = 0, min(len(a), len(b), most)
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(eq=False)
class Slot:
    """One slot: what lies in it, and how many positions it may count for."""

    number: int
    sequence: Sequence | None = None  # that runs in it
    kept: list[int] = field(default_factory=list)  # tokens whose keys and values lie here, while it is free
    scope: str = ""  # of what is kept
    freed: int = 0  # a count: the lower, the longer ago; 0 when nothing is kept
    reserved: int = 0  # positions that its sequence may come to need
    touched: int = 0  # positions that have taken memory

    @property
    def holds(self) -> int:
        """Return the positions that count."""
        return max(self.reserved, self.touched)

    def tokens(self, scope: str) -> list[int]:
        """Return the tokens whose keys and values lie here, as far as `scope` may know of them."""
        s = self.sequence
        if scope != (self.scope if s is None else s.cache_scope):
            return []
        return self.kept if s is None else (s.prompt_ids + s.output_ids)[: s.computed]


class Slots:
    """Place sequences. `copy(source, target, length)` and `release(slot)` are the runner's."""

    def __init__(
        self, count: int, positions: int, copy: Callable[[int, int, int], None], release: Callable[[int], None]
    ):
        self.positions = positions  # that all slots may hold together; enough for one full sequence
        self.saved = 0  # tokens that did not have to be computed
        self._slots = [Slot(number) for number in range(count)]
        self._copy, self._release = copy, release
        self._freed = 0
        self._leaders: dict[Sequence, tuple[Sequence, int]] = {}  # whom a sequence waits for, to compute how much

    @property
    def full(self) -> bool:
        """Say whether a sequence runs in every slot."""
        return all(slot.sequence is not None for slot in self._slots)

    @property
    def held(self) -> int:
        """Return the positions that count now."""
        return sum(slot.holds for slot in self._slots)

    @property
    def kept(self) -> int:
        """Return the positions among them that free slots keep."""
        return sum(slot.holds for slot in self._slots if slot.sequence is None)

    def enter(self, sequence: Sequence) -> bool:
        """Give a sequence a slot, with what already lies there of its prompt; False when there is no room yet."""
        source, shared = self._longest(sequence)
        leader = self._leader(sequence, shared)
        if leader is not None:
            source = None
        need = whole_blocks(len(sequence.prompt_ids) + sequence.output_limit)
        target = self._place(source, shared, need)
        if target is None:
            return False
        target.sequence, sequence.slot, target.reserved = sequence, target.number, need
        if leader is not None:
            self._leaders[sequence] = leader
        elif source is not None:
            self._begin(sequence, source, target, shared)
        target.kept, target.freed = [], 0
        return True

    def ready(self, sequence: Sequence) -> bool:
        """Say whether a running sequence may go on; one that waits for a common beginning takes it once it is there."""
        if sequence not in self._leaders or sequence.slot is None:
            return True
        leader, length = self._leaders[sequence]
        if leader.slot is not None and leader.computed < length:
            return False
        del self._leaders[sequence]
        source, shared = self._longest(sequence)
        if source is not None:
            self._begin(sequence, source, self._slots[sequence.slot], shared)
        return True

    def leave(self, sequence: Sequence, keep: bool) -> None:
        """Free a sequence's slot; `keep` what lies in it for others that begin alike."""
        if sequence.slot is None:
            raise ValueError(f"{sequence.id} has no slot")
        slot = self._slots[sequence.slot]
        slot.scope = sequence.cache_scope
        slot.kept = slot.tokens(slot.scope) if keep else []
        if slot.kept:
            self._freed += 1
            slot.freed = self._freed
        slot.touched, slot.reserved = max(slot.touched, whole_blocks(sequence.computed)), 0
        slot.sequence = sequence.slot = None
        self._leaders.pop(sequence, None)

    def _longest(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """Return the slot that begins with most of a prompt, a free one if there is, and how much that is.

        A prompt's last token is always computed, since its logits are wanted; with `prompt_logprobs` so is each.
        """
        prompt, best, most = sequence.prompt_ids, None, (LEAST_SHARED, False, -math.inf)
        if sequence.params.prompt_logprobs:
            return None, 0
        for slot in self._slots:
            if slot.sequence is not sequence:
                tokens = slot.tokens(sequence.cache_scope)
                shared = shared_length(tokens, prompt, len(prompt) - 1)
                found = shared, slot.sequence is None, -len(tokens)  # of equals the one that loses least
                if found > most:
                    best, most = slot, found
        return best, 0 if best is None else most[0]

    def _leader(self, sequence: Sequence, shared: int) -> tuple[Sequence, int] | None:
        """Return a running sequence that is about to compute much of this one's prompt, and how much."""
        prompt = sequence.prompt_ids
        if sequence.params.prompt_logprobs:
            return None
        for slot in self._slots:
            leader = slot.sequence
            if leader is not None and leader.in_prefill and leader.cache_scope == sequence.cache_scope:
                length = shared_length(leader.prompt_ids, prompt, len(prompt) - 1)
                if length - shared >= max(WORTH_WAITING, (len(prompt) - shared) // 2):
                    return leader, length
        return None

    def _begin(self, sequence: Sequence, source: Slot, target: Slot, length: int) -> None:
        """Let a sequence in `target` go on from the first `length` tokens of `source`."""
        if source is not target:
            self._copy(source.number, target.number, length)
        sequence.computed = sequence.cached_tokens = length
        self.saved += length

    def _place(self, source: Slot | None, shared: int, need: int) -> Slot | None:
        """Return a free slot with room for `need` positions, or None: `source` itself, or the least recently used."""
        free = sorted((slot for slot in self._slots if slot.sequence is None), key=lambda slot: slot.freed)
        places = free[:1]
        if source in free:
            places.insert(0 if 2 * shared >= len(source.kept) else 1, source)
        return next((slot for slot in places if self._make_room(slot, source, need)), None)

    def _make_room(self, target: Slot, source: Slot | None, need: int) -> bool:
        """Let `target` hold `need` positions at the cost of what was kept longest; False when that is not enough."""
        others = [s for s in self._slots if s.sequence is None and s is not target and s is not source and s.holds > 0]
        excess = self.held - target.holds + max(need, target.touched) - self.positions
        if excess > sum(slot.holds for slot in others):
            return False
        for slot in sorted(others, key=lambda slot: slot.freed):
            if excess <= 0:
                break
            excess -= slot.holds
            self._release(slot.number)
            slot.kept, slot.freed, slot.touched = [], 0, 0
        return True
