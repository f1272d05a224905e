"""Jobs whose files cannot be read: they are listed with what is wrong, and harm no other job."""

import errno
import json
import os
from pathlib import Path

import pytest
from fakes import FakeEngine, byte_tokenizer
from test_jobs import Place, config, wait_for

from api_server import create_app
from training.fine_tuning import job_id
from training.local_backend import LocalBackend
from web.settings import Settings

ODD = ("\ud800", [1], 10**400)
STATUS = {"state": "succeeded", "created": 1.0, "started": 1.0, "finished": 2.0, "priority": 0, "order": 0}
ROW = {"iter_num": 5, "loss": 1.5, "train_loss": 1.5, "val_loss": 1.5, "val_bits_per_byte": 2.0, "time": 1.0}
FILES = {
    "status.json": STATUS,
    "train_config.json": {"dataset": "text", "output_dir": "out/bad", "max_iters": 5},
    "result.json": {"state": "succeeded", "iter_num": 5, "finished": 2.0, "note": None, "error": None},
    "metrics.jsonl": ROW,
    "samples.jsonl": {"iter_num": 5, "prompt": "to", "text": " be"},
    "train.log": "the end",
    "trainer.json": {"pid": 99999999, "start_time": 1, "boot_id": "x", "ranks": [1, 2]},
    "openai.json": {"suffix": "s", "metadata": {}, "paused": 1.0},
    "ckpt.pt.json": {"size": 7, "iter_num": 5, "best_val_loss": 1.0, "earlier": []},
}
TRAIN = {"dataset": "text", "model_type": "nano", "max_iters": 5}


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    for name in ("good", "bad"):
        (made.workspace.out / name).mkdir()
        for file, content in FILES.items():
            (made.workspace.out / name / file).write_text(json.dumps(content) + "\n")
        made.checkpoint(name)
    yield made
    for manager in made.managers:
        manager.close()


def client(place: Place):
    """Return a client of a server with a real JobManager."""
    settings = Settings(root=place.workspace.root)
    return create_app(settings, FakeEngine(byte_tokenizer()), place.manager(), place.workspace).test_client()


def told(reply) -> tuple[int, str]:
    return reply.status_code, reply.get_data().decode("utf-8", "replace")


def ask_everything(place: Place) -> dict[str, tuple[int, str]]:
    """Return what every route says that has to do with jobs: status and body."""
    asked, openai = client(place), f"/v1/fine_tuning/jobs/{job_id('bad')}"
    of_one = ("", "/metrics", "/samples", "/log", "/log?follow=1", "/plot.svg")
    paths = [f"/api/jobs/bad{end}" for end in of_one] + [openai, f"{openai}/events", f"{openai}/checkpoints"]
    paths += ["/api/jobs", "/v1/fine_tuning/jobs", "/v1/models", "/api/models", "/api/jobs/good/plot.svg?compare=bad"]
    posts = [f"/api/jobs/bad/{end}" for end in ("resume", "stop")] + [f"{openai}/cancel"]
    replies = {path: told(asked.get(path)) for path in paths}
    replies |= {path: told(asked.post(path, json={})) for path in posts}
    replies["delete"] = told(asked.delete("/api/jobs/bad"))
    replies["again"] = told(asked.post("/api/train", json=TRAIN | {"output_dir": "out/bad", "overwrite": True}))
    return replies


def listed(replies: dict[str, tuple[int, str]]) -> dict[str, dict]:
    return {job["name"]: job for job in json.loads(replies["/api/jobs"][1])["jobs"]}


def replace(path: Path, kind: str) -> None:
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)


def deny(monkeypatch, under: Path, number: int) -> None:
    """Let the disk fail wherever a file below a folder is looked at or opened."""

    def failing(original):
        def call(path, *args, **kwargs):
            if not isinstance(path, int) and str(path).startswith(str(under)):
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *args, **kwargs)

        return call

    for name in ("open", "stat", "lstat", "scandir", "listdir"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))


def require_whole(replies: dict[str, tuple[int, str]]) -> None:
    """Require lists with both jobs, and no reply that is the server's fault or has nothing but an error's number."""
    assert not {path: reply for path, reply in replies.items() if reply[0] >= 500 or "internal error" in reply[1]}
    assert all(replies[path][0] == 200 for path in ("/api/jobs", "/v1/fine_tuning/jobs", "/v1/models", "/api/models"))
    found = listed(replies)
    assert found.keys() == {"good", "bad"} and found["good"]["loss"] == 1.5 and found["good"]["damaged"] is None


