"""Errors: one shape for each API, fixed words for the unknown, and a status for every exception of ours."""

import errno
import inspect as python_inspect
import logging

import pytest
from fakes import FakeServer, byte_tokenizer

from inference import sequence
from storage import errors as storage
from storage.files import NAME_RULE
from training.jobs import JobBusy
from training.strict_model import ConfigError
from web.client import ClientGone
from web.completion import GenerationFailed
from web.errors import Refused, problem_of


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return FakeServer(tmp_path_factory.mktemp("server"), byte_tokenizer())


def subclasses(module, base):
    found = [cls for _, cls in python_inspect.getmembers(module, python_inspect.isclass) if issubclass(cls, base)]
    return [cls for cls in found if cls is not base]


@pytest.mark.parametrize(
    ("error", "native", "openai"),
    [
        (storage.BadName("m"), 400, 400),
        (storage.NotFound("m"), 404, 404),
        (storage.NotLoadable("m"), 422, 422),
        (storage.Exists("m"), 409, 400),
        (storage.NoSpace("m"), 409, 400),
        (storage.TooLarge("m"), 413, 413),
        (storage.Unreachable("m"), 503, 503),
        (sequence.PromptTooLong("m"), 400, 400),
        (sequence.NoModel("m"), 409, 404),
        (sequence.LoadInProgress("m"), 409, 503),
        (sequence.DoesNotFit("m"), 422, 400),
        (sequence.QueueFull("m", retry_after=7), 429, 429),
        (sequence.EngineDown("m"), 503, 503),
        (sequence.OutOfTime("m"), 504, 504),
        (JobBusy("m"), 409, 400),
        (ConfigError("m"), 400, 400),
        (GenerationFailed("m"), 500, 500),
        (ClientGone(), 499, 499),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), 409, 400),
        (Refused(418, "m"), 418, 418),
    ],
)
def test_each_exception_has_its_status(error, native, openai):
    assert (problem_of(error).status, problem_of(error, openai=True).status) == (native, openai)


def test_no_exception_of_storage_and_inference_is_unknown():
    for cls in subclasses(storage, storage.StorageError) + subclasses(sequence, sequence.InferenceError):
        assert problem_of(cls("m")).code != "internal_error", cls


def test_who_is_told_to_come_again_is_told_when():
    for error in (sequence.QueueFull("m", 7), sequence.EngineDown("m"), storage.Unreachable("m")):
        assert int(problem_of(error).headers["Retry-After"]) >= 1
    assert problem_of(sequence.QueueFull("m", 7)).headers == {"Retry-After": "7"}


def test_an_unknown_exception_leaves_an_id_and_nothing_else(server, caplog, monkeypatch):
    def fail():
        raise RuntimeError("secret at 0x7f0000000000 in /root/x")

    monkeypatch.setattr(server.engine, "info", fail)
    with caplog.at_level(logging.ERROR):
        reply = server.get("/api/status")
    assert reply.status_code == 500 and "secret" not in reply.get_data(as_text=True)
    error_id = reply.json["error"].split()[2].rstrip(";")
    assert error_id in caplog.text and "secret" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/api/nowhere", 404),
        ("GET", "/API/STATUS", 404),
        ("GET", "/api/status/", 404),
        ("GET", "/.git/config", 404),
        ("GET", "/console?__debugger__=yes", 404),
        ("GET", "/api/%ff%fe", 404),
        ("GET", "/v1x", 404),
        ("GET", "/completionsx", 404),
        ("POST", "/healthz", 405),
        ("GET", "/api/load_model", 405),
        ("DELETE", "/api/status", 405),
    ],
)
def test_errors_of_routing_are_json(server, method, path, status):
    reply = server.client.open(path, method=method)
    assert reply.status_code == status and isinstance(reply.json["error"], str)
    assert (status == 405) == ("Allow" in reply.headers) == ("this method; it has " in reply.json["error"])


