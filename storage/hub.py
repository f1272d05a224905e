"""The five pretrained models by name: found on this machine, or fetched from the Hugging Face hub.

Only these names, and repositories of the registry file, are ever asked for, and only their safetensors and tokenizer
files. HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and HF_ENDPOINT mean what they mean everywhere. No torch; what is fetched is
inspected before it is loaded.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from storage.errors import BadName, Unreachable
from storage.files import NAME, quoted, require_space
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


def is_repository(name: str) -> bool:
    """Say whether a name is a repository's on the hub: owner/name."""
    parts = name.split("/")
    return len(parts) == 2 and all(map(NAME.fullmatch, parts)) and "--" not in name and ".." not in name


def _repositories(name: str) -> tuple[str, ...]:
    """Return the repository's id today, and the short one that old caches have; a repository's own id is its only."""
    if "/" in name:
        return (name,)
    return ("distilbert/" if name == "distilgpt2" else "openai-community/") + name, name


def _is_complete(folder: Path) -> bool:
    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    weights = has("model.safetensors") or has("model.safetensors.index.json")
    return has("config.json") and weights and (has("tokenizer.json") or has("vocab.json", "merges.txt"))


def cached(name: str) -> Path | None:
    """Return the model's folder in the Hugging Face cache, without asking the network."""
    from huggingface_hub import try_to_load_from_cache  # slow to import, and few servers need it

    for repository in _repositories(name):
        config = try_to_load_from_cache(repository, "config.json")
        if isinstance(config, str) and _is_complete(Path(config).parent):
            return Path(config).parent
    return None


def _answers(address: str) -> bool:
    """Say whether a hub answers in time; in a thread, because looking up a host's name has no time limit."""
    import requests

    answered = threading.Event()

    def ask() -> None:
        try:
            reply = requests.head(address, timeout=PROBE_SECONDS, allow_redirects=True)
        except requests.RequestException:
            return
        if reply.status_code < 500:
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def _download(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    repository = _repositories(name)[0]
    if constants.HF_HUB_OFFLINE:
        raise Unreachable(f"{name} is not on this machine and HF_HUB_OFFLINE is set; {WHAT_TO_DO}")
    if not _answers(f"{constants.ENDPOINT}/api/models/{repository}"):
        raise Unreachable(f"{name} is not on this machine and the Hugging Face hub does not answer; {WHAT_TO_DO}")
    require_space(Path(constants.HF_HUB_CACHE), MEGABYTES.get(name, 0) * 1_100_000)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(PATTERNS)))
    except Exception as e:  # what answers may be anything, and its replies make the client raise anything
        raise Unreachable(f"{name} could not be fetched from the Hugging Face hub; {WHAT_TO_DO}") from e
    if not _is_complete(folder):
        raise Unreachable(f"the Hugging Face hub did not give all files of {name}; {WHAT_TO_DO}")
    return folder


def fetch(name: str, workspace: Workspace, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of one of the five pretrained models, or of a repository "owner/name" of a registry file.

    Looks in models/, in `pretrained_dir`, in the Hugging Face cache, then on the hub. Without any of these it
    raises Unreachable within 10 seconds, saying what to do. BadName for any other name, NoSpace for a full disk.
    """
    if name not in PRETRAINED and not is_repository(name):
        raise BadName(f"model_type is {quoted(name)}; it must be one of {', '.join(PRETRAINED)}")
    folder = local_folder(workspace, name) or cached(name)
    if folder is None:
        if progress is not None:
            size = f", about {MEGABYTES[name]} MB" if name in MEGABYTES else ""
            progress(f"fetching {name} from the Hugging Face hub{size}")
        folder = _download(name)
    return folder
