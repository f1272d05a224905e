"""Clients that send a byte a second, stop in the middle, stop reading, or leave: none of them is in another's way."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from live_server import FAULTY, LONG, Process, Streams, make_root, raw, request_of, set_fault, until


@pytest.fixture(scope="module", params=["quick"])
def server(request, tmp_path_factory) -> Iterator[Process]:
    root = make_root(tmp_path_factory.mktemp("rude"))
    (root / request.param).touch()
    process = Process(root, "--slots", "8", "--threads", "1", "--max_streams", "200", script=FAULTY)
    yield process
    process.end()


def idle(server: Process) -> bool:
    queue = server.get("/queue").json()
    return queue["running"] == queue["waiting"] == queue["open_requests"] == 0


class Trickle:
    """Connections that get a byte more every second until the server has closed them; `replies` is what it said."""

    def __init__(self, connections: list[socket.socket]):
        self.replies = dict.fromkeys(connections, b"")
        self.open = set(connections)
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        while self.open:
            for connection in list(self.open):
                try:
                    connection.send(b"1")
                    while said := connection.recv(4096, socket.MSG_DONTWAIT):
                        self.replies[connection] += said
                    self.open.discard(connection)
                except BlockingIOError:
                    continue
                except OSError:
                    self.open.discard(connection)
            time.sleep(1.0)

    def close(self) -> None:
        self.open.clear()
        self._thread.join()
        for connection in self.replies:
            connection.close()


@pytest.mark.fault("F13", "heads and bodies of a byte a second")
@pytest.mark.parametrize("server", ["quick", pytest.param("patient", marks=pytest.mark.slow)], indirect=True)
def test_heads_and_bodies_that_trickle_hold_up_nobody_and_are_cut(server):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
    body = request_of(server, {}, length=100_000)
    trickle = Trickle([raw(server, head) for _ in range(150)] + [raw(server, body) for _ in range(150)])
    try:
        while trickle.open:
            assert server.get("/health").status_code == 200  # within the 30 s that `get` has
            assert server.post("/api/generate", {"prompt": "Once", "max_new_tokens": 4}).status_code == 200
            time.sleep(0.2)
    finally:
        trickle.close()
    said = {reply[:12] for reply in trickle.replies.values() if reply}
    assert said == {b"HTTP/1.1 408"}


def test_a_slow_but_steady_sender_is_served(server):
    data = request_of(server, {"prompt": "Once", "max_new_tokens": 4})
    with raw(server, data[:40]) as connection:
        for begin in range(40, len(data), 40):
            time.sleep(0.3)
            connection.sendall(data[begin : begin + 40])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def reset(connection: socket.socket) -> None:
    """Close with RST, as a program does that is killed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.fault("F12", "fifty clients leave in every state")
def test_fifty_clients_that_leave_in_every_state_leave_nothing_behind(server):
    stream = request_of(server, {**LONG, "stream": True})
    plain = request_of(server, LONG)
    leaving = [raw(server, stream if i % 2 else plain) for i in range(50)]
    until(lambda: server.get("/queue").json()["running"] == 8 and server.get("/queue").json()["waiting"] == 42, 20)
    for i, connection in enumerate(leaving):
        reset(connection) if i % 4 < 2 else connection.close()
    until(lambda: idle(server), 10)
    assert server.post("/api/generate", {"prompt": "Once", "max_new_tokens": 4}).status_code == 200


def test_as_many_streams_as_may_be_open_leave_threads_for_everything_else(server):
    data = request_of(server, {**LONG, "stream": True})
    streams = [raw(server, data) for _ in range(200)]
    try:
        until(lambda: server.get("/queue").json()["open_requests"] == 200)
        assert server.post("/api/generate", {"prompt": "Once"}).status_code == 429
        assert server.get("/health").status_code == 200
    finally:
        for stream in streams:
            stream.close()
    until(lambda: idle(server))


