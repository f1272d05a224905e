"""Fine-tuning jobs in OpenAI's words: a second view of the runs in out/, with nothing of its own but openai.json.

A job created there has the run out/ftjob-<24 hex digits>, and that name is its id; the id of any other run is made
of its name, so that every job has one in both views. openai.json in the run's folder keeps what only this protocol
knows: the files, the suffix, the hyperparameters as asked, and whether a stop was meant as a pause.
"""

import hashlib
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.checkpoint_files import PREVIOUS, listed
from storage.errors import NotFound
from storage.files import write_json
from storage.runs import Run, Workspace
from training import metrics
from training.job import Job, read_object, result_of, typed

ORGANIZATION = "local"
ID = re.compile(r"ftjob-[0-9a-f]{24}")
MODEL_NAME = re.compile(r"ft:[^:/]*:[^:/]*:[^:/]*:([0-9a-f]{24})(?::ckpt-step-([0-9]{1,10}))?")
STATUS = {"queued": "queued", "running": "running", "succeeded": "succeeded", "stopped": "cancelled"}
KEPT: dict[str, type] = dict.fromkeys(("model", "training_file", "validation_file", "suffix"), str)
KEPT |= {
    "hyperparameters": dict,
    "metadata": dict,
    "integrations": list,
    "paused": float,
}  # what openai.json may hold, and of which type
UNFINISHED = ("queued", "running", "paused")
Described = Mapping[str, Any]  # what Job.describe() returns


# ---- ids and names


def new_name() -> str:
    """Return the name of a new job's run, which is also its id."""
    return f"ftjob-{secrets.token_hex(12)}"


def job_id(run_name: str) -> str:
    """Return the id of a run's job."""
    if ID.fullmatch(run_name):
        return run_name
    return f"ftjob-{hashlib.sha256(run_name.encode()).hexdigest()[:24]}"


def run_of(workspace: Workspace, wanted: str) -> Run:
    """Return the run of the job with this id. Raises NotFound."""
    if ID.fullmatch(wanted):
        run = workspace.run(wanted)
        for other in (run,) if run.exists() else workspace.runs():
            if job_id(other.name) == wanted:
                return other
    raise NotFound(f"there is no fine-tuning job {wanted[:40]!r}")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _base(model: str) -> str:
    """Return the model that everything began with, also of a model that was tuned before."""
    return model.split(":")[1] if MODEL_NAME.fullmatch(model) else _plain(model)


def model_name(described: Described, run: Run) -> str:
    """Return the name under which a job's result is served: ft:<base>:<organization>:<suffix>:<digits of the id>."""
    kept = record(run)
    suffix = _plain(kept.get("suffix", "")) or ("" if ID.fullmatch(run.name) else run.name)
    base = _base(_model(described, kept))
    return f"ft:{base}:{ORGANIZATION}:{suffix}:{job_id(run.name).removeprefix('ftjob-')}"


def model_path(workspace: Workspace, name: str) -> str:
    """Return the path, as load_model takes it, of a model named ft:…, or of one of its checkpoints.

    The first part of the name is for people: the id at its end decides. Raises NotFound.
    """
    found = MODEL_NAME.fullmatch(name)
    if found is None:
        raise NotFound(f"there is no model {name[:100]!r}")
    run = run_of(workspace, f"ftjob-{found[1]}")
    if found[2] is None:
        if Job(run).has_result or result_of(run).get("state") == "succeeded":
            return f"{run.relative}/{run.checkpoint.name}"
        raise NotFound(f"the job of {name} has not succeeded; its checkpoints have names that end in :ckpt-step-<N>")
    for saved in saved_checkpoints(run):
        if saved.step == int(found[2]):
            return f"{run.relative}/{saved.file}"
    raise NotFound(f"there is no checkpoint {name}: a job keeps the latest, the best, and those that keep_every says")


# ---- openai.json


def record(run: Run) -> dict[str, Any]:
    """Return what openai.json keeps of a job, without what cannot be right; {} if there is none."""
    return typed(read_object(run.folder / "openai.json"), KEPT)


def keep(run: Run, values: Mapping[str, Any]) -> None:
    """Change openai.json in a run's folder, which is there: its other values stay."""
    write_json(run.folder / "openai.json", record(run) | dict(values))


# ---- the job


def status(described: Described, run: Run) -> str:
    """Return a job's status: a stop is a pause if that was what was asked for, else a cancellation."""
    state = described["state"]
    if state == "stopped" and record(run).get("paused") == described["created"]:
        return "paused"
    return STATUS.get(state, "failed")  # failed, lost


def _model(described: Described, kept: Described) -> str:
    config = described["config"]
    started = config.get("init_from")
    from_scratch = started in (None, "scratch", "pretrained", "resume")
    return str(kept.get("model") or (config.get("model_type") if from_scratch else started) or "unknown")


def _error(described: Described) -> dict[str, Any] | None:
    if described["state"] not in ("failed", "lost"):
        return None
    message = described["error"] or "the training ended without saying how"
    return {"code": f"training_{described['state']}", "message": message, "param": None}


