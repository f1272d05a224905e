"""The machine as far as it is ours: memory and cores, within the limits of the containers around this process.

Limits are those of Linux's control groups (cgroups), v2 or v1. Groups are folders; what holds for one holds for all
inside it, so that the least counts of our group and of those around it. Inside a container our own group may look
like the outermost one, or be named by a path that leads nowhere here: what is not there is passed over.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OURS = Path("/proc/self/cgroup")  # a line for each hierarchy: number:controllers:path, of v2 0::path
GROUPS = Path("/sys/fs/cgroup")
HIERARCHIES = {"": ("", "unified"), "memory": ("memory",), "cpu": ("cpu", "cpu,cpuacct")}  # "" is v2's, which has all


def _groups(controller: str = "") -> Iterator[Path]:
    """Give the folders of our group and of those around it, the inmost first, where a controller's limits are."""
    place = ""
    with contextlib.suppress(OSError, ValueError):
        for line in OURS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") and "/.." not in path:
                place = path.strip("/")
    for root in (GROUPS / name for name in HIERARCHIES[controller]):
        yield from (group for group in (root / place, *(root / place).parents) if group.is_relative_to(root))


def _numbers(file: Path) -> dict[str, int]:
    """Return the numbers in a file of `name number` lines, {} without one."""
    try:
        return {name: int(number) for name, number in (line.split() for line in file.read_text().splitlines())}
    except (OSError, ValueError):
        return {}


def _number(file: Path) -> int | None:
    """Return the number in a file, None without one: "max" is none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _memory() -> Iterator[tuple[int, int]]:
    """Give, of each group with a limit, that limit and what is left of it, in bytes.

    What is cached of files counts as left, as it does for the machine: it goes when the room is needed.
    """
    v2 = [(group, "memory.max", "memory.current", "") for group in _groups()]
    v1 = [(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_") for group in _groups("memory")]
    for group, limit_file, used_file, prefix in v2 + v1:
        limit, used, stat = _number(group / limit_file), _number(group / used_file), _numbers(group / "memory.stat")
        if limit is not None:
            cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
            yield limit, max(0, limit - (used or 0) + cached)


def total_memory() -> int:
    """Return the bytes of memory that there are for us: the machine's, or fewer where a container has a limit."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _memory())])


def available_memory() -> int | None:
    """Return the bytes that programs can still take without swapping, None where the system does not say."""
    left = [least for _, least in _memory()]
    with contextlib.suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    return min(left, default=None)


def core_limit() -> float:
    """Return how many cores' time containers grant this process; infinity without a limit."""
    limits = [math.inf]
    for group in _groups():
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            most, period = map(int, (group / "cpu.max").read_text().split())
            limits.append(most / period)
    for group in _groups("cpu"):
        most_of, period_of = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if most_of is not None and most_of > 0 and period_of:  # -1 is none
            limits.append(most_of / period_of)
    return min(limits)


def within_limit(cores: int) -> int:
    """Return so many cores, or as many whole ones as containers grant, at least one."""
    limit = core_limit()
    return cores if cores <= limit else max(1, math.floor(limit))


def usable_cores() -> int:
    """Return the number of cores, hardware threads counted each, that this process may use."""
    return within_limit(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
