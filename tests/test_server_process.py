"""The real server process: start, serve, notice who leaves, stop, and start again after a crash.

One server with a tiny random model serves most tests here; the last ones end it. Wrong starts never get
as far as a model.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from live_server import LONG, PATIENCE, ROOT, Process, alive, make_root, raw, request_of, until

from api_server import banner, main
from web.settings import SETTINGS


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_root(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def server(root) -> Iterator[Process]:
    process = Process(root, "--slots", "2", "--threads", "1", "--drain", "2")
    yield process
    process.end()


# ---- starts that are refused


def test_a_wrong_option_is_one_line_and_code_2():
    command = [sys.executable, str(ROOT / "api_server.py"), "--prot", "5000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "--prot" in done.stderr and "--port" in done.stderr


def test_a_variable_that_is_nearly_a_setting_is_told_when_the_server_starts(root, capsys, monkeypatch):
    monkeypatch.setenv("LM_SERVER_PROT", "5001")
    assert main(["--root", str(root), "--port", "x"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("api_server.py: LM_SERVER_PROT is no setting") and "port is 'x'" in said[1]


def refused(capsys, *flags: str) -> str:
    """Return the one line of a server that does not start."""
    assert main(list(flags)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("api_server.py: ") and said.err.count("\n") == 1
    return said.err


def test_an_unreadable_model_is_refused(root, capsys):
    flags = ("--root", str(root), "--model-path")
    assert "out/nothing/ckpt.pt does not exist" in refused(capsys, *flags, "out/nothing/ckpt.pt")
    (root / "out" / "broken").mkdir()
    (root / "out" / "broken" / "ckpt.pt").write_bytes(b"PK\x03\x04 and no more")
    assert "broken" in refused(capsys, *flags, "out/broken/ckpt.pt")


def test_a_pretrained_model_that_cannot_be_had_is_refused(root, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    assert main(["--root", str(root), "--model_type", "gpt2-xl"]) == 2
    assert "gpt2-xl is not on this machine" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_refused_before_anything_else_is_said(tmp_path):
    absent = "cuda" if sys.platform == "darwin" else "mps"
    command = [sys.executable, str(ROOT / "api_server.py"), "--root", str(tmp_path), "--port", "0"]
    command += ["--model_type", "none", "--device", absent]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"api_server.py: device is '{absent}', but torch finds none here; auto takes what there is\n"


ASKED = """
import types
from web.master import Server, _bind
from web.settings import Settings

said = []
server = Server(Settings(device={device!r}), _bind("127.0.0.1", 0), None, lambda: said.append("ready"))
server.cfg.when_ready(None)
print(said)
for age in (1, 2):
    process = types.SimpleNamespace(started=said.append)
    server.cfg.post_worker_init(types.SimpleNamespace(age=age, process=process))
print(said)
"""


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_device_that_is_asked_for_is_looked_for_before_the_server_says_that_it_listens(device):
    command = [sys.executable, "-c", ASKED.format(device=device)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    first = {"auto": ["ready"], "cuda": []}[device]
    assert done.stdout == f"{first}\n{['ready', 1, 2]}\n", done.stderr


FAILING = """
from web.master import Server, _bind
from web.settings import Settings, SettingsError

def build():
    {failure}

