"""/v1/fine_tuning/jobs: the training jobs of /api/jobs as OpenAI's clients know them.

There is one JobManager and one folder per run; a job that one protocol started is there in the other. A client
that cancels or pauses gets the job when its trainer has saved and ended, or after a wait if that takes long.
"""

import re
import shutil
import time
from http import HTTPStatus
from typing import Any

from flask import g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel

from storage import datasets, user_files
from storage.errors import NotFound, Unreachable
from storage.files import disk_errors_explained
from storage.runs import Run
from storage.user_files import UserFile
from training import fine_tuning
from training.fine_tuning_plan import base, plan
from training.job import ACTIVE
from training.jobs import JobManager
from web.context import Context, context
from web.errors import Refused
from web.fine_tuning_schemas import FineTuningBody, FineTuningJob, FineTuningList
from web.openai_schemas import OpenAIError
from web.paging import PageQuery, page
from web.schemas import BEFORE_ROUTES

JOBS_PAGE, EVENTS_PAGE, CHECKPOINTS_PAGE = 20, 20, 10
END_WAIT = 15.0  # seconds; a trainer that does not end is killed before
ERRORS: dict[str | int | HTTPStatus, Any] = dict.fromkeys((*BEFORE_ROUTES, 400, 401, 403, 404, 413, 415), OpenAIError)

routes = APIBlueprint("fine_tuning", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS)


class JobPath(BaseModel):
    """A job's id in the path."""

    job_id: str


# ---- creating


def _file(ctx: Context, field: str, file_id: str) -> UserFile:
    """Return a file that can be trained on. Raises Refused."""
    try:
        found = user_files.user_file(ctx.workspace, file_id)
    except NotFound as error:
        raise Refused(404, f"{field}: {error}", "file_not_found", field) from None
    if found.purpose != "fine-tune":
        raise Refused(400, f"{field}: {file_id} has the purpose {found.purpose}, not fine-tune", "invalid_file", field)
    if found.status == "uploaded":
        raise Refused(400, f"{field}: {file_id} is still being checked; try again", "file_not_ready", field)
    if found.status != "processed":
        raise Refused(400, f"{field}: {file_id} cannot be used: {found.status_details}", "invalid_file", field)
    return found


def _dataset(ctx: Context, body: FineTuningBody) -> str:
    """Return the name of the dataset to train on, made of the files if it must. Raises Refused, StorageError."""
    if body.dataset is not None:
        return body.dataset
    training = _file(ctx, "training_file", str(body.training_file))
    if body.validation_file is None:
        return user_files.as_dataset(ctx.workspace, training)
    return user_files.as_dataset(ctx.workspace, training, _file(ctx, "validation_file", body.validation_file))


def _no_model(error: NotFound) -> Refused:
    return Refused(404, str(error), "model_not_found", "model")


def _base(ctx: Context, body: FineTuningBody) -> dict[str, str]:
    try:
        return base(ctx.workspace, body.model, body.from_scratch)
    except NotFound as error:
        raise _no_model(error) from None


def _begin(ctx: Context, body: FineTuningBody, name: str) -> Any:
    """Create the job; if it cannot be, nothing is left of its folder."""
    fields = FineTuningBody.extras(request.get_json()) | _base(ctx, body) | body.tracked()
    fields |= {"output_dir": f"out/{name}"} | ({} if body.seed is None else {"seed": body.seed})
    dataset = datasets.dataset(ctx.workspace, _dataset(ctx, body))
    try:
        config, hyperparameters = plan(ctx.workspace, dataset, fields | {"dataset": dataset.name}, body.asked())
    except NotFound as error:
        raise _no_model(error) from None
    run = ctx.workspace.run(name)
    kept = {"training_file": body.training_file or dataset.name, "hyperparameters": hyperparameters}
    kept |= body.model_dump(include={"model", "validation_file", "suffix", "metadata", "integrations"})
    try:
        with disk_errors_explained(run.relative):
            run.folder.mkdir(parents=True)
        fine_tuning.keep(run, kept)
        return ctx.jobs.create(config)
    except BaseException:
        shutil.rmtree(run.folder, ignore_errors=True)
        raise


@routes.post("/v1/fine_tuning/jobs", responses={200: FineTuningJob, 413: OpenAIError, 422: OpenAIError})
def create(body: FineTuningBody) -> dict[str, Any]:
    """Start a fine-tuning job, or queue it."""
    g.ignored_params = FineTuningBody.ignored(request.get_json())
    ctx, name = context(), fine_tuning.new_name()
    try:
        job = _begin(ctx, body, name)
    except Unreachable as error:  # the server is well, and asking again would not help
        raise Refused(400, str(error), "model_not_found", "model") from None
    return fine_tuning.describe(job.describe(), ctx.workspace.run(name))


# ---- reading