def _number(config: Described, name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0


def _trained_tokens(described: Described) -> int | None:
    if described["state"] in ("queued", "running"):
        return None
    config = described["config"]
    window = _number(config, "window") or _number(config, "block_size")
    steps = _number(config, "batch_size") * (_number(config, "gradient_accumulation_steps") or 1)
    return int((described["iter_num"] or 0) * steps * window)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def describe(described: Described, run: Run) -> dict[str, Any]:
    """Return OpenAI's job object of a job."""
    kept, now = record(run), status(described, run)
    config, left = described["config"], described["eta_seconds"]
    asked = {name: kept.get("hyperparameters", {}).get(name, "auto") for name in HYPERPARAMETERS}
    return {
        "id": job_id(run.name),
        "object": "fine_tuning.job",
        "created_at": int(described["created"]),
        "started_at": _whole(described["started"]),
        "finished_at": None if now in UNFINISHED else _whole(described["finished"]),
        "estimated_finish": None if left is None else int(time.time() + left),
        "error": _error(described),
        "fine_tuned_model": model_name(described, run) if described["has_result"] and now not in UNFINISHED else None,
        "hyperparameters": asked,
        "method": {"type": "supervised", "supervised": {"hyperparameters": asked}},
        "model": _model(described, kept),
        "organization_id": ORGANIZATION,
        "result_files": [],
        "status": now,
        "trained_tokens": _trained_tokens(described),
        "training_file": str(kept.get("training_file") or config.get("dataset") or ""),
        "validation_file": kept.get("validation_file"),
        "seed": _number(config, "seed"),
        "integrations": kept.get("integrations") or [],
        "metadata": kept.get("metadata") or {},
        "name": run.name,
        "output_dir": run.relative,
        "iter_num": described["iter_num"],
        "max_iters": described["max_iters"],
    }


HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")


# ---- its checkpoints


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint file of a run."""

    file: str
    step: int
    written: float


def saved_checkpoints(run: Run) -> list[SavedCheckpoint]:
    """Return the checkpoints of a run that can be served, the latest first, each step once."""
    found: dict[int, SavedCheckpoint] = {}
    for file in listed(str(run.folder)):
        if file.name != PREVIOUS and isinstance(file.iter_num, int) and file.iter_num not in found:
            found[file.iter_num] = SavedCheckpoint(file.name, file.iter_num, file.modified)
    return sorted(found.values(), key=lambda saved: saved.step, reverse=True)


def _losses(run: Run, step: int) -> dict[str, float]:
    """Return the losses at a step, or at the last evaluation before it."""
    found: dict[str, float] = {"step": step}
    for row in metrics.read(run.metrics):
        if row["iter_num"] <= step:
            train, valid = row.get("train_loss", row.get("loss")), row.get("val_loss")
            found |= ({} if train is None else {"train_loss": train}) | ({} if valid is None else {"valid_loss": valid})
    return found


def describe_checkpoint(saved: SavedCheckpoint, described: Described, run: Run) -> dict[str, Any]:
    """Return OpenAI's checkpoint object."""
    return {
        "id": f"ftckpt-{job_id(run.name).removeprefix('ftjob-')}-{saved.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(saved.written),
        "fine_tuned_model_checkpoint": f"{model_name(described, run)}:ckpt-step-{saved.step}",
        "fine_tuning_job_id": job_id(run.name),
        "step_number": saved.step,
        "metrics": _losses(run, saved.step),
    }


# ---- its events


def _event(run: Run, key: object, when: float, message: str, level: str = "info", data: Any = None) -> dict[str, Any]:
    return {
        "id": f"ftevent-{job_id(run.name).removeprefix('ftjob-')}-{key}",
        "object": "fine_tuning.job.event",
        "created_at": int(when),
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data or {},
    }


def _progress(run: Run, row: Mapping[str, Any], total: int | None) -> dict[str, Any]:
    columns = {"train_loss": row.get("train_loss", row.get("loss")), "valid_loss": row.get("val_loss")}
    data = {"step": row["iter_num"], "total_steps": total} | columns
    said = [f"{name.replace('_', 'ing ' if name[0] == 't' else 'ation ')} {v:.4f}" for name, v in columns.items() if v]
    message = f"step {row['iter_num']} of {total}: {', '.join(said) or 'no loss yet'}"
    return _event(run, row["iter_num"], row.get("time") or 0, message, data=data)


def _end(described: Described, run: Run) -> dict[str, Any] | None:
    now, when = status(described, run), described["finished"] or described["created"]
    if now in ("queued", "running"):
        return None
    if now == "failed":
        return _event(run, "failed", when, f"the job failed: {described['error']}", "error")
    made = f"; the result is {model_name(described, run)}" if now == "succeeded" else ""
    return _event(run, now, when, f"the job has {'been ' if now != 'succeeded' else ''}{now}{made}")


def events(described: Described, run: Run) -> list[dict[str, Any]]:
    """Return what has happened to a job, the newest first: older ones keep their place when new ones come."""
    found = [_event(run, "created", described["created"], "the job was created")]
    if described["started"] is not None:
        found.append(_event(run, "started", described["started"], "the training has started"))
    rows = metrics.read(run.metrics)
    found += [_progress(run, row, described["max_iters"]) for row in rows]
    if (end := _end(described, run)) is not None:
        found.append(end)
    return found[::-1]
