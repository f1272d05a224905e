"""Training jobs, datasets and exports over HTTP."""

import io
import os
import shutil

import pytest
import torch
from fakes import FakeServer, byte_tokenizer, events

from model import GPT, GPTConfig
from storage import pretrained
from storage.errors import Unreachable
from storage.files import sweep_temporary, temporary_beside
from training import metrics

TRAIN = {"dataset": "shakesphere", "output_dir": "out/shakespeare_model", "model_type": "gpt2", "batch_size": 4}
TRAIN |= {"learning_rate": 3e-5, "max_iters": 20, "eval_interval": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def server(tmp_path, tokenizer):
    return FakeServer(tmp_path, tokenizer)


def test_a_training_starts_with_the_resolved_config_and_a_real_process_id(server):
    reply = server.post("/api/train", TRAIN).json
    assert reply["message"] == "Training started" and reply["process_id"] == 4321
    assert reply["config_path"] == "out/shakespeare_model/train_config.json"
    assert all(reply["config"][name] == value for name, value in TRAIN.items())
    assert reply["config"]["optimizer"] == "adamw"


def test_a_second_job_waits_without_a_process(server):
    server.post("/api/train", TRAIN)
    reply = server.post("/api/train", TRAIN | {"output_dir": "out/second"}).json
    assert reply["message"] == "Training queued" and reply["process_id"] is None
    reason = "max_jobs is 1"
    assert reply["job"]["queue_reason"] == server.get("/api/jobs/second").json["queue_reason"] == reason


def test_a_busy_output_dir_is_a_conflict(server):
    server.post("/api/train", TRAIN)
    assert server.post("/api/train", TRAIN).status_code == 409


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dataset": None}, "dataset is required"),
        ({"output_dir": None}, "output_dir is required"),
        ({"dataset": 3}, "dataset is 3"),
        ({"dataset": "../x"}, "dataset is"),
        ({"output_dir": "/tmp/evil"}, "output_dir is"),
        ({"output_dir": "out/../../evil"}, "output_dir is"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is true"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"max_iters": 1.5}, "max_iters is 1.5"),
        ({"model_type": "evil/repo"}, "model_type is"),
        ({"bacth_size": 4}, "did you mean 'batch_size'"),
    ],
)
def test_a_wrong_training_is_refused_by_name(server, wrong, words):
    reply = server.post("/api/train", TRAIN | wrong)
    assert reply.status_code == 400 and words in reply.json["error"]
    assert server.get("/api/jobs").json == {"jobs": []}


def test_a_model_that_cannot_be_fetched_is_no_fault_of_the_server(server, monkeypatch):
    def fail(config, priority):
        raise Unreachable("gpt2 is not on this machine and the hub does not answer")

    monkeypatch.setattr(server.jobs, "create", fail)
    reply = server.post("/api/train", TRAIN)
    assert reply.status_code == 422 and "hub" in reply.json["error"]


def test_jobs_are_listed_and_described(server):
    server.post("/api/train", TRAIN)
    assert [job["name"] for job in server.get("/api/jobs").json["jobs"]] == ["shakespeare_model"]
    job = server.get("/api/jobs/shakespeare_model").json
    assert job["state"] == "running" and job["max_iters"] == 20
    assert job["sample"] == {"iter_num": 5, "prompt": "To", "text": " be"}


@pytest.mark.parametrize("path", ["", "/metrics", "/samples", "/plot.svg", "/plot.png", "/log", "/log?follow=1"])
def test_an_unknown_job_is_not_found(server, path):
    assert server.get(f"/api/jobs/nobody{path}").status_code == 404
    assert server.get(f"/api/jobs/..%2f..%2fetc{path}").status_code in (400, 404)


def test_a_job_stops_goes_on_and_is_deleted(server):
    server.post("/api/train", TRAIN)
    assert server.client.delete("/api/jobs/shakespeare_model").status_code == 409
    assert server.post("/api/jobs/shakespeare_model/stop", {"force": True}).status_code == 400
    assert server.client.post("/api/jobs/shakespeare_model/stop").json["state"] == "stopped"
    resumed = server.post("/api/jobs/shakespeare_model/resume", {"max_iters": 40}).json
    assert resumed["state"] == "running" and resumed["max_iters"] == 40
    assert server.client.post("/api/jobs/shakespeare_model/resume").status_code == 409
    server.client.post("/api/jobs/shakespeare_model/stop")
    assert server.client.delete("/api/jobs/shakespeare_model").json["deleted"] is True
    assert server.get("/api/jobs/shakespeare_model").status_code == 404


