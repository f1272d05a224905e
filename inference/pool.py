"""The pool: every loaded model with its lane, which one is current, who holds which, and the memory they take.

A model leaves in two steps. It is retired when a newer one takes its place or its memory is wanted; the engine's
thread closes it once nothing runs on it and nobody holds it. A model in use is never retired for its memory.
`lock` guards everything here. Loading itself is ModelSource's, computing is the engine's.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inference import sequence as seq
from inference.backend import ServedModel
from inference.lane import Lane
from inference.loading import ModelSource

if TYPE_CHECKING:
    from pathlib import Path

    from storage.registry import ModelReference

    Key = tuple[str, Path | None, str | None, str | None]

LOOK = 0.2  # seconds between looks at what is still in use, while a load waits for memory


@dataclass(eq=False)
class _Place:
    """A lane in the pool."""

    lane: Lane
    written: float  # when the file that it was loaded from was written
    holders: int = 0
    added: float = field(default_factory=time.monotonic)  # this and the next: time.monotonic()
    used: float = field(default_factory=time.monotonic)

    @property
    def idle(self) -> bool:
        return self.holders == 0 and not self.lane.busy

    @property
    def nbytes(self) -> int:
        return self.lane.served.memory_bytes


def _key(reference: "ModelReference") -> "Key":
    return reference.id, reference.path, reference.device, reference.dtype


def _written(reference: "ModelReference") -> float:
    """Return when a model's file was last written; 0 for one that has none, or none any more."""
    try:
        return 0.0 if reference.path is None else reference.path.stat().st_mtime
    except OSError:
        return 0.0


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


