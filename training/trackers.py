"""Trackers: where a run's metrics go beside metrics.jsonl, if its config says so: TensorBoard, Weights & Biases.

They are told what was written, after it was written, and may fail: a night's training is worth more than its
picture elsewhere. No tracker reads anything from a device. wandb is a package that only its users install.
"""

import importlib.util
import secrets
from typing import Any, Protocol

from storage.errors import NotFound
from storage.files import read_json, write_json
from storage.runs import Run
from training.config import ConfigError, TrainConfig
from training.event_file import PATTERN, EventFile
from training.metrics import numbers

WANDB = "wandb.json"  # in a run's folder: the id under which Weights & Biases knows it


class Tracker(Protocol):
    """Is told the rows and samples of a run. What it raises ends it, and never the run."""

    name: str

    def row(self, row: dict[str, Any]) -> None:
        """Take a row of metrics."""

    def sample(self, iter_num: int, sample: str) -> None:
        """Take a text sample."""

    def cut(self, iter_num: int) -> None:
        """Learn that what came after `iter_num` will come again."""


def require(config: TrainConfig) -> None:
    """Raise ConfigError if the config asks for a tracker whose package is not there."""
    found = importlib.util.find_spec("wandb") if config.wandb else None
    if config.wandb and (found is None or found.origin is None):  # a mere folder of that name has no origin
        raise ConfigError(
            "wandb is true, and the package wandb is not installed here; pip install it, or leave wandb out"
        )


class WeightsAndBiases:
    """The run as Weights & Biases shows it. Its own variables WANDB_* say where, and as what it may."""

    name = "wandb"

    def __init__(self, run: Run, config: TrainConfig, run_id: str):
        wandb = importlib.import_module("wandb")
        quiet = wandb.Settings(console="off", silent=True)  # train.log has all that a run prints
        self._run = wandb.init(
            id=run_id,
            name=config.wandb_name or run.name,
            project=config.wandb_project,
            entity=config.wandb_entity,
            tags=None if config.wandb_tags is None else [tag.strip() for tag in config.wandb_tags.split(",")],
            dir=str(run.folder),
            config=config.given(),
            resume="allow",
            settings=quiet,
        )
        self._run.define_metric("*", step_metric="iter_num")

    def row(self, row: dict[str, Any]) -> None:
        """Take a row of metrics; sending it is the matter of another process."""
        self._run.log({"iter_num": row["iter_num"]} | numbers(row))

    def sample(self, iter_num: int, sample: str) -> None:
        """Take a text sample."""
        self._run.log({"iter_num": iter_num, "sample": sample})

    def cut(self, iter_num: int) -> None:
        """Leave what was sent: it cannot be taken back, and the curve goes back to where the run did."""


def _wandb_id(run: Run, resumed: bool) -> str:
    """Return the id of the run, a new one at its start."""
    try:
        return str(read_json(run.folder / WANDB)["id"]) if resumed else _new_wandb_id(run)
    except (NotFound, KeyError, TypeError):
        return _new_wandb_id(run)


def _new_wandb_id(run: Run) -> str:
    found = secrets.token_hex(8)
    write_json(run.folder / WANDB, {"id": found})
    return found


def trackers(run: Run, config: TrainConfig) -> list[Tracker]:
    """Return the trackers that a config asks for, ready to be told of the run in a folder that is ours.

    Raises ConfigError if one of a new run cannot begin; a resumed run goes on without it, and its log says so.
    """
    require(config)
    found: list[Tracker] = []
    resumed = config.init_from == "resume"
    if not resumed:
        for left in run.folder.glob(PATTERN):  # by an earlier start that never came to a checkpoint
            left.unlink()
    if config.tensorboard:
        found.append(EventFile(run.folder))
    if config.wandb:
        try:
            found.append(WeightsAndBiases(run, config, _wandb_id(run, resumed)))
        except Exception as error:  # without network or key, or whatever that package raises
            said = f"wandb cannot be used: {str(error)[:300]}"
            if not resumed:
                raise ConfigError(f"{said}; WANDB_MODE=offline needs neither network nor key") from error
            print(f"{said}; the run goes on without it", flush=True)
    return found