@pytest.mark.parametrize("file", ["ckpt.pt", "best.pt"])
def test_a_run_that_serves_is_not_deleted_before_it_is_unloaded(server, file):
    server.post("/api/train", TRAIN)
    server.client.post("/api/jobs/shakespeare_model/stop")
    (server.workspace.out / "shakespeare_model" / file).write_bytes(b"weights")
    server.post("/api/load_model", {"model_path": f"out/shakespeare_model/{file}"})
    refused = server.client.delete("/api/jobs/shakespeare_model")
    assert refused.status_code == 409 and "out/shakespeare_model holds the current model" in refused.json["error"]
    assert "unload_model" in refused.json["error"]
    assert server.client.post("/api/unload_model").status_code == 200
    assert server.client.delete("/api/jobs/shakespeare_model").json["deleted"] is True


def test_a_waiting_job_is_moved_in_the_queue_and_a_running_one_is_not(server):
    server.post("/api/train", TRAIN)
    waiting = server.post("/api/train", TRAIN | {"output_dir": "out/second", "priority": 3}).json
    assert waiting["job"]["priority"] == 3 and "priority" not in waiting["config"]
    assert server.post("/api/jobs/second/priority", {"priority": -7}).json["priority"] == -7
    assert server.post("/api/jobs/shakespeare_model/priority", {"priority": 1}).status_code == 409
    assert server.post("/api/jobs/nobody/priority", {"priority": 1}).status_code == 404


@pytest.mark.parametrize("priority", [101, -101, 1.5, "high", None, True])
def test_a_priority_that_is_none_is_refused_by_name(server, priority):
    server.post("/api/train", TRAIN)
    reply = server.post("/api/jobs/shakespeare_model/priority", {"priority": priority})
    assert reply.status_code == 400 and "priority" in reply.json["error"]


def test_a_resume_from_what_was_not_kept_is_not_found(server):
    server.post("/api/train", TRAIN)
    server.client.post("/api/jobs/shakespeare_model/stop")
    assert server.post("/api/jobs/shakespeare_model/resume", {"iter_num": 7}).status_code == 404
    for wrong in (-1, 1.5, "7", True):
        refused = server.post("/api/jobs/shakespeare_model/resume", {"iter_num": wrong})
        assert refused.status_code == 400 and "iter_num" in refused.json["error"]
    (server.workspace.out / "shakespeare_model" / "ckpt-7.pt").write_bytes(b"weights")
    assert server.post("/api/jobs/shakespeare_model/resume", {"iter_num": 7}).json["state"] == "running"


def test_a_resume_that_would_keep_too_many_checkpoints_is_refused(server):
    server.post("/api/train", TRAIN | {"eval_interval": 1, "keep_every": 1})
    server.post("/api/jobs/shakespeare_model/stop", {})
    refused = server.post("/api/jobs/shakespeare_model/resume", {"max_iters": 1001})
    assert refused.status_code == 400 and "max_iters is 1001; it must be at most 1000" in refused.json["error"]
    assert server.post("/api/jobs/shakespeare_model/resume", {"max_iters": 1000}).json["state"] == "running"


def test_an_empty_body_resumes_with_the_old_end(server):
    server.post("/api/train", TRAIN)
    server.client.post("/api/jobs/shakespeare_model/stop", content_type="application/json")
    reply = server.client.post("/api/jobs/shakespeare_model/resume", content_type="application/json")
    assert reply.json["max_iters"] == 20


def test_metrics_come_after_an_iteration(server):
    server.post("/api/train", TRAIN)
    rows = [{"iter_num": k, "loss": 4.0 - k} for k in range(4)]
    file = server.workspace.run("shakespeare_model").metrics
    file.write_text("".join(f'{{"iter_num": {row["iter_num"]}, "loss": {row["loss"]}}}\n' for row in rows))
    assert server.get("/api/jobs/shakespeare_model/metrics").json["metrics"] == rows
    assert server.get("/api/jobs/shakespeare_model/metrics?after=1").json["metrics"] == rows[2:]
    assert server.get("/api/jobs/shakespeare_model/metrics?limit=1").json["metrics"] == rows[-1:]
    assert server.get("/api/jobs/shakespeare_model/metrics?after=x").status_code == 400


def test_a_dry_run_refuses_a_tracker_whose_package_is_missing(server, monkeypatch):
    monkeypatch.setattr("training.trackers.importlib.util.find_spec", lambda name: None)
    reply = server.post("/api/train", TRAIN | {"wandb": True, "dry_run": True})
    assert reply.status_code == 400 and "wandb is true, and the package wandb is not installed" in reply.json["error"]


