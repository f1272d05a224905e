"""Where the five pretrained models come from; with a hub of our own on loopback, and with none."""

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from storage import hub
from storage.errors import BadName, NoSpace, Unreachable
from storage.hub import fetch
from storage.runs import Workspace

COMMIT = "a" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"x" * 1000, "tokenizer.json": b"[]", "pytorch_model.bin": b"evil"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test an empty Hugging Face cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path, tmp_path / "local")


def cached(cache, repository, *names):
    folder = cache / ("models--" + repository.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name in names:
        path = folder / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    return folder / "snapshots" / COMMIT


@pytest.mark.parametrize("name", ["gpt3", "../gpt2", "http://x/gpt2", "gpt2:main", "", "tiny-shakespeare"])
def test_only_the_five_names_are_ever_asked_for(workspace, name):
    with pytest.raises(BadName, match=r"must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2$"):
        fetch(name, workspace)


def test_a_repository_of_a_registry_file_is_found_in_the_cache(workspace, cache):
    folder = cached(cache, "someone/poet", *FILES)
    assert fetch("someone/poet", workspace) == folder


def test_a_local_folder_comes_first(workspace, cache):
    cached(cache, "openai-community/gpt2", *FILES)
    (workspace.root / "local" / "gpt2").mkdir(parents=True)
    (workspace.root / "local" / "gpt2" / "config.json").write_bytes(b"{}")
    assert fetch("gpt2", workspace) == workspace.root / "local" / "gpt2"


@pytest.mark.parametrize(
    ("name", "repository"),
    [("gpt2", "openai-community/gpt2"), ("gpt2", "gpt2"), ("distilgpt2", "distilbert/distilgpt2")],
)
@pytest.mark.parametrize("tokenizer", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_then_the_cache_under_the_new_or_the_old_name(workspace, cache, name, repository, tokenizer):
    folder = cached(cache, repository, "config.json", "model.safetensors", *tokenizer)
    assert fetch(name, workspace) == folder


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_cache_that_is_not_complete_does_not_count(workspace, cache, lacking):
    cached(cache, "openai-community/gpt2", *(name for name in FILES if name != lacking))
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE is set; connect this machine once, or put"):
        fetch("gpt2", workspace)


# ---- the network


class Hub(BaseHTTPRequestHandler):
    """The few calls of the hub that a download makes."""

    protocol_version = "HTTP/1.1"
    timeout = 5

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(None)

    def answer(self, body):
        self.server.asked.append(self.path)
        data, headers = self.reply()
        self.send_response(self.server.status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if body is None else body)

    def reply(self):
        if "/resolve/" in self.path:
            data = FILES[self.path.rpartition("/")[2]]
            return data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        value = {"id": "openai-community/gpt2", "sha": COMMIT, "siblings": []}
        if "/tree/" in self.path:
            value = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.server.files.items()]
        elif "/api/models/" not in self.path:
            value = {}
        return json.dumps(value).encode(), {"Content-Type": "application/json"}


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked, server.status, server.files = [], 200, dict(FILES)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
        server.shutdown()
        thread.join()


def test_then_the_hub_and_only_safetensors_and_tokenizer_files(workspace, server):
    said = []
    folder = fetch("gpt2", workspace, said.append)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert said == ["fetching gpt2 from the Hugging Face hub, about 551 MB"]
    assert not any("pytorch_model" in path for path in server.asked)


def test_what_was_fetched_once_is_not_asked_for_again(workspace, server):
    fetch("gpt2", workspace)
    server.asked.clear()
    fetch("gpt2", workspace)
    assert server.asked == []


def test_a_hub_that_lacks_files_or_talks_nonsense_is_said_to_have_failed(workspace, server, monkeypatch):
    del server.files["tokenizer.json"]
    with pytest.raises(Unreachable, match="did not give all files of gpt2"):
        fetch("gpt2", workspace)
    monkeypatch.setattr(Hub, "reply", lambda self: (b"<html>sign in</html>", {"Content-Type": "text/html"}))
    with pytest.raises(Unreachable, match="gpt2-medium could not be fetched"):
        fetch("gpt2-medium", workspace)


def test_a_hub_that_fails_is_one_that_does_not_answer(workspace, server):
    server.status = 503
    with pytest.raises(Unreachable, match="the Hugging Face hub does not answer"):
        fetch("gpt2", workspace)
    assert len(server.asked) == 1


def test_a_full_disk_is_noticed_before_the_download(workspace, server, monkeypatch):
    monkeypatch.setitem(hub.MEGABYTES, "gpt2", 10**12)
    with pytest.raises(NoSpace, match="MB are needed"):
        fetch("gpt2", workspace)


def test_no_network_is_refused_at_once_and_a_silent_one_within_its_bound(workspace, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.3)
    assert hub.PROBE_SECONDS < 10
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        for listening in (False, True):
            if listening:
                silent.listen()
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
            started = time.monotonic()
            with pytest.raises(Unreachable, match=r"does not answer; connect .*, or put .* --pretrained_dir"):
                fetch("gpt2-xl", workspace)
            assert time.monotonic() - started < 5
