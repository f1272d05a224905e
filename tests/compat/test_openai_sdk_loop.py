"""The `openai` package, unchanged, drives the whole loop against the real server process with real trainers.

Upload, train from scratch, follow, serve; fine-tune the result with adapters; pause, go on, cancel; delete.
"""

import json

import openai
import pytest
from live_server import until
from openai_shapes import checked

SENTENCE = "The quick brown fox jumps over the lazy dog. "
TEXT = "".join(json.dumps({"text": SENTENCE * 4}) + "\n" for _ in range(40))
WORDS = SENTENCE.replace(".", "").split()
PAIRS = "".join(json.dumps({"prompt": f"The {a}", "completion": f" {b}."}) + "\n" for a in WORDS for b in WORDS)
TINY = {"from_scratch": True, "tokenizer": "char", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}
FAST = {"eval_iters": 1, "sample_tokens": 0, "threads": 1, "batch_size": 8}
OVER = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def client(server):
    with checked(server.url) as made:
        yield made


def uploaded(client, name, text):
    file = client.files.create(file=(name, text.encode()), purpose="fine-tune")
    found = client.files.wait_for_processing(file.id, poll_interval=0.2)
    assert found.status == "processed", found.status_details
    return found


def wait_for(client, job, statuses):
    """Return the job when it has one of the statuses."""

    def found():
        now = client.fine_tuning.jobs.retrieve(job.id)
        return now if now.status in statuses else None

    return until(found, 90)


def wait_for_step(client, job, step):
    """Return when the job has made more steps than `step`."""
    until(lambda: (client.fine_tuning.jobs.retrieve(job.id).iter_num or 0) > step, 60)


@pytest.fixture(scope="module")
def file(client):
    return uploaded(client, "fox.jsonl", TEXT)


@pytest.fixture(scope="module")
def trained(client, file):
    """Return a job that has trained a model from scratch."""
    extra = TINY | FAST | {"max_iters": 120, "eval_interval": 60, "log_interval": 4, "learning_rate": 0.01}
    job = client.fine_tuning.jobs.create(
        model="nano", training_file=file.id, suffix="fox", seed=3, metadata={"by": "test"}, extra_body=extra
    )
    assert job.status in ("queued", "running") and job.fine_tuned_model is None and job.trained_tokens is None
    return wait_for(client, job, OVER)


@pytest.fixture(scope="module")
def tuned(client, trained):
    """Return a job that has tuned that model's adapters."""
    file = uploaded(client, "pairs.jsonl", PAIRS)
    job = client.fine_tuning.jobs.create(
        model=trained.fine_tuned_model,
        training_file=file.id,
        suffix="pairs",
        method={"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 2.0}}},
        extra_body=FAST | {"lora_rank": 2, "max_iters": 12, "eval_interval": 4},
    )
    return wait_for(client, job, OVER)


@pytest.mark.timeout(150)
def test_a_model_from_scratch_is_served_by_its_name_as_soon_as_it_has_succeeded(client, trained):
    assert trained.status == "succeeded" and trained.error is None and trained.trained_tokens > 0
    assert trained.fine_tuned_model.startswith("ft:nano:local:fox:") and trained.metadata == {"by": "test"}
    made = client.completions.create(model=trained.fine_tuned_model, prompt="The quick", max_tokens=20, temperature=0)
    assert made.model == trained.fine_tuned_model
    assert ("The quick" + made.choices[0].text) == SENTENCE[: len("The quick") + 20]
    stream = client.completions.create(
        model=trained.fine_tuned_model, prompt="The quick", max_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == made.choices[0].text


def test_the_result_and_its_checkpoints_are_models(client, trained):
    saved = list(client.fine_tuning.jobs.checkpoints.list(trained.id, limit=1))
    assert saved and saved[0].step_number == 120 and saved[0].metrics.valid_loss > 0
    listed = {model.id for model in client.models.list()}
    for name in (trained.fine_tuned_model, *(checkpoint.fine_tuned_model_checkpoint for checkpoint in saved)):
        assert name in listed and client.models.retrieve(name).id == name
        made = client.completions.create(model=name, prompt="The quick", max_tokens=3, temperature=0)
        assert made.model == name and made.choices[0].text == " br"


def test_all_events_come_in_pages_newest_first(client, trained):
    page = client.fine_tuning.jobs.list_events(trained.id, limit=5)
    assert len(page.data) == 5 and page.has_more and "succeeded" in page.data[0].message
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=5))
    assert len({event.id for event in events}) == len(events) > 20
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == sorted(steps, reverse=True) and steps[0] == 120
    assert events[-1].message == "the job was created"


@pytest.mark.timeout(150)
def test_adapters_are_tuned_on_a_tuned_model_and_served_merged(client, trained, tuned):
    assert tuned.status == "succeeded", tuned.error
    assert tuned.fine_tuned_model.startswith("ft:nano:local:pairs:")
    assert tuned.model == trained.fine_tuned_model and tuned.hyperparameters.learning_rate_multiplier == 2.0
    made = client.completions.create(model=tuned.fine_tuned_model, prompt="The fox", max_tokens=4)
    assert made.usage.completion_tokens == 4 and client.models.retrieve(tuned.fine_tuned_model).parameters < 20000
    jobs = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert jobs.index(tuned.id) < jobs.index(trained.id)


@pytest.mark.timeout(150)
def test_a_job_is_paused_goes_on_from_there_and_is_cancelled(client, file):
    extra = TINY | FAST | {"max_iters": 100000, "eval_interval": 50000, "log_interval": 1}
    job = client.fine_tuning.jobs.create(model="nano", training_file=file.id, extra_body=extra)
    wait_for_step(client, job, 0)
    paused = client.fine_tuning.jobs.pause(job.id)
    assert paused.status == "paused" and paused.finished_at is None
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    wait_for_step(client, job, checkpoint.step_number)
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.iter_num > checkpoint.step_number
    assert cancelled.fine_tuned_model is None
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            call(job.id)


@pytest.mark.timeout(150)
def test_what_was_made_is_deleted(client, file, tuned):
    assert client.models.delete(tuned.fine_tuned_model).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(tuned.fine_tuned_model)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(tuned.id)
    assert client.files.delete(file.id).deleted is True
    assert file.id not in {found.id for found in client.files.list(purpose="fine-tune")}
