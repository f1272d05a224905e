"""/v1/fine_tuning/jobs over HTTP: the same jobs as /api/jobs, in OpenAI's words."""

import io
import json
import shutil

import pytest
from fakes import FakeServer, byte_tokenizer

from storage.files import write_json
from storage.inspection import Inspection
from training import fine_tuning_plan, metrics, starting_point
from training.presets import PRESETS
from web import fine_tuning_routes

JOBS = "/v1/fine_tuning/jobs"
LINES = b"".join(
    b'{"prompt": "What is %d?", "completion": " It is a number, and a fine one."}\n' % i for i in range(200)
)
WANDB = {"type": "wandb", "wandb": {"project": "mine"}}
TRAIN = {"dataset": "shakesphere", "output_dir": "out/by_hand", "model_type": "gpt2", "max_iters": 20}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def server(tmp_path, tokenizer):
    return FakeServer(tmp_path, tokenizer)


def upload(server, data=LINES, filename="a.jsonl", purpose="fine-tune"):
    form = {"file": (io.BytesIO(data), filename), "purpose": purpose}
    return server.client.post("/v1/files", data=form).json["id"]


@pytest.fixture
def file_id(server):
    return upload(server)


def create(server, file_id, **more):
    reply = server.post(JOBS, {"model": "nano", "training_file": file_id} | more)
    assert reply.status_code == 200, reply.json
    return reply.json


def refusal(server, status=400, **body):
    reply = server.post(JOBS, body)
    assert reply.status_code == status, reply.json
    return reply.json["error"]


def run_of(server, job):
    return server.workspace.run(job["name"])


def finish(server, job, state="succeeded", **more):
    server.jobs.get(job["name"]).state = state
    write_json(run_of(server, job).status, {"state": state, "created": 1.0, **more})


def test_a_job_has_every_key_that_clients_need(server, file_id):
    job = create(server, file_id, suffix="mine", seed=7, metadata={"a": "b"})
    assert job["id"].startswith("ftjob-") and job["object"] == "fine_tuning.job" and job["status"] == "running"
    for name in ("error", "finished_at", "fine_tuned_model", "trained_tokens", "validation_file"):
        assert name in job and job[name] is None
    assert (job["model"], job["training_file"], job["seed"], job["metadata"]) == ("nano", file_id, 7, {"a": "b"})
    assert job["result_files"] == [] and job["organization_id"] and type(job["created_at"]) is int
    assert "auto" not in job["hyperparameters"].values() and len(job["hyperparameters"]) == 3
    assert server.get(f"{JOBS}/{job['id']}").json["suffix" if "suffix" in job else "id"]


def test_the_job_is_one_of_the_native_jobs(server, file_id):
    job = create(server, file_id)
    (native,) = server.get("/api/jobs").json["jobs"]
    assert native["name"] == job["name"] == job["id"] and native["config"]["dataset"] == file_id
    assert (server.workspace.data / file_id / "documents.jsonl").read_bytes() == LINES


def test_a_native_job_is_here_too(server):
    server.post("/api/train", TRAIN)
    (job,) = server.get(JOBS).json["data"]
    assert job["name"] == "by_hand" and job["training_file"] == "shakesphere" and job["model"] == "gpt2"
    assert server.get(f"{JOBS}/{job['id']}").json["output_dir"] == "out/by_hand"
    assert server.client.post(f"{JOBS}/{job['id']}/cancel").json["status"] == "cancelled"
    assert server.get("/api/jobs/by_hand").json["state"] == "stopped"


def test_a_second_job_waits(server, file_id):
    create(server, file_id)
    assert create(server, file_id)["status"] == "queued"