Server(Settings(), _bind("127.0.0.1", 0), build, lambda: None).run()
"""


@pytest.mark.parametrize(
    "failure", ['raise SettingsError("it cannot be")', "import nothing_of_this_name", "sys.exit(7)"]
)
def test_a_worker_that_cannot_start_ends_the_server_with_code_2(failure):
    command = [sys.executable, "-c", FAILING.format(failure=failure)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr
    assert "it cannot be" not in failure or done.stderr.count("it cannot be") == 1


def test_an_address_that_is_none_is_refused(root, capsys):
    flags = ("--host", "no.such.host.invalid", "--api_key", "a", "--port", "0")
    rule = "it must be an address of this machine: "
    assert f"host is 'no.such.host.invalid'; {rule}" in refused(capsys, "--root", str(root), *flags)
    flags = ("--host", "192.0.2.1", "--api_key", "a", "--port", "0")  # which is nobody's (RFC 5737)
    assert f"host is '192.0.2.1'; {rule}" in refused(capsys, "--root", str(root), *flags)


def test_another_address_without_keys_is_refused(root, capsys, monkeypatch):
    monkeypatch.setenv("LM_SERVER_HOST", "0.0.0.0")
    assert "needs api_key" in refused(capsys, "--root", str(root))


def test_a_model_that_is_not_allowed_is_refused(root, capsys):
    assert "allow list" in refused(capsys, "--root", str(root), "--model_allow_list", "gpt2")


@pytest.mark.fault("F19", "a second server on one out/")
def test_a_busy_port_and_a_second_server_on_one_out_are_refused(server, tmp_path, capsys):
    assert ".lock is held by another server" in refused(capsys, "--root", str(server.root), "--port", "0")
    busy = refused(capsys, "--root", str(tmp_path), "--model_type", "none", "--port", str(server.port))
    assert f"port {server.port} on 127.0.0.1 cannot be used: address already in use; choose another with --port" in busy


def test_help_names_every_setting(capsys):
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(row.flag in said and row.variable in said for row in SETTINGS)


# ---- serving


def test_the_banner_has_what_a_newcomer_needs(server):
    said = "".join(server.lines)
    assert f"{server.url}/docs" in said and f"curl -s {server.url}/api/generate" in said
    assert "Authorization" not in said
    assert "-H 'Authorization: Bearer KEY' -d" in banner("0.0.0.0", 5000, needs_key=True)


@pytest.mark.parametrize("how", [{"seed": 5}, {"temperature": 0, "max_new_tokens": 120}], ids=["seeded", "greedy"])
def test_it_generates_and_streams_the_same_text(server, how):
    body = {"prompt": "Once upon", "max_new_tokens": 30, **how}
    whole = server.post("/api/generate", body).json()
    with server.post("/api/generate", {**body, "stream": True}, stream=True) as reply:
        frames = [line[6:] for line in reply.iter_lines(decode_unicode=True) if line.startswith("data: ")]
    assert frames[-1] == "[DONE]" and json.loads(frames[-2])["generated_text"] == whole["generated_text"]
    pieces = [json.loads(frame)["text"] for frame in frames[:-2]]
    assert "Once upon" + "".join(pieces) == whole["generated_text"]


def test_pieces_come_one_by_one_and_not_at_the_end(server):
    with server.post("/api/generate", {**LONG, "stream": True}, stream=True) as reply:
        lines = reply.iter_lines()  # kept: where it ends, requests closes the connection
        next(lines)
        assert server.get("/queue").json()["running"] == 1
    until(lambda: server.get("/queue").json()["running"] == 0, 3)


def test_a_trained_model_is_listed_exported_and_served_from_there(server):
    assert "trained" in [run["name"] for run in server.get("/api/models").json()["trained_models"]]
    reply = server.post("/api/export", {"model": "trained"}).json()
    assert reply["path"] == "out/trained/export" and (server.root / reply["path"] / "model.safetensors").is_file()
    assert server.post("/api/load_model", {"model_path": reply["path"]}).status_code == 200
    assert server.post("/api/export", {"model": "trained/export"}).status_code == 400
    assert server.post("/api/load_model", {"model_type": "tiny-shakespeare"}).status_code == 200


def test_a_plain_client_that_leaves_frees_its_slot_also_while_it_waits(server):
    connections = [raw(server, request_of(server, LONG)) for _ in range(4)]
    until(lambda: server.get("/queue").json()["waiting"] == 2, 5)
    for connection in connections:
        connection.close()
    until(lambda: (q := server.get("/queue").json())["running"] == q["waiting"] == q["open_requests"] == 0, 3)


def test_what_is_no_http_is_answered_in_json(server):
    with raw(server, b"FOO\x01 /health HTTP/1.1\r\n\r\n") as connection:
        reply = connection.recv(4096)
    assert b"\r\nX-Request-Id: req-" in reply
    assert reply.startswith(b"HTTP/1.1 400") and json.loads(reply.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    ("rest", "status"), [(f"?{'a' * 9000} HTTP/1.1", 414), (f" HTTP/1.1\r\nX: {'a' * 90_000}", 431), (" HTTP/9", 400)]
)
def test_a_request_that_cannot_be_read_is_answered_in_the_shape_of_its_path(server, rest, status):
    for path, kind in (("/v1/models", dict), ("/completions", dict), ("/api/models", str)):
        with raw(server, f"GET {path}{rest}\r\n\r\n".encode()) as connection:
            reply = connection.recv(4096)
        error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
        assert reply.startswith(b"HTTP/1.1 %d" % status) and type(error) is kind
        assert kind is str or error.keys() == {"message", "type", "param", "code"}


def test_a_body_in_chunks_that_ends_early_did_not_come_in_time(server):
    head = f"POST /api/generate HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
    with raw(server, f"{head}Transfer-Encoding: chunked\r\n\r\n5\r\nab".encode()) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_chunks_of_a_compressed_body_are_refused_and_the_connection_is_closed(server):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
    with raw(server, f"{head}Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n".encode()) as connection:
        reply = connection.makefile("rb").read()
    error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert reply.startswith(b"HTTP/1.1 501") and "only chunked is supported" in error["message"]


def test_a_damaged_chunk_is_a_bad_request(server):
    head = f"POST /api/generate HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
    with raw(server, f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode()) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_silent_and_refused_connections_do_not_hold_up_others(server):
    silent = [raw(server, b"") for _ in range(100)]
    unfinished = request_of(server, {}, length=100_000).replace(b"/api/generate", b"/nowhere")
    refused = [raw(server, unfinished) for _ in range(40)]
    for connection in refused:
        assert connection.recv(100).startswith(b"HTTP/1.1 404")
    begun = time.monotonic()
    assert server.get("/health").status_code == 200 and time.monotonic() - begun < 2
    for connection in [*silent, *refused]:
        connection.close()


# ---- ends; from here on the order matters


@pytest.mark.fault("F18", "SIGKILL of the worker")
def test_a_killed_worker_comes_back_with_the_last_model(server):
    assert server.post("/api/load_model", {"model_path": "models/other"}).status_code == 200
    before = server.worker()
    os.kill(before, signal.SIGKILL)
    until(lambda: server.ready() and server.worker() != before)
    assert server.get("/api/status").json()["model"]["id"] == "other"


@pytest.mark.fault("F11", "SIGTERM with running and waiting requests")
def test_sigterm_ends_running_requests_and_refuses_waiting_and_new_ones(server):
    replies: list[requests.Response] = []
    threads = [threading.Thread(target=lambda: replies.append(server.post("/api/generate", LONG))) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: (q := server.get("/queue").json())["running"] == 2 and q["waiting"] == 1, 10)
    begun = time.monotonic()
    server.child.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert 503 in [reply.status_code for reply in replies]
    assert all(reply.status_code == 200 or "Retry-After" in reply.headers for reply in replies)
    assert server.child.wait(10) == 0 and time.monotonic() - begun < 2 + 2 + 1
    with pytest.raises(requests.ConnectionError):
        server.get("/health")


def test_a_second_signal_ends_at_once(root):
    process = Process(root, "--threads", "1", "--drain", "60", "--slots", "1")
    try:
        with process.post("/api/generate", {**LONG, "stream": True, "num_samples": 8}, stream=True) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.child.send_signal(signal.SIGINT)
            until(lambda: not process.ready(), 5)
            begun = time.monotonic()
            process.child.send_signal(signal.SIGTERM)
            process.child.wait(10)
            assert time.monotonic() - begun < 4
    finally:
        process.end()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker looks for its parent every second")
def test_after_a_killed_master_the_next_server_starts_at_once(root):
    first = Process(root, "--threads", "1")
    worker = first.worker()
    os.kill(worker, signal.SIGSTOP)  # it cannot see for itself that its master has gone
    first.child.kill()
    try:
        until(lambda: not alive(worker), 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        first.end()
    second = Process(root, "--threads", "1", "--port", str(first.port))
    try:
        assert second.get("/health").status_code == 200
    finally:
        second.end()
