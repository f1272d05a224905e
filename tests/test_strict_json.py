"""The one parser of JSON bodies: what it takes, what it refuses, and that it never fails otherwise."""

import json

import pytest
from fakes import FakeServer, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from web.strict_json import parse


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return FakeServer(tmp_path_factory.mktemp("server"), byte_tokenizer(), max_body_bytes=4096)


def post(server, data: bytes, **headers):
    headers = {"Content-Type": "application/json", **headers}
    return server.client.post("/api/generate", data=data, headers=headers)


@pytest.mark.parametrize("data", [b"", b"  \n", b"{}", b"\xef\xbb\xbf{}"])
def test_nothing_and_an_empty_object_are_an_empty_object(data):
    assert parse(data) == {}


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9)
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=5), LEAVES | st.lists(LEAVES, max_size=4), max_size=4))
def test_what_python_writes_is_read(value):
    assert parse(json.dumps(value).encode()) == value


@pytest.mark.parametrize("text", ["", "1234567890123456789012"])  # with a text of many digits integers are read apart
def test_integers_of_twenty_digits_are_read(text):
    value = {"a": [10**20 - 1, 1 - 10**20, 10**19, 7], "b": text, "c": [[-1], {"d": 0}]}
    assert parse(json.dumps(value).encode()) == value


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_refused_with_a_sentence(data):
    try:
        assert isinstance(parse(data), dict)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"{}{}", "not valid JSON"),
        (b'{"a":', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": NaN}', "a is NaN; it must be a finite number"),
        (b'{"a": -Infinity}', "a is -Infinity; it must be a finite number"),
        (b'{"a": 1e999}', "a is 1e999; it must be a finite number"),
        (b'{"a": 123456789012345678901}', "a is 123456789012345678901; it must be at most 20 digits long"),
        (b'{"a": [1, [2, -123456789012345678901]]}', "a is -123456789012345678901; it must be at most 20 digits long"),
        (b'{"a": "\xff"}', "not valid UTF-8 at byte 7"),
        (b'{"a": "\\ud800"}', "a has a text with half of a surrogate pair"),
        (b'{"b": 1, "a": [{"c": [NaN]}]}', "a is NaN"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        (b"[" * 20000, "nested"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "a has objects and lists that are nested more than 64 deep"),
    ],
)
def test_what_is_not_strict_json_is_refused(data, words):
    with pytest.raises(ValueError) as error:
        parse(data)
    assert words in str(error.value)


def test_many_keys_are_read_quickly():
    assert len(parse(b"{" + b",".join(b'"k%d":1' % k for k in range(50_000)) + b"}")) == 50_000


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/vnd.bentoml+pickle", ""]
)
def test_other_content_types_are_refused(server, content_type):
    reply = post(server, b'{"prompt": "a"}', **{"Content-Type": content_type})
    assert reply.status_code == 415 and reply.json["error"] == "Content-Type must be application/json"


def test_compressed_bodies_are_refused(server):
    assert post(server, b'{"prompt": "a"}', **{"Content-Encoding": "gzip"}).status_code == 415


@pytest.mark.parametrize("coding", ["gzip, chunked", "deflate,chunked", "compress"])
def test_bodies_that_are_compressed_for_the_transfer_are_refused(server, coding):
    reply = post(server, b'{"prompt": "a"}', **{"Transfer-Encoding": coding})
    assert reply.status_code == 501 and "Transfer-Encoding" in reply.json["error"]


def test_a_body_over_the_limit_is_refused_before_it_is_read(server):
    reply = post(server, b'{"prompt": "' + b"a" * 5000 + b'"}')
    assert reply.status_code == 413 and "larger" in reply.json["error"]


def test_an_unread_body_closes_the_connection_and_a_read_one_does_not(server):
    closed = []
    environ = {"web.close_connection": lambda: closed.append(True)}
    server.client.post("/api/generate", json={"prompt": 3}, environ_overrides=environ)
    assert not closed
    server.client.post("/nowhere", json={"prompt": 3}, environ_overrides=environ)
    assert closed