def test_samples_come_in_their_order_and_after_an_iteration(server):
    server.post("/api/train", TRAIN)
    assert server.get("/api/jobs/shakespeare_model/samples").json == {"samples": []}
    rows = [{"iter_num": k, "prompt": "To be", "text": f", or {k}"} for k in (10, 20, 30)]
    for row in rows:
        metrics.append(server.workspace.run("shakespeare_model").samples, row)
    assert server.get("/api/jobs/shakespeare_model/samples").json["samples"] == rows
    assert server.get("/api/jobs/shakespeare_model/samples?after=10&limit=1").json["samples"] == rows[-1:]


def test_the_losses_of_jobs_come_as_one_picture(server):
    server.post("/api/train", TRAIN)
    server.post("/api/train", TRAIN | {"output_dir": "out/second"})
    server.workspace.run("second").metrics.write_text('{"iter_num": 0, "val_loss": 4.0}\n')
    reply = server.get("/api/jobs/shakespeare_model/plot.svg?compare=second,second,")
    assert reply.mimetype == "image/svg+xml" and "second: best 4.0000 at 0" in reply.text
    assert "no losses yet" in server.get("/api/jobs/shakespeare_model/plot.svg").text
    pixels = server.get("/api/jobs/shakespeare_model/plot.png?compare=second")
    assert (
        pixels.mimetype == "image/png"
        and pixels.data.startswith(b"\x89PNG")
        and pixels.data.endswith(b"IEND\xaeB`\x82")
    )


@pytest.mark.parametrize(
    ("query", "status"), [("nobody", 404), ("..%2f..", 400), ("a,b,c,d,e,f", 400), ("x" * 401, 400)]
)
def test_a_picture_of_what_is_not_there_is_refused(server, query, status):
    server.post("/api/train", TRAIN)
    for kind in ("svg", "png"):
        assert server.get(f"/api/jobs/shakespeare_model/plot.{kind}?compare={query}").status_code == status


def test_a_log_is_read_and_followed(server):
    server.post("/api/train", TRAIN)
    server.workspace.run("shakespeare_model").log.write_text("step 1\n")
    assert server.get("/api/jobs/shakespeare_model/log").json == {"log": "step 1\n"}
    found = events(server.get("/api/jobs/shakespeare_model/log?follow=1"))
    assert found[0] == {"text": "step 1\n"} and found[-2]["job"]["state"] == "succeeded" and found[-1] == "[DONE]"
    assert server.get("/queue").json["open_requests"] == 0


# ---- datasets


def upload(server, content: bytes, filename: str = "mine.txt", **fields):
    data = {"file": (io.BytesIO(content), filename), **fields}
    return server.client.post("/api/datasets", data=data, content_type="multipart/form-data")


def test_a_dataset_is_uploaded_listed_and_deleted(server):
    reply = upload(server, b"To be, or not to be.\n" * 10, name="hamlet")
    assert reply.status_code == 200 and reply.json["name"] == "hamlet" and reply.json["bytes"] == 210
    assert [dataset["name"] for dataset in server.get("/api/datasets").json["datasets"]] == ["hamlet"]
    assert server.client.delete("/api/datasets/hamlet").status_code == 200
    assert server.client.delete("/api/datasets/hamlet").status_code == 404


def test_a_dataset_may_take_its_files_name_and_numbers_are_names(server):
    assert upload(server, b"some text\n", "notes.txt").json["name"] == "notes"
    assert upload(server, b"some text\n", "notes.txt", name="2024").json["name"] == "2024"


def test_an_upload_is_reported_with_its_documents_and_its_longest_line(server):
    lines = b'{"text": "one two"}\n{"text": "a line\\nand a longer line"}\n'
    report = upload(server, lines, "two.jsonl").json["report"]
    assert report | {"documents": 2, "characters": 31, "bytes": 31, "longest_line": 17} == report


def test_tokens_of_an_upload_are_counted_where_gpt2s_tokenizer_is(server, shared, monkeypatch):
    text = (shared / "data/tinyshakespeare/input.txt").read_bytes()[:100_000]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "data/gpt2_bpe/tiktoken_cache"))
    tokens = upload(server, text, "sh.txt").json["report"]["gpt2_tokens"]
    assert tokens == pytest.approx(100_000 * 338_025 / 1_115_394, rel=0.05)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/nowhere")
    assert upload(server, text, "more.txt").json["report"]["gpt2_tokens"] is None


