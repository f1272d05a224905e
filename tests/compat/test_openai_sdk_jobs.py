"""The `openai` package, unchanged, uploads files and drives training jobs: the real app and JobManager, fake trainers.

The package retries 408, 409, 429 and 5xx with pauses; the counter of requests shows that nothing here makes it.
"""

import json
import shutil
import threading
import time
from pathlib import Path

import openai
import pytest
from fakes import FakeEngine, byte_tokenizer
from test_jobs import FakeBackend
from werkzeug.serving import WSGIRequestHandler, make_server

from api_server import create_app
from storage.files import write_json
from storage.runs import Workspace
from training import metrics
from training.jobs import JobManager
from web.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
LINES = "".join(json.dumps({"prompt": f"What is {i}?", "completion": " A number."}) + "\n" for i in range(100))


class Quiet(WSGIRequestHandler):
    """Log nothing."""

    def log(self, type, message, *args):
        pass


class Served:
    """The app on a port, its jobs, and the trainers that do what a test says."""

    def __init__(self, root, engine=None):
        self.workspace, self.backend, self.requests = Workspace(root), FakeBackend(), 0
        self.engine = FakeEngine(byte_tokenizer()) if engine is None else engine
        (root / "out").mkdir()
        self.jobs = JobManager(self.workspace, self.backend)
        app = create_app(Settings(root=root), self.engine, self.jobs, self.workspace)
        app.before_request(self._count)
        self.server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def _count(self):
        self.requests += 1

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.jobs.close()

    def progress(self, job, steps):
        """Do as a trainer that has made so many steps and saved."""
        run = self.workspace.run(job.id)
        for step in range(1, steps + 1):
            losses = {"loss": 3.0 - step / 100, "train_loss": 2.9, "val_loss": 3.1}
            metrics.append(run.metrics, {"iter_num": step, "time": 1000.0 + step} | losses)
        for path, step in ((run.checkpoint, steps), (run.best, 1)):
            path.write_bytes(b"weights")
            write_json(run.manifest(path), {"size": 7, "iter_num": step, "written": 1000.0 + step})

    def finish(self, client, job, **result):
        """End the trainer, and return the job when the manager has seen it."""
        self.backend.end(job.id, **({"state": "succeeded", "iter_num": 45} | result))
        return self.settled(client, job)

    def settled(self, client, job):
        """Return the job when it no longer runs."""
        deadline = time.monotonic() + 10
        while (found := client.fine_tuning.jobs.retrieve(job.id)).status == "running" and time.monotonic() < deadline:
            time.sleep(0.01)
        return found


@pytest.fixture
def served(tmp_path):
    found = Served(tmp_path)
    yield found
    found.close()


@pytest.fixture
def file(client):
    uploaded = client.files.create(file=("train.jsonl", LINES.encode()), purpose="fine-tune")
    return client.files.wait_for_processing(uploaded.id)


def test_files_are_uploaded_listed_read_and_deleted(client, file):
    assert file.status == "processed" and file.object == "file" and file.bytes == len(LINES)
    others = [client.files.create(file=b"Once upon a time", purpose="fine-tune").id for _ in range(4)]
    assert [found.id for found in client.files.list(limit=2)] == [*others[::-1], file.id]  # three pages
    assert [found.id for found in client.files.list(order="asc", limit=3)] == [file.id, *others]
    assert client.files.content(file.id).read() == LINES.encode()
    assert client.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_bad_file_names_its_lines(client):
    bad = client.files.create(file=("bad.jsonl", b'{"text": "a"}\n{}\n'), purpose="fine-tune")
    found = client.files.wait_for_processing(bad.id)
    assert found.status == "error" and "line 2" in found.status_details
    with pytest.raises(openai.BadRequestError, match="line 2"):
        client.fine_tuning.jobs.create(model="nano", training_file=bad.id)


def test_adapters_on_chats_are_refused_for_a_model_that_knows_none(served, client):
    shutil.copytree(ROOT / "models" / "tiny-shakespeare", served.workspace.models / "tiny-shakespeare")
    said = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]
    uploaded = client.files.create(file=("chat.jsonl", json.dumps({"messages": said}).encode()), purpose="fine-tune")
    file = client.files.wait_for_processing(uploaded.id)
    with pytest.raises(openai.BadRequestError, match=f"lora_rank is 8, and {file.id} holds chats"):
        client.fine_tuning.jobs.create(
            model="tiny-shakespeare", training_file=file.id, extra_body={"lora_rank": 8, "window": 4}
        )
    assert list(client.fine_tuning.jobs.list()) == []


