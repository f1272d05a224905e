"""Server-sent events: frames, pings, ends and failures; and the client that leaves."""

import socket
import time

import pytest

from inference.sequence import EngineDown
from web import sse
from web.client import Client, ClientGone


def test_an_event_is_one_line_of_json_whatever_is_in_it():
    frame = sse.frame({"text": "a\nb\r\n\u2028ü"})
    assert frame.startswith("data: ") and frame.endswith("\n\n") and frame.count("\n") == 2 and "\r" not in frame


def test_a_stream_that_ends_well_ends_with_done():
    assert list(sse.frames(iter([{"a": 1}]))) == ['data: {"a": 1}\n\n', "data: [DONE]\n\n"]


def test_quiet_moments_are_pings_but_not_many(monkeypatch):
    monkeypatch.setattr(sse, "PING_SECONDS", 0.0)
    assert next(sse.frames(iter([None, {"a": 1}]))) == ": ping\n\n"
    monkeypatch.setattr(sse, "PING_SECONDS", 60.0)
    assert list(sse.frames(iter([None, None, {"a": 1}]))) == ["", "", 'data: {"a": 1}\n\n', "data: [DONE]\n\n"]


def failing(error: Exception):
    yield {"a": 1}
    raise error


def test_a_failure_is_an_error_frame_and_no_done():
    assert list(sse.frames(failing(EngineDown("stopping"))))[1:] == ['data: {"error": "stopping"}\n\n']
    assert '"code": "engine_down"' in list(sse.frames(failing(EngineDown("stopping")), openai=True))[1]


def test_an_unknown_failure_tells_no_details():
    assert "secret" not in list(sse.frames(failing(RuntimeError("secret"))))[1]


def test_nothing_is_written_to_a_client_that_has_gone():
    assert list(sse.frames(failing(ClientGone()))) == ['data: {"a": 1}\n\n']


def test_a_stream_that_nobody_reads_is_closed_all_the_same():
    closed = []
    sse.response(iter(["a"]), lambda: closed.append(True)).close()
    assert closed == [True]


def test_a_stream_is_neither_cached_nor_buffered():
    with sse.response(iter([]), lambda: None) as reply:
        assert reply.mimetype == "text/event-stream" and reply.headers["Cache-Control"] == "no-cache"


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def look(client: Client) -> None:
    """Look at once, whenever the last look was."""
    client._looked = time.monotonic() - 1
    client.check()


def test_a_client_is_there_while_it_is_silent_or_sends(pair):
    client = Client({"gunicorn.socket": pair[0]})
    look(client)
    pair[1].sendall(b"more")
    look(client)
    assert pair[0].recv(4) == b"more"


def test_a_client_that_closed_has_gone(pair):
    client = Client({"gunicorn.socket": pair[0]})
    pair[1].close()
    with pytest.raises(ClientGone):
        look(client)


def test_without_a_socket_the_client_never_goes():
    look(Client({}))
