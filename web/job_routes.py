"""/api/train, /api/jobs, /api/datasets, /api/export: training jobs and what they train on.

The run folder is the truth: what is told of a job is read from its files, by the JobManager and here.
"""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, BinaryIO, cast

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from storage import datasets as stored
from storage import uploads
from storage.errors import BadName, Unreachable
from storage.files import check_name, quoted
from storage.registry import resolve
from training import metrics as training_metrics
from training import plot, raster
from training.config import TrainConfig
from training.dry_run_process import DryRunFailed, try_out
from training.jobs import JobBusy
from training.starting_point import reference as starting_point
from training.starting_point import settled
from training.trackers import require as require_trackers
from web import sse
from web.client import Client
from web.context import Context, context
from web.errors import Refused
from web.loading import check_allowed
from web.schemas import (
    BEFORE_ROUTES,
    Datasets,
    Error,
    ExportBody,
    Job,
    Jobs,
    Log,
    LogQuery,
    Message,
    MetricsQuery,
    NamePath,
    NoFields,
    PlotQuery,
    PriorityBody,
    Reply,
    ResumeBody,
    Rows,
    TrainBody,
    Training,
    UploadedDataset,
    UploadForm,
)
from web.strict_json import expect_upload

ERRORS: dict[str | int | HTTPStatus, Any] = dict.fromkeys((*BEFORE_ROUTES, 400, 401, 403, 413, 415), Error)

routes = APIBlueprint("jobs", __name__, abp_tags=[Tag(name="training")], abp_responses=ERRORS)


@routes.before_request
def _expect_upload() -> None:
    if request.endpoint == "jobs.upload_dataset":
        expect_upload(context().settings.max_upload_bytes)


def _dry_run(ctx: Context, asked: TrainConfig) -> dict[str, Any]:
    """Return what a training would be, found out by a process of its own; no run is left behind."""
    config = settled(asked, ctx.workspace)
    ctx.workspace.run_from_output_dir(config.output_dir)  # refuses what is none
    require_trackers(config)
    stored.dataset(ctx.workspace, config.dataset)
    if config.init_from not in ("scratch", "resume"):
        check_allowed(ctx.settings, starting_point(config, ctx.workspace))
    if not ctx.trying.acquire(blocking=False):
        raise JobBusy("another dry run is going on; try again in a moment")
    try:
        found = try_out(ctx.workspace, config, memory=ctx.settings.training_memory_bytes)
    except DryRunFailed as error:
        raise Refused(422, str(error)) from None
    finally:
        ctx.trying.release()
    running = ctx.jobs.counts().get("running", 0)
    if running:
        found["warnings"].append(f"jobs that run on this machine now: {running}; alone it is faster")
    message = "Dry run: nothing was started"
    return {"message": message, "config": config.given(), "config_path": None, "process_id": None, "dry_run": found}


@routes.post("/api/train", responses={200: Training, 404: Error, 409: Error, 422: Error})
def train(body: TrainBody) -> dict[str, Any]:
    """Start a training job, or queue it behind another; or with `dry_run` say what it would be."""
    if body.dry_run:
        return _dry_run(context(), body.config())
    try:
        job = context().jobs.create(body.config(), body.priority).describe()
    except Unreachable as error:  # the server is well; it is this job that cannot be
        raise Refused(422, str(error)) from None
    started = job["process_id"] is not None
    return {
        "message": "Training started" if started else "Training queued",
        "config": job["config"],
        "config_path": f"out/{job['name']}/train_config.json",
        "process_id": job["process_id"],
        "job": job,
    }


@routes.get("/api/jobs", responses={200: Jobs})
def jobs() -> dict[str, Any]:
    """List the training jobs."""
    return {"jobs": [job.describe() for job in context().jobs.list()]}


@routes.get("/api/jobs/<name>", responses={200: Job, 404: Error, 422: Error})
def job(path: NamePath) -> dict[str, Any]:
    """Tell the state of a job, with its latest text sample."""
    found = context().jobs.get(path.name)
    sample = found.sample()  # first, because a file of samples that is damaged is told in the description
    return found.describe() | {"sample": sample}


