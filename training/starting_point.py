"""Where a run starts: the model that `init_from` names, and whether model, data and machine fit each other."""

from typing import Any

from storage import registry
from storage.datasets import Splits
from storage.errors import BadName
from storage.files import quoted
from storage.inspection import inspect
from storage.machine import available_memory
from storage.runs import Run, Workspace
from training.config import ConfigError, TrainConfig, resolve
from training.disk_space import parameters
from training.presets import GPT2_WIDTH, PRESETS

ACTIVATION_BYTES = 32  # of a token in a layer, by width: what the backward pass needs of the forward one, at least


def named(name: str, workspace: Workspace, field: str) -> registry.ModelReference:
    """Return the trained model called `name`: a pretrained name, my_run, my_run/best, or a path of load_model.

    Raises StorageError; for what can be no such name one that names `field`, where it was given.
    """
    if name in registry.pretrained_names(workspace):
        return registry.resolve(workspace, model_type=name)
    run, slash, file = name.partition("/")
    path = f"out/{run}" if not slash else f"out/{run}/best.pt" if file == "best" else name
    try:
        return registry.resolve(workspace, model_path=path)
    except BadName:
        rule = "it must be a pretrained name, a run or a checkpoint: gpt2, my_run, my_run/best, out/my_run/ckpt.pt"
        raise BadName(f"{field} is {quoted(name)}; {rule}") from None


def reference(config: TrainConfig, workspace: Workspace) -> registry.ModelReference:
    """Return the trained model that a resolved config starts from. Raises StorageError."""
    name = config.model_type if config.init_from == "pretrained" else config.init_from
    return named(str(name), workspace, "init_from")


def require_thin(rank: int | None, width: int) -> None:
    """Raise ConfigError for adapters whose rank is not below the model's width."""
    if rank is not None and rank >= width:
        raise ConfigError(f"lora_rank is {rank}; it must be less than the model's width of {width}")


def shorter_context(config: TrainConfig, context: int) -> int:
    """Return the context of a trained model, lowered if the config says so. Raises ConfigError for a longer one."""
    block_size = context if config.block_size is None else config.block_size
    if block_size > context:
        raise ConfigError(f"block_size is {block_size}; it must be at most the model's context of {context}")
    return block_size


def settled(config: TrainConfig, workspace: Workspace) -> TrainConfig:
    """Return the config with every default filled in, as `resolve` does, for the model that it starts from.

    Reads at most that model's description. Raises ConfigError, also for what does not suit that model, StorageError.
    """
    names = registry.pretrained_names(workspace)
    found = resolve(config, names)
    if found.init_from in ("scratch", "resume"):
        return found
    start = reference(found, workspace)
    if start.path is not None:
        shape = inspect(start).model_args
    elif start.id in registry.PRETRAINED:  # yet to be fetched, and of GPT-2's family: its name tells the shape
        shape = PRESETS.get(start.id, PRESETS["gpt2"])
    else:  # somewhere on the hub: the trainer will know
        return resolve(config, names, GPT2_WIDTH)
    require_thin(config.lora_rank, shape["n_embd"])
    shorter_context(config, shape["block_size"])
    return resolve(config, names, shape["n_embd"])


def base_run(config: dict[str, Any]) -> str | None:
    """Return the name of the run that a config starts from, None if it starts from none; "resume" is none other."""
    first = str(config.get("init_from")).removeprefix("out/").split("/")[0]
    fixed = ("None", "scratch", "pretrained", "resume", *registry.PRETRAINED, registry.BUNDLED)
    return None if first in fixed else first


def require_elsewhere(config: TrainConfig, run: Run) -> None:
    """Raise ConfigError for a run that would replace the very run whose weights it starts from."""
    if base_run(config.given()) == run.name:
        raise ConfigError(f"{run.relative} is what this training starts from; choose another output_dir, or resume it")


def require_known_tokens(config: TrainConfig, known: bool) -> None:
    """Raise ConfigError for adapters on chats whose tokens the model does not know: its embedding stays as it is."""
    if config.lora_rank is not None and not known:
        raise ConfigError(
            f"lora_rank is {config.lora_rank}, and {config.dataset} holds chats: adapters cannot learn the new tokens "
            "of chats; train all weights, or begin with a model that was trained on chats"
        )


def window_of(config: TrainConfig, context: int) -> int:
    """Return the tokens per window: as configured, and never more than the model's context."""
    return context if config.window is None else min(config.window, context)


def check_fit(config: TrainConfig, splits: Splits, shape: Any, world: int) -> None:
    """Raise ConfigError, before the first iteration, for what would fail in it; `world` processes share a batch.

    `shape` is the model's GPTConfig.
    """
    window, vocab_size = window_of(config, shape.block_size), shape.vocab_size
    if splits.tokenizer.n_vocab > vocab_size:
        n, name = splits.tokenizer.n_vocab, splits.tokenizer.name
        raise ConfigError(f"the tokenizer {name} has {n} tokens, more than the model's vocabulary of {vocab_size}")
    count = len(splits.train)
    if count <= window and splits.train_mask is None:  # examples are learned however few there are
        least = f"a window of {window} needs {window + 1}; lower block_size or window, or add text"
        raise ConfigError(f"{config.dataset} has {count} tokens to train on, and {least}")
    if len(splits.val) < 2:
        raise ConfigError(f"{config.dataset} has {len(splits.val)} tokens to validate on, and 2 are needed; add text")
    size, steps = int(config.batch_size or 1), int(config.gradient_accumulation_steps or 1)
    if steps % world and size % world:
        raise ConfigError(f"batch_size is {size}; {world} processes need a multiple of {world} to share it")
    rows = size // (1 if steps % world == 0 else world) * window
    activations = rows * shape.n_layer * shape.n_embd * ACTIVATION_BYTES
    available = available_memory()
    if available is not None and activations > available:
        need = f"{activations / 1e9:.1f} GB for activations alone, and {available / 1e9:.1f} GB are free"
        raise ConfigError(f"batch_size {size} with windows of {window} needs {need}; lower batch_size or window")


def require_memory(n_layer: int, n_embd: int, block_size: int, vocab_size: int) -> None:
    """Raise ConfigError for a model whose weights, gradients and moments are more than the memory there is."""
    size = 16 * parameters(n_layer, n_embd, block_size, vocab_size)
    available = available_memory()
    if available is not None and size > available:
        shape = f"a model of {n_layer} layers and width {n_embd}"
        raise ConfigError(f"{shape} needs {size / 1e9:.1f} GB to train, and {available / 1e9:.1f} GB are free")
