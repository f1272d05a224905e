"""The order in which windows of a split are trained on: each once per epoch, in a seeded random order.

An epoch cuts the tokens into windows of equal length, from an offset of its own, and permutes them. The state
is two numbers, epoch and position, so a run that is resumed goes on with the very window it would have taken.
Tokens are read from the memory map at the last moment; nothing here is a tensor. The order of more windows than
LISTED is computed as it is asked for, and takes no memory, however large the split is.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[Any]  # uint16 or uint32, usually a np.memmap

LISTED = 2**23  # windows: an order in memory up to here, which takes 32 MB and 0.2 s
ROUNDS = 6  # of the network that makes an order without a list; four mix well already


class UnlistedOrder:
    """A seeded random order of the numbers below `count` that is computed item by item.

    A Feistel network permutes the numbers of an even count of bits; what falls outside goes through it again.
    """

    def __init__(self, count: int, random: np.random.Generator):
        self.count, self.half = count, ((count - 1).bit_length() + 1) // 2
        self.keys = random.integers(2**63, size=ROUNDS, dtype=np.uint64) | np.uint64(1)

    def _mixed(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        half, low = np.uint64(self.half), np.uint64(2**self.half - 1)
        left, right = numbers >> half, numbers & low
        for key in self.keys:
            hashed = (right + (key >> np.uint64(32))) * key
            left, right = right, left ^ (((hashed ^ (hashed >> np.uint64(29))) * key) >> np.uint64(64 - self.half))
        return (left << half) | right

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> npt.NDArray[np.int64]:
        """Return the items of a slice."""
        numbers = self._mixed(np.arange(*part.indices(self.count), dtype=np.uint64))
        while (outside := numbers >= self.count).any():
            numbers[outside] = self._mixed(numbers[outside])
        return numbers.astype(np.int64)


class WindowOrder:
    """Endless window starts in a split of `tokens` tokens; a window has `length` inputs and one target more."""

    def __init__(self, tokens: int, length: int, seed: int):
        if tokens < length + 1:
            raise ValueError(f"{tokens} tokens hold no window of {length} and the token after it")
        self.tokens, self.length, self.seed = tokens, length, seed
        self.epoch = self.position = 0
        self._shuffle()

    def _shuffle(self) -> None:
        random = np.random.default_rng((self.seed, self.epoch))
        self.offset = int(random.integers(min(self.length, self.tokens - self.length)))
        windows = (self.tokens - 1 - self.offset) // self.length
        self.order: npt.NDArray[Any] | UnlistedOrder
        if windows <= LISTED:
            self.order = random.permutation(np.arange(windows, dtype=np.uint32))
        else:
            self.order = UnlistedOrder(windows, random)

    def _starts(self, taken: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return where windows of the order begin."""
        return self.offset + taken.astype(np.int64) * self.length

    def next(self, n: int) -> npt.NDArray[np.int64]:
        """Return the starts of the next `n` windows, running into the next epoch where one ends."""
        parts = []
        while n > 0:
            if self.position >= len(self.order):
                self.epoch, self.position = self.epoch + 1, 0
                self._shuffle()
            taken = self.order[self.position : self.position + n]
            parts.append(self._starts(taken))
            self.position += len(taken)
            n -= len(taken)
        return np.concatenate(parts)

    def state(self) -> dict[str, int]:
        """Return what `restore` needs to go on from here."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a state of an order with the same tokens, length and seed."""
        self.epoch = state["epoch"]
        self._shuffle()
        self.position = state["position"]


def gather(tokens: Tokens, starts: npt.NDArray[np.int64], length: int) -> Tokens:
    """Return the windows as rows (len(starts), length + 1): inputs, and the target after the last.

    What passes the end of the tokens goes on at their beginning.
    """
    if starts.max(initial=0) + length >= len(tokens):
        around: Tokens = tokens[(starts[:, None] + np.arange(length + 1)) % len(tokens)]
        return around
    rows: Tokens = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[starts]
    return rows