@pytest.mark.parametrize(
    ("asked", "key", "value"),
    [
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 3}}}}, "batch_size", 3),
        ({"hyperparameters": {"batch_size": 3}}, "batch_size", 3),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, "batch_size", 32),
        ({"hyperparameters": {"batch_size": "auto"}, "batch_size": 5}, "batch_size", 5),
        ({"hyperparameters": {"learning_rate_multiplier": 2}}, "learning_rate", 2 * PRESETS["nano"]["learning_rate"]),
        ({"learning_rate": 0.002}, "learning_rate", 0.002),
        ({"max_iters": 7, "hyperparameters": {"n_epochs": 3}}, "max_iters", 7),
        ({"n_layer": 2}, "n_layer", 2),
        ({}, "max_iters", PRESETS["nano"]["max_iters"]),
        ({"seed": 0}, "seed", 0),
    ],
)
def test_what_was_asked_reaches_the_trainer(server, file_id, asked, key, value):
    create(server, file_id, **asked)
    assert server.get("/api/jobs").json["jobs"][0]["config"][key] == pytest.approx(value)


def test_epochs_become_iterations_by_the_size_of_the_text(server, file_id):
    configs = [create(server, file_id, hyperparameters={"n_epochs": n})["max_iters"] for n in (1, 10)]
    assert configs[1] == 10 * configs[0] and configs[0] == pytest.approx(len(LINES) * 0.7 / 2.5 / (32 * 64), abs=2)


def test_a_tiny_file_gets_windows_that_it_can_fill(server):
    tiny = upload(server, b"".join(b'{"text": "number %d is here for you"}\n' % i for i in range(10)))
    config = server.get("/api/jobs/" + create(server, tiny)["name"]).json["config"]
    assert config["window"] < 20 and config["block_size"] == 64


def test_from_scratch_takes_the_preset_and_not_the_pretrained_weights(server, file_id):
    for body in ({"model": "gpt2", "from_scratch": True}, {"model": "my-model", "from_scratch": "micro"}):
        job = create(server, file_id, **body)
        config = server.get(f"/api/jobs/{job['name']}").json["config"]
        assert config["init_from"] == "scratch" and config["model_type"] in ("gpt2", "micro")


def test_fine_tuning_fits_the_windows_to_the_base_model(server, file_id, monkeypatch, tokenizer):
    base = server.workspace.out / "base"
    base.mkdir(parents=True)
    (base / "ckpt.pt").write_bytes(b"x")
    tokenizer.save(base / "tokenizer.json")
    shape = Inspection("checkpoint", base / "ckpt.pt", {"block_size": 48, "n_embd": 384}, {}, {}, 0, 0)
    monkeypatch.setattr(fine_tuning_plan, "inspect", lambda reference: shape)
    monkeypatch.setattr(starting_point, "inspect", lambda reference: shape)
    config = server.get("/api/jobs/" + create(server, file_id, model="base")["name"]).json["config"]
    assert (config["init_from"], config["window"], config["optimizer"]) == ("base", 48, "adamw")
    assert config["learning_rate"] == 4 * 3e-5, "half as wide as GPT-2"
    assert 1 <= config["max_iters"] <= 200 and config["eval_interval"] <= config["max_iters"]


def test_a_dataset_may_be_named_instead_of_a_file(server, tmp_path):
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/text.txt").write_text("To be or not to be. " * 200)
    reply = server.post(JOBS, {"model": "nano", "dataset": "mine"})
    assert reply.json["training_file"] == "mine" and reply.json["status"] == "running"


def test_a_validation_file_goes_into_the_dataset(server, file_id):
    other = upload(server, LINES[:4000].rsplit(b"\n", 1)[0])
    job = create(server, file_id, validation_file=other)
    dataset = server.get(f"/api/jobs/{job['name']}").json["config"]["dataset"]
    assert job["validation_file"] == other
    assert sorted(path.name for path in (server.workspace.data / dataset).iterdir()) == ["documents.jsonl", "val.jsonl"]


def test_any_text_may_be_the_suffix_and_the_models_name_takes_what_it_can(server, file_id):
    job = create(server, file_id, suffix="my model: é/1")
    finish(server, job)
    name = server.get(f"{JOBS}/{job['id']}").json["fine_tuned_model"]
    assert name == f"ft:nano:local:my-model----1:{job['id'].removeprefix('ftjob-')}"


