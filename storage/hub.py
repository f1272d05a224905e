"""The five pretrained models by name: found on this machine, or fetched from the Hugging Face hub.

Only these names are ever asked for, and only their safetensors and tokenizer files. HF_HUB_OFFLINE, HF_TOKEN,
HF_HOME and HF_ENDPOINT mean what they mean everywhere. No torch; what is fetched is inspected before it is loaded.
"""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from storage.errors import BadName, Unreachable
from storage.files import quoted, require_space
from storage.registry import PRETRAINED, local_folder
from storage.runs import Workspace

PATTERNS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
)
MEGABYTES = {"gpt2": 551, "gpt2-medium": 1530, "gpt2-large": 3260, "gpt2-xl": 6440, "distilgpt2": 356}
PROBE_SECONDS = 5.0  # the hub's own client retries for 23 s when there is no network
WHAT_TO_DO = (
    "connect this machine once, or put the model's Hugging Face folder (config.json, model.safetensors, "
    "tokenizer.json) under --pretrained_dir by its name"
)


def _repositories(name: str) -> tuple[str, str]:
    """Return the repository's id today, and the short one that old caches have."""
    return ("distilbert/" if name == "distilgpt2" else "openai-community/") + name, name


def _is_complete(folder: Path) -> bool:
    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    weights = has("model.safetensors") or has("model.safetensors.index.json")
    return has("config.json") and weights and (has("tokenizer.json") or has("vocab.json", "merges.txt"))


def _cached(name: str) -> Path | None:
    """Return the model's folder in the Hugging Face cache, without asking the network."""
    from huggingface_hub import snapshot_download  # takes half a second to import, and few servers need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    for repository in _repositories(name):
        try:
            folder = Path(snapshot_download(repository, local_files_only=True))
        except (LocalEntryNotFoundError, OSError):
            continue
        if _is_complete(folder):
            return folder
    return None


def _probe(address: tuple[str, int]) -> bool:
    """Say whether the address accepts a connection; in a thread, because looking up a name has no time limit."""
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, PROBE_SECONDS).close()
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def _hub_address() -> tuple[str, int]:
    """Return host and port to connect to: the proxy if there is one, else the hub."""
    from huggingface_hub import constants

    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    parts = urlsplit(proxy or constants.ENDPOINT)
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


def _download(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise Unreachable(f"{name} is not on this machine and HF_HUB_OFFLINE is set; {WHAT_TO_DO}")
    if not _probe(_hub_address()):
        raise Unreachable(f"{name} is not on this machine and the Hugging Face hub does not answer; {WHAT_TO_DO}")
    require_space(Path(constants.HF_HUB_CACHE), MEGABYTES[name] * 1_100_000)
    try:
        return Path(snapshot_download(_repositories(name)[0], allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise Unreachable(f"{name} could not be fetched from the Hugging Face hub; {WHAT_TO_DO}") from e


def fetch(name: str, workspace: Workspace, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of one of the five pretrained models.

    Looks in models/, in `pretrained_dir`, in the Hugging Face cache, then on the hub. Without any of these it
    raises Unreachable within 10 seconds, saying what to do. BadName for any other name, NoSpace for a full disk.
    """
    if name not in PRETRAINED:
        raise BadName(f"model_type is {quoted(name)}; it must be one of {', '.join(PRETRAINED)}")
    folder = local_folder(workspace, name) or _cached(name)
    if folder is None:
        if progress is not None:
            progress(f"fetching {name} from the Hugging Face hub, about {MEGABYTES[name]} MB")
        folder = _download(name)
    return folder
