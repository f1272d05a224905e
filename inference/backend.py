"""Where inference runs, as the web layer sees it: a few methods that an engine in this process satisfies.

Another process or another machine can satisfy them too. No torch here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from inference.sequence import Bell, Generation, SamplingParams

if TYPE_CHECKING:
    from storage.registry import ModelReference
    from storage.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model, as requests need to know it. Compared by identity: a reload is another one."""

    id: str
    reference: "ModelReference"
    tokenizer: "Tokenizer"
    block_size: int
    vocab_size: int
    n_embd: int  # numbers in an embedding
    parameters: int
    memory_bytes: int  # of weights and cache
    runner: str  # "torch", "native"
    runner_reason: str  # why this runner serves, in words
    device: str
    dtype: str
    fingerprint: str  # of weights, tokenizer, runner, dtype and the runner's arithmetic
    loaded_at: float  # seconds since the epoch
    load_seconds: float


@dataclass(frozen=True)
class Footprint:
    """What a model takes, loaded or not."""

    parameters: int
    block_size: int
    size_bytes: int  # of the weights on disk
    memory_bytes: int  # of weights and cache, when it serves
    chat: bool  # whether its tokenizer has the chat format's tokens


class InferenceBackend(Protocol):
    """Run models and generate with them. All methods may be called from any thread."""

    @property
    def bell(self) -> Bell:
        """Return what rings when events of generations have come, so that one thread can wait for many of them."""
        ...

    def served(self) -> ServedModel | None:
        """Return the loaded model, or None."""
        ...

    def submit(
        self,
        model: ServedModel,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        owner: str = "",
        cache_scope: str = "",
    ) -> Generation:
        """Queue a request on `model`. Raises PromptTooLong, QueueFull, NoModel, EngineDown or ValueError at once.

        `request_id` names it for `request()`; one that is still at work here is a ValueError. Owners who wait
        at the same time get the same number of slots. Requests of one `cache_scope` may skip what an earlier
        one has computed of their prompt; those of others never notice.
        """
        ...

    def embed(
        self, model: ServedModel, prompt_ids: Sequence[int], request_id: str | None = None, owner: str = ""
    ) -> Generation:
        """Queue a prompt whose final hidden states are wanted, as the Generation's `embedding`; see `submit`."""
        ...

    def load(self, reference: "ModelReference") -> ServedModel:
        """Load a model beside the current one, then swap.

        Raises StorageError, LoadInProgress, EngineDown or ValueError; then nothing changed.
        """
        ...

    def models(self) -> list[ServedModel]:
        """Return every model that serves: the current one, and those that requests have named."""
        ...

    def using(self, reference: "ModelReference | None") -> AbstractContextManager[ServedModel]:
        """Have a model stay loaded for a while: the current one for None, else the one named, loaded if it is not.

        Any number of callers may wait for one load. Beside the current model others are loaded as far as the memory
        budget goes; those that nobody uses leave, the least recently used first. Raises on entering: NoModel,
        DoesNotFit, LoadInProgress after too long a wait, and what loading raises.
        """
        ...

    def measure(self, reference: "ModelReference") -> Footprint:
        """Return what a model takes, from its file's description. Raises StorageError and ValueError."""
        ...

    def forget(self, name: str) -> None:
        """Let the models of the run `name` go that were loaded beside the current one, once nothing uses them."""
        ...

    def unload(self) -> None:
        """Unload the current model once its running requests have ended. Raises NoModel."""
        ...

    def info(self) -> dict[str, Any]:
        """Return queue and engine figures.

        At least running, waiting, slots, waiting_tokens, tokens_per_second, cache_tokens, cache_capacity and
        heartbeat_age.
        """
        ...

    def heartbeat_age(self) -> float:
        """Return the seconds since the engine last said that it works. Never waits for the engine."""
        ...

    def request(self, request_id: str) -> dict[str, Any] | None:
        """Return one request's state, position, tokens so far and timings; None when unknown or long over."""
        ...

    def close(self, drain: float) -> None:
        """Refuse new requests, wait up to `drain` seconds for running ones, then end them and stop."""
        ...