def test_an_integration_with_weights_and_biases_is_a_run_with_wandb(server, file_id):
    job = create(server, file_id, integrations=[WANDB])
    (native,) = server.get("/api/jobs").json["jobs"]
    assert {name: v for name, v in native["config"].items() if "wandb" in name} == {
        "wandb": True,
        "wandb_project": "mine",
    }
    assert job["integrations"][0]["wandb"] == {"project": "mine", "name": None, "entity": None, "tags": []}
    assert create(server, file_id, integrations=[])["integrations"] == []


def test_an_integration_says_how_the_run_is_called_whose_it_is_and_how_it_is_tagged(server, file_id):
    asked = {"project": "mine", "name": "first", "entity": "us", "tags": ["a", "b c"]}
    job = create(server, file_id, integrations=[{"type": "wandb", "wandb": asked}])
    config = server.get("/api/jobs").json["jobs"][0]["config"]
    found = [config[f"wandb_{name}"] for name in ("project", "name", "entity", "tags")]
    assert found == ["mine", "first", "us", "a,b c"] and job["integrations"][0]["wandb"] == asked


def test_a_job_that_is_deleted_while_it_is_cancelled_leaves_no_folder(server, file_id, monkeypatch):
    job = create(server, file_id)
    run = run_of(server, job)
    monkeypatch.setattr(fine_tuning_routes, "_require", lambda *_: shutil.rmtree(run.folder))
    assert server.client.post(f"{JOBS}/{job['id']}/cancel").status_code == 404
    assert not run.folder.exists()


def test_unknown_parameters_are_ignored_and_named(server, file_id):
    body = {"model": "nano", "training_file": file_id, "user": None, "foo": 1, "output_dir": "out/evil"}
    reply = server.post(JOBS, body | {"max_iters": 5})
    assert reply.status_code == 200 and reply.headers["X-Ignored-Params"] == "foo, output_dir, user"
    assert not (server.workspace.out / "evil").exists()


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ({"training_file": None}, 400, "training_file is required"),
        ({"model": None}, 400, "model is required"),
        ({"model": ""}, 400, "model"),
        ({"model": 3}, 400, "model is 3"),
        ({"model": "../../etc"}, 400, 'model is "../../etc"; it must be a pretrained name, a run'),
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "nobody/best"}, 404, "nobody"),
        ({"model": "ft:nano:local::" + "0" * 24}, 404, "ftjob-"),
        ({"training_file": "../../etc/passwd"}, 404, "there is no file"),
        ({"training_file": "file-nope"}, 404, "there is no file"),
        ({"validation_file": "file-nope"}, 404, "there is no file"),
        ({"suffix": ""}, 400, "suffix is ''; it must be a text that is not empty"),
        ({"suffix": 5}, 400, "suffix is 5"),
        ({"suffix": "x" * 65}, 400, "suffix is"),
        ({"seed": -1}, 400, "seed is -1"),
        ({"seed": 2**31}, 400, "seed is"),
        ({"hyperparameters": "auto"}, 400, "hyperparameters is 'auto'"),
        ({"hyperparameters": {"n_epochs": 10**9}}, 400, "n_epochs is 1000000000"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "n_epochs is 0"),
        ({"hyperparameters": {"n_epochs": True}}, 400, "n_epochs is true"),
        ({"hyperparameters": {"batch_size": 257}}, 400, "batch_size is 257"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, 400, "learning_rate_multiplier is 0"),
        ({"method": {"type": "dpo"}}, 400, "method.type is 'dpo'"),
        ({"method": []}, 400, "method is"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata"),
        ({"integrations": "wandb"}, 400, "integrations is 'wandb'; it must be a list"),
        ({"integrations": [{"type": "mlflow"}]}, 400, "integrations[0].type is 'mlflow'; it must be one of wandb"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations[0].wandb is required"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, 400, "integrations[0].wandb.project is required"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["a,b"]}}]},
            400,
            "tags has 'a,b'; a tag must have no comma",
        ),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p", "entity": 5}}]}, 400, "wandb.entity is 5"),
        ({"integrations": [WANDB] * 2}, 400, "integrations is a list; it must be at most 1 items long"),
        ({"from_scratch": 3}, 400, "from_scratch is 3"),
        ({"model": "distilgpt2", "from_scratch": True}, 400, "from_scratch needs a preset"),
        ({"max_iters": -1}, 400, "max_iters is -1"),
        ({"max_iters": "5"}, 400, "max_iters is '5'"),
        ({"device": "tpu"}, 400, "device is"),
        ({"dataset": "mine"}, 400, "dataset and training_file are both given"),
    ],
)
def test_a_wrong_job_is_refused_by_name(server, file_id, wrong, status, words):
    body = {"model": "nano", "training_file": file_id} | wrong
    error = refusal(server, status, **body)
    assert words in error["message"] and (status != 404 or error["code"] in ("model_not_found", "file_not_found"))
    assert server.get(JOBS).json["data"] == [] and not list(server.workspace.out.glob("ftjob-*"))


