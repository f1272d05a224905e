"""What must hold before a job may start: refused here at once, what the trainer would refuse after a while.

Nothing here writes. Whether the run's folder is free is for the JobManager to say, which knows the other jobs.
"""

import os
from collections.abc import Callable
from typing import Any

from storage import datasets, hub, registry, tokenizer
from storage.chat_format import is_chat
from storage.errors import BadName, NotFound
from storage.files import require_space, require_writable
from storage.runs import Run, Workspace
from storage.tokenizer import Tokenizer
from training import hardware
from training.config import ConfigError, TrainConfig
from training.starting_point import reference, require_elsewhere, require_known_tokens
from training.trackers import require as require_trackers

Allow = Callable[[registry.ModelReference], None]


def allow_all(start: registry.ModelReference) -> None:
    """Let jobs start from any model."""


def has_weights(run: Run) -> bool:
    """Say whether a run has something in its folder that training has made."""
    try:
        run.describe()
    except NotFound:
        return False
    return True


def require_folder(run: Run) -> None:
    """Raise BadName if the run's folder is a link or a file, NotLoadable if it cannot be read."""
    if not run.exists() and os.path.lexists(run.folder):
        raise BadName(f"{run.relative} is not a folder")


def require_room(workspace: Workspace, size: int) -> None:
    """Raise NoSpace or ReadOnly unless a run can be kept that takes so many bytes."""
    require_writable(workspace.out)
    require_space(workspace.out, size)


def tokenizer_of(start: registry.ModelReference) -> Tokenizer | None:
    """Return the tokenizer that lies beside a model, None if there is none: then it is GPT-2's. Raises NotLoadable."""
    if start.path is None:
        return None
    try:
        return tokenizer.load((start.path if start.path.is_dir() else start.path.parent) / "tokenizer.json")
    except NotFound:
        return None


def check(config: TrainConfig, workspace: Workspace, run: Run, allow: Allow = allow_all) -> None:
    """Refuse a resolved config whose data or starting point would not do. Raises StorageError, ConfigError."""
    if (there := hardware.gpus()) > 0:  # where the driver says nothing, the trainer finds out
        hardware.require_devices(config.device, config.nproc_per_node, there)
    require_trackers(config)
    source = datasets.dataset(workspace, config.dataset)
    name = config.tokenizer or "auto"
    if config.init_from == "resume":
        raise ConfigError(f"init_from is resume; POST /api/jobs/<name>/resume goes on with {config.output_dir}")
    if config.init_from != "scratch":
        start = reference(config, workspace)
        allow(start)
        require_elsewhere(config, run)
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        if start.kind == "pretrained" and offline:
            hub.fetch(start.id, workspace)  # finds it here, or refuses
        text = tokenizer_of(start)
        if text is not None:
            name = text.name
        elif start.kind == "pretrained":
            name = "gpt2"
        if source.is_known():  # else the trainer fetches it first
            require_known_tokens(config, source.format() != "chat" or (text is not None and is_chat(text)))
    source.check(name, config.window or config.block_size)


def downloads(config: dict[str, Any], workspace: Workspace) -> bool:
    """Say whether a run has to fetch its weights from a hub first."""
    fetched = config.get("model_type") if config.get("init_from") == "pretrained" else config.get("init_from")
    return fetched in registry.PRETRAINED and registry.local_folder(workspace, str(fetched)) is None
