"""From what an OpenAI client asks of a fine-tuning job to a TrainConfig: which model, how long, in which steps.

Epochs, batch size and learning rate that are "auto" or absent become the preset's, cut to the size of the text: a
file of ten short examples still trains. Sizes in tokens are estimates here, made of a sample; nothing is prepared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage import registry, tokenizer
from storage.datasets import Dataset
from storage.documents import pieces, scan, validation_start
from storage.errors import NotFound
from storage.inspection import inspect
from storage.runs import Workspace
from storage.token_files import split
from training import fine_tuning
from training.config import PRESETS, ConfigError, TrainConfig
from training.starting_point import named, reference, settled

BYTES_PER_TOKEN = {"char": 1.0, "gpt2": 4.0}
OTHER_BYTES_PER_TOKEN = 2.5  # of small vocabularies of byte pairs
LONGEST_TOKENS = 1.5  # how much longer than estimated tokens may be in the text to validate on
SMALL_BYTES = 16 * 2**20  # larger texts are never too small for a window
AUTO_EPOCHS, LEAST_ITERS = 3, 50
HUB_CONTEXT = 1024  # of the pretrained models that may still have to be fetched
OURS = ("model_type", "init_from", "output_dir", "overwrite", "dataset", "seed")
EXTRAS = frozenset(TrainConfig.model_fields) - set(OURS)


@dataclass(frozen=True)
class Sizes:
    """Bytes of UTF-8 on each side of a dataset's split."""

    train: int
    val: int


def sizes(dataset: Dataset) -> Sizes:
    """Return how much text there is to train and to validate on; roughly, of a large dataset or one of tokens."""
    files = dataset.sources()
    total = sum(file.size for file in files) or 2 * SMALL_BYTES
    if not 0 < total <= SMALL_BYTES:
        return Sizes(total * 9 // 10, total // 10)
    counts = [0, 0]
    found, val_from = scan(pieces(dataset.folder, files)), validation_start(dataset.folder, files)
    for side, piece in split(pieces(dataset.folder, files), found, val_from):
        counts[side] += len(piece.text.encode())
    return Sizes(*counts)


# ---- which model


def base(workspace: Workspace, model: str, from_scratch: bool | str) -> dict[str, str]:
    """Return model_type and init_from for a model's name: pretrained, ft:…, a run, or a preset to begin with.

    Raises StorageError, ConfigError.
    """
    if from_scratch:
        preset = model if from_scratch is True else str(from_scratch)
        if preset not in PRESETS:
            raise ConfigError(f"from_scratch needs a preset as its value or as model: {', '.join(PRESETS)}")
        return {"model_type": preset, "init_from": "scratch"}
    if model in registry.pretrained_names(workspace):
        return {"model_type": model, "init_from": "pretrained"}
    if model in PRESETS:
        return {"model_type": model, "init_from": "scratch"}
    if model.startswith("ft:"):
        return {"init_from": fine_tuning.model_path(workspace, model)}
    named(model, workspace, "model")  # refused here as what it is called there
    return {"init_from": model}


def _of_base(config: TrainConfig, workspace: Workspace) -> tuple[int, str]:
    """Return the context and the kind of tokenizer of the model that a resolved config starts from."""
    if config.init_from == "scratch":
        return int(config.block_size or 1), str(config.tokenizer).partition(":")[0]
    start = reference(config, workspace)
    if start.path is None:
        return HUB_CONTEXT, "gpt2"
    folder = start.path if start.path.is_dir() else start.path.parent
    try:
        kind = tokenizer.load(folder / "tokenizer.json").kind
    except NotFound:
        kind = "gpt2"
    return int(inspect(start).model_args["block_size"]), kind


# ---- how long, in which steps


def _window(config: TrainConfig, context: int, val_tokens: float) -> int:
    """Return the tokens per window: as asked, else the preset's, cut to the context and to the text there is."""
    if config.init_from == "scratch" or config.window is None:
        wanted = context
    else:
        wanted = config.window
    return max(1, int(min(wanted, context, val_tokens / LONGEST_TOKENS - 1)))


def _iterations(asked: Mapping[str, Any], per_epoch: int, usual: int, from_scratch: bool) -> int:
    if asked["n_epochs"] != "auto":
        return int(asked["n_epochs"]) * per_epoch
    return usual if from_scratch else min(usual, max(LEAST_ITERS, AUTO_EPOCHS * per_epoch))


def plan(
    workspace: Workspace, dataset: Dataset, fields: Mapping[str, Any], asked: Mapping[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the config of a job and its hyperparameters, of which none is "auto" any more.

    `fields` are those of TrainConfig that are decided; `asked` are OpenAI's hyperparameters. Raises ConfigError and
    StorageError.
    """
    given = dict(fields)
    if asked["batch_size"] != "auto":
        given.setdefault("batch_size", asked["batch_size"])
    usual = settled(TrainConfig.parse(given), workspace)
    context, kind = _of_base(usual, workspace)
    per_token, text = BYTES_PER_TOKEN.get(kind, OTHER_BYTES_PER_TOKEN), sizes(dataset)
    from_scratch = usual.init_from == "scratch"
    most = text.val / per_token if dataset.format() == "text" else math.inf  # few examples are one window
    window = int(given.get("window") or _window(usual, context, most))
    steps = int(usual.batch_size or 1) * int(usual.gradient_accumulation_steps or 1)
    per_epoch = max(1, math.ceil(text.train / per_token / (steps * window)))
    iterations = _iterations(asked, per_epoch, int(usual.max_iters or 1), from_scratch)
    iterations = int(given.setdefault("max_iters", iterations))
    rate, factor = float(usual.learning_rate or 0), asked["learning_rate_multiplier"]
    given.setdefault("learning_rate", rate * (1 if factor == "auto" else factor))
    given.setdefault("eval_interval", max(1, min(int(usual.eval_interval or 1), iterations // 4)))
    given.setdefault("log_interval", max(1, min(usual.log_interval, iterations // 10)))
    if not from_scratch or window < context:
        given["window"] = window
    used = {"n_epochs": max(1, round(iterations / per_epoch)), "batch_size": int(usual.batch_size or 1)}
    return TrainConfig.parse(given), used | {"learning_rate_multiplier": given["learning_rate"] / rate}
