"""What the hardware is and could do: which device and precision a run gets, peak arithmetic, what a process took.

How much memory and how many cores there are is in storage/machine.py. No torch here.
"""

import contextlib
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.strict_model import ConfigError

GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each, from the driver

# Dense bf16 operations per second, from the makers' data sheets.
BF16_PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


@dataclass(frozen=True)
class Peak:
    """What a run's speed is compared with: floating point operations per second, and where the number is from."""

    flops: float
    source: str


def sheet_peak(device_name: str, dtype: str) -> Peak | None:
    """Return the peak of a device by its name, None if it is not one we know in this precision."""
    if dtype not in ("bf16", "fp16"):  # which have the same peak on all of these
        return None
    found = next(((part, peak) for part, peak in BF16_PEAK.items() if part in device_name), None)
    return None if found is None else Peak(found[1], f"the data sheet of {found[0]}")


def process_memory() -> int:
    """Return the most bytes of memory that this process has held.

    What getrusage says begins with the memory of the process that started this one, so Linux's own record comes first.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_kills() -> int:
    """Return how many processes this system has ended because memory ran out; 0 where it does not say."""
    try:
        with open("/proc/vmstat") as f:
            fields = dict(line.split() for line in f)
    except OSError:
        return 0
    return int(fields.get("oom_kill", 0))


def choose_device(asked: str, there: Mapping[str, int], local_rank: int) -> str:
    """Return the device that `asked` means where `there` are so many of each kind, best kind first.

    "cuda" is the one of this process's number. Raises ConfigError if it is not there.
    """
    kind, _, number = asked.partition(":")
    if kind == "auto":
        kind = next(kind for kind, count in there.items() if count > 0)
    index = int(number) if number else local_rank if kind == "cuda" else 0
    if index >= there[kind]:
        raise ConfigError(f"device is {asked}, and this machine has {there[kind]} {kind} devices; use cpu or auto")
    return f"cuda:{index}" if kind == "cuda" else kind


def gpus() -> int:
    """Return how many NVIDIA GPUs programs may use here, 0 where the driver does not say."""
    there = len(list(GPUS.glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len([name for name in visible.split(",") if name.strip()]))


def require_devices(asked: str, processes: int, there: int) -> None:
    """Raise ConfigError unless each of several processes can have a GPU of its own, or they all train on the CPU.

    `there` is the number of GPUs.
    """
    on_gpus = asked == "cuda" or (asked == "auto" and there > 0)
    if processes > 1 and on_gpus and processes > there:
        raise ConfigError(
            f"nproc_per_node is {processes}, and this machine has {there} GPUs; give at most as many, or device cpu"
        )


def choose_dtype(asked: str, kind: str, has_bf16: bool) -> str:
    """Return the precision of forward passes on a kind of device. Raises ConfigError for one it cannot have."""
    if asked == "auto":
        return "bf16" if has_bf16 else "fp32"
    if asked == "fp16" and kind != "cuda":
        raise ConfigError(f"dtype is fp16, which needs a cuda device and this is {kind}; use bf16, fp32 or auto")
    return asked
