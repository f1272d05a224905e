"""Stand-ins for what lies behind the web layer: full implementations of its interfaces, small and predictable.

`FakeEngine` continues a prompt with its own tokens over and over, or with what `script` says. Unless
`manual` is set it answers at once; otherwise a test makes it go on, token by token, with `step`.
`FakeJobs` keeps jobs in memory and their files in a real workspace.
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from api_server import create_app
from inference.backend import Footprint, ServedModel
from inference.sequence import (
    Bell,
    EngineDown,
    Failure,
    Finished,
    FinishReason,
    Generation,
    LoadInProgress,
    NoModel,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    Sequence,
    Token,
)
from storage.chat_format import ends
from storage.errors import NotFound
from storage.registry import ModelReference
from storage.runs import Workspace
from storage.tokenizer import Tokenizer, train_bpe
from training.config import TrainConfig, resolve
from training.jobs import JobBusy
from training.resumption import lengthened
from web.settings import Settings

TEXT = "Once upon a time there was a small model that told stories. To be or not to be, 0123456789.\n"


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level BPE with few merges, so that an emoji is several tokens and all text can be encoded."""
    return train_bpe([TEXT * 4], 280)


def served_model(tokenizer: Tokenizer, reference: ModelReference, block_size: int) -> ServedModel:
    """Return a loaded model, as an engine describes it."""
    return ServedModel(
        id=reference.id,
        reference=reference,
        tokenizer=tokenizer,
        block_size=block_size,
        vocab_size=tokenizer.n_vocab,
        n_embd=4,
        parameters=1234,
        memory_bytes=4936,
        runner="torch",
        runner_reason="it is a fake",
        device="cpu",
        dtype="fp32",
        fingerprint="fp_fake",
        loaded_at=time.time(),
        load_seconds=0.1,
    )


