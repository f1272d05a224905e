"""The pump: what many streams say goes out after each ring, a slow reader waits alone, and a failure is its own."""

import socket
import threading
from collections import deque
from types import SimpleNamespace

import pytest
from live_server import until

from inference.sequence import Bell
from web.pump import FEW, Pump, looked_at, paced, written
from web.worker import ReplySender


class Source:
    """Frames that a test gives; "" while there are none, and the end after None."""

    def __init__(self) -> None:
        self.given: deque[str | Exception | None] = deque()
        self.asked_by: set[str] = set()
        self.wait = lambda: None

    def __iter__(self):
        return self

    def __next__(self) -> str:
        self.asked_by.add(threading.current_thread().name)
        self.wait()
        frame = self.given.popleft() if self.given else ""
        if isinstance(frame, Exception):
            raise frame
        if frame is None:
            raise StopIteration
        return frame


class Reply:
    """A reply to a client at the other end of a pair of sockets, written in a thread as its request would."""

    def __init__(self, pump: Pump):
        ours, self.client = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.client.settimeout(30)
        self.source, self.failed = Source(), None
        self.sock, self.chunked, self.sent, self.should_close = ours, False, 0, lambda: True
        self.headers_sent = True
        self.thread = threading.Thread(target=self._write, args=(pump,), daemon=True)
        self.thread.start()

    def _write(self, pump: Pump) -> None:
        try:
            assert list(written(self.source, ReplySender(self), pump)) == []
        except Exception as error:
            self.failed = error
        self.sock.close()

    def read(self) -> bytes:
        """Return all that the client gets."""
        with self.client, self.client.makefile("rb") as file:
            return file.read()


@pytest.fixture
def reply(pump):
    """Return what makes replies and closes their ends."""
    made = []

    def make() -> Reply:
        made.append(Reply(pump))
        return made[-1]

    yield make
    for each in made:
        each.client.close()
        each.thread.join(30)


@pytest.fixture
def bell():
    return Bell()


@pytest.fixture
def pump(bell):
    made = Pump(SimpleNamespace(bell=bell))
    made.start()
    return made


def test_streams_get_their_own_frames_in_order_when_the_bell_rings(bell, reply):
    replies = [reply() for _ in range(5)]
    for i in range(20):
        for k, each in enumerate(replies):
            each.source.given.append(f"{k}:{i} ")
        bell.ring()
    for each in replies:
        each.source.given.append(None)
    bell.ring()
    for k, each in enumerate(replies):
        assert each.read().decode() == "".join(f"{k}:{i} " for i in range(20))
        assert each.source.asked_by == {"pump"}


def test_a_reader_who_stops_holds_up_nobody_and_gets_all_in_the_end(bell, reply):
    slow, quick = reply(), reply()
    slow.source.given.extend(["x" * 1000] * 2000)
    bell.ring()
    quick.source.given.extend(["quick", None])
    bell.ring()
    assert quick.read() == b"quick" and slow.thread.is_alive()
    slow.source.given.append(None)
    assert slow.read() == b"x" * 2_000_000


@pytest.mark.parametrize("why", ["the source", "the socket"])
def test_a_failure_is_raised_where_the_request_is_and_others_go_on(bell, reply, why):
    broken, fine = reply(), reply()
    if why == "the socket":
        broken.client.close()
    broken.source.given.append("a" if why == "the socket" else RuntimeError(why))
    fine.source.given.extend(["fine", None])
    bell.ring()
    broken.thread.join(30)
    assert isinstance(broken.failed, OSError if why == "the socket" else RuntimeError)
    assert fine.read() == b"fine"


def test_a_stream_gets_a_moment_also_when_nothing_rings(reply):
    quiet = reply()
    until(lambda: "pump" in quiet.source.asked_by)
    quiet.source.given.extend(["late", None])
    assert quiet.read() == b"late"


@pytest.fixture
def unasked(monkeypatch):
    """Have the pump's thread look only when it is woken."""
    monkeypatch.setattr("web.pump.LOOK", 60.0)


def test_few_streams_are_written_by_who_rings_with_time_to_spare(unasked, bell, reply):
    each = reply()
    until(lambda: bell.ring(spare=True) or "MainThread" in each.source.asked_by)
    each.source.given.extend(["few", None])
    bell.ring(spare=True)
    assert each.read() == b"few"


