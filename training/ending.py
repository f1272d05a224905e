"""How a job ended: as its trainer says in result.json, or as the system and the log tell of one that said nothing."""

import os
import signal

from storage.errors import StorageError
from storage.runs import Run
from training import log as job_log
from training.job import ENDED, Status, result_of
from training.outcome import NO_MEMORY, OUT_OF_MEMORY

Ending = tuple[str, str | None, int | None]  # state, error, exit code
ADVICE = "lower batch_size or window, or choose a smaller model"


def could_not_start(error: OSError | StorageError) -> str:
    """Return the sentence for a trainer that never came to run."""
    if isinstance(error, StorageError):
        return f"the trainer could not be started: {error}"
    file = "" if error.filename is None else f" ({os.path.basename(error.filename)})"
    return f"the trainer could not be started: {error.strerror}{file}"


def _last_words(run: Run) -> str:
    try:
        said = job_log.last_lines(run.log)
    except StorageError as error:
        return f"; {error}"
    return f"; its last words: {said}" if said else ""


def _killed_by(number: int, memory_ran_out: bool, last: str) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {-number}{last}"
    if number != signal.SIGKILL:
        return f"killed by {name}{last}"
    if memory_ran_out:
        return f"{OUT_OF_MEMORY}: the system ended it; {ADVICE}{last}"
    return f"killed by {name}, perhaps because memory ran out{last}"


def how_it_ended(run: Run, status: Status, code: int | None, grace: float, memory_ran_out: bool) -> Ending:
    """Return state, error and exit code of an ended trainer; `code` is None if nobody can know it.

    `memory_ran_out` says whether the system has ended some process for memory while this one ran.
    """
    result = result_of(run)
    if result.get("state") in ENDED:
        return result["state"], result.get("error"), result.get("exit_code")
    if status.killed:
        late = f"it did not end within {grace:g} s and was killed; work since its last checkpoint is lost"
        return "stopped", late, code
    if status.stopping:
        return "stopped", None, code
    last = _last_words(run)
    if code is None:
        return "lost", f"it ended without saying how: killed, or while no server looked{last}", None
    if any(words.lower() in last.lower() for words in NO_MEMORY):  # a library ended it
        return "failed", f"{OUT_OF_MEMORY}; {ADVICE}{last}", code
    if code < 0:
        return "failed", _killed_by(-code, memory_ran_out, last), code
    return "failed", f"exit code {code}{last}", code
