"""What is ours of the machine: the least that any group around us leaves, of v2 or of v1, else what the machine has."""

import os

import pytest
import torch

from inference.build import half_of_memory
from learning.machine import Machine
from storage import machine
from training.config import TrainConfig, resolve

GB = 2**30
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Return what makes up a machine's groups: our line in /proc/self/cgroup, and files with what they hold."""
    monkeypatch.setattr(machine, "OURS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")

    def make(ours: str, files: dict[str, object]) -> None:
        (tmp_path / "cgroup").write_text(f"9:name=systemd:/elsewhere\n{ours}\n")
        (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {8 * GB // 1024} kB\n")
        for name, content in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(f"{content}\n")

    return make


V2 = {"a/memory.max": 3 * GB, "a/memory.current": GB, "a/b/memory.max": "max", "a/b/memory.current": GB // 2}
V1 = {"memory/a/memory.limit_in_bytes": 3 * GB, "memory/a/memory.usage_in_bytes": GB}
V1 |= {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 9 * GB}
LAID_OUT = {
    "v2, of a parent": ("0::/a/b", V2, 3 * GB, 2 * GB),
    "v2, the least": ("0::/a/b", V2 | {"a/b/memory.max": GB, "a/b/memory.current": GB // 4}, GB, 3 * GB // 4),
    "v2, seen from inside": ("0::/", {"memory.max": GB, "memory.current": GB // 2}, GB, GB // 2),
    "v2, of a path that is not there": ("0::/../x", {"memory.max": GB, "memory.current": 0}, GB, GB),
    "v2, of another group": ("0::/c", V2, MACHINE, 8 * GB),
    "v2, beside v1": ("0::/a", {f"unified/{name}": value for name, value in V2.items()}, 3 * GB, 2 * GB),
    "v1": ("4:memory:/a/b", V1, 3 * GB, 2 * GB),
    "v1, seen from inside": ("4:memory:/docker/f00", {"memory/memory.limit_in_bytes": GB}, GB, GB),
    "more than the machine": ("0::/", {"memory.max": 2**60, "memory.current": 0}, MACHINE, 8 * GB),
    "none": ("", {}, MACHINE, 8 * GB),
    "odd": ("nonsense", {"memory.max": "much", "memory.stat": "file"}, MACHINE, 8 * GB),
}


@pytest.mark.parametrize(("ours", "files", "total", "left"), LAID_OUT.values(), ids=LAID_OUT)
def test_memory_is_the_least_that_any_group_around_us_leaves(container, ours, files, total, left):
    container(ours, files)
    assert (machine.total_memory(), machine.available_memory()) == (min(total, MACHINE), left)


def test_models_may_take_half_of_the_containers_memory(container):
    container("0::/", {"memory.max": GB})
    assert half_of_memory("cpu") == GB // 2


def test_cached_files_count_as_available_and_more_than_the_limit_used_as_nothing(container):
    container(
        "0::/", {"memory.max": GB, "memory.current": GB, "memory.stat": "anon 5\ninactive_file 30\nactive_file 4"}
    )
    assert machine.available_memory() == 34
    container("0::/", {"memory.max": GB, "memory.current": GB + 1, "memory.stat": ""})
    assert machine.available_memory() == 0


CORES = {
    "v2": ("0::/a", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
    "v2, of a parent": ("0::/a", {"cpu.max": "150000 100000", "a/cpu.max": "400000 100000"}, 1),
    "less than one": ("0::/", {"cpu.max": "50000 100000"}, 1),
    "v1": (
        "3:cpu,cpuacct:/a",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": 300000, "cpu,cpuacct/a/cpu.cfs_period_us": 100000},
        3,
    ),
    "v1, none": ("3:cpu:/", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, 8),
    "odd": ("0::/", {"cpu.max": "odd"}, 8),
}


@pytest.mark.parametrize(("ours", "files", "cores"), CORES.values(), ids=CORES)
def test_cores_are_those_whose_time_every_group_around_us_grants(container, monkeypatch, ours, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    container(ours, files)
    assert machine.usable_cores() == cores


def test_a_training_takes_no_more_threads_than_the_container_has_cores(container):
    container("0::/", {"cpu.max": "200000 100000"})
    before = torch.get_num_threads()
    try:
        for asked, threads in ((None, 2), (3, 3)):
            torch.set_num_threads(4)
            Machine.of(resolve(TrainConfig.parse({"dataset": "d", "output_dir": "out/d", "threads": asked})))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
