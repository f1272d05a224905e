"""Give the number of a dead trainer to a stranger, ARGV[1] times, and let a job manager and its backend at it.

For a pid namespace of its own (`unshare --pid --fork --mount-proc`), where the next pid can be chosen. Prints how
many strangers were there under the very number, and how many of them were alive at the end.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from storage.files import write_json
from storage.runs import Workspace
from training.job import Status
from training.jobs import JobManager
from training.local_backend import LocalBackend
from training.process import TRAINER, identify

SLEEP = ["sleep", "1000"]
TICK = 0.02  # seconds; start times are told in hundredths


def stranger_after_trainer(workspace: Workspace, name: str) -> subprocess.Popen[bytes] | None:
    """Leave a running job whose trainer is dead, and return the stranger that has its number; None if it has not."""
    trainer = subprocess.Popen(SLEEP, start_new_session=True)
    identity = identify(trainer.pid)
    assert identity is not None
    run = workspace.run(name)
    run.folder.mkdir(parents=True)
    write_json(run.config, {"dataset": "d", "output_dir": run.relative})
    write_json(run.folder / TRAINER, identity.to_json())
    Status("running", time.time(), started=time.time(), identity=identity).write(run)
    trainer.kill()
    trainer.wait()
    time.sleep(TICK)
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(trainer.pid - 1))
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    if stranger.pid == trainer.pid:
        return stranger
    stranger.kill()
    stranger.wait()
    return None


def main(rounds: int) -> None:
    """Do it."""
    strangers, states = [], []
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for i in range(rounds):
            found = stranger_after_trainer(workspace, f"job{i}")
            strangers += [] if found is None else [found]
        manager = JobManager(workspace, LocalBackend(workspace), grace=0.01)
        for job in manager.list():
            states.append(job.state)
            manager.stop(job.name)
            assert job.status.identity is None
        manager.close()
    survivors = sum(stranger.poll() is None for stranger in strangers)
    print(len(strangers), survivors, sorted(set(states)))
    for stranger in strangers:
        stranger.kill()
        stranger.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]))
