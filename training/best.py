"""BestLoss: the lowest validation loss of a run, how long ago it was, and whether to wait for a lower one.

An untrained model's loss does not count: best.pt is to hold something that was learnt.
"""

from typing import Any

from training.config import TrainConfig

NONE_YET = 1e9  # nanoGPT's best_val_loss before there is one


class BestLoss:
    """The best of the evaluations so far, and the number of evaluations since."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.waited = 0

    def see(self, iter_num: int, val_loss: float) -> bool:
        """Take an evaluation's loss and say whether it is the best."""
        if iter_num == 0:
            return False
        better = self.loss is None or val_loss < self.loss
        self.loss, self.waited = (val_loss, 0) if better else (self.loss, self.waited + 1)
        return better

    def verdict(self, iter_num: int, config: TrainConfig) -> str | None:
        """Return why to stop before the last iteration, None to go on."""
        last = config.max_iters is not None and iter_num >= config.max_iters
        if config.patience is None or self.waited < config.patience or last:
            return None
        times = "1 evaluation" if self.waited == 1 else f"{self.waited} evaluations"
        return f"stopped early at iteration {iter_num}: val loss has not improved for {times}"

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this."""
        return {"best_val_loss": NONE_YET if self.loss is None else self.loss, "waited": self.waited}

    def restore(self, state: dict[str, Any], patience: int | None) -> None:
        """Go on from a checkpoint; a run that had stopped early waits anew, as it was resumed to go on."""
        self.loss = state["best_val_loss"] if state["best_val_loss"] < NONE_YET else None
        waited = state.get("waited", 0)  # checkpoints of version 0.1 have none
        self.waited = waited if patience is None or waited < patience else 0
