"""Trainers as processes of this machine: a session of their own, no keys, no strangers hit, no zombies left."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.machine import total_memory
from storage.runs import Run, Workspace
from training.local_backend import LocalBackend, environment, fail_first_without_memory
from training.process import ProcessIdentity, boot_id, identify, is_alive, session, signal_session

TRAINER = """
import os, resource, signal, sys, time
print("argv", sys.argv[1:], flush=True)
print("env", sorted(os.environ), flush=True)
time.sleep(0.2)  # its priority is set right after it was started
print("session", os.getsid(0) == os.getpid(), "nice", os.nice(0), "policy", os.sched_getscheduler(0), flush=True)
print("oom", open("/proc/self/oom_score_adj").read(), "threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
print("memory", *resource.getrlimit(resource.RLIMIT_DATA), flush=True)
if os.path.exists("/proc/self/autogroup"): print(open("/proc/self/autogroup").read().strip(), "group", flush=True)
{body}
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Workspace(tmp_path).run("a")
    made.folder.mkdir(parents=True)
    return made


def script(run: Run, body: str) -> Path:
    path = run.folder / "train.py"
    path.write_text(TRAINER.format(body=body))
    return path


def backend(run: Run, body: str) -> LocalBackend:
    return LocalBackend(Workspace(run.folder.parent.parent), script=script(run, body))


def first_words(run: Run) -> set[str]:
    """Return the first word of each line that the trainer has printed."""
    return {line.partition(" ")[0] for line in run.log.read_text().splitlines()}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(trainers: LocalBackend, identity: ProcessIdentity) -> int | None:
    while trainers.alive(identity):
        trainers.wait([identity], 10)
    return trainers.exit_code(identity)


def test_a_trainer_runs_in_its_own_session_at_low_priority_and_writes_to_its_log(run):
    trainers = backend(run, "sys.exit(7)")
    identity = trainers.start(run, resume=True, downloads=False)
    assert ended(trainers, identity) == 7 and trainers.exit_code(identity) is None
    log = run.log.read_text()
    assert "session True" in log and "nice 10 policy 0" in log and "oom 500" in log
    assert "autogroup" not in log or "nice 10 group" in log
    assert str(run.config) in log and "'--init_from', 'resume'" in log


def test_an_idle_trainer_runs_when_nothing_else_wants_to(run):
    trainers = LocalBackend(Workspace(run.folder.parent.parent), script=script(run, "signal.pause()"), priority="idle")
    identity = trainers.start(run, resume=False, downloads=False)
    pid = identity.pid  # asked from here: on busy cores it would take a minute to say it itself
    assert (os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid)) == (19, os.SCHED_IDLE)
    trainers.kill(identity)
    assert ended(trainers, identity) == -signal.SIGKILL


def test_a_trainer_that_need_not_yield_has_the_priority_of_the_server_but_ends_first_without_memory(run):
    trainers = LocalBackend(Workspace(run.folder.parent.parent), script=script(run, ""), priority="normal")
    ended(trainers, trainers.start(run, resume=False, downloads=False))
    assert f"nice {os.nice(0)} policy {os.sched_getscheduler(0)}" in run.log.read_text()
    assert "oom 500" in run.log.read_text()


def memory_of_a_trainer(run: Run, memory: int | None) -> list[int]:
    """Start a trainer with a bound of memory; return the bounds that it has."""
    trainers = LocalBackend(Workspace(run.folder.parent.parent), script=script(run, ""), memory=memory)
    ended(trainers, trainers.start(run, resume=False, downloads=False))
    said = [line for line in run.log.read_text().splitlines() if line.startswith("memory")]
    return [int(word) for word in said[-1].split()[1:]]


def test_a_trainer_takes_no_more_memory_than_it_may_or_than_the_machine_has(run, monkeypatch):
    assert memory_of_a_trainer(run, 2**30) == [2**30, 2**30]
    monkeypatch.setattr("training.local_backend.gpus", lambda: 0)
    assert memory_of_a_trainer(run, None) == [total_memory()] * 2


def test_the_default_bounds_no_trainer_that_may_have_a_gpu(run, monkeypatch):
    monkeypatch.setattr("training.local_backend.gpus", lambda: 1)
    assert memory_of_a_trainer(run, None) == list(resource.getrlimit(resource.RLIMIT_DATA))
    assert memory_of_a_trainer(run, 2**30) == [2**30, 2**30]


def test_a_bound_of_memory_lowers_a_lower_one_of_the_server_no_further_and_never_lifts_it(run):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        resource.prlimit(child.pid, resource.RLIMIT_DATA, (2**30, 2**31))
        fail_first_without_memory(child.pid, 2**40)
        assert resource.prlimit(child.pid, resource.RLIMIT_DATA) == (2**30, 2**30)


