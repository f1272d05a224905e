"""What the benchmarks share: interleaved rounds, medians with their spread, the machine in words, tables.

Figures of different moments do not compare: memory bandwidth of a shared machine can halve within the hour,
and a busy neighbour stops a two-thread step. So contestants take turns within each round, every round
notes how much CPU others used, and what is reported are medians and ratios within rounds.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Figure:
    """The samples of one contestant, in the unit that the benchmark states."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def text(self, digits: int = 0) -> str:
        """Return `median (least-most)`."""
        return f"{self.median:.{digits}f} ({min(self.samples):.{digits}f}-{max(self.samples):.{digits}f})"


def _busy_and_own() -> tuple[float, float]:
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    f = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
    own = os.times()
    return (sum(f) - f[3] - f[4]) / TICKS, own.user + own.system + own.children_user + own.children_system


def rounds(contestants: Mapping[str, Callable[[], float]], count: int) -> tuple[dict[str, Figure], float]:
    """Run every contestant once per round; return their figures and the cores that others used meanwhile."""
    figures = {name: Figure() for name in contestants}
    (busy, own), start = _busy_and_own(), time.monotonic()
    for _ in range(count):
        for name, run in contestants.items():
            figures[name].samples.append(run())
    busy_end, own_end = _busy_and_own()
    return figures, max(0.0, (busy_end - busy) - (own_end - own)) / (time.monotonic() - start)


def ratio(a: Figure, b: Figure) -> str:
    """Return the median of a/b within rounds, with its spread."""
    return Figure([x / y for x, y in zip(a.samples, b.samples, strict=True)]).text(2)


def table(title: str, unit: str, figures: Mapping[str, Figure], ours: str, digits: int = 0) -> str:
    """Return a Markdown table: each contestant, and how many times as fast as it `ours` is."""
    lines = [f"**{title}**, {unit}", "", f"| | {unit} | {ours} is faster by |", "|---|---|---|"]
    seconds = unit in ("s", "ms")  # less is better
    for name, figure in figures.items():
        pair = (figure, figures[ours]) if seconds else (figures[ours], figure)
        times = "" if name == ours else f"{ratio(*pair)} x"
        lines.append(f"| {name} | {figure.text(digits)} | {times} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Return the processor, cores and versions in one line."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