@pytest.mark.parametrize(("count", "spare"), [(1, False), (FEW + 1, True)])
def test_without_time_to_spare_or_for_many_the_pump_is_woken(unasked, bell, reply, count, spare):
    replies = [reply() for _ in range(count)]
    until(lambda: all(each.source.asked_by for each in replies))
    for each in replies:
        each.source.given.extend(["a", "", None])
        each.source.asked_by.clear()
    bell.ring(spare)
    assert {each.client.recv(1) for each in replies} == {b"a"}
    assert set().union(*(each.source.asked_by for each in replies)) == {"pump"}
    bell.ring()
    assert {each.read() for each in replies} == {b""}


def test_who_rings_does_not_wait_for_the_pump(unasked, bell, reply):
    each, asked, go_on = reply(), threading.Event(), threading.Event()
    each.source.wait = lambda: asked.set() or go_on.wait(30)
    bell.ring()
    assert asked.wait(30)
    each.source.given.extend(["late", None])
    bell.ring(spare=True)
    assert each.source.asked_by == {"pump"}
    go_on.set()
    assert each.read() == b"late"


def test_what_is_only_looked_at_is_taken_in_to_its_end_or_failure_by_the_pump(pump):
    seen = []

    def moments():
        for moment in (1, None, 2):
            seen.append((moment, threading.current_thread().name))
            yield moment
        if len(seen) > 3:
            raise RuntimeError("it failed")

    assert looked_at(moments(), pump) is None and seen == [(1, "pump"), (None, "pump"), (2, "pump")]
    with pytest.raises(RuntimeError, match="it failed"):
        looked_at(moments(), pump)


@pytest.fixture
def sender():
    """Return what makes a sender, its reply and the client's end of the connection."""
    sockets = []

    def make(**state) -> tuple[ReplySender, SimpleNamespace, socket.socket]:
        sockets.extend(socket.socketpair())
        ours, client = sockets[-2:]
        reply = SimpleNamespace(sock=ours, sent=0, response_length=None, **{"should_close": lambda: False} | state)
        client.setblocking(False)
        return ReplySender(reply), reply, client

    yield make
    for each in sockets:
        each.close()


def test_chunks_are_framed_as_gunicorn_would(sender):
    ours, _, client = sender(chunked=True, headers_sent=True)
    assert ours.send("é".encode() * 8, False) == b""
    assert client.recv(100) == b"10\r\n" + "é".encode() * 8 + b"\r\n"


@pytest.mark.parametrize(("data", "framed"), [(b"end", b"3\r\nend\r\n0\r\n\r\n"), (b"", b"0\r\n\r\n")])
def test_the_last_data_take_the_end_of_the_body_along_which_gunicorn_then_leaves_out(sender, data, framed):
    ours, reply, client = sender(chunked=True, headers_sent=True)
    assert ours.send(data, True) == b"" and client.recv(100) == framed
    assert not reply.chunked and reply.response_length == reply.sent == len(data)
    with pytest.raises(BlockingIOError):  # it is kept alive
        client.recv(100)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_connection_that_is_not_kept_ends_with_the_last_data(sender, chunked):
    ours, _, client = sender(chunked=chunked, headers_sent=True, should_close=lambda: True)
    assert ours.send(b"a", False) == b"" and client.recv(100)
    assert ours.send(b"end", True) == b"" and b"end" in client.recv(100) and client.recv(100) == b""


def test_the_head_goes_with_the_first_bytes_and_only_with_them(sender):
    head = {"default_headers": lambda: ["HTTP/1.1 200 OK\r\n"], "headers": [("A", "ü")], "headers_sent": False}
    ours, reply, client = sender(chunked=False, **head)
    ours.begin()
    with pytest.raises(BlockingIOError):
        client.recv(100)
    assert ours.send(b"one", False) == b"" and ours.send(b"two", False) == b"" and reply.sent == 6
    assert client.recv(100) == b"HTTP/1.1 200 OK\r\nA: \xfc\r\n\r\nonetwo"


def test_without_a_pump_the_frames_are_the_same(bell):
    source = Source()
    source.given.extend(["a", "", "b", None])
    assert list(paced(source, bell)) == ["a", "b"]


def test_whoever_has_seen_a_ring_does_not_wait_for_it(bell):
    seen = bell.rung
    bell.ring()
    bell.wait(seen, 3600)  # comes back at once
