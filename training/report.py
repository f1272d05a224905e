"""What a run tells while it trains: rows of metrics, text samples, and the progress line.

It decides when a row is due and computes speeds; it never touches the training.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storage.errors import StorageError
from storage.runs import Run
from training import metrics
from training.config import TrainConfig
from training.hardware import Peak
from training.progress import ProgressLine, quantity
from training.trackers import Tracker


def losses(train_loss: float, val_loss: float, best_val_loss: float, bytes_per_token: float) -> dict[str, Any]:
    """Return the columns of an evaluation; losses in nats per token, and bits per byte compare across tokenizers."""
    return {
        "train_loss": train_loss,
        "val_loss": val_loss,
        "val_perplexity": math.exp(min(val_loss, 700.0)),
        "val_bits_per_byte": val_loss / math.log(2) / bytes_per_token,
        "best_val_loss": best_val_loss,
    }


class Report:
    """The reports of one run, appended to its folder; without a run (a process other than 0) it does nothing."""

    def __init__(self, run: Run | None, config: TrainConfig, trackers: Sequence[Tracker] = ()):
        self.run, self.trackers = run, list(trackers)
        self.peak = math.inf  # operations per second of all devices
        self.log_interval, self.max_iters = config.log_interval, int(config.max_iters or 0)
        self.batch = int(config.batch_size or 1) * int(config.gradient_accumulation_steps or 1)  # windows per iteration
        self.line = ProgressLine(self.max_iters)
        self.val_loss: float | None = None
        self.rows_lost = False
        self.failure: StorageError | OSError | None = None  # of the last attempt at a checkpoint
        self.since = (0, 0.0)  # iter_num and seconds at the last row
        self.tokens = self.flops = 0  # of one iteration

    def resume(self, iter_num: int, seconds: float) -> None:
        """Go on after `iter_num` iterations; what was reported after them will come again."""
        self.since = (iter_num, seconds)
        self._tell(lambda tracker: tracker.cut(iter_num))
        if self.run is not None:
            metrics.cut(self.run.metrics, iter_num)
            metrics.cut(self.run.samples, iter_num)

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """Tell the trackers; one that fails is told no more, and the log says so."""
        for tracker in list(self.trackers):
            try:
                what(tracker)
            except Exception as error:  # of a disk, a network, or a package that is not ours
                self.trackers.remove(tracker)
                self.line.say(f"{tracker.name} failed and gets nothing more of this run: {str(error)[:300]}")

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        """Append a row; on a disk that takes none it is lost, which is said once, and the run goes on."""
        try:
            metrics.append(path, row)
        except OSError as error:
            if not self.rows_lost:
                self.line.say(f"{path.name} could not be written, and rows will be missing: {error.strerror}")
            self.rows_lost = True

    def attempt(self, iter_num: int, write: Callable[[], None]) -> bool:
        """Have a checkpoint written and say whether it was; what went wrong is kept in `failure` and reported."""
        failed, self.failure = self.failure is not None, None
        try:
            write()
        except (StorageError, OSError) as error:
            self.failure = error
        if self.run is not None and (failed or self.failure is not None):
            why = getattr(self.failure, "strerror", None) or self.failure
            said = f"no checkpoint could be written at iteration {iter_num}: {why}; the next save tries again"
            sentence = None if why is None else said
            self.line.say(sentence or f"a checkpoint could be written again at iteration {iter_num}")
            self._append(self.run.metrics, {"iter_num": iter_num, "checkpoint_error": sentence, "time": time.time()})
        return self.failure is None

    def start(self, parameters: int, window: int, flops_per_token: int, peak: Peak, devices: int) -> None:
        """Tell the size of the model, of a window, the operations for a token, and the peak of each device."""
        self.tokens = self.batch * window
        self.flops, self.peak = self.tokens * flops_per_token, peak.flops * devices
        if self.run is not None:
            self.line.say(f"{quantity(parameters)} parameters, {quantity(self.tokens)} tokens per iteration")
            each = "" if devices == 1 else f", of each of {devices} processes"
            self.line.say(
                f"peak {quantity(peak.flops)}FLOP/s ({peak.source}){each}: mfu is the share of it that is used"
            )

    def rolled_back(self, iter_num: int, seconds: float, note: str | None) -> None:
        """Say that the run went back to `iter_num`, and why; what was reported after it will come again."""
        with contextlib.suppress(StorageError, OSError):  # on a full disk the old rows stay
            self.resume(iter_num, seconds)
        self.tell(iter_num, note)

    def tell(self, iter_num: int, note: str | None) -> None:
        """Say what has happened to the run, if anything has, in its log and its metrics."""
        if self.run is not None and note is not None:
            self.line.say(str(note))
            self._append(self.run.metrics, {"iter_num": iter_num, "note": note, "time": time.time()})

    def iteration(
        self,
        iter_num: int,
        update: dict[str, Any],
        evaluation: dict[str, Any] | None,
        seconds: float,
        memory: int,
        note: str | None = None,
    ) -> None:
        """Report an iteration: its loss, rate and norm ({} before the first), and an evaluation if there was one.

        `seconds` of training have passed in all, evaluations not counted; `note` is repeated with each evaluation.
        """
        if evaluation is not None:
            self.val_loss = evaluation["val_loss"]
        due = evaluation is not None or (bool(update) and iter_num % self.log_interval == 0)
        if self.run is None or not (due or (update and self.line.terminal)):
            return
        row = {"iter_num": iter_num, **update}
        if update:
            speed = (iter_num - self.since[0]) / max(seconds - self.since[1], 1e-9)  # iterations per second
            row |= {"tokens_per_second": speed * self.tokens, "seconds_left": (self.max_iters - iter_num) / speed}
            row |= {"flops_per_second": speed * self.flops, "mfu": speed * self.flops / self.peak}
            figures = (row["loss"], self.val_loss, row["tokens_per_second"], row["seconds_left"])
            self.line.show(iter_num, *figures, keep=evaluation is not None)
        elif evaluation is not None:
            self.line.say(f"at iteration {iter_num}: val {self.val_loss:.4f}")
        if due:
            row |= {"elapsed_seconds": seconds, "memory_bytes": memory, "time": time.time(), **(evaluation or {})}
            row |= {} if note is None or evaluation is None else {"note": note}
            self._append(self.run.metrics, row)
            self._tell(lambda tracker: tracker.row(row))
            self.since = (iter_num, seconds)

    def sample(self, iter_num: int, prompt: str, text: str) -> None:
        """Report a text sample: a row in samples.jsonl, and one line in the log."""
        if self.run is None:
            return
        self._append(self.run.samples, {"iter_num": iter_num, "prompt": prompt, "text": text})
        self._tell(lambda tracker: tracker.sample(iter_num, prompt + text))
        shown = repr(prompt + text)[1:-1]
        self.line.say(f"sample: {shown[:200]}")
