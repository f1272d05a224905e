"""Decode steps in static shapes: equal to the plain path and to naive generation. Recording itself needs CUDA."""

import inspect
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inference.decode_graphs import (
    ONE_AT_A_TIME,
    WARM_UP,
    CudaRecorder,
    EagerGraph,
    Graph,
    Shape,
    recorder,
    return_memory,
    shape_for,
)
from inference.engine import Engine
from inference.footprint import memory_bytes
from inference.sequence import SamplingParams
from inference.torch_runner import TorchRunner
from model import GPT, GPTConfig
from storage.registry import ModelReference

V = 50
CONFIG = GPTConfig(n_layer=2, n_head=3, n_embd=48, block_size=300, vocab_size=V)


def tiny() -> GPT:
    torch.manual_seed(4)
    model = GPT(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


class Recorder:
    """Graphs that are run again, and what was asked for."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, work: Callable[[], None]) -> Graph:
        work()  # as the warm-up of a real recording does
        self.graphs.append(EagerGraph(work))
        return self.graphs[-1]


def pair(slots: int, dtype: str = "fp32") -> tuple[TorchRunner, TorchRunner]:
    """Return a runner with graphs and a plain one."""
    return TorchRunner(tiny(), slots, dtype=dtype, record=Recorder()), TorchRunner(tiny(), slots, dtype=dtype)


@pytest.mark.parametrize(
    ("count", "end", "slots", "shape"),
    [
        (1, 1, 128, Shape(1, 128, False)),
        (1, 128, 128, Shape(1, 128, False)),
        (5, 129, 128, Shape(8, 256, False)),
        (32, 1000, 128, Shape(32, 1024, False)),
        (33, 1024, 128, Shape(128, 1024, True)),
        (1, 7, 3, Shape(3, 128, True)),
        (2, 1025, 16, Shape(2, 1280, False)),
        (3, 1100, 16, Shape(4, 1100, False)),
    ],
)
def test_shapes_are_few_and_fit(count: int, end: int, slots: int, shape: Shape) -> None:
    assert shape_for(count, end, slots, 1100 if end == 1100 else 4096) == shape


def test_every_shape_covers_its_rows_and_span() -> None:
    shapes = set()
    for slots in (1, 2, 7, 16, 128):
        for count in range(1, slots + 1):
            for end in (1, 127, 128, 500, 2047, 2048, 3001, 8192):
                shape = shape_for(count, end, slots, 8192)
                assert shape.rows >= count and 8192 >= shape.span >= end and shape.span <= max(128, 1.25 * end + 1)
                assert not shape.in_place or shape.rows == slots
                shapes.add(shape)
    assert len(shapes) < 120


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("slots", [1, 3, 20])
def test_steps_of_any_kind_have_the_logits_of_the_plain_path(slots: int, dtype: str) -> None:
    rng, (graphs, plain) = random.Random(slots), pair(slots, dtype)
    tolerance = 2e-5 if dtype == "fp32" else 0.1
    lengths = [rng.choice([0, 1, 100, 126, 250]) for _ in range(slots)]
    for slot, length in enumerate(lengths):
        if length > 0:
            for runner in (graphs, plain):
                runner.rows([3] * length, [slot] * length, list(range(length)), [])
    for turn in range(12):
        chosen = rng.sample(range(slots), rng.randint(1, slots))
        rows = [(rng.randrange(V), slot, lengths[slot] + i) for slot in chosen for i in range(2 if turn == 7 else 1)]
        want = rng.choices(range(len(rows)), k=len(rows)) if turn % 2 else list(range(len(rows)))
        for _, slot, position in rows:
            lengths[slot] = position + 1
        step = [[row[i] for row in rows] for i in range(3)]
        torch.testing.assert_close(graphs.rows(*step, want), plain.rows(*step, want), atol=tolerance, rtol=1e-5)


def test_idle_slots_keep_what_they_hold() -> None:
    graphs, plain = pair(3)
    for runner in (graphs, plain):
        runner.rows(list(range(40)), [1] * 40, list(range(40)), [])
        for position in range(5):
            runner.rows([position], [2], [position], [0])
            runner.rows([position, 7], [2, 0], [position, position], [0, 1])
    torch.testing.assert_close(graphs.rows([9], [1], [40], [0]), plain.rows([9], [1], [40], [0]), atol=2e-5, rtol=1e-5)


def test_numbers_that_are_none_stay_in_their_sequence() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(tiny().lm_head.weight.detach().clone())
        model.transformer["wte"].weight[13] = float("nan")
    runner, plain = TorchRunner(model, 20, record=Recorder()), TorchRunner(tiny(), 20)
    for slot in range(20):
        runner.rows([13] * 30, [slot] * 30, list(range(30)), [])
    for position in range(3):  # over what was left behind: alone, then beside others that are still no numbers
        runner.rows([5], [4], [position], [])
        plain.rows([5], [4], [position], [])
    got = runner.rows([13] * 19 + [6], [*range(4), *range(5, 20), 4], [30] * 19 + [3], [18, 19])
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1:], plain.rows([6], [4], [3], [0]), atol=2e-5, rtol=1e-5)


def test_a_step_is_recorded_once_for_its_shape_and_small_ones_at_the_start() -> None:
    record = Recorder()
    runner = TorchRunner(tiny(), 20, record=record)
    assert len(record.graphs) == 4  # 1, 2 and 4 rows, and all in place
    for position in range(130):
        runner.rows([1], [3], [position], [0])
    assert len(record.graphs) == 5
    runner.rows([1, 2], [5, 5], [0, 1], [0])  # not a decode step
    runner.hidden([1], [5], [2], [0])
    assert len(record.graphs) == 5


class NoQuestions(TorchDispatchMode):
    """Refuse what needs a tensor's values on the host, which a recording cannot give."""

    ASKING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "unique", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.ASKING:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_recorded_work_asks_nothing_of_the_host_and_writes_to_fixed_places() -> None:
    def record(work: Callable[[], None]) -> Graph:
        def watched() -> None:
            with NoQuestions():
                work()

        return EagerGraph(watched)

    runner = TorchRunner(tiny(), 20, record=record)
    places = {runner.rows([1], [3], [position], [0]).data_ptr() for position in range(130)}
    assert len(places) == 1
    with NoQuestions(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(2).sum().item()


@pytest.mark.parametrize("at_start", [True, False])
def test_what_cannot_be_recorded_is_launched_and_said(at_start: bool, caplog: pytest.LogCaptureFixture) -> None:
    broken = at_start

    def record(work: Callable[[], None]) -> Graph:
        if broken:
            raise RuntimeError("CUDA error: out of memory")
        return EagerGraph(work)

    with caplog.at_level(logging.WARNING):
        runner, plain = TorchRunner(tiny(), 2, record=record), TorchRunner(tiny(), 2)
        assert ("launched kernel by kernel" in caplog.text) is at_start
        broken = True
        for position in range(130):  # the second span is recorded while it serves
            step = [3, position % V], [0, 1], [position] * 2, [0, 1]
            torch.testing.assert_close(runner.rows(*step), plain.rows(*step), atol=2e-5, rtol=1e-5)
    assert caplog.text.count("launched kernel by kernel") == 1 and "CUDA error: out of memory" in caplog.text


@contextmanager
def engine(slots: int) -> Iterator[tuple[Engine, Any]]:
    def build(model: GPT, options: Any) -> tuple[TorchRunner, str]:
        return TorchRunner(model, options.slots, record=EagerGraph), "a test"

    def loader(reference: Any, workspace: Any) -> Any:
        tokenizer = SimpleNamespace(n_vocab=V, eot=None, fingerprint="0123456789abcdef")
        return SimpleNamespace(model=tiny(), tokenizer=tokenizer, reference=reference)

    made = Engine(Path("."), loader=loader, build=build, slots=slots)  # type: ignore[arg-type]
    try:
        yield made, made.load(ModelReference("m", "trained", None, "m"))  # type: ignore[arg-type]
    finally:
        made.close(0.0)


@pytest.mark.parametrize("slots", [2, 8])
def test_the_engine_gives_the_tokens_of_naive_generation(slots: int) -> None:
    rng, model = random.Random(slots), tiny()
    prompts = [[rng.randrange(V) for _ in range(length)] for length in (1, 120, 30, 250, 2, 126, 60)]
    lengths = [140, 12, 70, 9, 30, 6, 80]
    with engine(slots) as (made, served):
        params = [SamplingParams(max_new_tokens=n, temperature=0.0, ignore_eos=True) for n in lengths]
        handles = [made.submit(served, ids, p) for ids, p in zip(prompts, params, strict=True)]
        got = [[token.token_id for token in handle] for handle in handles]
    for ids, n, tokens in zip(prompts, lengths, got, strict=True):
        assert tokens == model.generate(torch.tensor([ids]), n, temperature=0.0)[0, len(ids) :].tolist()


def test_only_cuda_is_recorded_and_its_scratch_slot_counts_as_memory() -> None:
    assert recorder("cpu") is None and recorder("mps") is None
    with_scratch, without = (memory_bytes(CONFIG, "torch", device, "bf16", 4) for device in ("cuda", "mps"))
    assert with_scratch - without == 2 * CONFIG.n_layer * CONFIG.block_size * CONFIG.n_embd * 2


def test_memory_goes_back_to_a_gpu_and_never_during_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(ONE_AT_A_TIME.locked()))
    TorchRunner(tiny(), 1).close()
    assert held == []
    return_memory("cuda")
    assert held == [True] and not ONE_AT_A_TIME.locked()


class FakeCuda:
    """As much of torch.cuda as a recording asks for; `said` is what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        signature = inspect.signature(torch.cuda.graph)  # the real one's, so that arguments are checked

        @contextmanager
        def graph(*args: Any, **options: Any) -> Iterator[None]:
            bound = signature.bind(*args, **options).arguments
            assert (bound["pool"], bound["stream"].name, bound["capture_error_mode"]) == (7, "side", "thread_local")
            self.said += [f"begin, locked: {ONE_AT_A_TIME.locked()}"]
            yield
            self.said += ["end"]

        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream("main"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)

    def stream(self, name: str) -> Any:
        def wait(other: Any) -> None:
            self.said.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait)


def test_a_recording_is_warmed_up_beside_and_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    CudaRecorder()(lambda: cuda.said.append("work"))
    warm = ["side waits for main", *["work"] * WARM_UP, "main waits for side"]
    assert cuda.said == [*warm, "begin, locked: True", "work", "end"]
    assert not ONE_AT_A_TIME.locked()