@pytest.mark.parametrize(
    ("encoding", "filename"), [("latin-1", "a.txt"), ("UTF-16", "b.txt"), ("windows_1252", "c.jsonl")]
)
def test_text_of_another_encoding_is_stored_as_utf8(server, encoding, filename):
    text = '{"text": "Fräulein, ça va?"}\n' * 10
    assert upload(server, text.encode(encoding), filename, encoding=encoding).status_code == 200
    (stored,) = (server.workspace.data / filename[0]).glob("*.*")
    assert stored.read_text("utf-8") == text


@pytest.mark.parametrize(
    ("encoding", "content", "status", "words"),
    [
        ("klingon", b"x", 400, 'encoding is "klingon"; it must be one of utf-8'),
        ("zlib", b"x", 400, "encoding is"),
        ("", b"x", 400, "encoding is"),
        ("utf-16", b"\xff\xfea\0\0\xd8b\0", 422, "file is not utf-16 text at byte 4"),
        ("euc-jp", "日本".encode("euc-jp") + b"\xff", 422, "at byte 4"),
        ("shift_jis", "日".encode("shift_jis") + b"\x93", 422, "at byte 2"),
        ("utf-8", b"ab\xff", 422, "not UTF-8 text at byte 2"),
    ],
)
def test_a_wrong_encoding_is_refused_with_the_place_and_leaves_nothing(server, encoding, content, status, words):
    reply = upload(server, content, "a.txt", encoding=encoding)
    assert reply.status_code == status and words in reply.json["error"]
    assert server.get("/api/datasets").json == {"datasets": []}


@pytest.mark.parametrize(
    ("content", "filename", "name", "status"),
    [
        (b"x\n", "a.txt", "../evil", 400),
        (b"x\n", "a.zip", "archive", 400),
        (b"PK\x03\x04 and more", "a.txt", "zipped", 422),
        (b"\xff\xfe\x00", "a.txt", "binary", 422),
        (b"{broken\n", "a.jsonl", "lines", 422),
    ],
)
def test_a_file_that_is_no_text_is_refused(server, content, filename, name, status):
    reply = upload(server, content, filename, name=name)
    assert reply.status_code == status and isinstance(reply.json["error"], str)
    assert server.get("/api/datasets").json == {"datasets": []}


def test_a_taken_name_is_a_conflict(server):
    upload(server, b"some text\n", name="mine")
    assert upload(server, b"other text\n", name="mine").status_code == 409


def test_an_upload_needs_a_file_and_has_a_limit(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, max_upload_bytes=2000)
    reply = server.client.post("/api/datasets", data={"name": "x"}, content_type="multipart/form-data")
    assert reply.status_code == 400 and reply.json["error"] == "file is required"
    assert upload(server, b"x" * 3000, name="large").status_code == 413
    assert upload(server, b"x" * 300_000, name="larger").status_code == 413


def test_a_field_of_text_is_no_file(server):
    reply = server.client.post(
        "/api/datasets", data={"name": "x", "file": "a text"}, content_type="multipart/form-data"
    )
    assert reply.status_code == 400 and "file is a text" in reply.json["error"]


def test_an_upload_may_be_larger_than_a_json_body(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, max_body_bytes=2000)
    assert upload(server, b"words " * 5000, name="large").status_code == 200
    assert server.post("/api/generate", {"prompt": "x" * 5000}).status_code == 413


# ---- export


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"model": "nobody"}, 404),
        ({"model": "../../etc"}, 400),
        ({"model": "my_model", "format": "gguf"}, 400),
        ({"model": 5}, 400),
    ],
)
def test_export_refuses(server, body, status):
    reply = server.post("/api/export", body)
    assert reply.status_code == status and "model_path" not in reply.json["error"]


def test_an_unfinished_export_is_no_obstacle_to_a_job_and_gone_when_a_server_starts(server, tokenizer, monkeypatch):
    run, write = server.workspace.run("mine"), pretrained._write_folder
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=tokenizer.n_vocab))
    run.folder.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "model_args": model.config.model_args()}, run.checkpoint)
    tokenizer.save(run.tokenizer)

    def slow(folder, *args):
        write(folder, *args)
        sweep_temporary(run.folder)  # as a job does that starts meanwhile
        shutil.copytree(folder, temporary_beside(folder))  # which a server that is killed now would leave

    monkeypatch.setattr(pretrained, "_write_folder", slow)
    assert server.post("/api/export", {"model": "mine"}).json["path"] == "out/mine/export"
    sweep_temporary(server.workspace.out)  # as JobManager does when it begins
    assert sorted(os.listdir(run.folder)) == ["ckpt.pt", "export", "tokenizer.json"]
    assert os.listdir(server.workspace.out) == ["mine"]
