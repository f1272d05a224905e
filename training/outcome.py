"""result.json: the trainer's last file, which says how a run ended, and the words for what went wrong.

State "succeeded", "failed" or "stopped"; exit code 0 for an end as asked, 1 for a failure on the way, 2 for
a refusal before the first iteration.
"""

import contextlib
import sys
import time
import traceback
from types import TracebackType
from typing import Any, Self

from storage.errors import StorageError
from storage.files import write_json
from storage.runs import Run
from training.config import ConfigError, TrainConfig
from training.metrics import finite
from training.stop_signal import Stopped

OUT_OF_MEMORY = "out of memory"  # how the error of such a job begins
NO_MEMORY = (OUT_OF_MEMORY, "can't allocate memory", "Cannot allocate memory", "bad_alloc")  # as PyTorch and C++ say it


ANOTHER_ENDED = "another process of this training has ended"  # the error of those that are left
LEFT_ALONE = ("Connection closed by peer", "Connection reset by peer")  # as gloo says it


class Diverged(Exception):
    """The loss is no longer a number."""


class TeamFailed(Exception):
    """One of several processes ended and took the others with it."""


def explain(error: BaseException, config: TrainConfig | None, iter_num: int) -> tuple[int, str]:
    """Return the exit code and the sentence for what ended a run after `iter_num` iterations."""
    if isinstance(error, ConfigError | StorageError):
        return 2 if iter_num == 0 else 1, str(error)
    if isinstance(error, Diverged | TeamFailed):
        return 1, str(error)
    if any(words in str(error) for words in LEFT_ALONE):
        return 1, ANOTHER_ENDED
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        size = "" if config is None else f" ({config.batch_size})"
        return 1, f"{OUT_OF_MEMORY}; lower batch_size{size} or window, or choose a smaller model"
    return 1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Outcome:
    """The end of a run, as a context around all of it: what is raised inside becomes result.json and an exit code."""

    def __init__(self) -> None:
        self.run: Run | None = None  # of the process that writes; the others only have an exit code
        self.config: TrainConfig | None = None
        self.iter_num = 0
        self.best_val_loss: float | None = None
        self.stopped = False
        self.note: str | None = None  # what else is to be said of a good end
        self.exit_code = 0

    def of(self, run: Run | None, config: TrainConfig) -> None:
        """Say whose end this is."""
        self.run, self.config = run, config

    def reached(self, iter_num: int, best_val_loss: float | None) -> None:
        """Say how far the run has come."""
        self.iter_num, self.best_val_loss = iter_num, best_val_loss

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, SystemExit):  # argparse has said it all
            return False
        if isinstance(error, Stopped):
            self.stopped, error = True, None
        sentence = None
        if error is not None:
            self.exit_code, sentence = explain(error, self.config, self.iter_num)
            if self.run is not None:
                sentence = sentence.replace(f"{self.run.folder.parent.parent}/", "")
            if self.exit_code == 1 and not isinstance(error, TeamFailed) and sentence != ANOTHER_ENDED:
                traceback.print_exception(error)
            print(f"train.py: {sentence}", file=sys.stderr, flush=True)
        if self.note is not None:
            print(self.note, flush=True)
        state = "failed" if error is not None else "stopped" if self.stopped else "succeeded"
        if self.run is not None:
            self._write(self.run, state, sentence)
            if error is None:
                best = "" if self.best_val_loss is None else f", best val {self.best_val_loss:.4f}"
                print(f"{state}: {self.iter_num} iterations{best}, in {self.run.relative}", flush=True)
        return True

    def _write(self, run: Run, state: str, sentence: str | None) -> None:
        result: dict[str, Any] = {
            "state": state,
            "iter_num": self.iter_num,
            "best_val_loss": finite(self.best_val_loss),
        }
        result |= {"error": sentence, "note": self.note, "exit_code": self.exit_code, "finished": time.time()}
        with contextlib.suppress(StorageError, OSError):  # on a full disk the exit code and the log must do
            write_json(run.result, result)
