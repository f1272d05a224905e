"""How many prompt tokens a step may carry, so that a long prompt does not make running streams wait.

What they cost is not predicted: it depends on the machine, on their positions, and on the rows that decode, with which
they share the reading of the weights, so that the first ones may cost nothing. The number is found by trying. Pure
Python, no torch; owned by the engine's thread.
"""

from collections import deque
from statistics import median

AIM = 1.75  # ordinary steps that one with prompt tokens lasts, so that no stream waits more than two though steps vary
STEADY = 16  # steps with prompt tokens after which an ordinary one is measured again
LONGEST_STEP = 0.5  # seconds: what arrives or leaves meanwhile waits for the step to end
FIRST = 16  # tokens with nobody to hold up, before any were measured: a second or two of a large model on a small CPU
SHORTEST = 0.0025  # seconds that an ordinary step counts as at least: a small model's vary by more than they last
LEAST = 8  # tokens beside such short steps, which others hold up by more than these take
LEAST_EMBEDDED = 16  # tokens: a step that embeds reads all weights for itself, so that fewer cost nearly as much


class PrefillBudget:
    """Bound a step's prompt tokens by how long the steps before have lasted.

    Ordinary steps only decode. While streams run, a step with prompt tokens is to last AIM ordinary ones: it carries
    `_width` tokens, which begins at one, falls at once when a step has lasted longer, and rises slowly when it has not;
    once a step was too long, to what was not. What an ordinary step lasts is measured anew when the rows have changed
    and after STEADY steps, by one that carries none; then more is tried again. Beside steps of SHORTEST or less it is
    at least LEAST. With nobody to hold up, a step carries `most`, or half a second's worth.
    """

    def __init__(self, most: int):
        self.most = most
        self._recent: deque[float] = deque(maxlen=3)  # seconds of ordinary steps: their median leaves out what was odd
        self._rows, self._ordinary = 0, 0.0  # rows of the last one, and what one lasts
        self._steady = 0  # steps for which that holds
        self._width, self._found = 1, SHORTEST  # tokens, and what an ordinary step lasted when they were found
        self._fine = 0  # the most tokens that were not too many since the last ordinary step
        self._bound = most  # what may be tried until the next
        self._seconds = self._tokens = 0.0  # that prompts alone have taken of late, and their tokens

    def beside(self, rows: int) -> int:
        """Return the prompt tokens of a step in which so many rows decode; 0 where it is to be an ordinary one."""
        if self._steady == 0 or not self._same(rows):
            return 0
        return min(self._tokens_now(), self.most)

    def alone(self) -> int:
        """Return the prompt tokens of a step that holds up nobody."""
        return self._worth(LONGEST_STEP)

    def embedding(self, decoding: bool) -> int:
        """Return the tokens of a step that embeds: beside one that decodes it is to last no longer than that."""
        if not decoding:
            return self.alone()
        return min(max(self._worth(self._ordinary), LEAST_EMBEDDED), self.most)

    def observe(self, decoded: int, prefilled: int, seconds: float) -> None:
        """Learn from a step with so many rows of output and of prompts.

        `seconds` are from the step before to its end where it decodes: what streams have waited. Else they are its own.
        """
        seconds = max(seconds, 1e-6)
        if decoded == 0:
            self._seconds = 0.8 * self._seconds + seconds
            self._tokens = 0.8 * self._tokens + prefilled
        elif prefilled == 0:
            self._learn_ordinary(decoded, seconds)
        elif self._same(decoded):
            self._learn_width(prefilled, seconds)

    def _same(self, rows: int) -> bool:
        """Say whether so many rows last about as long as those of the last ordinary step."""
        return self._rows > 0 and abs(rows - self._rows) <= max(1, self._rows // 4)

    def _tokens_now(self) -> int:
        """Return the width; of ordinary steps that are half as long now, half of what was found."""
        least = LEAST if self._ordinary <= SHORTEST else 1
        return max(least, int(self._width * min(1.0, self._ordinary / self._found)))

    def _worth(self, seconds: float) -> int:
        """Return how many tokens last so long in a step of their own."""
        fits = int(seconds * self._tokens / self._seconds) if self._tokens else FIRST
        return min(max(fits, 1), self.most)

    def _learn_ordinary(self, rows: int, seconds: float) -> None:
        if not self._same(rows):
            self._recent.clear()
        self._recent.append(seconds)
        self._rows, self._ordinary, self._steady = rows, max(median(self._recent), SHORTEST), STEADY
        self._fine, self._bound = self._width - 1, self.most

    def _learn_width(self, prefilled: int, seconds: float) -> None:
        self._steady = max(self._steady - 1, 0)
        self._ordinary = max(min(self._ordinary, seconds), SHORTEST)  # without prompt tokens: shorter yet
        width, room = self._tokens_now(), (AIM - 1) * self._ordinary
        extra = max(seconds - self._ordinary, 1e-9)
        fits = int(prefilled * room / extra)  # if each token cost the same
        if extra > room:
            self._width = max(min(fits, width), width // 2, 1)  # half at most: it may have been the machine
            self._bound = min(self._bound, max(self._fine, self._width))
        else:
            self._fine = max(self._fine, prefilled)
            if prefilled < width:  # the end of a prompt tells nothing of more
                return
            self._width = min(fits, width + max(1, min(width, fits - width) // 4), self._bound)
        self._found = self._ordinary
