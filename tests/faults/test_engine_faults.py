"""Faults of the engine in a real server process: a step that raises, one that never ends, a process that hangs."""

import json
import os
import signal
import time
from collections.abc import Iterator

import pytest
import requests
from live_server import FAULTY, Process, Streams, make_root, set_fault, until


@pytest.fixture(scope="module", params=["quick"])
def server(request, tmp_path_factory) -> Iterator[Process]:
    root = make_root(tmp_path_factory.mktemp("faults"))
    (root / request.param).touch()
    process = Process(root, "--slots", "2", "--threads", "1", "--drain", "2", script=FAULTY)
    assert process.post("/api/load_model", {"model_path": "models/other"}).status_code == 200
    yield process
    process.end()


def status(server: Process, path: str = "/health") -> int:
    return server.get(path).status_code


@pytest.mark.fault("F9", "a step raises among running streams")
def test_a_step_that_raises_ends_no_stream(server):
    until(lambda: status(server) == 200)
    body = {"prompt": "Once upon", "max_new_tokens": 40, "seed": 3}
    clean = server.post("/api/generate", body).json()["generated_text"]
    set_fault(server, "raise")
    assert server.post("/api/generate", body).json()["generated_text"] == clean
    assert not (server.root / "fault").exists()


@pytest.mark.fault("F10", "a step never ends")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("server", ["quick", pytest.param("patient", marks=pytest.mark.slow)], indirect=True)
def test_a_stalled_engine_turns_health_red_ends_what_waits_and_is_replaced(server):
    before = server.worker()
    set_fault(server, "stall")
    streams = Streams(server, 3)  # two run, one waits
    until(lambda: not (server.root / "fault").exists(), 10)
    until(lambda: status(server) == 503 and status(server, "/healthz") == 503, 8)
    assert server.get("/health").json()["status"] == "stalled"
    until(streams.ended, 10)
    for lines in streams.lines:
        assert "does not respond" in json.loads(lines[-1])["error"]["message"]
    refused = server.post("/api/generate", {"prompt": "a"})
    assert refused.status_code == 503 and refused.headers["Retry-After"]
    until(lambda: server.ready() and server.worker() != before)
    assert server.get("/api/status").json()["model"]["id"] == "other"
    assert server.post("/api/generate", {"prompt": "a"}).status_code == 200
    log = "".join(server.lines)
    assert "What the threads were doing" in log and "faulty_rows" in log


@pytest.mark.fault("F10", "a step never ends and holds the interpreter")
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_process_that_hangs_is_replaced_too(server):
    until(lambda: status(server) == 200)
    before = server.worker()
    set_fault(server, "hold")
    with pytest.raises(requests.RequestException):
        server.post("/api/generate", {"prompt": "a"})
    until(lambda: server.worker() != before and server.ready())
    assert server.get("/api/status").json()["model"]["id"] == "other"
    assert "faulty_rows" in "".join(server.lines)


@pytest.mark.fault("F10", "SIGSTOP of the worker, then SIGCONT")
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_server_that_was_stopped_for_a_while_goes_on(server):
    until(lambda: status(server) == 200)
    worker, asleep = server.worker(), (server.child.pid, server.worker())
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(25)  # longer than anybody's patience with a worker
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    time.sleep(3)
    assert server.worker() == worker and status(server) == 200
