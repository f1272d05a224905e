"""One request as the engine sees it: how to choose tokens, its state, and the caller's handle. No torch.

A `Sequence` belongs to the engine's thread, a `Generation` to the caller's. They share one queue of
events and one flag, `cancelled`, which only goes from false to true. Every accepted sequence gets
any number of `Token` events and then exactly one `Finished`.
"""

import math
import os
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from inference.penalties import Penalties


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-text or stop token
    LENGTH = "length"  # max_new_tokens, or the end of the context
    CANCELLED = "cancelled"
    ERROR = "error"


class Failure(StrEnum):
    """Why a sequence ended with an error, in words for the user."""

    STEP = "The server failed while it computed this request."
    ENGINE = "The server failed."
    NOT_A_NUMBER = "The model's output for this request was not a number."
    OUT_OF_TIME = "The request took longer than the server allows."
    SHUTTING_DOWN = "The server is shutting down."
    STALLED = "The engine does not respond; it is about to be started again."


class InferenceError(Exception):
    """The base of what the engine refuses or fails with."""


class NoModel(InferenceError):
    """No model is loaded, or the one asked for is gone."""


class LoadInProgress(InferenceError):
    """Another load is running."""


class DoesNotFit(InferenceError):
    """A model needs more memory than models may take."""


class PromptTooLong(InferenceError):
    """The prompt does not fit the context."""