class FakeEngine:
    """An engine without a model; satisfies InferenceBackend."""

    def __init__(self, tokenizer: Tokenizer | None, block_size: int = 64, max_waiting: int = 256):
        self.tokenizer, self.block_size, self.max_waiting = tokenizer, block_size, max_waiting
        self.script: Callable[[list[int], int], int] | None = None
        self.manual = False
        self.loading = self.closed = False
        self.quiet = 0.0  # seconds since the last sign of life
        self.fail_after: int | None = None
        self.sequences: list[Sequence] = []
        self.bell = Bell()
        self.loads: list[ModelReference] = []
        self.drained: list[float] = []
        self.held = 0
        self._served: ServedModel | None = None
        self._others: dict[str, ServedModel] = {}  # by id, beside the current one
        if tokenizer is not None:
            self.load(ModelReference("tiny", "trained", Path("out/tiny/ckpt.pt"), "out/tiny/ckpt.pt"))

    def served(self) -> ServedModel | None:
        return self._served

    def models(self) -> list[ServedModel]:
        return [model for model in (self._served, *self._others.values()) if model is not None]

    @contextmanager
    def using(self, reference: ModelReference | None) -> Iterator[ServedModel]:
        model = self._served if reference is None else self._loaded(reference)
        if model is None:
            raise NoModel("No model is loaded.")
        self.held += 1
        try:
            yield model
        finally:
            self.held -= 1

    def _loaded(self, reference: ModelReference) -> ServedModel:
        written = 0.0 if reference.path is None or not reference.path.exists() else reference.path.stat().st_mtime
        for model in self.models():
            same = (model.id, model.reference.path) == (reference.id, reference.path)
            if same and model.loaded_at >= written:
                return model
        if self.tokenizer is None:
            self.tokenizer = byte_tokenizer()
        self.loads.append(reference)
        self._others[reference.id] = served_model(self.tokenizer, reference, self.block_size)
        return self._others[reference.id]

    def measure(self, reference: ModelReference) -> Footprint:
        return Footprint(1234, self.block_size, 617, 4936, chat=False)

    def forget(self, name: str) -> None:
        self._others = {key: model for key, model in self._others.items() if key.split("/")[0] != name}

    def submit(
        self,
        model: ServedModel,
        prompt_ids: Any,
        params: SamplingParams,
        request_id: str | None = None,
        owner: str = "",
        cache_scope: str = "",
    ) -> Generation:
        if self.closed:
            raise EngineDown("The server is shutting down.")
        if not prompt_ids or any(not 0 <= i < model.vocab_size for i in prompt_ids):
            raise ValueError("prompt_ids has a token id that is out of range")
        room = self.block_size - len(prompt_ids)
        if room < min(1, params.max_new_tokens):
            raise PromptTooLong("This model's maximum context length is exceeded")
        if sum(s.finished_at is None for s in self.sequences) >= self.max_waiting:
            raise QueueFull("the queue is full", retry_after=2)
        stop_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else ends(model.tokenizer))
        sequence = Sequence(
            list(prompt_ids), params, stop_ids, min(room, params.max_new_tokens), request_id or "req-fake"
        )
        sequence.owner, sequence.cache_scope = owner, cache_scope
        sequence.started_at = time.monotonic()
        if params.prompt_logprobs:
            sequence.prompt_logprobs = [self._token(i, params) for i in prompt_ids[1:]]
        self.sequences.append(sequence)
        if not self.manual:
            self.run(sequence)
        return Generation(sequence)

    def embed(self, model: ServedModel, prompt_ids: Any, request_id: str | None = None, owner: str = "") -> Generation:
        generation = self.submit(model, prompt_ids, SamplingParams(max_new_tokens=0), request_id, owner)
        embedded = self.sequences[-1]
        embedded.hidden_sum = [float(sum(prompt_ids)), 0.0, 3.0 * len(prompt_ids), 4.0 * len(prompt_ids)]
        return generation

    def _token(self, token_id: int, params: SamplingParams) -> Token:
        if params.logprobs is None:
            return Token(token_id)
        top = tuple((i, -1.0 - i) for i in range(params.logprobs))
        return Token(token_id, -0.5 - token_id / 1000, top)

    def _next_id(self, sequence: Sequence) -> int:
        k = len(sequence.output_ids)
        if self.script is not None:
            return self.script(sequence.prompt_ids, k)
        if sequence.params.greedy:
            return sequence.prompt_ids[k % len(sequence.prompt_ids)]
        return random.Random(f"{sequence.seed} {k}").choice(sequence.prompt_ids)

    def step(self, sequence: Sequence) -> None:
        """Generate one token of a sequence, or its end."""
        if sequence.finished_at is not None:
            return
        if sequence.cancelled:
            self.finish(sequence, FinishReason.CANCELLED)
        elif self.fail_after is not None and len(sequence.output_ids) >= self.fail_after:
            self.finish(sequence, FinishReason.ERROR, Failure.STEP)
        elif len(sequence.output_ids) >= sequence.output_limit:
            self.finish(sequence, FinishReason.LENGTH)
        else:
            token = self._token(self._next_id(sequence), sequence.params)
            sequence.output_ids.append(token.token_id)
            sequence.events.put(token)
            self.bell.ring()
            if token.token_id in sequence.stop_ids:
                self.finish(sequence, FinishReason.STOP)

    def run(self, sequence: Sequence) -> None:
        """Generate to the end."""
        while sequence.finished_at is None:
            self.step(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason, error: Failure | None = None) -> None:
        """End a sequence."""
        sequence.finish_reason, sequence.finished_at = reason, time.monotonic()
        sequence.events.put(Finished(reason, error))
        sequence.ended.set()
        self.bell.ring()

    def load(self, reference: ModelReference) -> ServedModel:
        if self.loading:
            raise LoadInProgress("Another model is being loaded.")
        if self.tokenizer is None:
            self.tokenizer = byte_tokenizer()
        self.loads.append(reference)
        self._served = served_model(self.tokenizer, reference, self.block_size)
        return self._served

    def unload(self) -> None:
        if self._served is None:
            raise NoModel("No model is loaded.")
        self._served = None

    def info(self) -> dict[str, Any]:
        live = sum(s.finished_at is None for s in self.sequences)
        figures = {"running": live, "waiting": 0, "waiting_tokens": 0, "slots": 16, "tokens_per_second": 0.0}
        figures |= dict.fromkeys(("cache_tokens", "cache_kept", "cache_bytes", "cache_saved"), 0)
        figures |= {"drafted_tokens": 0, "accepted_tokens": 0}
        return figures | {"cache_capacity": 1024, "heartbeat_age": self.quiet}

    def heartbeat_age(self) -> float:
        return self.quiet

    def request(self, request_id: str) -> dict[str, Any] | None:
        found = next((s for s in self.sequences if s.id == request_id), None)
        return None if found is None else {"id": found.id, "state": found.state}

    def close(self, drain: float) -> None:
        self.closed = True
        self.drained.append(drain)


