"""Examples: training on text of which only a part is learned, as its mask says (storage/token_files.py).

Windows then begin where documents begin, so that a model sees a conversation as it will be asked: from its start.
A document that a window cuts begins the next one; what is longer than a window goes on in it. The last document is
followed by the first, and windows without a token to learn are left out. Without a mask there are only windows.py's
windows, and each token counts the same. No window is longer than its split: a little text is enough to validate on.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from storage.token_files import BEGINS, LEARNED
from training.windows import Tokens, WindowOrder, gather

Mask = npt.NDArray[Any]  # uint8, usually a np.memmap
Part = tuple[Tokens, Mask | None]  # a split


class ExampleOrder(WindowOrder):
    """Endless starts of windows with something to learn; each epoch cuts from another document on."""

    def __init__(self, mask: Mask, length: int, seed: int):
        self.mask = mask
        self.begins = np.union1d([0], np.flatnonzero(mask & BEGINS))
        super().__init__(len(mask), length, seed)

    def _after(self, start: int) -> int:
        """Return where the window after the one at `start` begins."""
        last_target = start + self.length
        rounds, place = divmod(last_target + 1, self.tokens)
        cut = rounds * self.tokens + int(self.begins[np.searchsorted(self.begins, place, "right") - 1])
        return cut if cut > start else last_target

    def _learns(self, start: int) -> bool:
        """Say whether the window at `start` has something to learn."""
        over = max(0, start + 1 + self.length - self.tokens)
        parts = self.mask[start + 1 : start + 1 + self.length], self.mask[:over]
        return any(bool((part & LEARNED).any()) for part in parts)

    def _shuffle(self) -> None:
        random = np.random.default_rng((self.seed, self.epoch))
        start, found = int(random.choice(self.begins)), []
        end = start + self.tokens
        while start < end:
            if self._learns(start % self.tokens):
                found.append(start % self.tokens)
            start = self._after(start)
        if not found:
            raise ValueError(f"no window of {self.length} has a token to learn")
        self.order = random.permutation(np.array(found, dtype=np.int64))

    def _starts(self, taken: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        return taken


def order_of(tokens: Tokens, mask: Mask | None, length: int, seed: int) -> WindowOrder:
    """Return the order of a split's windows, the split itself if it is shorter. Raises ValueError if there is none."""
    length = min(length, len(tokens) - 1)
    return WindowOrder(len(tokens), length, seed) if mask is None else ExampleOrder(mask, length, seed)


def learned(mask: Mask, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
    """Return which targets (len(starts), length) of the windows are learned."""
    return np.asarray(gather(mask, starts, length)[:, 1:] & LEARNED > 0)


def weight(mask: Mask | None, starts: npt.NDArray[np.int64], length: int) -> int:
    """Return how much the windows count in a mean over several batches: their learned targets, or their number."""
    return len(starts) if mask is None else int(learned(mask, starts, length).sum())