@pytest.mark.parametrize(
    ("purpose", "data", "words"), [("fine-tune", b"{\n", "line 1"), ("assistants", LINES, "purpose assistants")]
)
def test_a_file_that_cannot_be_trained_on_is_refused(server, purpose, data, words):
    error = refusal(server, model="nano", training_file=upload(server, data, purpose=purpose))
    assert words in error["message"] and error["param"] == "training_file"


def test_a_job_that_the_manager_refuses_leaves_nothing(server, file_id, monkeypatch):
    def fail(config):
        raise OSError("no")

    monkeypatch.setattr(server.jobs, "create", fail)
    assert server.post(JOBS, {"model": "nano", "training_file": file_id}).status_code == 500
    assert list(server.workspace.out.glob("*")) == []


def test_jobs_come_in_pages_newest_first(server, file_id):
    made = [create(server, file_id)["id"] for _ in range(5)]
    first = server.get(f"{JOBS}?limit=3").json
    assert [job["id"] for job in first["data"]] == made[:1:-1] and first["has_more"] is True
    rest = server.get(f"{JOBS}?after={first['last_id']}").json
    assert [job["id"] for job in rest["data"]] == made[1::-1] and rest["has_more"] is False


@pytest.mark.parametrize("query", ["after=ftjob-nobody", "limit=0", "limit=-1&after=..%2f", "limit=" + "9" * 400])
def test_a_wrong_page_is_refused(server, file_id, query):
    create(server, file_id)
    assert server.get(f"{JOBS}?{query}").status_code == 400


@pytest.mark.parametrize("wanted", ["ftjob-nobody", "ftjob-" + "0" * 24, "1;kill", "..%2f..%2fetc%2fpasswd", "by_hand"])
def test_an_unknown_job_is_not_found(server, wanted):
    server.post("/api/train", TRAIN)
    for path in ("", "/events", "/checkpoints"):
        assert server.get(f"{JOBS}/{wanted}{path}").status_code == 404
    for verb in ("cancel", "pause", "resume"):
        assert server.client.post(f"{JOBS}/{wanted}/{verb}").status_code == 404


def test_jobs_are_found_by_their_metadata(server, file_id):
    made = [create(server, file_id, metadata={"color": color, "a": "b"})["id"] for color in ("red", "blue")]
    for query, expected in (("metadata[color]=red", made[:1]), ("metadata[a]=b", made[::-1]), ("metadata[x]=y", [])):
        assert [job["id"] for job in server.get(f"{JOBS}?{query}").json["data"]] == expected


EMPTY = {"content_type": "application/json", "data": b""}


