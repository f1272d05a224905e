"""Building the native step: once, into a cache, safely beside others, and a reason in words where it cannot be."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from inference.native import build, machine

ROOT = Path(__file__).resolve().parent.parent
FAKE = """#!{python}
import os, sys
if "--version" in sys.argv:
    print("fake 1")
    sys.exit()
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write("compiled\\n")
if os.environ.get("FAKE_FAILS"):
    sys.exit("step.cpp:1: error: no")
open(sys.argv[sys.argv.index("-o") + 1], "w").write("library")
"""


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Put a small full compiler in the place of the system's; return how often it has compiled."""
    fake = tmp_path / "fake-c++"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    for name, value in (("CXX", fake), (build.CACHE_SETTING, tmp_path / "cache"), ("FAKE_LOG", log)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build.NEEDED))
    return lambda: len(log.read_text().splitlines())


def test_the_library_is_compiled_once_and_then_found(compiled):
    first = build.library()
    assert first.read_text() == "library"
    assert build.library() == first
    assert compiled() == 1
    assert [p.name for p in first.parent.iterdir()] == [first.name]


def test_another_processor_gets_a_library_of_its_own(compiled, monkeypatch):
    first = build.library()
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset([*build.NEEDED, "avx512_vnni"]))
    assert build.library() != first
    assert compiled() == 2


def test_a_changed_source_gets_a_library_of_its_own(compiled, monkeypatch, tmp_path):
    changed = tmp_path / "sources"
    shutil.copytree(build.HERE, changed, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "HERE", changed)
    found = {build.library()}
    parts = [path for path in changed.iterdir() if path.suffix in (".cpp", ".h")]
    for path in parts:
        path.write_bytes(path.read_bytes() + b"// changed")
        found.add(build.library())
    assert len(found) == len(parts) + 1 > 5


def test_two_that_start_at_once_both_get_a_whole_library(compiled):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.library())) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found[0] == found[1]
    assert [p.read_text() for p in found[0].parent.iterdir()] == ["library"]


def test_a_failed_compilation_is_a_reason_and_leaves_nothing(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(build.CannotBuild, match=r"failed: step\.cpp:1: error: no"):
        build.library()
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_compiler_is_a_reason(compiled, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(build.CannotBuild, match="no C\\+\\+ compiler"):
        build.library()


def test_a_processor_without_the_instructions_is_a_reason(compiled, monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"sse2", "avx2", "fma", "f16c"}))
    with pytest.raises(build.CannotBuild, match="no avx512f, avx512bw, avx512dq, avx512vl"):
        build.library()


def test_a_cache_that_cannot_be_written_is_a_reason_that_names_the_setting(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(build.CACHE_SETTING, str(tmp_path / "file" / "cache"))
    with pytest.raises(build.CannotBuild, match=f"cannot be written .* set {build.CACHE_SETTING}"):
        build.library()


def test_building_ahead_ends_well_also_where_it_cannot():
    environment = os.environ | {"PATH": "/nonexistent", build.CACHE_SETTING: "/nonexistent/cache"}
    environment.pop("CXX", None)
    command = [sys.executable, "-m", "inference.native.build"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "not built, the torch runner will serve" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_setup_builds_ahead_and_make_sanitize_runs_the_checked_build():
    for target, command in (("setup", "-m inference.native.build\n"), ("sanitize", "build --sanitize\n")):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert command in done.stdout, done


def test_the_cache_is_where_the_setting_or_the_users_cache_folder_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(build.CACHE_SETTING, raising=False)
    assert build.cache_folder() == tmp_path / "language-model-api-server"
    monkeypatch.setenv(build.CACHE_SETTING, str(tmp_path / "own"))
    assert build.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize(("limit", "cores"), [(float("inf"), 2), (1.0, 1), (0.5, 1)])
def test_threads_are_the_physical_cores_within_the_containers_quota(monkeypatch, tmp_path, limit, cores):
    for cpu, siblings in ((0, "0,2"), (1, "1,3"), (2, "0,2"), (3, "1,3")):
        (tmp_path / str(cpu)).write_text(siblings)
    monkeypatch.setattr("storage.machine.core_limit", lambda: limit)
    monkeypatch.setattr(machine, "CORE", str(tmp_path / "{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert machine.available_cores() == cores