def test_a_job_is_followed_to_its_model(served, client, file):
    job = client.fine_tuning.jobs.create(
        model="nano",
        training_file=file.id,
        suffix="numbers",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"max_iters": 45, "from_scratch": True},
    )
    assert job.status == "running" and job.fine_tuned_model is None and job.trained_tokens is None
    served.progress(job, 45)
    done = served.finish(client, job)
    assert done.status == "succeeded" and done.fine_tuned_model.startswith("ft:nano:local:numbers:")
    assert done.finished_at >= done.created_at and done.trained_tokens > 0 and done.error is None
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert [event.data["step"] for event in events if event.type == "metrics"] == list(range(45, 0, -1))
    saved = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [checkpoint.step_number for checkpoint in saved] == [45, 1]
    assert saved[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-45"
    assert saved[0].metrics.valid_loss == 3.1


def test_the_job_is_one_job_in_both_protocols(served, client, file):
    job = client.fine_tuning.jobs.create(model="nano", training_file=file.id, hyperparameters={})
    native = served.jobs.get(job.id).describe()
    assert native["state"] == "running" and native["config"]["dataset"] == file.id
    served.jobs.stop(job.id)
    assert served.settled(client, job).status == "cancelled"


def test_a_job_is_paused_goes_on_and_is_cancelled(served, client, file):
    job = client.fine_tuning.jobs.create(model="nano", training_file=file.id)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "running"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert [name for name, _, _ in served.backend.started] == [job.id, job.id]


def test_a_waiting_job_is_paused_and_cancelled(client, file):
    client.fine_tuning.jobs.create(model="nano", training_file=file.id)
    waiting = client.fine_tuning.jobs.create(model="nano", training_file=file.id)
    assert waiting.status == "queued"
    assert client.fine_tuning.jobs.pause(waiting.id).status == "paused"
    assert client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"


def test_a_refusal_is_final_and_costs_one_request(served, client, file):
    job = client.fine_tuning.jobs.create(model="nano", training_file=file.id)
    assert served.finish(client, job).status == "succeeded"
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        before = served.requests
        with pytest.raises(openai.BadRequestError, match="succeeded"):
            call(job.id)
        assert served.requests == before + 1


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"training_file": "file-nope"}, openai.NotFoundError),
        ({"suffix": "x" * 65}, openai.BadRequestError),
        ({"hyperparameters": {"n_epochs": 51}}, openai.BadRequestError),
        ({"method": {"type": "dpo"}}, openai.BadRequestError),
    ],
)
def test_a_wrong_job_is_refused_at_once(served, client, file, more, error):
    before = served.requests
    with pytest.raises(error) as refused:
        client.fine_tuning.jobs.create(**{"model": "nano", "training_file": file.id} | more)
    assert refused.value.body["type"] == "invalid_request_error" and served.requests == before + 1


def test_a_failed_job_says_why(served, client, file):
    job = client.fine_tuning.jobs.create(model="nano", training_file=file.id)
    failed = served.finish(client, job, state="failed", error="out of memory", iter_num=3)
    assert failed.status == "failed" and failed.error.message == "out of memory" and failed.fine_tuned_model is None
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


def test_jobs_are_listed_in_pages_newest_first(client, file):
    made = [client.fine_tuning.jobs.create(model="nano", training_file=file.id).id for _ in range(5)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == made[::-1]


def test_jobs_outlive_the_server(served, client, file):
    job = client.fine_tuning.jobs.create(model="nano", training_file=file.id, suffix="kept", metadata={"a": "b"})
    client.fine_tuning.jobs.pause(job.id)
    served.jobs.close()
    again = JobManager(served.workspace, served.backend)
    try:
        assert again.get(job.id).state == "stopped"
        found = client.fine_tuning.jobs.retrieve(job.id)
        assert found.status == "paused" and found.metadata == {"a": "b"}
    finally:
        again.close()