def test_a_job_is_paused_and_goes_on_and_is_cancelled_with_empty_bodies(server, file_id):
    job = create(server, file_id)
    paused = server.client.post(f"{JOBS}/{job['id']}/pause", **EMPTY).json
    # the fake job is as old as each look at it, where a real one keeps the time of its creation
    assert paused["status"] in ("paused", "cancelled") and paused["fine_tuned_model"] is None
    write_json(run_of(server, job).folder / "openai.json", {"paused": 5.0})
    server.jobs.get(job["name"]).describe = lambda: described(server, job)
    assert server.client.post(f"{JOBS}/{job['id']}/resume", **EMPTY).json["status"] == "running"
    assert server.client.post(f"{JOBS}/{job['id']}/cancel", **EMPTY).json["status"] == "cancelled"


def described(server, job, **more):
    fake = server.jobs.get(job["name"])
    return type(fake).describe(fake) | {"created": 5.0, "started": 6.0} | more


@pytest.mark.parametrize("state", ["succeeded", "failed", "stopped", "lost"])
def test_a_job_that_has_ended_refuses_without_409(server, file_id, state):
    job = create(server, file_id)
    finish(server, job, state)
    for verb in ("cancel", "pause", "resume"):
        reply = server.client.post(f"{JOBS}/{job['id']}/{verb}", **EMPTY)
        assert reply.status_code == 400 and job["id"] in reply.json["error"]["message"]


@pytest.mark.parametrize(("state", "status"), [("failed", "failed"), ("lost", "failed"), ("stopped", "cancelled")])
def test_the_end_of_a_job_has_a_status(server, file_id, state, status):
    job = create(server, file_id)
    finish(server, job, state)
    found = server.get(f"{JOBS}/{job['id']}").json
    assert found["status"] == status and found["fine_tuned_model"] is None and found["trained_tokens"] == 0
    assert (found["error"] is None) == (status == "cancelled")
    assert found["error"] is None or set(found["error"]) == {"code", "message", "param"}


def trained(server, file_id, **more):
    """Return a job that has succeeded, with two checkpoints and some metrics."""
    job = create(server, file_id, **more)
    run = run_of(server, job)
    for row in ({"iter_num": 5, "loss": 3.0}, {"iter_num": 8, "loss": 2.5, "train_loss": 2.4, "val_loss": 2.6}):
        metrics.append(run.metrics, row | {"time": 1000.0 + row["iter_num"]})
    metrics.append(run.metrics, {"iter_num": 10, "loss": float("nan"), "time": 1010.0})
    for path, step in ((run.checkpoint, 10), (run.best, 8)):
        path.write_bytes(b"x")
        write_json(run.manifest(path), {"size": 1, "iter_num": step, "written": 1000.0 + step})
    finish(server, job)
    return job


def test_a_succeeded_job_names_its_model(server, file_id):
    job = trained(server, file_id, suffix="mine")
    found = server.get(f"{JOBS}/{job['id']}").json
    assert found["status"] == "succeeded"
    assert found["fine_tuned_model"] == f"ft:nano:local:mine:{job['id'].removeprefix('ftjob-')}"


def test_events_come_newest_first_in_strict_json(server, file_id):
    job = trained(server, file_id)
    reply = server.get(f"{JOBS}/{job['id']}/events")
    assert "NaN" not in reply.get_data(as_text=True)
    found = reply.json["data"]
    assert [event["type"] for event in found] == ["message", "metrics", "metrics", "metrics", "message"]
    assert "succeeded" in found[0]["message"] and "created" in found[-1]["message"]
    total = PRESETS["nano"]["max_iters"]
    assert found[2]["data"] == {"step": 8, "total_steps": total, "train_loss": 2.4, "valid_loss": 2.6}
    keys = {"id", "object", "created_at", "level", "message", "type", "data"}
    assert all(set(event) == keys and event["object"] == "fine_tuning.job.event" for event in found)


