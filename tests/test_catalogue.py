"""The catalogue: names of models under /v1, what they load, and what is listed of them."""

import shutil
from pathlib import Path

import pytest
from fakes import FakeServer, byte_tokenizer

from storage.chat_format import with_chat_tokens
from storage.errors import NotLoadable

BUNDLED = Path(__file__).parent.parent / "models" / "tiny-shakespeare"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def server(tmp_path, tokenizer):
    shutil.copytree(BUNDLED, tmp_path / "models" / BUNDLED.name)
    return FakeServer(tmp_path, tokenizer)


def run(server, name: str, *files: str) -> None:
    folder = server.workspace.out / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes(b"weights")


def complete(server, name, status=200):
    reply = server.post("/v1/completions", {"model": name, "prompt": "Once", "max_tokens": 2})
    assert reply.status_code == status, reply.json
    return reply.json


def refusal(reply, status: int) -> dict:
    assert reply.status_code == status, reply.json
    return reply.json["error"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mine", "ckpt.pt"),
        ("mine/best", "best.pt"),
        ("out/mine", "ckpt.pt"),
        ("out/mine/best.pt", "best.pt"),
        ("mine/export", "export"),
        ("tiny-shakespeare", "tiny-shakespeare"),
    ],
)
def test_a_name_loads_its_model_once_and_leaves_the_current_one(server, name, file):
    run(server, "mine", "ckpt.pt", "best.pt")
    shutil.copytree(BUNDLED, server.workspace.out / "mine" / "export")
    for _ in range(2):
        assert complete(server, name)["model"] == name
    assert [reference.path.name for reference in server.engine.loads[1:]] == [file]
    assert server.get("/api/status").json["model"]["id"] == "tiny" and server.engine.held == 0


@pytest.mark.parametrize("name", [None, "tiny", "out/tiny/ckpt.pt"])
def test_the_current_model_answers_though_its_file_is_gone(server, name):
    complete(server, name)
    assert len(server.engine.loads) == 1


@pytest.mark.parametrize(
    "name",
    ["nobody", "nobody/best", "out/nobody", "gpt-9", "", "../..", "/etc/passwd", "out/..", "a" * 300, "a\nb", "é"],
)
def test_an_unknown_name_is_not_found(server, name):
    found = refusal(server.post("/v1/completions", {"model": name, "prompt": "a"}), 404)
    assert found["code"] == "model_not_found" and found["param"] == "model" and len(found["message"]) < 300


def test_what_is_not_on_this_machine_is_not_fetched_by_a_request(server, monkeypatch):
    monkeypatch.setattr("storage.hub.cached", lambda name: None)
    assert "POST /api/load_model" in complete(server, "gpt2", 404)["error"]["message"]


def test_a_name_answers_while_no_model_is_current(server):
    server.post("/api/unload_model", {})
    complete(server, "tiny-shakespeare")


def test_all_that_can_be_named_is_listed_with_what_it_takes(server):
    run(server, "mine", "ckpt.pt", "best.pt")
    run(server, "empty")
    complete(server, "mine")
    listed = server.get("/v1/models").json["data"]
    assert [model["id"] for model in listed] == ["tiny", "tiny-shakespeare", "mine", "mine/best"]
    assert [model["loaded"] for model in listed] == [True, False, True, False]
    for model in listed[1:]:
        assert (model["parameters"], model["size_bytes"], model["memory_bytes"]) == (1234, 617, 4936)
        assert server.get(f"/v1/models/{model['id']}").json == model


def test_a_damaged_model_is_listed_without_sizes(server):
    def damaged(reference):
        raise NotLoadable("it is damaged")

    run(server, "mine", "ckpt.pt")
    server.engine.measure = damaged
    listed = {model["id"]: model for model in server.get("/v1/models").json["data"]}
    assert listed["mine"]["parameters"] is None and listed["mine"]["memory_bytes"] is None


def test_what_the_allow_list_lacks_is_neither_listed_nor_loaded(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, model_allow_list=("tiny", "mine"))
    run(server, "mine", "ckpt.pt")
    run(server, "other", "ckpt.pt")
    assert [model["id"] for model in server.get("/v1/models").json["data"]] == ["tiny", "mine"]
    complete(server, "mine")
    refusal(server.post("/v1/completions", {"model": "other", "prompt": "a"}), 403)
    refusal(server.post("/v1/completions", {"model": "out/other/ckpt.pt", "prompt": "a"}), 403)


def test_a_run_on_the_allow_list_is_there_with_its_checkpoints(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, model_allow_list=("tiny", "mine"))
    run(server, "mine", "ckpt.pt", "best.pt")
    run(server, "mine2", "ckpt.pt")
    assert [model["id"] for model in server.get("/v1/models").json["data"]] == ["tiny", "mine", "mine/best"]
    complete(server, "mine/best")
    complete(server, "out/mine/best.pt")
    refusal(server.post("/v1/completions", {"model": "mine2", "prompt": "a"}), 403)
    assert [model["name"] for model in server.get("/api/models").json["trained_models"]] == ["mine"]


