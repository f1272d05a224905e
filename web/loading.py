"""ModelLoader: which model is served, from the start, by request, and again after the worker was replaced.

It turns a name or path into a reference, applies the allow list, has the engine load, and remembers the
choice in out/.server.json, so that a worker that takes over from a killed one serves the same model. The
file belongs to one run of the server: a new start overwrites it. No weights are read here.
"""

import logging
import threading
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from inference.backend import InferenceBackend, ServedModel
from inference.sequence import InferenceError
from storage.errors import StorageError
from storage.files import read_json, write_json
from storage.listing import RunListing
from storage.registry import BUNDLED, ModelReference, resolve
from storage.runs import Workspace
from web.errors import Refused
from web.settings import Settings

log = logging.getLogger(__name__)

NONE = "none"  # the model_type that means: start without a model


def state_file(workspace: Workspace) -> Path:
    """Return the file that remembers the last loaded model."""
    return workspace.out / ".server.json"


def first_choice(settings: Settings) -> dict[str, str] | None:
    """Return what the settings ask to serve at the start, as load_model's body; None for no model."""
    if settings.model_path is not None:
        return {"model_path": settings.model_path}
    if settings.model_type == NONE:
        return None
    return {"model_type": settings.model_type or BUNDLED}


def on_allow_list(settings: Settings, names: Iterable[str]) -> bool:
    """Say whether the allow list, when there is one, has one of these names; a `*` in it stands for any text."""
    allowed = settings.model_allow_list
    return not allowed or any(fnmatchcase(name, entry) for name in names for entry in allowed)


def is_allowed(settings: Settings, reference: ModelReference, name: str | None = None) -> bool:
    """Say whether the allow list, when there is one, has a model: its id, the path or the `name` that was asked for.

    A run on the list is there with all its checkpoints, and a registered model with its aliases.
    """
    whole = reference.id if reference.kind == "registered" else reference.id.partition("/")[0]
    asked = set() if name is None else {name, name.partition(":ckpt-step-")[0]}
    return on_allow_list(settings, {reference.id, reference.label, whole} | asked)


def check_allowed(settings: Settings, reference: ModelReference, name: str | None = None) -> None:
    """Raise Refused (403) for a model that is not on the allow list; see `is_allowed`."""
    if not is_allowed(settings, reference, name):
        allowed = ", ".join(settings.model_allow_list)
        raise Refused(403, f"the model {reference.id} is not on this server's allow list: {allowed}")


class ModelLoader:
    """Load and unload models, and remember which."""

    def __init__(self, settings: Settings, engine: InferenceBackend, workspace: Workspace):
        self._settings, self._engine, self._workspace = settings, engine, workspace
        self._starting, self._listing = threading.Event(), RunListing(workspace)

    @property
    def starting(self) -> bool:
        """Say whether the first model is still being loaded."""
        return self._starting.is_set()

    def load(self, choice: dict[str, str]) -> ServedModel:
        """Serve the model of {"model_path": …} or {"model_type": …}; raises what resolve and the engine raise."""
        reference = resolve(self._workspace, **choice)
        check_allowed(self._settings, reference)
        try:
            served = self._engine.load(reference)
        except ValueError as error:  # a device or precision that this machine or model does not have
            raise Refused(400, str(error)) from None
        self._remember(choice)
        return served

    def unload(self) -> None:
        """Stop serving the current model. Raises NoModel."""
        self._engine.unload()
        self._remember(None)

    def begin_start(self) -> None:
        """Note that the first model is about to be loaded."""
        self._starting.set()

    def start(self, again: bool) -> ServedModel | None:
        """Load the first model: the settings' choice, or when `again` the last one that was loaded.

        A model that cannot be loaded `again` is logged and leaves the server without one: it may have been
        deleted since, which is no reason not to answer. The first time its error is raised.
        """
        self._starting.set()
        try:
            choice = self._recall() if again else first_choice(self._settings)
            return None if choice is None else self.load(choice)
        except (StorageError, InferenceError, Refused) as error:
            if not again:
                raise
            log.error("the last model could not be loaded again: %s", error)
            return None
        finally:
            self._starting.clear()

    def serves(self, name: str) -> bool:
        """Say whether the current model lies in the folder of the run `name`: a checkpoint of it, or its export."""
        served, folder = self._engine.served(), self._workspace.run(name).folder
        path = None if served is None else served.reference.path
        return path is not None and folder in (path, *path.parents)

    def trained(self) -> list[dict[str, Any]]:
        """Return the runs that may be loaded."""
        found = self._listing.trained_models()
        return [run for run in found if on_allow_list(self._settings, (run["name"], run["path"]))]

    def _remember(self, choice: dict[str, str] | None) -> None:
        try:
            self._workspace.out.mkdir(exist_ok=True)
            write_json(state_file(self._workspace), {"model": choice})
        except (OSError, StorageError) as error:
            log.warning("the loaded model could not be noted for a restart: %s", type(error).__name__)

    def _recall(self) -> dict[str, str] | None:
        try:
            choice = read_json(state_file(self._workspace), 2**16)["model"]
        except (StorageError, KeyError, TypeError):
            return first_choice(self._settings)
        return choice if choice is None or isinstance(choice, dict) else first_choice(self._settings)
