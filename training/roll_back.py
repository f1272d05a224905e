"""RollBacks: when a run has diverged, and how much of its learning rate is left after it went back.

A loss or gradient that is no number is divergence, and so are several losses in a row far above those before them
and above what guessing costs. The trainer then returns to its last good checkpoint with half the rate. What
is remembered here travels in the checkpoint, so that a resumed run judges and goes on as one never stopped.
"""

import math
from typing import Any

from training.outcome import Diverged

MOST = 4  # roll-backs of one run
SPIKES = 5  # losses in a row that are a divergence; fewer are bad batches
FAR = 1.0  # nats per token above the usual loss
SHARE = 0.05  # of a new loss in the usual one
ADVICE = "lower learning_rate"


class RollBacks:
    """The losses of a run as they usually are, and how often it had to go back."""

    def __init__(self, vocab_size: int) -> None:
        self.guessing = math.log(vocab_size)
        self.count = 0
        self.forget_losses()
        self.note: str | None = None  # what happened, in words

    def forget_losses(self) -> None:
        """Know no usual loss, as before the first iteration."""
        self.usual: float | None = None
        self.spikes = 0

    @property
    def factor(self) -> float:
        """Return the part of the configured learning rate that is left: halved by each roll-back."""
        return 0.5**self.count

    def see(self, iter_num: int, loss: float) -> None:
        """Take the loss of the next iteration. Raises Diverged."""
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at iteration {iter_num}; {ADVICE}")
        usual = loss if self.usual is None else self.usual
        if loss <= max(self.guessing, usual + FAR):
            self.usual, self.spikes = usual + SHARE * (loss - usual), 0
            return
        self.spikes += 1
        if self.spikes >= SPIKES:
            far = f"{loss:.3f} at iteration {iter_num}, far above {usual:.3f} for {SPIKES} iterations"
            raise Diverged(f"the loss is {far}; {ADVICE}")

    def again(self, reason: Diverged, iter_num: int) -> None:
        """Count a roll-back to `iter_num`. Raises Diverged when there have been enough."""
        cause = str(reason).removesuffix(f"; {ADVICE}")
        if self.count >= MOST:
            raise Diverged(f"{cause}, after {MOST} roll-backs and with 1/{2**MOST} of learning_rate; {ADVICE}")
        self.count += 1
        self.note = (
            f"rolled back to iteration {iter_num}, with 1/{2**self.count} of learning_rate from here on: {cause}"
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this."""
        return {"count": self.count, "note": self.note, "usual": self.usual, "spikes": self.spikes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, {} in checkpoints of version 0.1; roll-backs since then stay counted."""
        self.usual, self.spikes = state.get("usual"), state.get("spikes", 0)
        if state.get("count", 0) >= self.count:
            self.count, self.note = state.get("count", 0), state.get("note")
