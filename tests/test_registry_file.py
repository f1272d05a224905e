"""The registry file: what it adds, and that every mistake in it is one clear line before the server starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeEngine, FakeJobs, byte_tokenizer

from api_server import create_app, open_workspace
from storage.errors import NotFound, StorageError
from storage.registry import pretrained_names, resolve
from storage.registry_file import RegistryError, read_registry
from storage.runs import Workspace
from web.settings import Settings

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "models" / "tiny-shakespeare"
POET = {"name": "poet", "path": str(BUNDLED), "dtype": "fp32", "device": "cpu", "max_context_tokens": 32}
POET["aliases"] = ["gpt-3.5-turbo", "openai/gpt-4"]


def registry(tmp_path, *entries, name="models.json"):
    path = tmp_path / name
    path.write_text(json.dumps({"models": list(entries)}))
    return path


@pytest.mark.parametrize("file", ["models.json", "models.yaml", "models.yml"])
def test_names_and_aliases_mean_one_model(tmp_path, file):
    found = dict(read_registry(registry(tmp_path, POET, name=file)))  # JSON is YAML, too
    assert list(found) == ["poet", "gpt-3.5-turbo", "openai/gpt-4"]
    assert len(set(map(id, found.values()))) == 1
    model = found["poet"]
    assert (model.id, model.path, model.dtype, model.device) == ("poet", BUNDLED, "fp32", "cpu")
    assert model.max_context_tokens == 32


def test_yaml_is_read(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text(f"models:\n  - name: poet\n    path: {BUNDLED}\n    aliases: [bard]\n")
    assert list(dict(read_registry(path))) == ["poet", "bard"]


def test_a_relative_path_is_one_in_the_files_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"weights")
    for given in ("run", "run/ckpt.pt", "./run/"):
        (_, model), *_ = read_registry(registry(tmp_path, {"name": "mine", "path": given}))
        assert model.path == tmp_path / "run" / "ckpt.pt"


def test_a_repository_is_kept_and_not_fetched(tmp_path):
    ((_, model),) = read_registry(registry(tmp_path, {"name": "small", "hf_repo": "openai-community/gpt2"}))
    assert model.path is None and model.repository == "openai-community/gpt2"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (5, "models[0] is 5"),
        ({}, "exactly one of path and hf_repo"),
        ({"name": "a"}, "exactly one of path and hf_repo"),
        (POET | {"hf_repo": "a/b"}, "exactly one of path and hf_repo"),
        (POET | {"dtyp": "fp32"}, "unknown field"),
        (POET | {"name": None}, "models[0].name"),
        (POET | {"name": "../x"}, "models[0].name"),
        (POET | {"name": ["a"]}, "models[0].name"),
        (POET | {"name": "gpt2"}, "already means another model"),
        (POET | {"name": "out/x"}, "already means another model"),
        (POET | {"name": "tiny-shakespeare"}, "already means another model"),
        (POET | {"aliases": "bard"}, "models[0].aliases"),
        (POET | {"aliases": [5]}, "models[0].aliases[0]"),
        (POET | {"aliases": ["poet"]}, "is there twice"),
        (POET | {"dtype": "fp64"}, "dtype"),
        (POET | {"dtype": []}, "dtype"),
        (POET | {"device": "tpu"}, "device"),
        (POET | {"max_context_tokens": 0}, "at least 1"),
        (POET | {"max_context_tokens": True}, "at least 1"),
        ({"name": "a", "path": ""}, "models[0].path"),
        ({"name": "a", "path": 5}, "models[0].path"),
        ({"name": "a", "path": "nowhere"}, "there is no checkpoint"),
        ({"name": "a", "hf_repo": "gpt2"}, "hf_repo"),
        ({"name": "a", "hf_repo": "b"}, "owner/name"),
        ({"name": "a", "hf_repo": "https://x/y"}, "hf_repo"),
        ({"name": "a", "hf_repo": "../y"}, "hf_repo"),
        ({"name": "a", "hf_repo": 5}, "hf_repo"),
    ],
)
def test_a_mistake_names_entry_field_and_rule(tmp_path, entry, words):
    with pytest.raises(RegistryError) as refused:
        read_registry(registry(tmp_path, entry))
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", ""),
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", '{"models": {}}'),
        ("a.json", '{"models": [], "more": 1}'),
        ("a.yaml", ""),
        ("a.yaml", "models: [\n"),
        ("a.yaml", "models: !!python/object/apply:os.getcwd []\n"),
        ("a.yaml", "\x00"),
    ],
)
def test_what_is_no_registry_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(StorageError) as refused:
        read_registry(tmp_path / name)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_told_by_its_path(tmp_path):
    with pytest.raises(NotFound, match=f"the registry file {tmp_path / 'none.json'} does not exist"):
        read_registry(tmp_path / "none.json")


def test_the_server_does_not_start_with_a_wrong_file(tmp_path):
    path = registry(tmp_path, POET | {"dtype": "fp64"})
    command = [sys.executable, ROOT / "api_server.py", "--port", "0", "--model_registry_path", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "models[0].dtype" in ended.stderr


def test_a_damaged_model_is_found_at_the_start(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    path = registry(tmp_path, {"name": "bad", "path": "bad.pt"})
    with pytest.raises(StorageError):
        open_workspace(Settings(root=tmp_path, model_registry_path=path))


# ---- a server with one


@pytest.fixture
def workspace(tmp_path):
    return open_workspace(Settings(root=tmp_path, model_registry_path=registry(tmp_path, POET)))


@pytest.fixture
def server(tmp_path, workspace):
    engine = FakeEngine(byte_tokenizer())
    app = create_app(Settings(root=tmp_path), engine, FakeJobs(Workspace(tmp_path)), workspace)  # type: ignore[arg-type]
    client = app.test_client()
    client.engine = engine
    return client


@pytest.mark.parametrize("name", ["poet", "gpt-3.5-turbo", "openai/gpt-4"])
def test_every_name_answers_as_itself(server, name):
    reply = server.post("/v1/completions", json={"model": name, "prompt": "Once", "max_tokens": 1})
    assert reply.json["model"] == name and server.engine.loads[-1].id == "poet"
    assert server.engine.loads[-1].dtype == "fp32"


def test_names_are_listed_with_their_own_context(server):
    listed = {model["id"]: model for model in server.get("/v1/models").json["data"]}
    assert set(listed) == {"tiny", "poet", "gpt-3.5-turbo", "openai/gpt-4"}
    assert listed["gpt-3.5-turbo"]["max_model_len"] == 32 and listed["poet"]["kind"] == "registered"
    assert server.get("/v1/models/openai/gpt-4").json == listed["openai/gpt-4"]
    reply = server.post("/v1/completions", json={"model": "poet", "prompt": [5] * 33})
    assert reply.json["error"]["code"] == "context_length_exceeded"


def test_a_registered_model_can_be_the_current_one(server, workspace):
    assert "poet" in pretrained_names(workspace) and resolve(workspace, model_type="poet").path == BUNDLED
    assert server.post("/api/load_model", json={"model_type": "poet"}).json["model"]["kind"] == "registered"


def test_a_registered_model_is_never_deleted(server):
    reply = server.delete("/v1/models/poet")
    assert reply.status_code == 400 and BUNDLED.is_dir()
