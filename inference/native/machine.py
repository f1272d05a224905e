"""What this machine's processor can do and how much of it is ours: instruction sets, cores. Linux only."""

import os
import platform
from pathlib import Path

from storage.machine import within_limit

CPU_INFO = Path("/proc/cpuinfo")
CORE = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of an x86-64 processor under Linux, by the kernel's names; empty elsewhere."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    for line in CPU_INFO.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def available_cores() -> int:
    """Return the physical cores that this process may use: two hardware threads of a core share its arithmetic."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(CORE.format(cpu)).read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return within_limit(len(cores))
