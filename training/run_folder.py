"""A trainer's hold on its run folder: one trainer at a time, and no finished run overwritten unasked."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from storage.errors import StorageError
from storage.files import read_json, sweep_temporary, write_json
from storage.runs import Run
from storage.trash import move_to_trash
from training.config import ConfigError, TrainConfig
from training.process import TRAINER, identify
from training.starting_point import require_elsewhere

OF_THE_SERVER = ("status.json", "openai.json", "train_config.json")  # it may be writing these at this moment


@contextlib.contextmanager
def _locked(folder: Path, shown: str) -> Iterator[None]:
    """Hold the folder's lock; the system gives it up when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"another process is training in {shown}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def require_unused(run: Run, config: TrainConfig) -> None:
    """Raise ConfigError for a finished run that the config says neither to resume nor to replace."""
    if run.checkpoint.exists() and config.init_from != "resume" and not config.overwrite:
        instead = "resume it (init_from resume), choose another output_dir, or set overwrite"
        raise ConfigError(f"{run.relative} holds a trained model; {instead}")


def _make_way(run: Run, config: TrainConfig) -> None:
    """Move a finished run out of the way if the config says so. Raises ConfigError if it does not."""
    require_unused(run, config)
    if not run.checkpoint.exists():
        return
    require_elsewhere(config, run)
    with _locked(run.folder, run.relative):
        move_to_trash(run.folder)


@contextlib.contextmanager
def claim(run: Run, config: TrainConfig, launcher: int | None = None, ranks: Sequence[int] = ()) -> Iterator[None]:
    """Hold the run's folder, made if need be, with its train_config.json. Raises ConfigError.

    `launcher` is the process to be known as its trainer if it is not this one, `ranks` are those that it started.
    A run that is refused inside before it has reported anything leaves no folder that was not there before.
    """
    if config.init_from != "resume":
        _make_way(run, config)
    new = not run.folder.exists()
    run.folder.mkdir(parents=True, exist_ok=True)
    with _locked(run.folder, run.relative):
        trainer = identify(os.getpid() if launcher is None else launcher)
        write_json(run.folder / TRAINER, {} if trainer is None else trainer.to_json() | {"ranks": list(ranks)})
        run.result.unlink(missing_ok=True)
        sweep_temporary(run.folder, but=OF_THE_SERVER)  # a killed trainer's half a checkpoint
        if config.init_from != "resume":  # an earlier start that never came to a checkpoint
            run.metrics.unlink(missing_ok=True)
            run.samples.unlink(missing_ok=True)
        write_json(run.config, config.given() | _first_start(run, config))
        try:
            yield
        except (ConfigError, StorageError):
            if new and not run.metrics.exists():
                shutil.rmtree(run.folder, ignore_errors=True)
            raise


def _first_start(run: Run, config: TrainConfig) -> dict[str, str]:
    """Return the init_from that the run began with: "resume" says where it goes on, not what it is."""
    if config.init_from != "resume":
        return {}
    try:
        return {"init_from": str(read_json(run.config)["init_from"])}
    except (StorageError, KeyError, TypeError):
        return {}
