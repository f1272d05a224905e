"""train.py again and again without loading torch each time: for each line of JSON, an argv, fork a trainer.

A trainer here is a process like any other, and dies of SIGKILL like any other. Its disk is slow: every fsync takes
20 ms more, so that the moments in which a checkpoint is being written are long enough to be hit. Prints the pid of
each trainer when it starts, and how it ended (as waitpid says it) when it has.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train

SLOW = 0.02  # seconds


def run(argv: list[str]) -> None:
    """Be a trainer, in a process of its own."""
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        time.sleep(SLOW)
        sync(descriptor)

    os.fsync = slow_sync
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os._exit(train.main(argv))


if __name__ == "__main__":
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
