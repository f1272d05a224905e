"""The engine: one thread that runs every request on the loaded models, a step at a time.

For ever: take the inbox (block only when idle), end what was cancelled, let the scheduler admit,
compute one ragged step of each model, sample, emit. The thread owns the lanes (one per loaded model, kept in
the pool); callers own their `Generation`. They share a message inbox, each sequence's events and its `cancelled` flag.
A message is a function that the engine's thread runs. Knows token ids only: no text, no HTTP.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from inference import sequence as seq
from inference.admission import Admission
from inference.backend import Footprint, ServedModel
from inference.build import RunnerOptions, build_runner
from inference.lane import NO_FIGURES, Lane
from inference.loading import ModelSource
from inference.pool import ModelPool
from inference.sequence import Generation, SamplingParams
from storage.chat_format import ends
from storage.checkpoints import open_model
from storage.machine import within_limit

if TYPE_CHECKING:
    from inference.loading import Builder, Loader
    from inference.runner import ModelRunner
    from storage.registry import ModelReference
    from storage.runs import Workspace

logger = logging.getLogger(__name__)

IDLE_BEAT = 0.5  # seconds between heartbeats while there is nothing to do
RATE_WINDOW = 10.0  # seconds over which tokens_per_second is taken


class Rate:
    """Tokens per second over the last seconds; written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: deque[tuple[float, int]] = deque(maxlen=4096)

    def add(self, tokens: int) -> None:
        """Count the tokens of one step."""
        with self._lock:
            self._steps.append((time.monotonic(), tokens))

    def per_second(self) -> float:
        """Return tokens per second of the time since the window, or the first step in it, began."""
        now = time.monotonic()
        with self._lock:
            recent = [(t, n) for t, n in self._steps if now - t <= RATE_WINDOW]
        if not recent:
            return 0.0
        return sum(n for _, n in recent) / max(now - recent[0][0], 0.1)