def stopped_reader(server: Process, data: bytes) -> socket.socket:
    """Send a request and read nothing; there is room for little."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    reader.connect(("127.0.0.1", server.port))
    reader.sendall(data)
    return reader


def rest_of(reader: socket.socket) -> bytes:
    """Return all that still comes."""
    said = b""
    reader.settimeout(10)
    with contextlib.suppress(ConnectionError):
        while more := reader.recv(65536):
            said += more
    return said


@pytest.mark.fault("F14", "a reader stops before the first byte")
def test_a_reader_that_stops_is_cut_and_the_others_read_on(server):
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True, "logprobs": 1}
    data = request_of(server, body).replace(b"/api/generate", b"/v1/completions")
    with stopped_reader(server, data) as reader:
        until(lambda: server.get("/queue").json()["running"] == 1)
        others = Streams(server, 2, tokens=500)
        until(others.ended)
        assert all(lines[-1] == "[DONE]" for lines in others.lines)
        until(lambda: idle(server))
        assert b"[DONE]" not in rest_of(reader)


class Looks:
    """Seconds that /health took, asked by a thread as long as this is open."""

    def __init__(self, server: Process):
        self.seconds: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(server,), daemon=True)
        self._thread.start()

    def _look(self, server: Process) -> None:
        while not self._end.wait(0.05):
            asked = time.monotonic()
            assert server.get("/health").status_code == 200
            self.seconds.append(time.monotonic() - asked)

    def p99(self) -> float:
        """End, and return the 99th percentile."""
        self._end.set()
        self._thread.join()
        values = sorted(self.seconds)
        return values[-1 - len(values) // 100]


def tokens_per_second(server: Process, seconds: float) -> float:
    """Return how many tokens the engine makes in a second, over so many."""
    begun, before = time.monotonic(), server.get("/queue").json()["tokens"]
    time.sleep(seconds)
    return (server.get("/queue").json()["tokens"] - before) / (time.monotonic() - begun)


@pytest.mark.fault("F14", "200 readers stop after 1 kB")
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("server", ["patient"], indirect=True)
def test_two_hundred_readers_that_stop_are_cut_and_nobody_waits_for_them(server, record_property):
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    data = request_of(server, body).replace(b"/api/generate", b"/v1/completions")
    before, readers = server.memory(), []
    try:
        for _ in range(200):
            readers.append(stopped_reader(server, data))
        until(lambda: server.get("/queue").json()["open_requests"] == 200)
        assert server.post("/api/generate", {"prompt": "Once"}).status_code == 429
        looks, most = Looks(server), 0
        for reader in readers[:8]:
            assert reader.recv(1024).startswith(b"HTTP/1.1 200")
        while not idle(server):
            most = max(most, server.memory())
            time.sleep(0.2)
        p99 = looks.p99()
        record_property("found", f"all cut; {(most - before) / 1024:.0f} MiB more at most; /health p99 {p99:.3f} s")
        assert p99 <= 0.25 and most - before <= 50 * 1024
        for reader in readers:
            assert b"[DONE]" not in rest_of(reader)
    finally:
        for reader in readers:
            reader.close()


@pytest.mark.fault("F13", "200 silent, 200 half heads, 200 slow bodies, 50 refused ones unsent; 8 good streams")
@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("server", ["patient"], indirect=True)
def test_health_and_good_streams_stay_quick_among_hundreds_of_rude_clients(server, record_property):
    refused = request_of(server, {}, length=100_000).replace(b"/api/generate", b"/nowhere")
    set_fault(server, "slow")  # so that steps, not this machine's load, make the pace
    good = Streams(server, 8)
    until(lambda: server.get("/queue").json()["running"] == 8)
    looks = Looks(server)
    clean = tokens_per_second(server, 5)  # with somebody who looks, as below
    looks.p99()
    trickle = Trickle(
        [raw(server, b"GET /health HTTP/1.1\r\nX-Slow: ") for _ in range(200)]
        + [raw(server, request_of(server, {}, length=100_000)) for _ in range(200)]
    )
    others = [raw(server, b"") for _ in range(200)] + [raw(server, refused) for _ in range(50)]
    begun, looks = time.monotonic(), Looks(server)
    try:
        among = tokens_per_second(server, 8)
        until(lambda: not trickle.open, 30)
        seconds = time.monotonic() - begun
        p99, share = looks.p99(), among / clean
        found = f"/health p99 {p99:.3f} s; streams at {share:.0%} of their pace; all closed after {seconds:.1f} s"
        record_property("found", found)
        assert p99 <= 0.25 and share >= 0.9 and seconds <= 15
    finally:
        (server.root / "fault").unlink()
        trickle.close()
        for connection in others:
            connection.close()
    until(good.ended)
    assert all(lines[-1] == "[DONE]" for lines in good.lines)
