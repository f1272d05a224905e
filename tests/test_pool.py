"""The pool of loaded models: loading what is named, once; the memory budget, and who has to leave."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inference.backend import Footprint
from inference.pool import ModelPool
from inference.sequence import DoesNotFit, EngineDown, LoadInProgress, NoModel
from storage.registry import ModelReference

BYTES = 100  # of every model here


class FakeSource:
    """Loads models that only have a name; waits at the gate."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False

    def measure(self, reference: ModelReference) -> Footprint:
        return Footprint(1, 1, BYTES, BYTES, chat=False)

    def load(self, reference: ModelReference) -> tuple[Any, Any]:
        assert self.gate.wait(20), "the test left the gate shut"
        self.loads.append(reference.id)
        if self.fail:
            raise OSError("the test's fault")
        served = SimpleNamespace(id=reference.id, reference=reference, memory_bytes=BYTES)
        return Hashable(served), None


class Hashable:
    """A served model, compared by identity."""

    def __init__(self, served: Any):
        self.__dict__ = vars(served)


class FakeLane:
    """A lane that a test makes busy."""

    def __init__(self, served: Any, runner: Any):
        self.served, self.busy, self.retired, self.closed = served, False, False, False

    def close(self) -> None:
        self.closed = True


class Bench:
    """A pool, and an engine that does nothing but close what can be closed when it is woken."""

    def __init__(self, models: float | None = None, patience: float | None = 10.0):
        self.source = FakeSource()
        budget = None if models is None else int(models * BYTES)
        self.pool = ModelPool(self.source, FakeLane, self.tidy, budget, patience)  # type: ignore[arg-type]
        self.engine_works = True

    def tidy(self) -> None:
        with self.pool.lock:
            for lane in self.pool.closable() if self.engine_works else []:
                self.pool.remove(lane)
                lane.close()

    def use(self, name: str) -> Any:
        """Hold a model and let it go."""
        served = self.pool.hold(reference(name))
        self.pool.release(served)
        return served

    @property
    def names(self) -> list[str]:
        return [model.id for model in self.pool.models()]


def reference(name: str, path: Path | None = None) -> ModelReference:
    return ModelReference(name, "trained", path, name)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.002)


def in_threads(n: int, call: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(n)]
    for thread in threads:
        thread.start()
    return threads, results


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


# --- loading what is named


def test_a_named_model_is_loaded_once_and_beside_the_current_one() -> None:
    bench = Bench()
    current = bench.pool.load(reference("a"))
    assert bench.use("b") is bench.use("b") and bench.use("a") is current
    assert bench.source.loads == ["a", "b"] and bench.pool.current is current and bench.names == ["a", "b"]


def test_requests_that_come_together_wait_for_one_load() -> None:
    bench = Bench()
    bench.source.gate.clear()
    threads, results = in_threads(8, lambda: bench.pool.hold(reference("a")))
    until(lambda: bench.pool.loading)
    bench.source.gate.set()
    join(threads)
    assert len(results) == 8 and len(set(map(id, results))) == 1 and bench.source.loads == ["a"]


def test_a_load_that_fails_fails_for_all_that_wait_and_is_tried_again_by_the_next() -> None:
    bench = Bench()
    bench.source.gate.clear()
    bench.source.fail = True
    threads, results = in_threads(5, lambda: bench.pool.hold(reference("a")))
    until(lambda: len(bench.pool._pending) == 1)
    bench.source.gate.set()
    join(threads)
    assert all(isinstance(result, OSError) for result in results) and not bench.names
    bench.source.fail = False
    assert bench.use("a").id == "a"


def test_different_models_wait_for_each_other_and_all_come() -> None:
    bench = Bench()
    names = iter("abcdef")
    threads, results = in_threads(6, lambda: bench.use(next(names)).id)
    join(threads)
    assert sorted(results) == list("abcdef") == sorted(bench.source.loads)


def test_without_a_name_it_is_the_current_model() -> None:
    bench = Bench()
    bench.use("b")
    with pytest.raises(NoModel):
        bench.pool.hold(None)
    current = bench.pool.load(reference("a"))
    assert bench.pool.hold(None) is current


def test_a_file_that_was_written_again_is_loaded_again(tmp_path: Path) -> None:
    bench, file = Bench(), tmp_path / "ckpt.pt"
    file.write_bytes(b"1")
    first = bench.pool.hold(reference("a", file))
    bench.pool.release(first)
    stamp = file.stat().st_mtime
    for newer in (stamp + 5, stamp + 1e6, stamp - 5):  # the clock of whoever wrote it may be wrong
        os.utime(file, (newer, newer))
        again = bench.pool.hold(reference("a", file))
        bench.pool.release(again)
        assert again is not first and bench.pool.hold(reference("a", file)) is again
        bench.pool.release(again)
        first = again
    assert len(bench.source.loads) == 4 and bench.names == ["a"]


