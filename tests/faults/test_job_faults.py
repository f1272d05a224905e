"""Jobs whose trainers go wrong: out of memory, deaf, dead with a stranger under their number, endless talkers."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live_server import alive, until
from test_jobs import Place, config, wait_for, wait_until
from test_train import TEXT

from training import log as job_log
from training.local_backend import LocalBackend
from training.process import session

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = {"tokenizer": "char", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2, "threads": 1}
ENDLESS = {"max_iters": 1_000_000, "eval_interval": 1_000_000, "log_interval": 1, "sample_tokens": 0}


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    (made.workspace.data / "text" / "a.txt").write_text(TEXT)
    yield made
    for manager in made.managers:
        for job in manager.list():
            manager.stop(job.name)
        until(lambda manager=manager: manager.counts() == {"running": 0, "queued": 0})
        manager.close()


def deaf_trainer(folder: Path) -> Path:
    """Return a trainer that ignores SIGTERM and has two children that do, too."""
    script = folder / "deaf.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for _ in range(2):\n"
        "    if os.fork() == 0: break\n"
        "print('deaf', flush=True)\n"
        "time.sleep(1e6)\n"
    )
    return script


@pytest.mark.fault("F27", "a trainer and two children that ignore SIGTERM, then a stop")
def test_of_a_deaf_trainer_and_its_children_none_survives_a_stop(place, tmp_path, record_property):
    manager = place.manager(backend=LocalBackend(place.workspace, script=deaf_trainer(tmp_path)), grace=0.5)
    manager.create(config(**SHAPE))
    identity = manager.get("a").status.identity
    wait_until(lambda: place.workspace.run("a").log.read_text().count("deaf") == 3)
    family = session(identity)
    manager.stop("a")
    stopped = wait_for(manager, "a", "stopped", seconds=40)
    wait_until(lambda: not any(alive(member.pid) for member in family))
    assert len(family) == 3 and session(identity) == [] and "did not end within 0.5 s" in stopped["error"]
    record_property("found", "SIGTERM, grace, SIGKILL of the session: 0 of 3 processes left, the job says why")


@pytest.mark.fault("F17", "a trainer may take 512 MiB, and batch_size needs more")
@pytest.mark.timeout(180)
def test_a_trainer_that_needs_more_memory_than_it_may_take_fails_and_says_so(place, record_property):
    manager, began = place.manager(backend=LocalBackend(place.workspace, memory=512 * 2**20)), time.monotonic()
    large = SHAPE | {"n_layer": 4, "n_embd": 256, "block_size": 64, "batch_size": 1024, "dtype": "fp32"}
    manager.create(config(**large | ENDLESS))
    failed = wait_for(manager, "a", "failed", seconds=120)
    assert failed["error"].startswith("out of memory; lower batch_size (1024)")
    record_property("found", f"the job failed after {time.monotonic() - began:.1f} s: {failed['error'][:40]}…")


@pytest.mark.fault("F24", "a job log of 10 GB that is one line")
def test_a_log_of_ten_gigabytes_in_one_line_is_read_in_small_pieces_and_cut(place, record_property):
    manager = place.manager(max_jobs=1)
    manager.create(config())
    log = place.workspace.run("a").log
    with open(log, "wb") as f:
        f.truncate(10 * 10**9)  # zeros that take no room
        f.seek(0, os.SEEK_END)
        f.write(b"and this is its end")
    began = time.monotonic()
    assert len(manager.log_tail("a")) <= job_log.TAIL_BYTES and manager.log_tail("a").endswith("this is its end")
    assert manager.get("a").describe()["activity"].endswith("this is its end")
    seconds = time.monotonic() - began
    assert job_log.cap(log) and log.stat().st_blocks * 512 <= 2 * job_log.KEPT_BYTES
    assert manager.log_tail("a").endswith("this is its end")
    record_property(
        "found", f"tail of 64 KiB, read in {seconds:.3f} s; the log was cut to {log.stat().st_size:,} bytes"
    )


CAPPED = """
import sys
sys.stdout.write("x" * 200_000_000)
sys.stdout.flush()
open("{done}", "w").close()
import time; time.sleep(1e6)
"""


@pytest.mark.fault("F24", "a trainer that prints 200 MB without a newline")
def test_a_talkative_trainers_log_is_bounded(place, tmp_path, record_property):
    done, script = tmp_path / "done", tmp_path / "talker.py"
    script.write_text(CAPPED.format(done=done))
    manager = place.manager(backend=LocalBackend(place.workspace, script=script), grace=0.1)
    manager.create(config(**SHAPE))
    wait_until(done.exists)
    manager._backend.wake()  # a round comes every five seconds; do not wait for it
    log = place.workspace.run("a").log
    wait_until(lambda: log.stat().st_size < 2 * job_log.KEPT_BYTES)
    assert manager.get("a").state == "running" and len(manager.log_tail("a")) <= job_log.TAIL_BYTES
    record_property("found", f"cut to {log.stat().st_size:,} bytes under its hands; it goes on")


def can_have_pids_of_its_own() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "test", "-w", "/proc/sys/kernel/ns_last_pid"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.fault("F8", "the pid of a dead trainer given to a stranger; a server starts, and the job is stopped")
@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_stranger_with_the_number_of_a_dead_trainer_is_left_alone(rounds, record_property):
    if not can_have_pids_of_its_own():
        pytest.skip("needs a pid namespace of its own: Linux, unshare and root")
    script = str(Path(__file__).with_name("reused_pids.py"))
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, script, str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    reused, survivors, states = done.stdout.split(maxsplit=2)
    record_property("found", f"{survivors} of {reused} strangers alive; their jobs are {states.strip()}")
    assert reused == survivors == str(rounds) and states.strip() == "['lost']"
