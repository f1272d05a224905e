"""Where the arithmetic of a run happens, and in which precision.

What of this needs no torch is in training/hardware.py.
"""

import contextlib
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from model import GPT
from storage.machine import within_limit
from training.config import TrainConfig
from training.hardware import Peak, choose_device, choose_dtype, process_memory, sheet_peak
from training.rank import Rank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEAK_SECONDS, PEAK_SIDE, PEAK_SIDE_CPU = 0.1, 4096, 1024  # of measuring; sides of the matrices


@dataclass(frozen=True)
class Machine:
    """Where the arithmetic happens, and in which precision."""

    device: torch.device
    name: str  # the maker's
    dtype: str

    @classmethod
    def of(cls, config: TrainConfig) -> "Machine":
        """Return the machine that the config asks for. Raises ConfigError if it is not there."""
        there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
        place = Rank.of(os.environ)
        device = torch.device(choose_device(config.device, there, place.local))
        bf16 = {"cuda": torch.cuda.is_bf16_supported, "cpu": torch.cpu._is_avx512_bf16_supported, "mps": bool}
        dtype = choose_dtype(config.dtype, device.type, bf16[device.type]())
        before = torch.get_num_threads()
        threads = within_limit(before) if config.threads is None else max(1, config.threads // place.local_world)
        if threads != before:
            torch.set_num_threads(threads)
        if device.type != "cuda":
            return cls(device, device.type, dtype)
        torch.cuda.set_device(device)
        return cls(device, torch.cuda.get_device_name(device), dtype)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, self.product_dtype, enabled=self.dtype != "fp32")

    @property
    def product_dtype(self) -> torch.dtype:
        """Return the type in which matrices are multiplied."""
        return DTYPES[self.dtype]

    def memory_bytes(self) -> int:
        """Return the most memory held so far: the device's on a GPU, the process's elsewhere."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else process_memory()

    def peak(self) -> Peak:
        """Return the operations per second to compare a run with: the maker's number for GPUs we know, else measured.

        Measured is the best of several products of two square matrices in the run's precision, in a fraction of a
        second. A product (n, n) @ (n, n) takes 2 n^3 operations. On a CPU its time is the processor time of each
        thread, all of which are busy, and not that of the clock: what others compute meanwhile does not count.
        """
        known = sheet_peak(self.name, self.dtype)
        if known is not None:
            return known
        n = PEAK_SIDE_CPU if self.device.type == "cpu" else PEAK_SIDE
        matrix = torch.full((n, n), 1 / n, device=self.device, dtype=self.product_dtype)
        clock, threads = time.perf_counter, 1
        if self.device.type == "cpu":
            clock, threads = time.process_time, min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        best, runs, begun = math.inf, 0, time.perf_counter()
        while runs < 2 or time.perf_counter() - begun < PEAK_SECONDS:
            before = clock()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            best, runs = min(best, (clock() - before) / threads), runs + 1
        return Peak(2 * n**3 / best, f"a product of matrices in {self.dtype}, measured")


def compiled(model: GPT, backend: str = "inductor") -> torch.nn.Module:
    """Return the model under torch.compile, but for the loss in parts, a loop that is not unrolled.

    Said here and not where the loss is: naming the compiler imports it, 70 MB and a second that serving does not need.
    """
    model.loss_in_parts = torch.compiler.disable(model.loss_in_parts)  # type: ignore[method-assign, no-untyped-call]
    whole: torch.nn.Module = torch.compile(model, backend=backend)  # type: ignore[assignment]
    return whole
