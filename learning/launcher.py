"""The launcher of a run on several devices: torchrun's agent, and a rule for what is started again.

When one of the processes is killed, by the system or by somebody, all are started again from the last checkpoint,
max_restarts times at most. One that ends by itself with an error would do so again: that ends the run. A request to
stop goes to all of them, and they end together. They meet at a file, so that no port is opened for it, and none of
them outlives the launcher (training/rank.py).
"""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from storage.machine import usable_cores
from storage.runs import Run
from training.config import TrainConfig
from training.hardware import require_devices
from training.job import ENDED, read_object, trainer_of
from training.outcome import ANOTHER_ENDED, Outcome, TeamFailed
from training.process import children, identify
from training.rank import FOLDER, LAUNCHER, NOTE
from training.run_folder import require_unused
from training.stop_signal import StopSignal

AGAIN = 2.0  # seconds after which a request to stop is repeated: a process may just have been about to start
PATIENCE = 120  # seconds that the others have to end when one has failed


def pass_on(stop: StopSignal) -> None:
    """Let requests to stop reach the processes that this one starts, which then end by themselves."""

    def send(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for pid in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):  # nobody else gets a child's number before it was waited for
                os.kill(pid, signal.SIGTERM if number == signal.SIGALRM else number)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, send)


def threads_each(processes: int) -> int:
    """Return the CPU threads of each process: together those that this one would have taken."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(given) if given.isdecimal() else usable_cores()) // processes)


def run_together(script: Path, argv: Sequence[str], processes: int, threads: int, note: str = "") -> dict[int, int]:
    """Run a script in several processes to their end; return exit codes by rank, of those that failed first."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {LAUNCHER: str(os.getpid()), FOLDER: folder, NOTE: note, "OMP_NUM_THREADS": str(threads)}
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # what they say to each other stays on this machine
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="train",
            role="train",
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/agent",
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,  # whether to start again is decided below
            logs_specs=DefaultLogsSpecs(log_dir=f"{folder}/logs"),
            signals_to_handle="SIGQUIT",  # the others are passed on
            shutdown_timeout=PATIENCE,
        )
        try:
            elastic_launch(config, sys.executable)(str(script), *argv)
        except ChildFailedError as error:
            failures = sorted(error.failures.items(), key=lambda failure: (failure[1].timestamp, failure[0]))
            return {rank: failure.exitcode for rank, failure in failures}
    return {}


def cause(failures: dict[int, int]) -> tuple[int, int]:
    """Return rank and exit code of the process to blame.

    One that was killed makes the others fail, or abort; and torchrun's agent ends those that are left with SIGTERM, or
    after half a minute with SIGKILL. Of equals the first is to blame.
    """

    def guilt(failure: tuple[int, int]) -> int:
        code = failure[1]
        return {-signal.SIGTERM: 3, -signal.SIGABRT: 1}.get(code, 2 if code > 0 else 0)

    return min(failures.items(), key=guilt)


def ended(rank: int, code: int, processes: int) -> str:
    """Return in words how a process ended."""
    names = {number.value: number.name for number in signal.Signals}
    how = f"was killed by {names.get(-code, f'signal {-code}')}" if code < 0 else f"ended with code {code}"
    return f"process {rank} of the {processes} from 0 to {processes - 1} {how}"


def _conclude(failures: dict[int, int], config: TrainConfig, run: Run, outcome: Outcome, stop: StopSignal) -> None:
    """Give `outcome` what process 0 has not told in result.json. Raises TeamFailed."""
    if trainer_of(run) != identify(os.getpid()):  # they did not come to claim the folder, or have given it up
        outcome.exit_code = 0 if stop.requested or not failures else max(1, cause(failures)[1])
        return
    result, processes = read_object(run.result), config.nproc_per_node
    said = result.get("state") in ENDED and ANOTHER_ENDED not in str(result.get("error"))
    begun = run.metrics.exists()
    if said and (result["state"] != "failed" or begun or not stop.requested):
        outcome.exit_code = int(result.get("exit_code") or 0)
        return
    checkpoint = read_object(run.manifest(run.checkpoint)) if begun else {}
    outcome.of(run, config)
    outcome.reached(int(checkpoint.get("iter_num") or 0), checkpoint.get("best_val_loss"))
    outcome.stopped = stop.requested
    if failures and not stop.requested:
        rank, code = cause(failures)
        raise TeamFailed(ended(rank, code, processes) + (", and restarts are used up" if code < 0 else ""))


def launch(
    script: Path, argv: Sequence[str], config: TrainConfig, run: Run, outcome: Outcome, stop: StopSignal
) -> None:
    """Run a resolved config's training in nproc_per_node processes; `outcome` gets the end if they do not tell it.

    Raises ConfigError for a folder or devices that cannot be had, before anything is started, and TeamFailed.
    """
    processes, note = config.nproc_per_node, ""
    require_unused(run, config)
    require_devices(config.device, processes, torch.cuda.device_count())
    threads = threads_each(processes)
    pass_on(stop)
    for restart in range(1, config.max_restarts + 2):
        failures = run_together(script, argv, processes, threads, note)
        killed = bool(failures) and cause(failures)[1] < 0
        if not killed or stop.requested or restart > config.max_restarts:
            break
        note = f"{ended(*cause(failures), processes)}; restart {restart} of {config.max_restarts}"
        print(note, flush=True)
        if trainer_of(run) != identify(os.getpid()):  # what is in the folder is not of this run
            continue
        if run.checkpoint.exists() or run.previous.exists():
            argv = [*argv, "--init_from", "resume"]
    signal.setitimer(signal.ITIMER_REAL, 0)
    _conclude(failures, config, run, outcome, stop)