def _find(ctx: Context, wanted: str) -> tuple[dict[str, Any], Run]:
    """Return a job's description and run. Raises NotFound."""
    run = fine_tuning.run_of(ctx.workspace, wanted)
    return ctx.jobs.get(run.name).describe(), run


def _wanted_metadata() -> dict[str, str]:
    keys = {name: re.fullmatch(r"metadata\[(.+)\]", name) for name in request.args}
    return {key[1]: request.args[name] for name, key in keys.items() if key is not None}


def _has_metadata(run: Run, wanted: dict[str, str]) -> bool:
    return not wanted or wanted.items() <= (fine_tuning.record(run).get("metadata") or {}).items()


@routes.get("/v1/fine_tuning/jobs", responses={200: FineTuningList})
def jobs(query: PageQuery) -> dict[str, Any]:
    """List the fine-tuning jobs, the newest first; `metadata[key]=value` leaves out those without it."""
    ctx, wanted = context(), _wanted_metadata()
    newest_first = [job for job in ctx.jobs.list() if _has_metadata(ctx.workspace.run(job.name), wanted)][::-1]
    return page(
        newest_first,
        query,
        JOBS_PAGE,
        lambda job: fine_tuning.job_id(job.name),
        lambda job: fine_tuning.describe(job.describe(), ctx.workspace.run(job.name)),
    )


@routes.get("/v1/fine_tuning/jobs/<job_id>", responses={200: FineTuningJob})
def job(path: JobPath) -> dict[str, Any]:
    """Describe a fine-tuning job."""
    return fine_tuning.describe(*_find(context(), path.job_id))


@routes.get("/v1/fine_tuning/jobs/<job_id>/events", responses={200: FineTuningList})
def events(path: JobPath, query: PageQuery) -> dict[str, Any]:
    """List what has happened to a job, the newest first."""
    found = fine_tuning.events(*_find(context(), path.job_id))
    return page(found, query, EVENTS_PAGE, lambda event: str(event["id"]), lambda event: event)


@routes.get("/v1/fine_tuning/jobs/<job_id>/checkpoints", responses={200: FineTuningList})
def checkpoints(path: JobPath, query: PageQuery) -> dict[str, Any]:
    """List the checkpoints that a job keeps, the latest first."""
    described, run = _find(context(), path.job_id)
    found = [fine_tuning.describe_checkpoint(saved, described, run) for saved in fine_tuning.saved_checkpoints(run)]
    return page(found, query, CHECKPOINTS_PAGE, lambda item: str(item["id"]), lambda item: item)


# ---- changing


def _wait_for_end(manager: JobManager, name: str) -> None:
    """Wait until a job that was asked to stop has ended, at most END_WAIT."""
    deadline = time.monotonic() + END_WAIT
    while manager.get(name).state in ACTIVE and time.monotonic() < deadline:
        time.sleep(0.2)


def _require(wanted: str, described: dict[str, Any], run: Run, states: tuple[str, ...], what: str) -> None:
    now = fine_tuning.status(described, run)
    if now not in states:
        rule = f"only a job that is {' or '.join(states)} can be {what}"
        raise Refused(400, f"{wanted} is {now}; {rule}", "invalid_state")


def _stop(wanted: str, states: tuple[str, ...], what: str) -> dict[str, Any]:
    ctx = context()
    described, run = _find(ctx, wanted)
    _require(wanted, described, run, states, what)
    try:
        fine_tuning.keep(run, {"paused": described["created"] if what == "paused" else None})
    except FileNotFoundError:  # deleted by another request
        raise NotFound(f"there is no fine-tuning job {wanted}") from None
    if described["state"] in ACTIVE:
        ctx.jobs.stop(run.name)
        _wait_for_end(ctx.jobs, run.name)
    return fine_tuning.describe(*_find(ctx, wanted))


@routes.post("/v1/fine_tuning/jobs/<job_id>/cancel", responses={200: FineTuningJob})
def cancel(path: JobPath) -> dict[str, Any]:
    """Cancel a job; it saves a checkpoint first."""
    return _stop(path.job_id, ("queued", "running", "paused"), "cancelled")


@routes.post("/v1/fine_tuning/jobs/<job_id>/pause", responses={200: FineTuningJob})
def pause(path: JobPath) -> dict[str, Any]:
    """Pause a job; it saves a checkpoint first."""
    return _stop(path.job_id, ("queued", "running"), "paused")


@routes.post("/v1/fine_tuning/jobs/<job_id>/resume", responses={200: FineTuningJob})
def resume(path: JobPath) -> dict[str, Any]:
    """Go on with a job that was paused."""
    ctx = context()
    described, run = _find(ctx, path.job_id)
    _require(path.job_id, described, run, ("paused",), "resumed")
    ctx.jobs.resume(run.name)
    return fine_tuning.describe(*_find(ctx, path.job_id))
