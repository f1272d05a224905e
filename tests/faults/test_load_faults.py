"""A server with more to do than it can: a full queue, models that change under it, a crash, and its end."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import FAULTY, Process, Streams, alive, make_root, raw, request_of, set_fault, streamed, until


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


def refusals_at_the_server(server: Process, route: str) -> float:
    """Return the share of requests to a route that began to be answered within 100 ms, as the server measured it."""
    lines = server.get("/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if line.startswith("lm_request_seconds"))
    quick = float(figures[f'lm_request_seconds_bucket{{le="0.1",route="{route}"}}'])
    return quick / float(figures[f'lm_request_seconds_count{{route="{route}"}}'])


def all_at_once(server: Process, count: int) -> Counter[bytes]:
    """Send so many requests at once and read all replies; return how many had which status."""
    request = request_of(server, {"prompt": "Once", "max_new_tokens": 5, "stream": True})
    request = request.replace(b"Host:", b"Connection: close\r\nHost:", 1)
    connections = [raw(server, request) for _ in range(count)]
    statuses: Counter[bytes] = Counter()
    for connection in connections:
        connection.settimeout(60)
        with connection, connection.makefile("rb") as file:
            reply = file.read()  # a reset would raise
        statuses[reply[9:12]] += 1
        assert (b"\r\nRetry-After: " in reply) == reply.startswith(b"HTTP/1.1 429")
        assert (b"data: [DONE]" in reply) == reply.startswith(b"HTTP/1.1 200")
    return statuses


@pytest.mark.fault("F15", "100 requests at once for a queue of 32")
def test_a_full_queue_refuses_the_rest_at_once_and_serves_what_it_took(server):
    statuses = all_at_once(server, 100)
    assert statuses.keys() == {b"200", b"429"} and statuses[b"200"] >= 32


@pytest.mark.fault("F15", "1000 requests at once for a queue of 64")
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_of_a_thousand_requests_at_once_those_that_find_no_place_are_told_so_quickly(tmp_path, record_property):
    root = make_root(tmp_path)
    server = Process(
        root, "--slots", "4", "--threads", "1", "--max_waiting", "64", "--max_streams", "900", script=FAULTY
    )
    try:
        set_fault(server, "slow")
        statuses = all_at_once(server, 1000)
        share = refusals_at_the_server(server, "/api/generate")
        told = ", ".join(f"{n} times {status.decode()}" for status, n in sorted(statuses.items()))
        record_property("found", f"{told}; {share:.1%} began to be answered within 100 ms of the server's time")
        assert statuses.keys() == {b"200", b"429"} and statuses[b"200"] >= 64 and share >= 0.99
        assert running(server) == (0, 0)
    finally:
        server.end()


PROMPTS = [[40 + i, 60, 80 + i] for i in range(8)]
FAULTY_PROMPT = [40, 60, 279]  # see faulty_server.py


@pytest.mark.fault("F9", "each step of one request of eight raises")
def test_a_request_whose_steps_raise_fails_alone_among_eight_and_the_others_do_not_notice(server):
    bodies = [{"prompt": ids, "max_tokens": 12, "seed": i, "temperature": 1.0} for i, ids in enumerate(PROMPTS)]
    clean = [texts(streamed(server, body)) for body in bodies]
    bodies[3] |= {"prompt": FAULTY_PROMPT}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda body: streamed(server, body), bodies))
    failed = found.pop(3)
    assert "failed" in json.loads(failed[-1])["error"]["message"] and len(failed) == 1
    assert [texts(each) for each in found] == clean[:3] + clean[4:]
    assert server.post("/v1/completions", bodies[3]).status_code == 500
    assert server.post("/v1/completions", bodies[0]).status_code == 200


def texts(events: list[str]) -> list[str]:
    """Return the text of each chunk of a stream that has ended well."""
    assert events[-1] == "[DONE]"
    return [json.loads(event)["choices"][0]["text"] for event in events[:-1]]


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


JOB = {"dataset": "sums", "output_dir": "out/sums", "tokenizer": "char", "n_layer": 1, "n_head": 1, "n_embd": 16}
JOB |= {"block_size": 16, "batch_size": 2, "log_interval": 1, "eval_iters": 1, "max_iters": 10_000_000, "dtype": "fp32"}


@pytest.mark.fault("F11", "SIGTERM with two streams, six waiting and a job")
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_job_does_not_notice_the_end_of_its_server_and_the_next_one_finds_it(tmp_path, record_property):
    root = make_root(tmp_path)
    (root / "data" / "sums").mkdir(parents=True)
    (root / "data" / "sums" / "sums.txt").write_text("".join(f"{i} + 1 = {i + 1}\n" for i in range(2000)))
    first = Process(root, "--slots", "2", "--threads", "1", "--drain", "2", script=FAULTY)
    pid = 0
    try:
        assert first.post("/api/train", JOB).status_code == 200
        pid = until(lambda: first.get("/api/jobs/sums").json()["process_id"])
        until(lambda: first.get("/api/jobs/sums").json()["iter_num"])
        streams = Streams(first, 8)
        until(lambda: running(first) == (2, 6))
        begun = time.monotonic()
        first.child.send_signal(signal.SIGTERM)
        until(streams.ended, 10)
        assert first.child.wait(10) == 0
        record_property(
            "found", f"the server ended after {time.monotonic() - begun:.1f} s; the job went on, and was found"
        )
        size = (root / "out" / "sums" / "metrics.jsonl").stat().st_size
        until(lambda: (root / "out" / "sums" / "metrics.jsonl").stat().st_size > size)
        second = Process(root, "--threads", "1")
        try:
            job = second.get("/api/jobs/sums").json()
            assert (job["state"], job["process_id"]) == ("running", pid) and alive(pid)
        finally:
            second.end()
    finally:
        first.end()
        if pid:
            os.kill(pid, signal.SIGKILL)