class Engine:
    """Serve models to any number of threads; satisfies InferenceBackend.

    `loader` and `build` stand between files and runners; tests put theirs in. No model is loaded at first.
    """

    def __init__(
        self,
        workspace: "Workspace",
        *,
        device: str = "auto",
        dtype: str = "auto",
        slots: int = 16,
        threads: int | None = None,
        cache_memory: int | None = None,
        max_waiting: int = 256,
        max_waiting_tokens: int = 256 * 1024,
        prefill_tokens: int = 2048,
        request_timeout: float | None = 600.0,
        memory: int | None = None,
        speculation: bool = True,
        loader: "Loader" = open_model,
        build: "Builder" = build_runner,
    ):
        self._options = RunnerOptions(device, dtype, slots, threads, cache_memory)
        self._prefill_tokens, self._request_timeout = prefill_tokens, request_timeout
        self._speculation = speculation
        self._admission = Admission(max_waiting, max_waiting_tokens)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._source = ModelSource(workspace, self._options, loader, build)
        self._pool = ModelPool(self._source, self._new_lane, self._wake, memory, request_timeout)
        self.bell = seq.Bell()
        self._stopped = False  # the engine's thread alone writes it, and the next four
        self._beat = time.monotonic()
        self._steps = self._tokens = 0
        self._rate = Rate()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- for any thread ---

    def served(self) -> ServedModel | None:
        """Return the loaded model, or None."""
        return self._pool.current

    def models(self) -> list[ServedModel]:
        """Return every model that serves."""
        return self._pool.models()

    @contextmanager
    def using(self, reference: "ModelReference | None") -> Iterator[ServedModel]:
        """Have a model stay loaded for a while; see `InferenceBackend.using`."""
        served = self._pool.hold(reference)
        try:
            yield served
        finally:
            self._pool.release(served)

    def submit(
        self,
        model: ServedModel,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        owner: str = "",
        cache_scope: str = "",
    ) -> Generation:
        """Queue a request; see `InferenceBackend.submit`."""
        sequence = self._sequence(model, list(prompt_ids), params)
        return self._enter(model, sequence, request_id, owner, cache_scope)

    def embed(
        self, model: ServedModel, prompt_ids: Sequence[int], request_id: str | None = None, owner: str = ""
    ) -> Generation:
        """Queue a prompt to embed; see `InferenceBackend.embed`."""
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=True)  # so that each prompt token is computed
        sequence = self._sequence(model, list(prompt_ids), params)
        sequence.embeds = True
        return self._enter(model, sequence, request_id, owner)

    def _enter(
        self, model: ServedModel, sequence: seq.Sequence, request_id: str | None, owner: str, cache_scope: str = ""
    ) -> Generation:
        sequence.owner, sequence.cache_scope = owner, cache_scope
        if request_id is not None:
            sequence.id = request_id
        with self._pool.lock:  # a lane leaves the pool only with the inbox empty
            if self._pool.closing:
                raise seq.EngineDown(seq.Failure.SHUTTING_DOWN)
            lane = self._pool.lane(model)
            if lane is None:
                raise seq.NoModel(f"The model {model.id} is no longer loaded.")
            self._admission.enter(sequence)
            self._inbox.put(partial(lane.add, sequence))
        return Generation(sequence)

    def _sequence(self, model: ServedModel, prompt_ids: list[int], params: SamplingParams) -> seq.Sequence:
        """Check a request against the model. Raises PromptTooLong or ValueError."""
        vocab_size = min(model.vocab_size, model.tokenizer.n_vocab)
        if not prompt_ids:
            raise ValueError("prompt_ids is empty; a prompt has at least one token")
        _check_ids("prompt_ids", prompt_ids, vocab_size)
        _check_ids("logit_bias", [token_id for token_id, _ in params.logit_bias], vocab_size)
        _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
        room = model.block_size - len(prompt_ids)
        if room < min(1, params.max_new_tokens):
            raise seq.PromptTooLong(
                f"This model's maximum context length is {model.block_size} tokens, "
                f"however the prompt has {len(prompt_ids)} tokens"
            )
        stop_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else ends(model.tokenizer))
        timeout = self._request_timeout
        return seq.Sequence(
            prompt_ids,
            params,
            stop_ids=stop_ids,
            output_limit=min(params.max_new_tokens, room),
            deadline=None if timeout is None else time.monotonic() + timeout,
        )

    def load(self, reference: "ModelReference") -> ServedModel:
        """Load a model beside the current one, then swap; see `InferenceBackend.load`."""
        return self._pool.load(reference)

    def unload(self) -> None:
        """Retire the current model; its memory is returned once its requests have ended. Raises NoModel."""
        self._pool.unload()

    def measure(self, reference: "ModelReference") -> Footprint:
        """Return what a model takes; see `InferenceBackend.measure`."""
        return self._source.measure(reference)

    def forget(self, name: str) -> None:
        """Let the models of a run go that are not current; see `InferenceBackend.forget`."""
        self._pool.forget(name)

    def _new_lane(self, served: ServedModel, runner: "ModelRunner") -> Lane:
        memory, draft = self._options.cache_memory, self._speculation
        return Lane(served, runner, self._admission, self._prefill_tokens, memory, draft, self._live, self._undisturbed)

    def _wake(self) -> None:
        self._inbox.put(lambda: None)

    def info(self) -> dict[str, Any]:
        """Return queue and engine figures."""
        admission, lane = self._admission, self._pool.lane(self._pool.current)
        lanes = self._pool.lanes()
        return {
            "running": admission.running,
            "waiting": admission.waiting,
            "waiting_tokens": admission.waiting_tokens,
            "max_waiting": admission.max_waiting,
            "max_waiting_tokens": admission.max_waiting_tokens,
            "finished": admission.finished,
            "slots": self._options.slots if lane is None else lane.runner.slots,
            "tokens_per_second": round(self._rate.per_second(), 2),
            "steps": self._steps,
            "tokens": self._tokens,
            "models": len(lanes),  # also those that end their requests before they leave
            "memory_bytes": sum(lane.served.memory_bytes for lane in lanes),
            "loading": self._pool.loading,
            "heartbeat_age": self.heartbeat_age(),
            **(NO_FIGURES if lane is None else lane.figures()),
        }

    def heartbeat_age(self) -> float:
        """Return the seconds since the engine's thread last began a turn; takes no lock."""
        return max(0.0, time.monotonic() - self._beat)

    def request(self, request_id: str) -> dict[str, Any] | None:
        """Return one request's state and figures, or None."""
        return self._admission.describe(request_id)

    def close(self, drain: float) -> None:
        """Refuse new requests, end waiting ones, give running ones `drain` seconds, then stop."""
        with self._pool.lock:
            self._pool.closing = True
            self._inbox.put(self._end_waiting)
        self._admission.wait_empty(drain)
        self._inbox.put(self._stop)
        self._thread.join(timeout=5.0)
        if self._thread.is_alive():
            logger.error("the engine's thread did not stop; it may be stuck in a step")

    # --- the engine's thread ---

    def _run(self) -> None:
        self._torch_threads = self._options.threads or within_limit(torch.get_num_threads())
        if self._torch_threads != torch.get_num_threads():
            torch.set_num_threads(self._torch_threads)
        while not self._stopped:
            try:
                self._turn()
            except Exception:  # a step handles its own failures: this is a fault of the engine itself
                logger.exception("the engine failed; its requests end, it goes on")
                for lane in self._pool.lanes():
                    lane.finish_all(seq.Failure.ENGINE)
                self.bell.ring()
        for lane in self._pool.lanes():
            lane.finish_all(seq.Failure.SHUTTING_DOWN)
            self.bell.ring()
            self._close_lane(lane)

    def _live(self) -> None:
        self._beat = time.monotonic()

    def _undisturbed(self) -> bool:
        """Say whether no request has come in, and no other model wants the processor."""
        return self._inbox.empty() and sum(lane.busy for lane in self._pool.lanes()) <= 1

    @property
    def _busy(self) -> bool:
        """Say whether any model has something to compute."""
        return any(lane.busy for lane in self._pool.lanes())

    def _turn(self) -> None:
        self._live()
        self._take_inbox()
        for lane in self._pool.lanes():
            lane.sweep()
            if lane.busy:
                self._share_out(lane.runner)
                tokens = lane.step()
                self._rate.add(tokens)
                self._steps += 1
                self._tokens += tokens
            self.bell.ring(spare=lane.begun or not self._busy)
        for lane in self._pool.closable():
            self._close_lane(lane)

    def _share_out(self, runner: "ModelRunner") -> None:
        """Let torch use one thread beside a runner that has its own.

        On busy cores two of them wait for each other in each of sampling's small operations: 16 rows took 20 ms, not 3.
        """
        threads = 1 if runner.own_threads else self._torch_threads
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _take_inbox(self) -> None:
        """Run the messages; with nothing to compute, wait for one until the next heartbeat is due."""
        idle = not self._busy and not self._pool.closable()
        try:
            message = self._inbox.get(block=idle, timeout=IDLE_BEAT if idle else None)
            while True:
                message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _close_lane(self, lane: Lane) -> None:
        """Close a lane that has nothing left, unless a request for it has just come in."""
        with self._pool.lock:
            if not self._inbox.empty() and not self._stopped:
                return
            self._pool.remove(lane)
        lane.close()
        logger.info("closed %s", lane.served.id)

    def _end_waiting(self) -> None:
        for lane in self._pool.lanes():
            for sequence in list(lane.scheduler.waiting):
                lane.finish(sequence, seq.FinishReason.ERROR, seq.Failure.SHUTTING_DOWN)

    def _stop(self) -> None:
        self._stopped = True


def _check_ids(name: str, ids: "Sequence[int] | frozenset[int]", vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name} has token id {token_id}; ids must be between 0 and {vocab_size - 1}")
