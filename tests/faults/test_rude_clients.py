"""Clients that send a byte a second, stop in the middle, stop reading, or leave: none of them is in another's way."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from live_server import LONG, Process, make_root, raw, request_of, until


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Process]:
    process = Process(make_root(tmp_path_factory.mktemp("rude")), "--slots", "4", "--threads", "1")
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
    until(lambda: server.get("/queue").json()["running"] == 4 and server.get("/queue").json()["waiting"] == 46, 20)
    for i, connection in enumerate(leaving):
        reset(connection) if i % 4 < 2 else connection.close()
    until(lambda: idle(server), 10)
    assert server.post("/api/generate", {"prompt": "Once", "max_new_tokens": 4}).status_code == 200


@pytest.mark.fault("F14", "a client stops reading its stream")
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_reader_that_stops_is_cut_and_the_engine_does_not_wait_for_it(server):
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "n": 3, "logprobs": 5, "stream": True}
    data = request_of(server, body).replace(b"/api/generate", b"/v1/completions")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with contextlib.closing(connection):
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(data)
        said = connection.recv(1024)
        assert server.post("/api/generate", {"prompt": "Once", "max_new_tokens": 4}).status_code == 200
        until(lambda: idle(server), 90)
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(65536):
                said += more
    assert said.startswith(b"HTTP/1.1 200") and b"[DONE]" not in said


@pytest.mark.fault("F13", "hundreds of silent, half and slow connections")
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_health_stays_quick_among_hundreds_of_rude_clients(server):
    refused = request_of(server, {}, length=100_000).replace(b"/api/generate", b"/nowhere")
    trickle = Trickle(
        [raw(server, b"GET /health HTTP/1.1\r\nX-Slow: ") for _ in range(200)]
        + [raw(server, request_of(server, {}, length=100_000)) for _ in range(200)]
    )
    others = [raw(server, b"") for _ in range(200)] + [raw(server, refused) for _ in range(50)]
    seconds = []
    try:
        begun = time.monotonic()
        while time.monotonic() - begun < 12:
            asked = time.monotonic()
            assert server.get("/health").status_code == 200
            seconds.append(time.monotonic() - asked)
            time.sleep(0.02)
        until(lambda: not trickle.open, 10)
    finally:
        trickle.close()
        for connection in others:
            connection.close()
    seconds.sort()
    p50, p99 = seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100]
    print(f"/health: median {p50:.3f} s, p99 {p99:.3f} s")
    assert p99 < 1.0  # 0.25 on an idle machine