@pytest.mark.parametrize(
    ("method", "path"),
    [*(("GET", f"/v1{rest}") for rest in ("", "/", "?a=b", "/nowhere", "/completions")), ("PUT", "/completions")],
)
def test_errors_under_v1_have_openais_four_keys(server, method, path):
    found = server.client.open(path, method=method).json["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/api/jobs/x/metrics?afer=5", "unknown field 'afer'; did you mean 'after'?"),
        ("GET", "/api/jobs/x/log?folow=1", "unknown field 'folow'; did you mean 'follow'?"),
        ("GET", "/api/models?limt=3", "unknown field 'limt'; none may be given here"),
        ("GET", "/api/jobs/x?__class__=1", "unknown field '__class__'; none may be given here"),
        ("GET", "/api/jobs/x/metrics?since=1", "unknown field 'since'; there are: after, limit"),
        ("DELETE", "/api/datasets/x?force=1", "unknown field 'force'; none may be given here"),
        ("POST", "/api/train?dry_run=1", "unknown field 'dry_run'; none may be given here"),
    ],
)
def test_an_unknown_parameter_of_api_is_refused_like_an_unknown_field(server, method, path, expected):
    reply = server.client.open(path, method=method)
    assert reply.status_code == 400 and reply.json == {"error": expected}


@pytest.mark.parametrize("path", ["/", "/?x=1", "/health?x=1", "/metrics?x=1", "/docs?x=1", "/static/app.js?v=2"])
def test_pages_and_health_take_no_notice_of_parameters(server, path):
    with server.get(path) as reply:
        assert reply.status_code == 200 and "X-Ignored-Params" not in reply.headers


def test_a_preflight_is_answered_whatever_the_parameters(server):
    assert server.client.options("/api/models?limt=3").status_code == 200


def test_unknown_parameters_under_v1_are_ignored_and_named(server):
    reply = server.get("/v1/files?limit=2&limt=3&order=asc&extra[]=1")
    assert reply.status_code == 200 and reply.headers["X-Ignored-Params"] == "limt"
    assert "X-Ignored-Params" not in server.get("/v1/fine_tuning/jobs?limit=2&metadata[team]=red").headers


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("metrics?after=1&after=1", "after is given 2 times; it may be given once"),
        ("log?follow=0&follow=1&follow=0", "follow is given 3 times; it may be given once"),
        ("plot.svg?compare=a&compare=b", "compare is given 2 times; it may be given once"),
        ("metrics?afer=1&afer=2&after=1&after=2", "unknown field 'afer'; did you mean 'after'?"),
    ],
)
def test_a_repeated_parameter_of_api_is_refused_like_a_repeated_name(server, path, expected):
    reply = server.get(f"/api/jobs/x/{path}")
    assert reply.status_code == 400 and reply.json == {"error": expected}


@pytest.mark.parametrize("path", ["/v1/files?limit=2&limit=3", "/?x=1&x=2", "/health?x=1&x=2"])
def test_elsewhere_a_parameter_may_be_repeated(server, path):
    assert server.get(path).status_code == 200


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("metrics?limit=0", "limit is '0'; it must be at least 1"),
        ("samples?limit=abc", "limit is 'abc'; it must be a whole number"),
        ("metrics?after=", "after is ''; it must be a whole number"),
        ("samples?after=1.5", "after is '1.5'; it must be a whole number"),
        (f"metrics?after={'9' * 4301}", f"after is '{'9' * 59}…; it must be a whole number of at most 4,300 digits"),
        ("log?follow=maybe", "follow is 'maybe'; it must be true or false"),
        ("log?follow", "follow is ''; it must be true or false"),
        ("plot.svg?compare=../y", f'compare is "../y"; {NAME_RULE}'),
        ("plot.png?compare=a,b,c,d,e,f", "compare makes 7 jobs; a picture has at most 6"),
    ],
    ids=lambda value: value[:30],
)
def test_a_wrong_value_in_a_query_is_refused_with_its_name_and_its_bound(server, path, expected):
    reply = server.get(f"/api/jobs/x/{path}")
    assert reply.status_code == 400 and reply.json == {"error": expected}