def test_trainers_that_run_at_once_share_the_cores_out(run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    trainers = LocalBackend(Workspace(run.folder.parent.parent), script=script(run, ""), at_once=1000)
    ended(trainers, trainers.start(run, resume=False, downloads=False))
    assert "threads 1" in run.log.read_text()


def test_the_environment_holds_no_keys():
    server = {"PATH": "/bin", "LM_SERVER_API_KEY": "k", "HF_TOKEN": "t", "AWS_SECRET": "s", "PYTHONPATH": "/x"}
    server |= {"LD_PRELOAD": "x.so", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "HF_HUB_TOKEN": "t"}
    plain = {"PATH": "/bin", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    plain |= {"OMP_WAIT_POLICY": "passive"}
    assert environment(server, downloads=False) == plain
    assert environment(server, downloads=True) == plain | {"HF_TOKEN": "t"}
    server |= {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}
    assert environment(server, downloads=False) == plain | {"WANDB_MODE": "offline"}
    assert environment(server, downloads=False, wandb=True).keys() - plain.keys() == {"WANDB_API_KEY", "WANDB_MODE"}


def test_terminate_reaches_the_trainer_and_wait_returns_when_it_has_ended(run):
    trainers = backend(
        run,
        "def end(*_): print('policy', os.sched_getscheduler(0), flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); signal.pause()",
    )
    identity = trainers.start(run, resume=False, downloads=False)
    wait_until(lambda: "up" in first_words(run))
    trainers.terminate(identity)
    assert ended(trainers, identity) == 0
    assert os.geteuid() != 0 or "policy 0" in run.log.read_text(), "it saves at the priority of others"
    assert not Path(f"/proc/{identity.pid}").exists(), "no zombie"


DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0: print("child", os.getpid(), flush=True)
else: print("up", flush=True)
signal.pause()
"""


def test_kill_ends_a_deaf_trainer_and_the_children_it_forked(run):
    trainers = backend(run, DEAF)
    identity = trainers.start(run, resume=False, downloads=False)
    wait_until(lambda: {"child", "up"} <= first_words(run))
    trainers.terminate(identity)
    assert len(session(identity)) == 2
    trainers.kill(identity)
    assert ended(trainers, identity) == -signal.SIGKILL and session(identity) == []


def test_a_child_that_leads_a_session_of_its_own_is_of_the_job_too(run):
    trainers = backend(run, DEAF.replace("== 0:", "== 0: os.setsid();"))
    identity = trainers.start(run, resume=False, downloads=False)
    wait_until(lambda: {"child", "up"} <= first_words(run))
    members = session(identity)
    assert len(members) == 2 and len({os.getsid(member.pid) for member in members}) == 2
    trainers.kill(identity)
    assert ended(trainers, identity) == -signal.SIGKILL
    wait_until(lambda: not any(is_alive(member) for member in members))


def test_a_trainer_of_another_server_is_recognised_and_waited_for(run):
    first = backend(run, "signal.pause()")
    identity = first.start(run, resume=False, downloads=False)
    second = backend(run, "")  # after a restart: not its child
    assert second.alive(identity) and second.exit_code(identity) is None
    first.kill(identity)
    second.wait([identity], 10)
    assert not second.alive(identity) and ended(first, identity) == -signal.SIGKILL


def test_a_reused_pid_is_neither_alive_nor_ever_signalled():
    stranger = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    try:
        now = identify(stranger.pid)
        before = ProcessIdentity(now.pid, now.start_time - 5000, now.boot_id)  # who had the number earlier
        other_boot = ProcessIdentity(now.pid, now.start_time, "another boot")
        for identity in (before, other_boot):
            assert not is_alive(identity) and signal_session(identity, signal.SIGKILL) == 0
        assert is_alive(now) and stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_an_identity_survives_json_and_nonsense_is_none():
    me = identify(os.getpid())
    assert ProcessIdentity.from_json(me.to_json()) == me and me.boot_id == boot_id()
    for nonsense in (
        None,
        [],
        {},
        {"pid": 1, "start_time": 1, "boot_id": ""},
        {"pid": True, "start_time": 1, "boot_id": ""},
    ):
        assert ProcessIdentity.from_json(nonsense) is None


def test_wake_ends_a_wait_even_if_it_came_first(run):
    trainers = backend(run, "")
    trainers.wake()
    began = time.monotonic()
    trainers.wait([], 10)
    assert time.monotonic() - began < 5


def test_a_log_that_is_a_link_is_not_written_through(run, tmp_path):
    run.log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        backend(run, "").start(run, resume=False, downloads=False)
    assert not (tmp_path / "elsewhere").exists()
