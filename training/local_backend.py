"""LocalBackend: trainers as processes of this machine, each in a session of its own.

A trainer writes to train.log, never to a pipe, so nothing breaks when the server goes away. Its environment
is made from a list of allowed names: no keys of the server reach it. It yields to the server, fails by itself
when it takes more memory than it may, and is the first that the system ends when memory runs out all the same.
"""

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from storage.files import open_to_append
from storage.machine import total_memory, usable_cores
from storage.runs import Run, Workspace
from training.hardware import gpus
from training.job import read_object
from training.process import ProcessIdentity, identify, is_alive, opened, session, signal_session

PROJECT = Path(__file__).resolve().parent.parent
NAMES = {"PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "HF_HOME"}
NAMES |= {"HF_ENDPOINT", "TIKTOKEN_CACHE_DIR", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_FILE"}
PREFIXES = ("LC_", "HF_HUB_", "TORCH", "OMP_", "MKL_", "WANDB_")
NICE = {"low": 10, "idle": 19}  # a tenth of the time of a core that others want, or next to none
OOM_SCORE = 500  # of 1000; the server keeps 0


def environment(of: Mapping[str, str], downloads: bool, wandb: bool = False) -> dict[str, str]:
    """Return the part of an environment that a trainer gets.

    The hub's token is only for those that download weights, the key of Weights & Biases for those that use it.
    """
    kept = {name: value for name, value in of.items() if name in NAMES or name.startswith(PREFIXES)}
    kept = {name: value for name, value in kept.items() if not name.endswith(("TOKEN", "KEY", "SECRET"))}
    secrets = ["HF_TOKEN"] * downloads + ["WANDB_API_KEY"] * wandb
    kept |= {name: of[name] for name in secrets if name in of}
    # Threads that wait must sleep: spinning, two of them beside a busy server train ten times slower.
    return {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"} | kept


def yield_to_the_server(pid: int, priority: str = "low") -> None:
    """Give a process that leads its session a priority, "low" or "idle"; what the system forbids is left out.

    Linux shares a core between sessions first (autogroups), and only then by the niceness of processes, so the
    session's own niceness counts. Threads and children that it starts later are the same.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE[priority])
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE[priority]))
    with contextlib.suppress(OSError):
        if priority == "idle":
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def hurry(pid: int) -> None:
    """Give a yielding process the priority of others again, as far as the system allows it: it is to save and end."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("0")
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, int(thread), 0)


def fail_first_without_memory(pid: int, most: int | None = None) -> None:
    """Let a process, and each that it starts, take at most so many bytes, and be ended first when memory runs out.

    Counted is what it can write and nobody shares (RLIMIT_DATA): not the files it maps, nor the addresses, often
    more than the machine has memory, that CUDA and allocators only reserve, which RLIMIT_AS would count. With None
    it is the memory that there is, and no bound where there are GPUs, whose driver may map what is not this machine's
    memory.
    """
    if most is None and gpus() == 0:
        most = total_memory()
    with contextlib.suppress(OSError):
        bounds = [most, *resource.prlimit(pid, resource.RLIMIT_DATA)]  # those of the server may be lower
        lowest = min((bound for bound in bounds if bound not in (None, resource.RLIM_INFINITY)), default=None)
        if lowest is not None:
            resource.prlimit(pid, resource.RLIMIT_DATA, (lowest, lowest))
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE))


class LocalBackend:
    """Trainers on this machine. Satisfies TrainingBackend; `wait` belongs to one thread, the rest to any."""

    def __init__(
        self,
        workspace: Workspace,
        python: str = sys.executable,
        script: Path = PROJECT / "train.py",
        priority: str = "low",
        at_once: int = 1,
        memory: int | None = None,
    ):
        """Start trainers with `python`; their `priority` is low, idle or normal, and `at_once` share the cores out.

        Each process takes at most `memory` bytes, see fail_first_without_memory.
        """
        self._memory = memory
        self._workspace, self._program, self._priority = workspace, [python, str(script)], priority
        self._budget = {} if at_once == 1 else {"OMP_NUM_THREADS": str(max(1, usable_cores() // at_once))}
        self._children: dict[ProcessIdentity, subprocess.Popen[bytes]] = {}
        self._awake, self._alarm = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def _argv(self, run: Run, resume: bool) -> list[str]:
        argv = [*self._program, "--config", str(run.config), "--root", str(self._workspace.root)]
        if self._workspace.pretrained_dir is not None:
            argv += ["--pretrained_dir", str(self._workspace.pretrained_dir)]
        return argv + (["--init_from", "resume"] if resume else [])

    def start(self, run: Run, resume: bool, downloads: bool) -> ProcessIdentity:
        """Start train.py for the run; its output is appended to the run's log. Raises OSError."""
        wandb = read_object(run.config).get("wandb") is True
        with open(open_to_append(run.log), "ab") as log:
            child = subprocess.Popen(
                self._argv(run, resume),
                cwd=PROJECT,
                env=self._budget | environment(os.environ, downloads, wandb),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        fail_first_without_memory(child.pid, self._memory)
        if self._priority != "normal":
            yield_to_the_server(child.pid, self._priority)
        identity = identify(child.pid)
        if identity is None:  # it has ended already, and still waits for us: its number cannot be anyone else's
            identity = ProcessIdentity(child.pid, 0, "")
        self._children[identity] = child
        return identity

    def alive(self, identity: ProcessIdentity) -> bool:
        """Say whether this very process is running, and take leave of it if it was ours and has ended."""
        child = self._children.get(identity)
        return is_alive(identity) if child is None else child.poll() is None

    def exit_code(self, identity: ProcessIdentity) -> int | None:
        """Return, once, the exit code of a process that this server started and that has ended, else None."""
        child = self._children.get(identity)
        code = None if child is None else child.poll()
        if code is not None:
            self._children.pop(identity, None)
        return code

    def terminate(self, identity: ProcessIdentity) -> None:
        """Send SIGTERM to the trainer's processes, and let them have the time to save."""
        for member in session(identity):
            hurry(member.pid)
        signal_session(identity, signal.SIGTERM)

    def kill(self, identity: ProcessIdentity) -> None:
        """Send SIGKILL to the trainer's processes, until there is none."""
        for _ in range(10):  # a process may fork while it is looked for
            if signal_session(identity, signal.SIGKILL) == 0:
                return

    def wait(self, identities: Collection[ProcessIdentity], timeout: float | None) -> None:
        """Return when one of the processes has ended, after `wake`, or after `timeout` seconds; never busy."""
        with contextlib.ExitStack() as stack:
            poll = select.poll()
            poll.register(self._awake, select.POLLIN)
            for identity in identities:
                descriptor = stack.enter_context(opened(identity.pid))
                if descriptor is None or not self.alive(identity):
                    return
                poll.register(descriptor, select.POLLIN)
            poll.poll(None if timeout is None else max(0, timeout) * 1000)
            with contextlib.suppress(BlockingIOError):
                os.read(self._awake, 4096)

    def wake(self) -> None:
        """Let `wait` return now."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._alarm, b"!")