def test_new_events_do_not_shift_the_pages(server, file_id):
    job = create(server, file_id)
    rows = run_of(server, job).metrics
    for step in range(1, 45):
        metrics.append(rows, {"iter_num": step, "loss": 1.0, "time": 1.0})
    first = server.get(f"{JOBS}/{job['id']}/events").json
    metrics.append(rows, {"iter_num": 45, "loss": 1.0, "time": 1.0})
    second = server.get(f"{JOBS}/{job['id']}/events?after={first['last_id']}").json
    third = server.get(f"{JOBS}/{job['id']}/events?after={second['last_id']}").json
    steps = [event["data"].get("step", 0) for page in (first, second, third) for event in page["data"]]
    assert steps == list(range(44, -1, -1)) and (len(first["data"]), third["has_more"]) == (20, False)


def test_the_latest_and_the_best_checkpoint_are_listed(server, file_id):
    job = trained(server, file_id)
    name = server.get(f"{JOBS}/{job['id']}").json["fine_tuned_model"]
    found = server.get(f"{JOBS}/{job['id']}/checkpoints").json["data"]
    assert [item["step_number"] for item in found] == [10, 8]
    assert found[1]["fine_tuned_model_checkpoint"] == f"{name}:ckpt-step-8"
    assert found[1]["metrics"] == {"step": 8, "train_loss": 2.4, "valid_loss": 2.6}
    assert found[1]["fine_tuning_job_id"] == job["id"] and found[1]["object"] == "fine_tuning.job.checkpoint"


def test_kept_checkpoints_are_listed_and_answer_by_their_names(server, file_id):
    job = trained(server, file_id)
    kept = run_of(server, job).folder / "ckpt-4.pt"
    kept.write_bytes(b"x")
    write_json(run_of(server, job).manifest(kept), {"size": 1, "iter_num": 4})
    found = server.get(f"{JOBS}/{job['id']}/checkpoints").json["data"]
    assert [item["step_number"] for item in found] == [10, 8, 4]
    name = found[2]["fine_tuned_model_checkpoint"]
    assert name.endswith(":ckpt-step-4")
    for model in (name, f"{job['name']}/ckpt-4"):
        assert server.post("/v1/completions", {"model": model, "prompt": "Once"}).status_code == 200
        assert server.engine.loads[-1].path == kept
    assert name in [model["id"] for model in server.get("/v1/models").json["data"]]


def test_a_tuned_model_can_be_tuned_again(server, file_id, monkeypatch, tokenizer):
    job = trained(server, file_id)
    name = server.get(f"{JOBS}/{job['id']}").json["fine_tuned_model"]
    tokenizer.save(run_of(server, job).tokenizer)
    shape = Inspection("checkpoint", run_of(server, job).checkpoint, {"block_size": 64, "n_embd": 64}, {}, {}, 0, 0)
    monkeypatch.setattr(fine_tuning_plan, "inspect", lambda reference: shape)
    monkeypatch.setattr(starting_point, "inspect", lambda reference: shape)
    for model, file in ((name, "ckpt.pt"), (f"{name}:ckpt-step-8", "best.pt")):
        config = server.get("/api/jobs/" + create(server, file_id, model=model)["name"]).json["config"]
        assert config["init_from"] == f"out/{job['name']}/{file}"
    assert refusal(server, 404, model=f"{name}:ckpt-step-9", training_file=file_id)["code"] == "model_not_found"


def test_a_file_in_use_is_not_deleted(server, file_id):
    job = create(server, file_id)
    reply = server.client.delete(f"/v1/files/{file_id}")
    assert reply.status_code == 400 and job["id"] in reply.json["error"]["message"]
    finish(server, job)
    assert server.client.delete(f"/v1/files/{file_id}").json["deleted"] is True


def test_the_openapi_document_has_the_routes(server):
    paths = json.loads(server.get("/openapi.json").data)["paths"]
    assert {"get", "post"} <= set(paths[JOBS]) and "post" in paths[f"{JOBS}/{{job_id}}/pause"]


