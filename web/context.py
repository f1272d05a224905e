"""What a route may use: settings, engine, jobs, workspace, the model loader and the counters. Nothing global.

`create_app` puts one `Context` into the app; `context()` returns the one of the app that handles this request.
"""

import threading
from dataclasses import dataclass, field

from flask import current_app

from inference.backend import InferenceBackend
from inference.sequence import EngineDown, Failure
from storage.runs import Workspace
from training.jobs import JobManager
from web.catalogue import Catalogue
from web.errors import Refused
from web.loading import ModelLoader
from web.metrics import Metrics
from web.pump import Pump
from web.settings import Settings

EXTENSION = "language_model_server"


class StreamLimit:
    """How many generation requests are open, and that there are not too many."""

    def __init__(self, most: int):
        self._most = most
        self._open = 0
        self._lock = threading.Lock()

    @property
    def open(self) -> int:
        """Return the number of open generation requests."""
        return self._open

    def enter(self) -> None:
        """Count one more. Raises Refused (429)."""
        with self._lock:
            if self._open >= self._most:
                raise Refused(
                    429, f"{self._open} requests are open, the most allowed", "queue_full", headers={"Retry-After": "1"}
                )
            self._open += 1

    def leave(self) -> None:
        """Count one less."""
        with self._lock:
            self._open -= 1


@dataclass(frozen=True)
class Context:
    """Everything the routes share."""

    settings: Settings
    engine: InferenceBackend
    jobs: JobManager
    workspace: Workspace
    loader: ModelLoader
    metrics: Metrics
    streams: StreamLimit
    catalogue: Catalogue
    pump: Pump
    trying: threading.Lock = field(default_factory=threading.Lock)  # held by the one dry run at a time
    closing: threading.Event = field(default_factory=threading.Event)  # the server is stopping
    stalled: threading.Event = field(default_factory=threading.Event)  # the engine does not move

    def require_engine(self) -> None:
        """Raise EngineDown when there is no use in waiting for the engine."""
        if self.stalled.is_set():
            raise EngineDown(Failure.STALLED)


def context() -> Context:
    """Return the context of the app that handles the current request."""
    found: Context = current_app.extensions[EXTENSION]
    return found