@routes.delete("/api/jobs/<name>", responses={200: Job, 404: Error, 409: Error, 422: Error})
def delete_job(path: NamePath) -> dict[str, Any]:
    """Delete a job that does not run, with its checkpoints; not while one of them is the current model."""
    ctx = context()
    described = ctx.jobs.get(path.name).describe()
    if ctx.loader.serves(path.name):
        instead = "POST /api/unload_model or load another one first"
        raise Refused(409, f"out/{path.name} holds the current model; {instead}")
    ctx.jobs.delete(path.name)
    ctx.engine.forget(path.name)
    return described | {"deleted": True}


@routes.post("/api/jobs/<name>/stop", responses={200: Job, 404: Error, 409: Error, 422: Error})
def stop_job(path: NamePath, body: NoFields) -> dict[str, Any]:
    """Stop a job; it saves a checkpoint first."""
    return context().jobs.stop(path.name).describe()


@routes.post("/api/jobs/<name>/resume", responses={200: Job, 404: Error, 409: Error, 422: Error})
def resume_job(path: NamePath, body: ResumeBody) -> dict[str, Any]:
    """Go on with a job that has ended, from its last checkpoint."""
    return context().jobs.resume(path.name, max_iters=body.max_iters, iter_num=body.iter_num).describe()


@routes.post("/api/jobs/<name>/priority", responses={200: Job, 404: Error, 409: Error, 422: Error})
def prioritize_job(path: NamePath, body: PriorityBody) -> dict[str, Any]:
    """Move a waiting job in the queue: higher goes first, and among equals who came first."""
    return context().jobs.set_priority(path.name, body.priority).describe()


@routes.get("/api/jobs/<name>/metrics", responses={200: Rows, 404: Error, 422: Error})
def job_metrics(path: NamePath, query: MetricsQuery) -> dict[str, Any]:
    """Return the rows of a job's metrics."""
    ctx = context()
    ctx.jobs.get(path.name)
    rows = training_metrics.read(ctx.workspace.run(path.name).metrics, after=query.after)
    return {"metrics": rows if query.limit is None else rows[-query.limit :]}


class Samples(Reply):
    """A job's text samples."""

    samples: list[dict[str, Any]]


@routes.get("/api/jobs/<name>/samples", responses={200: Samples, 404: Error, 422: Error})
def job_samples(path: NamePath, query: MetricsQuery) -> dict[str, Any]:
    """Return what the model wrote at each evaluation, from the same prompt and the same random numbers."""
    ctx = context()
    ctx.jobs.get(path.name)
    rows = training_metrics.read(ctx.workspace.run(path.name).samples, after=query.after)
    return {"samples": rows if query.limit is None else rows[-query.limit :]}


def _drawn(name: str, compare: str) -> str:
    """Return the losses of a job, and of others named in `compare`, as SVG."""
    ctx = context()
    others = [check_name("compare", other) for other in compare.split(",") if other]
    names = list(dict.fromkeys([name, *others]))
    if len(names) > plot.MOST_CURVES:
        raise Refused(
            400, f"compare makes {len(names)} jobs; a picture has at most {plot.MOST_CURVES}", param="compare"
        )
    for each in names:
        ctx.jobs.get(each)
    return plot.svg([plot.Curves.of(each, training_metrics.read(ctx.workspace.run(each).metrics)) for each in names])


def _picture(kind: str) -> dict[str | int | HTTPStatus, Any]:
    return {200: {"description": "the picture", "content": {kind: {}}}, 404: Error, 422: Error}


@routes.get("/api/jobs/<name>/plot.svg", responses=_picture("image/svg+xml"))
def job_plot(path: NamePath, query: PlotQuery) -> Response:
    """Draw the losses of a job, and of others beside it."""
    return Response(_drawn(path.name, query.compare), mimetype="image/svg+xml")