class FakeJob:
    """A training job that does nothing by itself."""

    def __init__(self, name: str, config: TrainConfig, process_id: int | None):
        self.name, self.config, self.process_id, self.priority = name, config, process_id, 0
        self.state, self.had_succeeded = "queued" if process_id is None else "running", False

    @property
    def has_result(self) -> bool:
        return self.had_succeeded or self.state == "succeeded"

    def sample(self) -> dict[str, Any] | None:
        return {"iter_num": 5, "prompt": "To", "text": " be"}

    def describe(self) -> dict[str, Any]:
        max_iters = self.config.max_iters
        numbers = {"iter_num": 0, "max_iters": max_iters, "loss": None, "val_loss": None, "best_val_loss": None}
        times = {"created": time.time(), "started": None, "finished": None, "eta_seconds": None}
        rest = {"tokens_per_second": None, "error": None, "process_id": self.process_id, "queue_position": None}
        rest |= {"queue_reason": "max_jobs is 1" if self.state == "queued" else None}
        rest |= {"priority": self.priority, "has_result": self.has_result}
        return {"name": self.name, "state": self.state, **numbers, **times, **rest, "config": self.config.given()}


class FakeJobs:
    """Jobs in memory; one runs, the others wait. Satisfies what the routes use of JobManager."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.jobs: dict[str, FakeJob] = {}
        self.closed = False

    def create(self, config: TrainConfig, priority: int = 0) -> FakeJob:
        run = self.workspace.run_from_output_dir(config.output_dir)
        if run.name in self.jobs:
            raise JobBusy(f"output_dir is {run.relative}; a job is using it")
        running = any(job.state == "running" for job in self.jobs.values())
        run.folder.mkdir(parents=True, exist_ok=True)
        run.config.write_text(json.dumps(config.given()))
        self.jobs[run.name] = FakeJob(run.name, resolve(config), None if running else 4321)
        self.jobs[run.name].priority = priority
        return self.jobs[run.name]

    def set_priority(self, name: str, priority: int) -> FakeJob:
        job = self.get(name)
        if job.state != "queued":
            raise JobBusy(f"job {name} is {job.state}; only a waiting one has a place to change")
        job.priority = priority
        return job

    def list(self) -> Iterable[FakeJob]:
        return tuple(self.jobs.values())

    def counts(self) -> dict[str, int]:
        states = [job.state for job in self.jobs.values()]
        return {state: states.count(state) for state in ("running", "queued")}

    def require_dataset_unused(self, name: str) -> None:
        if any(job.config.dataset == name for job in self.jobs.values()):
            raise JobBusy(f"the dataset {name} is in use")

    def log_tail(self, name: str) -> str:
        self.get(name)
        log = self.workspace.run(name).log
        return log.read_text() if log.exists() else ""

    def follow_log(self, name: str) -> Iterator[str | None]:
        yield self.log_tail(name)
        while self.get(name).state == "running":
            yield None
            self.get(name).state = "succeeded"

    def get(self, name: str) -> FakeJob:
        self.workspace.run(name)
        if name not in self.jobs:
            raise NotFound(f"there is no job {name}")
        return self.jobs[name]

    def stop(self, name: str) -> FakeJob:
        self.get(name).state = "stopped"
        return self.get(name)

    def resume(self, name: str, max_iters: int | None = None, iter_num: int | None = None) -> FakeJob:
        job = self.get(name)
        if iter_num is not None and not (self.workspace.run(name).folder / f"ckpt-{iter_num}.pt").exists():
            raise NotFound(f"no checkpoint of iteration {iter_num} is kept")
        if job.state == "running":
            raise JobBusy(f"job {name} is running")
        if max_iters is not None:
            job.config = lengthened(job.config, max_iters)
        job.state, job.had_succeeded = "running", job.has_result
        return job

    def delete(self, name: str) -> None:
        if self.get(name).state in ("queued", "running"):
            raise JobBusy(f"job {name} is {self.get(name).state}; stop it first")
        del self.jobs[name]

    def close(self) -> None:
        self.closed = True


class FakeServer:
    """An app over fakes, and the test client of it."""

    def __init__(self, root: Path, tokenizer: Tokenizer | None, **settings: Any):
        self.settings = Settings(root=root, **settings)
        self.workspace = Workspace(root)
        self.engine, self.jobs = FakeEngine(tokenizer), FakeJobs(self.workspace)
        self.app = create_app(self.settings, self.engine, self.jobs, self.workspace)  # type: ignore[arg-type]
        self.client = self.app.test_client()

    def post(self, path: str, body: Any, **more: Any) -> Any:
        return self.client.post(path, json=body, **more)

    def get(self, path: str, **more: Any) -> Any:
        return self.client.get(path, **more)


def events(reply: Any) -> list[Any]:
    """Return the events of a streamed reply, "[DONE]" as that text."""
    with reply:
        frames = [frame for frame in reply.get_data(as_text=True).split("\n\n") if frame.startswith("data: ")]
    return [frame[6:] if frame == "data: [DONE]" else json.loads(frame[6:]) for frame in frames]
