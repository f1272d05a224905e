"""What the benchmarks share: interleaved rounds, medians with their spread, the machine in words, tables.

Figures of different moments do not compare: memory bandwidth of a shared machine can halve within the hour,
and a busy neighbour stops a two-thread step. So contestants take turns within each round, every round
notes how much CPU others used, and what is reported are medians and ratios within rounds.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence, Set
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


def _group_seconds() -> float:
    """Return the CPU seconds of the processes of our group: this one and the contestants it has started."""
    own = os.times()
    total, group = own.children_user + own.children_system, os.getpgrp()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            f = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(f[2]) == group:
            total += (int(f[11]) + int(f[12])) / TICKS
    return total


class Noise:
    """How many cores others have used since this was made."""

    def __init__(self) -> None:
        self._start, self._before = time.monotonic(), self._others()

    @staticmethod
    def _others() -> float:
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        f = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
        return (sum(f) - f[3] - f[4]) / TICKS - _group_seconds()

    def cores(self) -> float:
        """Return the cores."""
        return max(0.0, self._others() - self._before) / max(time.monotonic() - self._start, 1e-9)


def rounds(contestants: Mapping[str, Callable[[], float]], count: int) -> tuple[dict[str, Figure], float]:
    """Run every contestant once per round; return their figures and the cores that others used meanwhile."""
    figures, noise = {name: Figure() for name in contestants}, Noise()
    for _ in range(count):
        for name, run in contestants.items():
            figures[name].samples.append(run())
    return figures, noise.cores()


def read_bandwidth(megabytes: int = 400, passes: int = 6) -> float:
    """Return the GB/s at which torch's threads together read memory that no cache holds: the best of some passes."""
    import torch

    data = torch.ones(megabytes * 250_000)
    best = math.inf
    for _ in range(passes):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return megabytes / 1e3 / best


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


def _bound(times: Figure, target: float | None) -> str:
    if target is None:
        return f"{times.text(2)} x"
    return f"{times.text(2)} x, aim {target:g}: {'holds' if times.median >= target else 'does not hold'}"


def comparison(
    figures: Mapping[str, Mapping[str, Figure]],
    digits: Mapping[str, int],
    less: Set[str],
    against: Sequence[tuple[str, str]],
    targets: Mapping[tuple[str, str], float],
) -> str:
    """Return two Markdown tables: all figures, a column each, and how many times as good ours are as each peer's.

    `figures` are by column and contestant; `less` are the columns in which less is better; `against` are pairs of
    ours and a peer; `targets` are what is aimed at, by peer and column.
    """
    head = f"| | {' | '.join(figures)} |\n|{'---|' * (len(figures) + 1)}"
    lines = [head]
    for name in next(iter(figures.values())):
        cells = [column[name].text(digits[title]) for title, column in figures.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if against:
        lines += ["", head]
    for mine, peer in against:
        cells = []
        for title, column in figures.items():
            a, b = (peer, mine) if title in less else (mine, peer)
            times = Figure([x / y for x, y in zip(column[a].samples, column[b].samples, strict=True)])
            cells.append(_bound(times, targets.get((peer, title))))
        lines.append(f"| {mine} against {peer} | {' | '.join(cells)} |")
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