class QueueFull(InferenceError):
    """Too many requests or tokens wait; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class OutOfTime(InferenceError):
    """A request passed its deadline, waiting or running."""


class EngineDown(InferenceError):
    """The engine is closing or stalled."""


def _between(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} is {value}; it must be between {low} and {high}")


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises ValueError naming field, value and bound."""

    max_new_tokens: int = 150
    temperature: float = 0.8  # 0, or too small to divide by, is greedy
    top_k: int = 40  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # of tokens in prompt or output: divides or multiplies logits (arXiv 1909.05858)
    presence_penalty: float = 0.0  # subtracted once from logits of tokens in the output
    frequency_penalty: float = 0.0  # subtracted per occurrence in the output

    seed: int | None = None  # None draws one
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)

    stop_token_ids: frozenset[int] = frozenset()  # beside those with which the model ends a text
    ignore_eos: bool = False  # the model's own ends do not end the sequence
    min_tokens: int = 0  # no end-of-text or stop token before this many

    logprobs: int | None = None  # None: none; N: the chosen token's and the N most probable ones'
    prompt_logprobs: bool = False  # also for the prompt's tokens

    def __post_init__(self) -> None:
        _between("max_new_tokens", self.max_new_tokens, 0, 2**31 - 1)
        _between("temperature", self.temperature, 0.0, 1e6)
        _between("top_k", self.top_k, 0, 2**31 - 1)
        _between("top_p", self.top_p, 0.0, 1.0)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _between("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _between("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _between("min_tokens", self.min_tokens, 0, self.max_new_tokens)
        if self.seed is not None:
            _between("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _between("logprobs", self.logprobs, 0, 2**31 - 1)
        for token_id, bias in self.logit_bias:
            _between(f"logit_bias of token {token_id}", bias, -1e4, 1e4)

    @property
    def greedy(self) -> bool:
        """Say whether the most probable token is always taken."""
        return self.temperature <= 1e-5 or self.top_k == 1


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; with logprobs asked for, its own and the most probable ones' (id, logprob)."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence; `error` says what failed when the reason is ERROR."""

    reason: FinishReason
    error: Failure | None = None


Event = Token | Finished


class Bell:
    """Rings when events have been put, whoever they are for: one wait for any number of generations."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._listeners: list[Callable[[bool], None]] = []
        self.rung = 0  # how often

    def listen(self, listener: Callable[[bool], None]) -> None:
        """Have `listener` called by the thread that rings, with `spare`; it must neither wait nor raise."""
        self._listeners.append(listener)

    def ring(self, spare: bool = False) -> None:
        """Wake all who wait, and tell all who listen whether this thread has time to spare."""
        with self._changed:
            self.rung += 1
            self._changed.notify_all()
        for listener in self._listeners:
            listener(spare)

    def wait(self, seen: int, timeout: float) -> None:
        """Wait until `rung` is not `seen`, at most `timeout` seconds. Read it before you look for events."""
        with self._changed:
            self._changed.wait_for(lambda: self.rung != seen, timeout)


@dataclass(eq=False)
class Sequence:
    """The engine's state of one request. The engine's thread owns everything but `cancelled` and `events`.

    A token that ends the text (end-of-text, or one of `stop_token_ids`) is put as a Token, since it was
    computed and counts in the usage; the Finished with STOP that follows tells the text layer to drop it.
    """

    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()  # the params' and, unless ignored, those with which the model ends a text
    output_limit: int = 0  # max_new_tokens, or less where the context ends first
    id: str = field(default_factory=lambda: "req-" + uuid.uuid4().hex)
    embeds: bool = False  # it wants the mean of its prompt's final hidden states, and no tokens
    owner: str = ""  # who asks: slots are shared out evenly among owners who wait for them
    cache_scope: str = ""  # sequences of one scope may use what others have computed
    deadline: float | None = None  # time.monotonic() after which it ends with an error
    cancelled: bool = False
    events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    ended: threading.Event = field(default_factory=threading.Event)  # the last event has been put
    slot: int | None = None
    computed: int = 0  # tokens of prompt + output whose keys and values are in the cache
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[Token] = field(default_factory=list)  # for prompt_ids[1:], complete before the first Token
    hidden_sum: list[float] = field(default_factory=list)  # of the prompt tokens computed so far
    cached_tokens: int = 0  # prompt tokens that were in the cache, so that nothing had to be computed
    submitted_at: float = field(default_factory=time.monotonic)  # this and the next three: time.monotonic()
    started_at: float | None = None  # when it got a slot
    first_token_at: float | None = None
    finished_at: float | None = None
    finish_reason: FinishReason | None = None
    seed: int = field(init=False)  # the params', or the one drawn; one request, one seed, one text
    generator: random.Random = field(init=False, repr=False)  # one number per sampled token
    _penalties: Penalties | None = field(init=False, default=None, repr=False)  # made when they are first asked for

    def __post_init__(self) -> None:
        seed = self.params.seed
        self.seed = int.from_bytes(os.urandom(6)) if seed is None else seed
        self.rewind()

    def rewind(self) -> None:
        """Set the generator to where the tokens so far have left it: a step that failed may have drawn from it."""
        self.generator = random.Random(self.seed)
        for _ in () if self.params.greedy else self.output_ids:
            self.generator.random()

    @property
    def unchanged(self) -> bool:
        """Say whether its next token is chosen by the logits as they come from the model."""
        p = self.params
        changed = p.logit_bias or p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        return not changed and len(self.output_ids) >= p.min_tokens

    @property
    def penalties(self) -> Penalties | None:
        """Return what changes its next logits, its last token counted in; None where nothing does."""
        if self.unchanged:
            return None
        if self._penalties is None:
            self._penalties = Penalties(self.params, self.prompt_ids, self.stop_ids)
        self._penalties.grow(self.output_ids)
        return self._penalties

    @property
    def takes_greatest(self) -> bool:
        """Say whether its next token is the one with the greatest logit, as it comes from the model."""
        return self.params.greedy and self.unchanged

    @property
    def plain(self) -> bool:
        """Say whether nothing else is asked of its next logits."""
        return self.takes_greatest and self.params.logprobs is None

    @property
    def state(self) -> str:
        """Return "waiting", "running" or "finished"."""
        if self.finished_at is not None:
            return "finished"
        return "waiting" if self.started_at is None else "running"

    @property
    def in_prefill(self) -> bool:
        """Say whether prompt tokens are still to be computed."""
        return self.computed < len(self.prompt_ids)


class Generation:
    """The caller's handle of one request: iterate over its tokens, or cancel it."""

    def __init__(self, sequence: Sequence):
        self._sequence = sequence
        self.finish_reason: FinishReason | None = None
        self.error: Failure | None = None

    @property
    def id(self) -> str:
        """Return the request's id."""
        return self._sequence.id

    @property
    def prompt_logprobs(self) -> list[Token]:
        """Return the prompt's log-probabilities, from its second token on; complete once a token has come."""
        return self._sequence.prompt_logprobs

    @property
    def cached_tokens(self) -> int:
        """Return how many prompt tokens came from a cache."""
        return self._sequence.cached_tokens

    @property
    def embedding(self) -> list[float]:
        """Return the mean of the prompt's final hidden states; complete once it has finished."""
        return [value / len(self._sequence.prompt_ids) for value in self._sequence.hidden_sum]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end it, of which none belongs to the text."""
        return self._sequence.stop_ids

    def cancel(self) -> None:
        """Ask the engine to stop; a Finished event still comes."""
        self._sequence.cancelled = True

    def next(self, timeout: float | None = None) -> Event | None:
        """Return the next event, or None when `timeout` seconds pass without one."""
        try:
            event = self._sequence.events.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Finished):
            self.finish_reason, self.error = event.reason, event.error
        return event

    @property
    def ready(self) -> bool:
        """Say whether an event is there."""
        return not self._sequence.events.empty()

    def wait_end(self, timeout: float) -> None:
        """Wait until all events are there, at most `timeout` seconds: a token does not wake the caller."""
        self._sequence.ended.wait(timeout)

    def __iter__(self) -> Iterator[Token]:
        while self.finish_reason is None:
            event = self.next()
            if isinstance(event, Token):
                yield event