@pytest.mark.fault("F25", "a folder or a FIFO in the place of each file of a job")
@pytest.mark.parametrize("kind", ["folder", "fifo"])
@pytest.mark.parametrize("file", FILES)
def test_a_job_with_another_thing_in_the_place_of_a_file_breaks_nothing(place, file, kind):
    replace(place.workspace.out / "bad" / file, kind)
    replies = ask_everything(place)
    require_whole(replies)
    if file in ("status.json", "train_config.json", "result.json", "metrics.jsonl"):
        words = "is a folder, not a file" if kind == "folder" else "is a pipe or a device, not a file"
        assert f"{file} {words}" in listed(replies)["bad"]["damaged"]


@pytest.mark.fault("F25", "a disk that fails at a file of a job, and at all of them")
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("file", [*FILES, ""])
def test_a_job_whose_disk_fails_is_listed_with_what_is_wrong(place, monkeypatch, file, number):
    with monkeypatch.context() as failing:
        deny(failing, place.workspace.out / "bad" / (file or "."), number)
        replies = ask_everything(place)
    require_whole(replies)
    if file in ("status.json", "train_config.json", "result.json", "metrics.jsonl", ""):
        assert f"cannot be read: {os.strerror(number)}" in listed(replies)["bad"]["damaged"]


@pytest.mark.fault("F25", "values of a wrong type in each file of a job")
@pytest.mark.parametrize("file", [file for file, content in FILES.items() if isinstance(content, dict)])
def test_a_job_with_odd_values_breaks_nothing(place, file):
    for name in FILES[file]:
        for value in ODD:
            for other, content in FILES.items():
                (place.workspace.out / "bad").mkdir(exist_ok=True)
                (place.workspace.out / "bad" / other).write_text(json.dumps(content))
            (place.workspace.out / "bad" / file).write_text(json.dumps(FILES[file] | {name: value}))
            replies = ask_everything(place)
            place.managers.pop().close()
            require_whole(replies)


def test_what_only_a_damaged_file_could_say_is_refused_by_its_name(place):
    for file in ("metrics.jsonl", "samples.jsonl", "train.log"):
        replace(place.workspace.out / "bad" / file, "folder")
    asked = client(place)
    for end, file in (("metrics", "metrics.jsonl"), ("samples", "samples.jsonl"), ("log?follow=1", "train.log")):
        reply = asked.get(f"/api/jobs/bad/{end}")
        assert (reply.status_code, reply.json) == (422, {"error": f"bad/{file} is a folder, not a file"})
    job = asked.get("/api/jobs/bad").json
    assert job["sample"] is None and job["loss"] is None and "bad/samples.jsonl" in job["damaged"]


@pytest.mark.fault("F25", "a log that cannot be read when its job ends")
def test_a_job_ends_and_the_next_one_starts_whatever_its_log_is(place):
    manager = place.manager()
    manager.create(config("first"))
    manager.create(config("second"))
    (place.workspace.out / "first" / "train.log").mkdir()
    place.backend.end("first", code=3)
    job = wait_for(manager, "first", "failed")
    assert job["error"] == "exit code 3; first/train.log is a folder, not a file"
    wait_for(manager, "second", "running")


@pytest.mark.fault("F25", "a folder or a FIFO that a trainer would have to write to")
@pytest.mark.parametrize(("file", "kind", "words"), [
    ("result.json", "folder", "Is a directory (result.json)"),
    ("train.log", "folder", "Is a directory (train.log)"),
    ("train.log", "fifo", "No such device or address (train.log)"),
])  # fmt: skip
def test_a_trainer_that_cannot_be_started_is_no_obstacle_for_the_next(place, file, kind, words):
    replace(place.workspace.out / "bad" / file, kind)
    (place.workspace.root / "sleep.py").write_text("import time; time.sleep(60)\n")
    backend = LocalBackend(place.workspace, script=place.workspace.root / "sleep.py")
    manager = place.manager(backend=backend)
    assert manager.resume("bad", max_iters=9).status.error == f"the trainer could not be started: {words}"
    assert manager.resume("good", max_iters=9).state == "running"
    manager.stop("good")
    wait_for(manager, "good", "stopped")
