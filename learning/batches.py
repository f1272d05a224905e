"""Batches: windows of a split as tensors on the device, in the order in which a run learns from them.

What comes next is read as soon as what is now has been queued: a GPU is still busy with it then, and never waits
for data, which reaches it from pinned memory. On a CPU nothing runs beside the arithmetic, and reading takes less
than a hundredth of its time (bench/RESULTS.md). The position that a checkpoint holds knows nothing of reading ahead.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learning.team import Team
from training.config import ConfigError, TrainConfig
from training.examples import Part, learned, weight
from training.windows import WindowOrder, gather

Starts = npt.NDArray[np.int64]


class Step(NamedTuple):
    """A part of an iteration: its tensors (B, T), by what to divide its mean loss, and whether it is the last one."""

    inputs: Tensor
    targets: Tensor
    divisor: float
    last: bool


class Batches:
    """The batches of one split, for this process's share of an iteration and for evaluations."""

    def __init__(
        self, part: Part, order: WindowOrder, config: TrainConfig, vocab_size: int, team: Team, device: torch.device
    ):
        self.part, self.order, self.config, self.team = part, order, config, team
        self.window, self.vocab_size, self.device = order.length, vocab_size, device
        self.ahead: tuple[list[Starts], list[float], Step] | None = None  # of the next iteration, with its first step
        self.before: dict[str, Any] = {}  # the position from which that was read

    def _moved(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def batch(self, starts: Starts) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T) of the windows at `starts`; they travel in two bytes a token.

        The target of what is only read is -1, which the loss leaves out. Raises ConfigError for an unknown token.
        """
        tokens, mask = self.part
        rows = gather(tokens, starts, self.window)
        if rows.max() >= self.vocab_size:
            raise ConfigError(f"the data has token {rows.max()}, beyond a vocabulary of {self.vocab_size}")
        windows = self._moved(rows).long()
        targets = windows[:, 1:].contiguous()
        if mask is not None:
            read = self._moved(~learned(mask, starts, self.window))
            targets = targets.masked_fill(read, -1)  # a copy: of one row, targets are a view of the inputs' memory
        return windows[:, :-1], targets

    def weight(self, starts: Starts) -> int:
        """Return how much the windows count in a mean over several batches."""
        return weight(self.part[1], starts, self.window)

    def _divisors(self, steps: Sequence[Starts]) -> list[float]:
        """Return by what to divide the mean loss of each step, so that they and all processes make one mean."""
        if self.part[1] is None:
            return [len(steps)] * len(steps)
        counts = [self.weight(starts) for starts in steps]
        total = self.team.sum(sum(counts))
        return [total / (count * self.team.world) for count in counts]

    def _step(self, steps: Sequence[Starts], divisors: Sequence[float], i: int) -> Step:
        return Step(*self.batch(steps[i]), divisors[i], i == len(steps) - 1)

    def _read_ahead(self) -> None:
        """Draw the windows of the next iteration, and read those of its first step."""
        self.before, world = self.order.state(), self.team.world
        accumulation, size = int(self.config.gradient_accumulation_steps or 1), int(self.config.batch_size or 1)
        share = np.array_split(self.order.next(accumulation * size), world)[self.team.rank]
        steps = np.array_split(share, accumulation // world if accumulation % world == 0 else accumulation)
        divisors = self._divisors(steps)
        self.ahead = steps, divisors, self._step(steps, divisors, 0)

    def next(self) -> Iterator[Step]:
        """Give the steps of the next iteration; take them all, or `restore` the position before."""
        if self.ahead is None:
            self._read_ahead()
        assert self.ahead is not None
        (steps, divisors, step), self.ahead = self.ahead, None
        for i in range(len(steps)):
            yield step  # the caller comes back when its work is queued
            if i + 1 < len(steps):
                step = self._step(steps, divisors, i + 1)
        self._read_ahead()

    def state(self) -> dict[str, Any]:
        """Return the position of the next iteration, for `restore`."""
        return self.order.state() if self.ahead is None else self.before

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a position; what was read ahead is dropped."""
        self.ahead = None
        self.order.restore(state)
