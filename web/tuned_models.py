"""Models named ft:…: what fine-tuning jobs made. They are listed, and loaded when a request names one.

Such a name stands for a checkpoint of a run; the same checkpoint is also served under the run's own name.
"""

from typing import Any

from inference.backend import ServedModel
from storage.errors import NotFound
from storage.registry import ModelReference, resolve
from storage.runs import Run
from training import fine_tuning
from web.context import Context
from web.errors import Refused

PREFIX = "ft:"


def _reference(ctx: Context, name: str) -> ModelReference:
    try:
        return resolve(ctx.workspace, model_path=fine_tuning.model_path(ctx.workspace, name))
    except NotFound as error:
        raise Refused(404, str(error), "model_not_found", "model") from None


def named(ctx: Context, name: str) -> ServedModel:
    """Return the model of this name, loaded now if another one is. Raises Refused (404) for an unknown name."""
    reference = _reference(ctx, name)
    served = ctx.engine.served()
    written = 0.0 if reference.path is None else reference.path.stat().st_mtime
    if served is not None and served.id == reference.id and served.loaded_at >= written:
        return served
    return ctx.loader.load({"model_path": reference.label})


def _model_object(name: str, created: float, run: Run) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "local", "run": run.name}


def described(ctx: Context, name: str) -> dict[str, Any]:
    """Return the model object of a name. Raises Refused (404)."""
    path = _reference(ctx, name).path
    assert path is not None  # a model that was trained here is a file
    run = ctx.workspace.run(path.parent.name)
    written = {saved.file: saved.written for saved in fine_tuning.saved_checkpoints(run)}
    return _model_object(name, written.get(path.name, path.stat().st_mtime), run)


def listed(ctx: Context) -> list[dict[str, Any]]:
    """Return a model object for the result and each checkpoint of the jobs that have succeeded."""
    found, allowed = [], ctx.settings.model_allow_list
    for job in ctx.jobs.list():
        run = ctx.workspace.run(job.name)
        if job.state != "succeeded" or (allowed and run.name not in allowed):
            continue
        name = fine_tuning.model_name(job.describe(), run)
        for saved in fine_tuning.saved_checkpoints(run):
            if saved.file == run.checkpoint.name:
                found.append(_model_object(name, saved.written, run))
            found.append(_model_object(f"{name}:ckpt-step-{saved.step}", saved.written, run))
    return found
