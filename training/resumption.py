"""What a run needs to go on exactly where it stopped, and what makes it go on only nearly so."""

from typing import Any

from storage import checkpoint_files
from storage.errors import NotLoadable
from storage.runs import Run
from training.config import MOST_KEPT, ConfigError, TrainConfig
from training.job import RESULT, read_object, result_of, typed


def lengthened(config: TrainConfig, max_iters: int) -> TrainConfig:
    """Return a resolved config with another end. Raises ConfigError if it would keep too many checkpoints."""
    longer = config.model_copy(update={"max_iters": max_iters})
    if longer.kept() > MOST_KEPT:
        interval = (longer.eval_interval or 1) * (longer.keep_every or 1)
        most = (MOST_KEPT + 1) * interval - 1
        why = f"of every {interval:,} iterations one checkpoint is kept, and of a run at most {MOST_KEPT:,} are"
        raise ConfigError(f"max_iters is {max_iters}; it must be at most {most}: {why}")
    return longer


def further(run: Run, max_iters: int | None = None, iter_num: int | None = None) -> TrainConfig:
    """Return the config with which an ended run goes on: to `max_iters`, from its newest checkpoint or `iter_num`'s.

    Raises ConfigError for one that leaves nothing to do, or that would keep too many checkpoints; NotLoadable.
    """
    given, problem = checkpoint_files.read_object(str(run.config))
    if problem is not None:
        raise NotLoadable(f"{run.relative} cannot go on: {problem}")
    config = TrainConfig.parse(given | {"output_dir": run.relative})  # a copied run does not train in the original
    reached = iter_num
    if reached is None:
        checkpoint = typed(read_object(run.manifest(run.checkpoint)), RESULT)
        reached = result_of(run).get("iter_num") or checkpoint.get("iter_num") or 0
    last = config.max_iters if max_iters is None else max_iters
    if last is not None and last <= reached:
        raise ConfigError(f"max_iters is {last}; {run.name} has {reached} iterations behind it: give more")
    return config if last is None else lengthened(config, last)


def require_resumable(state: dict[str, Any], name: str, config: TrainConfig) -> None:
    """Raise ConfigError for a checkpoint without all that decides the next iteration, or of other adapters."""
    missing = [key for key in ("optimizer", "data_state") if not state.get(key)]
    if missing:
        instead = "start a new run with init_from instead"
        raise ConfigError(f"{name} cannot be resumed, it has no {', '.join(missing)}; {instead}")
    for field in ("lora_rank", "lora_alpha"):
        before, now = state["config"].get(field), getattr(config, field)
        if before != now:
            raise ConfigError(f"{field} is {now}; {name} was trained with {before}, and a resumed run keeps it")


def warn_of_differences(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what differs from the machine that wrote a checkpoint: the last bits of the results will, too."""
    changed = [f"{key} was {before.get(key)} and is {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        print(f"resuming, but not to the last bit: {', '.join(changed)}")