def test_a_star_on_the_allow_list_lets_later_runs_in_and_nothing_else(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, model_allow_list=("tiny", "out/*"))
    assert server.get("/api/models").json["pretrained_models"] == []
    run(server, "later", "ckpt.pt", "best.pt")
    assert [model["name"] for model in server.get("/api/models").json["trained_models"]] == ["later"]
    for name in ("later", "later/best", "out/later/ckpt.pt"):
        complete(server, name)
    shutil.copytree(BUNDLED, server.workspace.models / "other")
    refusal(server.post("/v1/completions", {"model": "other", "prompt": "a"}), 403)


def test_a_folder_in_models_has_its_name_before_it_is_loaded(server):
    shutil.copytree(BUNDLED, server.workspace.models / "other")
    assert "other" in {model["id"] for model in server.get("/v1/models").json["data"]}
    assert server.get("/v1/models/other").json["loaded"] is False
    assert complete(server, "other")["model"] == "other"
    assert server.post("/api/load_model", {"model_type": "other"}).status_code == 200
    assert "other" in server.get("/api/models").json["pretrained_models"]


def test_it_is_told_which_models_can_chat(server, monkeypatch):
    run(server, "mine", "ckpt.pt")
    assert {model["chat"] for model in server.get("/v1/models").json["data"]} == {False}
    server.engine.tokenizer = with_chat_tokens(server.engine.tokenizer)
    complete(server, "mine")
    assert {model["id"] for model in server.get("/v1/models").json["data"] if model["chat"]} == {"mine"}


def test_who_waits_for_a_load_counts_as_open(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, max_streams=1)
    run(server, "mine", "ckpt.pt")
    loaded, opened = server.engine._loaded, []
    server.engine._loaded = lambda reference: opened.append(streams.open) or loaded(reference)
    streams = server.app.extensions["language_model_server"].streams
    complete(server, "mine")
    assert opened == [1] and streams.open == 0


def test_a_device_that_is_not_here_is_a_bad_request(server):
    def fail(reference):
        raise ValueError("device is 'cuda', but torch finds none here")

    run(server, "mine", "ckpt.pt")
    server.engine._loaded = fail
    assert "torch finds none" in complete(server, "mine", 400)["error"]["message"]


def test_tokens_are_those_of_the_model_that_is_named(server):
    run(server, "mine", "ckpt.pt")
    tokens = server.post("/tokenize", {"prompt": "Once", "model": "mine"}).json["tokens"]
    assert server.post("/detokenize", {"tokens": tokens, "model": "mine"}).json["prompt"] == "Once"
    assert server.engine.loads[-1].id == "mine"
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert refusal(server.post(path, body | {"model": "nobody"}), 404)["code"] == "model_not_found"


def test_errors_of_the_tokenizer_routes_have_openais_shape(server):
    server.post("/api/unload_model", {})
    assert refusal(server.get("/tokenizer_info"), 404)["code"] == "model_not_found"


# ---- deleting


def train(server, name: str) -> None:
    body = {"dataset": "shakesphere", "output_dir": f"out/{name}", "model_type": "nano", "max_iters": 2}
    assert server.post("/api/train", body).status_code == 200
    (server.workspace.out / name / "ckpt.pt").write_bytes(b"weights")


def test_a_trained_run_can_be_deleted(server):
    train(server, "mine")
    server.jobs.get("mine").state = "succeeded"
    complete(server, "mine")
    reply = server.client.delete("/v1/models/mine", headers={"Content-Type": "application/json"})
    assert reply.json == {"id": "mine", "object": "model", "deleted": True}
    assert [model.id for model in server.engine.models()] == ["tiny"] and "mine" not in server.jobs.jobs


def test_what_is_no_run_or_in_use_cannot_be_deleted(server):
    train(server, "runs")
    run(server, "brought", "ckpt.pt", "best.pt")
    for name in ("tiny-shakespeare", "brought", "brought/best", "runs", "tiny"):
        assert refusal(server.client.delete(f"/v1/models/{name}"), 400)["type"] == "invalid_request_error"
    assert refusal(server.client.delete("/v1/models/nobody"), 404)["code"] == "model_not_found"


def test_the_current_model_cannot_be_deleted(server):
    train(server, "mine")
    server.jobs.get("mine").state = "succeeded"
    server.post("/api/load_model", {"model_path": "out/mine/ckpt.pt"})
    assert "current" in refusal(server.client.delete("/v1/models/mine"), 400)["message"]
    assert server.jobs.get("mine").state == "succeeded"