class ModelPool:
    """The loaded models. `budget` bounds the bytes of those that requests load; None does not."""

    def __init__(
        self,
        source: ModelSource,
        lane: Callable[..., Lane],
        wake: Callable[[], None],
        budget: int | None = None,
        patience: float | None = None,
    ):
        self._source, self._lane, self._wake = source, lane, wake
        self._budget, self._patience = budget, patience
        self.lock = threading.Condition()
        self.closing = False
        self.current: ServedModel | None = None
        self._places: dict[ServedModel, _Place] = {}
        self._reserved = 0  # bytes of loads that have room and are not there yet
        self._pending: dict[Key, Future[None]] = {}
        self._loading = threading.Lock()

    # --- what there is

    @property
    def loading(self) -> bool:
        """Say whether a model is being loaded."""
        return self._loading.locked()

    def lanes(self) -> list[Lane]:
        """Return every lane, also the retired ones that are not closed yet."""
        with self.lock:
            return [place.lane for place in self._places.values()]

    def models(self) -> list[ServedModel]:
        """Return the models that serve."""
        return [lane.served for lane in self.lanes() if not lane.retired]

    def lane(self, served: ServedModel | None) -> Lane | None:
        """Return a model's lane, None when it is closed."""
        with self.lock:
            place = None if served is None else self._places.get(served)
            return None if place is None else place.lane

    # --- the current model

    def load(self, reference: "ModelReference") -> ServedModel:
        """Load a model and make it current. Raises LoadInProgress, EngineDown and what loading raises."""
        if not self._loading.acquire(blocking=False):
            raise seq.LoadInProgress("Another model is being loaded; try again when it is done.")
        try:
            return self._load(reference, current=True)
        finally:
            self._loading.release()

    def unload(self) -> None:
        """Retire the current model. Raises NoModel."""
        with self.lock:
            if self.current is None:
                raise seq.NoModel("No model is loaded.")
            self._retire(self._places[self.current])
            self.current = None

    def forget(self, name: str) -> None:
        """Retire what is loaded beside the current model that came from the run `name`."""
        with self.lock:
            for served, place in tuple(self._places.items()):
                if served is not self.current and served.id.split("/")[0] == name:
                    self._retire(place)

    def _load(self, reference: "ModelReference", current: bool) -> ServedModel:
        written = _written(reference)
        served, runner = self._source.load(reference)
        lane = self._lane(served, runner)
        with self.lock:
            if self.closing:
                lane.close()
                raise seq.EngineDown(seq.Failure.SHUTTING_DOWN)
            for other, place in tuple(self._places.items()):
                if other is self.current if current else other is not self.current and other.id == served.id:
                    self._retire(place)
            self._places[served] = _Place(lane, written)
            if current:
                self.current = served
                self._free(0)
        return served

    def _retire(self, place: _Place) -> None:
        place.lane.retired = True
        self._wake()

    # --- models that requests name

    def hold(self, reference: "ModelReference | None") -> ServedModel:
        """Return a model that stays until it is released: the current one for None, else loaded if it is not.

        Callers that want the same model wait for one load. Raises NoModel, DoesNotFit, LoadInProgress when waiting
        took too long, EngineDown and what loading raises.
        """
        asked = time.monotonic()
        deadline = None if self._patience is None else asked + self._patience
        while (served := self._hold_loaded(reference, asked)) is None:
            if reference is None:
                raise seq.NoModel("No model is loaded.")
            self._obtain(reference, deadline)
        return served

    def release(self, served: ServedModel) -> None:
        """Let go of a model that was held."""
        with self.lock:
            place = self._places[served]  # it cannot have been closed: it was held
            place.holders, place.used = place.holders - 1, time.monotonic()
            self.lock.notify_all()
            if place.lane.retired:
                self._wake()

    def _hold_loaded(self, reference: "ModelReference | None", asked: float) -> ServedModel | None:
        with self.lock:
            if self.closing:
                raise seq.EngineDown(seq.Failure.SHUTTING_DOWN)
            place = self._find(reference, asked)
            if place is None:
                return None
            place.holders, place.used = place.holders + 1, time.monotonic()
            return place.lane.served

    def _find(self, reference: "ModelReference | None", asked: float) -> _Place | None:
        """Return where a model is, if it is what its file holds, or was when it was asked for."""
        if reference is None:
            return None if self.current is None else self._places[self.current]
        key, written = _key(reference), _written(reference)
        for served, place in tuple(self._places.items()):
            fresh = place.written == written or place.added > asked
            if fresh and not place.lane.retired and _key(served.reference) == key:
                return place
        return None

    def _obtain(self, reference: "ModelReference", deadline: float | None) -> None:
        """Load a model, or wait for the thread that already does."""
        with self.lock:
            key = _key(reference)
            pending, mine = self._pending.get(key), False
            if pending is None:
                pending = self._pending[key] = Future()
                mine = True
        if mine:
            try:
                self._load_beside(reference, deadline)
                pending.set_result(None)
            except BaseException as error:
                pending.set_exception(error)
            finally:
                with self.lock:
                    del self._pending[key]
        try:
            pending.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise seq.LoadInProgress(f"The model {reference.id} is still being loaded.") from None

    def _load_beside(self, reference: "ModelReference", deadline: float | None) -> None:
        need = 0 if self._budget is None else self._source.measure(reference).memory_bytes
        self._reserve(need, reference, deadline)
        try:
            with self._loading:
                self._load(reference, current=False)
        finally:
            with self.lock:
                self._reserved -= need

    # --- memory

    def _reserve(self, need: int, reference: "ModelReference", deadline: float | None) -> None:
        """Set `need` bytes aside; wait while they are in use. Raises DoesNotFit, LoadInProgress, EngineDown."""
        with self.lock:
            while not self._free(need):
                self._require_possible(need, reference)
                if deadline is not None and time.monotonic() > deadline:
                    raise seq.LoadInProgress(f"The model {reference.id} waits for memory: all other models are in use.")
                self.lock.wait(LOOK)
                if self.closing:
                    raise seq.EngineDown(seq.Failure.SHUTTING_DOWN)
            self._reserved += need

    def _require_possible(self, need: int, reference: "ModelReference") -> None:
        taken = 0 if self.current is None else self.current.memory_bytes
        if self._budget is not None and taken + need > self._budget:
            current = "" if self.current is None else f", of which {self.current.id} takes {_megabytes(taken)}"
            raise seq.DoesNotFit(
                f"The model {reference.id} needs {_megabytes(need)} of memory; models may take "
                f"{_megabytes(self._budget)}{current}."
            )

    def _free(self, need: int) -> bool:
        """Retire idle models, the least recently used first, until `need` bytes fit; say whether they fit by now."""
        if self._budget is None:
            return True
        room = self._budget - self._reserved - need
        staying = [place for place in self._places.values() if not place.lane.retired]
        idle = [place for place in staying if place.idle and place.lane.served is not self.current]
        taken = sum(place.nbytes for place in staying)
        for place in sorted(idle, key=lambda place: place.used):
            if taken <= room:
                break
            self._retire(place)
            taken -= place.nbytes
        return sum(place.nbytes for place in self._places.values()) <= room

    # --- the engine's thread

    def closable(self) -> list[Lane]:
        """Return the retired lanes on which nothing runs and that nobody holds."""
        with self.lock:
            return [place.lane for place in self._places.values() if place.lane.retired and place.idle]

    def remove(self, lane: Lane) -> None:
        """Take a lane out; called with the lock held."""
        del self._places[lane.served]
        self.lock.notify_all()
