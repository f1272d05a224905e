"""Choose and build the runner of a loaded model: native where it can serve, torch everywhere."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from inference.decode_graphs import recorder
from inference.native.machine import cpu_flags
from inference.torch_runner import DTYPES, TorchRunner
from model import GPT, GPTConfig
from storage.machine import total_memory

if TYPE_CHECKING:
    from inference.runner import ModelRunner
    from storage.pretrained import StoredModel

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "int8")


@dataclass(frozen=True)
class RunnerOptions:
    """What the user asks of a runner. Raises ValueError naming the option and what it may be."""

    device: str = "auto"
    dtype: str = "auto"
    slots: int = 16
    threads: int | None = None  # None: as many as torch takes
    cache_memory: int | None = None  # most bytes of keys and values; None: all slots may be full

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; it must be one of {', '.join(DEVICES)}")
        if self.dtype not in PRECISIONS:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(PRECISIONS)}")
        for name, value in (
            ("slots", self.slots),
            ("threads", self.threads),
            ("cache_memory", self.cache_memory),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


def pick_device(asked: str) -> str:
    """Return the torch device for `asked`. Raises ValueError when this machine has no such device."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked == "auto":
        return "cuda" if present["cuda"] else "mps" if present["mps"] else "cpu"
    if not present[asked]:
        raise ValueError(f"device is {asked!r}, but torch finds none here; auto takes what there is")
    return asked


def half_of_memory(device: str) -> int:
    """Return half of the memory that models on this device live in, in bytes."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory) // 2
    return total_memory() // 2


class NotFinite(ValueError):
    """A model's weights hold what is no number, which would make every answer none."""


def fingerprint(model: "GPT | StoredModel") -> str:
    """Return a short hash of a model's shape and weights; about a second per 2 GB. Raises NotFinite."""
    digest = hashlib.sha256(repr(model.config).encode())
    names = [name for name, _ in model.named_parameters()] if isinstance(model, GPT) else model.names
    for name in names:
        digest.update(name.encode())
        for part in model.parts(name):
            if not torch.stack(torch.aminmax(part)).isfinite().all():
                raise NotFinite(f"weights that are no finite numbers, in {name}")
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(str(part.dtype).encode())
    return digest.hexdigest()[:12]


def native_auto() -> str:
    """Return what `auto` means to the native runner: the fastest precision that keeps quality.

    int8 costs less than 0.5 % of the loss (bench/bench_quality.py) and reads the fewest bytes, but without VNNI its
    arithmetic is slower than what bf16 reads more.
    """
    return "int8" if "avx512_vnni" in cpu_flags() else "bf16"


@dataclass(frozen=True)
class Choice:
    """Which runner serves a model, where and in which precision, and why."""

    runner: str
    device: str
    dtype: str
    reason: str


def _native_refusal(config: GPTConfig, dtype: str, device: str) -> str | None:
    """Return why the native runner cannot serve, or None."""
    if device != "cpu":
        return f"the device is {device}"
    try:
        from inference.native_runner import NativeRunner
    except ModuleNotFoundError:
        return "no native runner"
    return NativeRunner.unsupported(config, dtype)


def choose(config: GPTConfig, options: RunnerOptions) -> Choice:
    """Return the runner that serves a model of this shape best. Raises ValueError when none has what is asked for."""
    device = pick_device(options.device)
    dtype = native_auto() if options.dtype == "auto" else options.dtype
    reason = _native_refusal(config, dtype, device)
    if reason is None:
        return Choice("native", device, dtype, "the native runner supports this model and this CPU")
    if options.dtype == "int8":
        raise ValueError(f"dtype is 'int8', which only the native runner has; it does not serve here: {reason}")
    if options.dtype == "auto":
        dtype = "bf16" if device == "cuda" else "fp32"
    return Choice("torch", device, dtype, reason)


def build_runner(model: "GPT | StoredModel", options: RunnerOptions) -> tuple["ModelRunner", str]:
    """Return the runner that `choose` names, and why it was chosen. It takes the model over. Raises ValueError."""
    choice = choose(model.config, options)
    if choice.runner == "torch":
        whole = model if isinstance(model, GPT) else model.load()
        slots = options.slots
        if options.cache_memory is not None and choice.device != "cpu":  # all of it is taken at once there
            one = 2 * model.config.n_layer * model.config.n_embd * DTYPES[choice.dtype].itemsize
            spare = 1 if choice.device == "cuda" else 0  # the scratch slot of decode graphs
            slots = max(1, min(slots, options.cache_memory // (one * model.config.block_size) - spare))
        return TorchRunner(whole, slots, choice.device, choice.dtype, recorder(choice.device)), choice.reason
    from inference.native_runner import NativeRunner

    return NativeRunner(model, options.slots, choice.dtype, options.threads), choice.reason
