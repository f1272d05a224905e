"""A server with more to do than it can: a full queue, models that change under it, a crash, and its end."""

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from live_server import FAULTY, Process, Streams, make_root, raw, request_of, set_fault, until


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Process]:
    root = make_root(tmp_path_factory.mktemp("load"))
    process = Process(root, "--slots", "4", "--threads", "1", "--drain", "2", "--max_waiting", "32", script=FAULTY)
    set_fault(process, "slow")  # for all tests here: what runs is still running when something happens
    yield process
    process.end()


def running(server: Process) -> tuple[int, int]:
    queue = server.get("/queue").json()
    return queue["running"], queue["waiting"]


@pytest.mark.fault("F15", "100 requests at once for a queue of 32")
def test_a_full_queue_refuses_the_rest_at_once_and_serves_what_it_took(server):
    request = request_of(server, {"prompt": "Once", "max_new_tokens": 5})
    request = request.replace(b"Host:", b"Connection: close\r\nHost:", 1)
    connections = [raw(server, request) for _ in range(100)]
    statuses: Counter[bytes] = Counter()
    for connection in connections:
        connection.settimeout(30)
        with connection, connection.makefile("rb") as file:
            reply = file.read()
        statuses[reply[9:12]] += 1
        assert (b"\r\nRetry-After: " in reply) == reply.startswith(b"HTTP/1.1 429")
    assert statuses.keys() == {b"200", b"429"} and statuses[b"200"] >= 32


@pytest.mark.fault("F23", "ten racing loads while four streams run")
def test_streams_end_on_the_old_model_while_ten_loads_race(server):
    streams = Streams(server, 4, tokens=100)
    until(lambda: running(server)[0] == 4)
    replies: list[int] = []

    def load() -> None:
        replies.append(server.post("/api/load_model", {"model_path": "models/other"}).status_code)

    threads = [threading.Thread(target=load) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(replies) <= {200, 409} and 200 in replies
    assert server.post("/api/load_model", {"model_path": "out/nothing/ckpt.pt"}).status_code == 404
    assert server.get("/api/status").json()["model"]["id"] == "other"
    until(streams.ended)
    for lines in streams.lines:
        assert lines[-1] == "[DONE]" and json.loads(lines[0])["model"] == "tiny-shakespeare"


@pytest.mark.fault("F18", "SIGSEGV of the worker with two streams")
def test_a_crash_cuts_streams_without_an_end_and_the_next_worker_has_the_same_model(server):
    streams, before = Streams(server, 2), server.worker()
    until(lambda: running(server)[0] == 2)
    os.kill(before, signal.SIGSEGV)
    until(streams.ended)
    assert all(lines[-1:] != ["[DONE]"] for lines in streams.lines)
    until(lambda: server.worker() not in (0, before) and server.ready())
    assert server.get("/api/status").json()["model"]["id"] == "other"
    until(lambda: any("Segmentation fault" in line for line in server.lines))


@pytest.mark.fault("F11", "SIGTERM with four streams and two waiting")
def test_at_the_end_streams_are_told_and_what_waits_is_refused(server):
    streams = Streams(server, 6)
    until(lambda: running(server) == (4, 2))
    server.child.send_signal(signal.SIGTERM)
    until(streams.ended, 10)
    last = [json.loads(lines[-1])["error"]["message"] for lines in streams.lines]
    assert set(last) == {"The server is shutting down."}
    assert server.child.wait(10) == 0