def test_a_damaged_run_is_listed_all_the_same(server, file_id):
    job = trained(server, file_id)
    run = run_of(server, job)
    (run.folder / "openai.json").write_text('{"suffix": [], "hyperparameters": 5, "paused": {}}')
    write_json(run.manifest(run.checkpoint), {"iter_num": 10, "written": "yesterday"})
    strange = described(server, job) | {"config": {"seed": "x", "batch_size": [], "dataset": 5}, "state": "succeeded"}
    server.jobs.get(job["name"]).describe = lambda: strange
    for path in (JOBS, f"{JOBS}/{job['id']}", f"{JOBS}/{job['id']}/checkpoints", "/v1/models", "/v1/files"):
        assert server.get(path).status_code == 200


def test_the_result_answers_by_its_name_at_once(server, file_id):
    name = server.get(f"{JOBS}/{trained(server, file_id)['id']}").json["fine_tuned_model"]
    for _ in range(2):
        reply = server.post("/v1/completions", {"model": name, "prompt": "Once"})
        assert reply.status_code == 200 and reply.json["model"] == name
    loads = [reference.label for reference in server.engine.loads]
    assert loads[1:] == [f"out/{server.get(JOBS).json['data'][0]['name']}/ckpt.pt"]  # once, after the first model


def test_a_checkpoint_answers_by_its_name(server, file_id):
    job = trained(server, file_id)
    name = server.get(f"{JOBS}/{job['id']}/checkpoints").json["data"][1]["fine_tuned_model_checkpoint"]
    assert server.post("/v1/completions", {"model": name, "prompt": "Once"}).status_code == 200
    assert server.engine.loads[-1].id == f"{job['name']}/best"


def test_results_are_listed_as_models(server, file_id):
    job = trained(server, file_id)
    name = server.get(f"{JOBS}/{job['id']}").json["fine_tuned_model"]
    names = [model["id"] for model in server.get("/v1/models").json["data"]]
    tuned = [name, f"{name}:ckpt-step-10", f"{name}:ckpt-step-8"]
    assert names == ["tiny", job["name"], f"{job['name']}/best", *tuned]
    for model in server.get("/v1/models").json["data"]:
        assert server.get(f"/v1/models/{model['id']}").json == model and type(model["created"]) is int


@pytest.mark.parametrize("state, named", [("running", False), ("stopped", True), ("failed", True)])
def test_a_result_is_served_whatever_becomes_of_the_job_that_goes_on_from_it(server, file_id, state, named):
    job = trained(server, file_id)
    name = server.get(f"{JOBS}/{job['id']}").json["fine_tuned_model"]
    server.post(f"/api/jobs/{job['name']}/resume", {"max_iters": 1000})
    finish(server, job, state, had_succeeded=True)
    assert server.get(f"{JOBS}/{job['id']}").json["fine_tuned_model"] == (name if named else None)
    assert name in [model["id"] for model in server.get("/v1/models").json["data"]]
    assert server.get(f"/v1/models/{name}").json["id"] == name


def test_a_result_that_is_a_link_is_left_out_of_the_list(server, file_id):
    run = run_of(server, trained(server, file_id))
    run.checkpoint.rename(run.folder / "elsewhere.pt")
    run.checkpoint.symlink_to(run.folder / "elsewhere.pt")
    names = [model["id"] for model in server.get("/v1/models").json["data"]]
    assert "tiny" in names and not [name for name in names if name.endswith(":ckpt-step-10")]


@pytest.mark.parametrize("name", ["ft:", "ft:x", "ft:nano:local::" + "0" * 24, "ft:../../etc", "ft:a:b:c:" + "z" * 24])
def test_an_unknown_result_is_no_model(server, name):
    reply = server.post("/v1/completions", {"model": name, "prompt": "Once"})
    assert reply.status_code == 404 and reply.json["error"]["code"] == "model_not_found"


def test_a_job_that_still_runs_has_no_model_yet(server, file_id):
    job = create(server, file_id)
    reply = server.post("/v1/completions", {"model": f"ft:nano:local::{job['id'][6:]}", "prompt": "Once"})
    assert reply.status_code == 404 and "not succeeded" in reply.json["error"]["message"]
