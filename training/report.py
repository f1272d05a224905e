"""What a run tells while it trains: rows of metrics, text samples, and the progress line.

It decides when a row is due and computes speeds; it never touches the training.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

from storage.runs import Run
from training import metrics
from training.config import TrainConfig
from training.hardware import bf16_peak
from training.progress import ProgressLine, quantity


@dataclass(frozen=True)
class Work:
    """What one iteration is made of."""

    parameters: int
    tokens: int
    flops: float  # forward and backward, of the whole iteration
    device_name: str


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

    def __init__(self, run: Run | None, config: TrainConfig, work: Work):
        self.run, self.work = run, work
        self.log_interval, self.max_iters = config.log_interval, int(config.max_iters or 0)
        self.line = ProgressLine(self.max_iters)
        self.peak = bf16_peak(work.device_name)
        self.val_loss: float | None = None
        self.since = (0, 0.0)  # iter_num and seconds at the last row

    def resume(self, iter_num: int, seconds: float) -> None:
        """Go on after `iter_num` iterations; what was reported after them will come again."""
        self.since = (iter_num, seconds)
        if self.run is not None:
            metrics.cut(self.run.metrics, iter_num)
            metrics.cut(self.run.samples, iter_num)

    def iteration(
        self, iter_num: int, update: dict[str, Any], seconds: float, memory: int, evaluation: dict[str, Any] | None
    ) -> None:
        """Report an iteration: `update` has its loss, rate and norm; `seconds` of training have passed in all."""
        if self.run is None:
            return
        if evaluation is not None:
            self.val_loss = evaluation["val_loss"]
        due = evaluation is not None or iter_num % self.log_interval == 0
        if not due and not self.line.terminal:
            return
        speed = (iter_num - self.since[0]) / max(seconds - self.since[1], 1e-9)  # iterations per second
        tokens_per_second, left = speed * self.work.tokens, (self.max_iters - iter_num) / speed
        self.line.show(iter_num, update["loss"], self.val_loss, tokens_per_second, left)
        if due:
            row = {"iter_num": iter_num, **update, "tokens_per_second": tokens_per_second, "seconds_left": left}
            row |= {"mfu": None if self.peak is None else speed * self.work.flops / self.peak}
            row |= {"elapsed_seconds": seconds, "memory_bytes": memory, "time": time.time(), **(evaluation or {})}
            metrics.append(self.run.metrics, row)
            self.since = (iter_num, seconds)

    def first(self, evaluation: dict[str, Any]) -> None:
        """Report the evaluation before the first iteration."""
        if self.run is None:
            return
        self.line.say(f"{quantity(self.work.parameters)} parameters, {quantity(self.work.tokens)} tokens per iteration")
        self.val_loss = evaluation["val_loss"]
        self.line.say(f"before training: train {evaluation['train_loss']:.4f}  val {evaluation['val_loss']:.4f}")
        metrics.append(self.run.metrics, {"iter_num": 0, "time": time.time(), **evaluation})

    def sample(self, iter_num: int, prompt: str, text: str) -> None:
        """Report a text sample: a row in samples.jsonl, and one line in the log."""
        if self.run is None:
            return
        metrics.append(self.run.samples, {"iter_num": iter_num, "prompt": prompt, "text": text})
        shown = repr(prompt + text)[1:-1]
        self.line.say(f"sample: {shown[:200]}")