def test_waiting_for_a_load_ends_after_a_while() -> None:
    bench = Bench(patience=0.05)
    bench.source.gate.clear()
    threads, _ = in_threads(1, lambda: bench.pool.hold(reference("a")))
    until(lambda: bench.pool.loading)
    with pytest.raises(LoadInProgress, match="still being loaded"):
        bench.pool.hold(reference("a"))
    bench.source.gate.set()
    join(threads)


# --- who has to leave


def test_the_least_recently_used_leaves_and_never_the_current_one() -> None:
    bench = Bench(models=3)
    bench.pool.load(reference("current"))
    for name in ("a", "b", "a", "c"):
        bench.use(name)
    assert bench.names == ["current", "a", "c"]
    bench.use("b")
    assert bench.names == ["current", "c", "b"] and bench.source.loads == ["current", "a", "b", "c", "b"]


def test_what_is_held_or_busy_does_not_leave() -> None:
    bench = Bench(models=3)
    held, busy = bench.pool.hold(reference("held")), bench.use("busy")
    lane = bench.pool.lane(busy)
    assert lane is not None
    lane.busy = True
    bench.use("idle")
    bench.use("new")
    assert bench.names == ["held", "busy", "new"] and bench.pool.lane(held) is not None


def test_a_load_waits_until_something_may_leave() -> None:
    bench = Bench(models=1)
    first = bench.pool.hold(reference("a"))
    threads, results = in_threads(1, lambda: bench.pool.hold(reference("b")).id)
    until(lambda: len(bench.pool._pending) == 1)
    time.sleep(0.01)
    assert bench.source.loads == ["a"]
    bench.pool.release(first)
    join(threads)
    assert results == ["b"] and bench.names == ["b"]


def test_memory_counts_until_it_is_given_back() -> None:
    bench = Bench(models=1)
    bench.use("a")
    bench.engine_works = False
    threads, _ = in_threads(1, lambda: bench.use("b"))
    until(lambda: not bench.names)
    assert bench.source.loads == ["a"]
    bench.engine_works = True
    bench.tidy()
    join(threads)
    assert bench.source.loads == ["a", "b"]


def test_loads_at_the_same_time_do_not_count_the_same_room() -> None:
    bench = Bench(models=2)
    names = iter("abcd")
    threads, results = in_threads(4, lambda: bench.use(next(names)).id)
    join(threads)
    assert sorted(results) == list("abcd") and len(bench.names) == 2 and bench.pool._reserved == 0


def test_what_can_never_fit_is_refused_at_once_with_the_sizes() -> None:
    bench = Bench(models=1.5)
    bench.pool.load(reference("a"))
    with pytest.raises(DoesNotFit, match="The model b needs 0 MB of memory; models may take 0 MB, of which a takes"):
        bench.pool.hold(reference("b"))
    bench.pool.unload()
    assert bench.use("b").id == "b"


def test_waiting_for_memory_ends_after_a_while_and_leaves_nothing_reserved() -> None:
    bench = Bench(models=1, patience=0.05)
    bench.pool.hold(reference("a"))
    with pytest.raises(LoadInProgress, match="all other models are in use"):
        bench.pool.hold(reference("b"))
    assert bench.pool._reserved == 0


def test_a_load_by_hand_always_has_room_and_others_make_it() -> None:
    bench = Bench(models=2)
    for name in ("a", "b"):
        bench.use(name)
    bench.pool.load(reference("c"))
    assert bench.names == ["b", "c"]
    bench.pool.load(reference("d"))
    assert bench.names == ["b", "d"]


def test_a_run_that_is_deleted_is_forgotten_unless_it_is_current() -> None:
    bench = Bench()
    bench.pool.load(reference("run"))
    for name in ("run/best", "other"):
        bench.use(name)
    bench.pool.forget("run")
    assert bench.names == ["run", "other"]


def test_a_retired_model_stays_until_it_is_let_go() -> None:
    bench = Bench()
    held = bench.pool.hold(reference("a"))
    bench.pool.forget("a")
    assert bench.names == [] and bench.pool.lane(held) is not None
    bench.pool.release(held)
    assert bench.pool.lane(held) is None


def test_nothing_is_loaded_after_the_end() -> None:
    bench = Bench()
    bench.pool.closing = True
    for call in (lambda: bench.pool.hold(reference("a")), lambda: bench.pool.load(reference("a"))):
        with pytest.raises(EngineDown):
            call()
    assert bench.names == []
