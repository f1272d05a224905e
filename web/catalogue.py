"""The catalogue: every model that a request under /v1 may name, and what each takes.

A name is the id of the current model, a name of the registry file, a pretrained name that is on this machine, a run
of out/ (my_run, my_run/best, out/my_run/ckpt.pt), or ft:… of a fine-tuning job. Nothing is loaded here, and nothing
is fetched: what is not on this machine is fetched by POST /api/load_model only.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inference.backend import Footprint, InferenceBackend, ServedModel
from storage import hub
from storage.chat_format import is_chat
from storage.checkpoint_files import CHECKPOINT, PREVIOUS
from storage.errors import NotFound, StorageError
from storage.files import quoted
from storage.registry import ModelReference, local_folder, pretrained_names, resolve
from storage.runs import Workspace
from training import fine_tuning
from training.job import read_object
from training.jobs import JobManager
from web.errors import Refused
from web.loading import check_allowed, is_allowed
from web.settings import Settings

TUNED = "ft:"
Json = dict[str, Any]


class Catalogue:
    """Turn names into models, and list them."""

    def __init__(self, settings: Settings, engine: InferenceBackend, workspace: Workspace, jobs: JobManager):
        self._settings, self._engine, self._workspace, self._jobs = settings, engine, workspace, jobs
        self._footprints: dict[tuple[Path, int], Footprint | None] = {}  # by path and when it was written

    # --- one model

    def reference(self, name: str | None) -> ModelReference | None:
        """Return the model of this name, None for the current one. Raises Refused (404, 403)."""
        if name is None:
            return None
        try:
            found = self._resolve(name)
        except StorageError as error:
            served = self._engine.served()
            if served is not None and name in (served.id, served.reference.label):
                return None  # it serves from memory, though its file is gone
            message = str(error) if isinstance(error, NotFound) else f"there is no model {quoted(name)}"
            raise Refused(404, f"{message}; GET /v1/models lists those there are", "model_not_found", "model") from None
        check_allowed(self._settings, found, name)
        return found

    def _resolve(self, name: str) -> ModelReference:
        """Return the model of this name. Raises StorageError."""
        if name.startswith(TUNED):
            return resolve(self._workspace, model_path=fine_tuning.model_path(self._workspace, name))
        if name in pretrained_names(self._workspace):
            found = resolve(self._workspace, model_type=name)
            if not self._is_here(found):
                raise NotFound(f"the model {name} is not on this machine; POST /api/load_model fetches it")
            return found
        if name.startswith(("out/", "models/")):
            return resolve(self._workspace, model_path=name)
        if "/" in name:
            try:
                return resolve(self._workspace, model_path=f"out/{name}.pt")
            except NotFound:
                pass  # then it is a folder
        try:
            return resolve(self._workspace, model_path=f"out/{name}")
        except NotFound:
            raise NotFound(f"there is no model {quoted(name)}") from None

    @staticmethod
    def _is_here(reference: ModelReference) -> bool:
        return reference.path is not None or hub.cached(reference.repository or reference.id) is not None

    def entry(self, name: str) -> Json:
        """Return the model object of a name. Raises Refused (404, 403)."""
        reference = self.reference(name)
        if reference is None:
            served = self._engine.served()
            if served is None:
                raise Refused(404, f"the model {quoted(name)} is not loaded any more", "model_not_found", "model")
            reference = served.reference
        own = name.startswith(TUNED) or name in dict(self._workspace.registered)  # the name is an id here
        return self._object(name if own else reference.id, reference, self._loaded())

    # --- all models

    def entries(self) -> list[Json]:
        """Return a model object for every name, the current model first."""
        loaded, found = self._loaded(), dict[str, Json]()
        for name, reference in self._all():
            if name not in found and (name in loaded or is_allowed(self._settings, reference, name)):
                found[name] = self._object(name, reference, loaded)
        return list(found.values())

    def _all(self) -> Iterator[tuple[str, ModelReference]]:
        served = self._engine.served()
        if served is not None:
            yield served.id, served.reference
        registered = dict(self._workspace.registered)
        for name in pretrained_names(self._workspace):
            if name in registered or local_folder(self._workspace, name) is not None:
                yield name, resolve(self._workspace, model_type=name)
        for described in self._workspace.trained_models():
            files = [file["path"] for file in described["checkpoints"] if not file["path"].endswith(f"/{PREVIOUS}")]
            for path in dict.fromkeys((described["path"], *files)):
                try:
                    reference = resolve(self._workspace, model_path=path)
                except StorageError:
                    continue
                yield reference.id, reference
        yield from self._tuned()

    def _tuned(self) -> Iterator[tuple[str, ModelReference]]:
        """Give the result and each checkpoint of the jobs that have succeeded."""
        for job in self._jobs.list():
            if not job.has_result:
                continue
            run = self._workspace.run(job.name)
            name = fine_tuning.model_name({"config": read_object(run.config)}, run)
            for saved in fine_tuning.saved_checkpoints(run):
                try:
                    reference = resolve(self._workspace, model_path=f"{run.relative}/{saved.file}")
                except StorageError:  # it has just gone, or is a link
                    continue
                if saved.file == CHECKPOINT:
                    yield name, reference
                yield f"{name}:ckpt-step-{saved.step}", reference

    def _loaded(self) -> dict[str, ServedModel]:
        served = self._engine.served()
        return {model.id: model for model in (*self._engine.models(), *([] if served is None else [served]))}

    # --- what is said of one

    def _object(self, name: str, reference: ModelReference, loaded: dict[str, ServedModel]) -> Json:
        served, takes = loaded.get(reference.id), self._footprint(reference)
        known = takes if served is None else served
        limits = (self._settings.max_context_tokens, reference.max_context_tokens)
        chats = None if takes is None else takes.chat
        written = _written(reference)
        return {
            "id": name,
            "object": "model",
            "created": int(written / 1e9 if written else 0 if served is None else served.loaded_at),
            "owned_by": "local",
            "kind": reference.kind,
            "loaded": served is not None,
            "chat": chats if served is None else is_chat(served.tokenizer),
            "max_model_len": None if known is None else min(n for n in (known.block_size, *limits) if n is not None),
            "parameters": None if known is None else known.parameters,
            "size_bytes": None if takes is None else takes.size_bytes,
            "memory_bytes": None if known is None else known.memory_bytes,
        }

    def _footprint(self, reference: ModelReference) -> Footprint | None:
        """Return what a model takes; None for one whose file says nothing sound, or is gone."""
        if reference.path is None:
            return None
        key = (reference.path, _written(reference))
        if key not in self._footprints:
            for old in [old for old in self._footprints if old[0] == reference.path]:
                self._footprints.pop(old, None)
            try:
                self._footprints[key] = self._engine.measure(reference)
            except (StorageError, ValueError):
                self._footprints[key] = None
        return self._footprints[key]


def _written(reference: ModelReference) -> int:
    """Return when a model's file was written, in nanoseconds since the epoch; 0 if it is gone."""
    try:
        return 0 if reference.path is None else reference.path.stat().st_mtime_ns
    except OSError:
        return 0