@routes.get("/api/jobs/<name>/plot.png", responses=_picture("image/png"))
def job_plot_png(path: NamePath, query: PlotQuery) -> Response:
    """Draw the same picture as pixels, for what cannot show SVG."""
    return Response(raster.png(_drawn(path.name, query.compare)), mimetype="image/png")


def _follow(ctx: Context, name: str, client: Client) -> Iterator[dict[str, Any] | None]:
    """Give the end of a log and what is added to it, until the job has ended; then the job."""
    for text in ctx.jobs.follow_log(name):
        client.check()
        yield None if text is None else {"text": text}
        if ctx.closing.is_set():
            raise Refused(503, "the server is stopping; the job goes on")
    yield {"job": ctx.jobs.get(name).describe()}


@routes.get(
    "/api/jobs/<name>/log",
    responses={
        200: {
            "description": "the end of the log, or with `follow` events until the job ends",
            "content": {
                "application/json": {"schema": Log.model_json_schema()},
                "text/event-stream": {},
            },
        },
        404: Error,
        422: Error,
    },
)
def job_log(path: NamePath, query: LogQuery) -> Response | dict[str, Any]:
    """Return the end of a job's log, or follow it."""
    ctx = context()
    end = ctx.jobs.log_tail(path.name)
    if not query.follow:
        return {"log": end}
    ctx.streams.enter()
    return sse.response(sse.frames(_follow(ctx, path.name, Client(request.environ))), ctx.streams.leave)


@routes.get("/api/datasets", responses={200: Datasets})
def datasets() -> dict[str, Any]:
    """List the datasets."""
    return {"datasets": [dataset.describe() for dataset in stored.datasets(context().workspace)]}


@routes.post("/api/datasets", responses={200: UploadedDataset, 409: Error, 413: Error, 422: Error})
def upload_dataset(form: UploadForm) -> dict[str, Any]:
    """Upload a dataset."""
    ctx, file = context(), form.file
    stream, limit = cast(BinaryIO, file.stream), ctx.settings.max_upload_bytes
    name, encoding = request.form.get("name"), request.form.get("encoding")
    dataset, report = uploads.upload(ctx.workspace, name, file.filename, stream, limit, encoding)
    return dataset.describe() | {"report": report}


@routes.delete("/api/datasets/<name>", responses={200: Message, 404: Error, 409: Error, 422: Error})
def delete_dataset(path: NamePath) -> dict[str, Any]:
    """Delete a dataset; of one that this project can prepare again, what its prepare.py made."""
    ctx = context()
    ctx.jobs.require_dataset_unused(path.name)
    uploads.delete(ctx.workspace, path.name)
    name = stored.ALIASES.get(path.name, path.name)
    again = (ctx.workspace.data / name / "prepare.py").exists()
    what = "text and tokens deleted; its prepare.py can fetch them again" if again else "deleted"
    return {"message": f"Dataset {name}: {what}"}


@routes.post("/api/export", responses={200: Message, 404: Error, 409: Error, 422: Error, 503: Error})
def export(body: ExportBody) -> dict[str, Any]:
    """Write a trained model as a Hugging Face folder, which transformers loads with no other file."""
    from storage import checkpoints, pretrained  # with torch, which this process has anyway when it serves

    ctx = context()
    path = body.model if body.model.startswith("out/") else f"out/{body.model}"
    try:
        reference = resolve(ctx.workspace, model_path=path)
    except BadName:
        rule = "it must be a run or a checkpoint: my_run, out/my_run/best.pt"
        raise Refused(400, f"model is {quoted(body.model)}; {rule}", param="model") from None
    if reference.kind != "trained" or reference.path is None:
        raise Refused(400, f"{body.model} is a Hugging Face folder already", param="model")
    check_allowed(ctx.settings, reference)
    loaded = checkpoints.load_model(reference, ctx.workspace)
    folder = reference.path.parent / "export"
    pretrained.export(loaded.model, loaded.tokenizer, folder, work=ctx.workspace.out)  # swept when a server starts
    return {"message": "Model exported", "path": str(folder.relative_to(ctx.workspace.root)), "model": reference.id}
