"""Embeddings: over HTTP with a fake engine, and the mean of hidden states with real ones."""

import base64
import math
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeServer, byte_tokenizer
from test_engine import FakeTokenizer, tiny

from inference.build import build_runner
from inference.engine import Engine
from inference.sequence import Failure, FinishReason, SamplingParams
from model import GPT
from storage.registry import ModelReference
from storage.runs import Workspace
from web.embedding_routes import unit


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def server(tmp_path, tokenizer):
    return FakeServer(tmp_path, tokenizer)


def embed(server, value, **more) -> list:
    reply = server.post("/v1/embeddings", {"input": value} | more)
    assert reply.status_code == 200, reply.json
    return [item["embedding"] for item in reply.json["data"]]


def error(reply, status: int = 400) -> dict:
    assert reply.status_code == status, reply.json
    return reply.json["error"]


# ---- over HTTP


@pytest.mark.parametrize("value", ["Once", ["Once"], [5, 6], [[5, 6]]])
def test_one_text_gives_one_vector_of_length_one(server, value):
    (vector,) = embed(server, value)
    assert len(vector) == 4 and sum(x * x for x in vector) == pytest.approx(1)


def test_a_reply_has_every_key_and_counts_each_token(server):
    reply = server.post("/v1/embeddings", {"input": [[5, 6], [7]], "model": "tiny"}).json
    assert reply["object"] == "list" and reply["model"] == "tiny"
    assert reply["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [(item["object"], item["index"]) for item in reply["data"]] == [("embedding", 0), ("embedding", 1)]


def test_base64_is_little_endian_float32(server):
    (numbers,), (text,) = embed(server, "Once"), embed(server, "Once", encoding_format="base64")
    assert struct.unpack("<4f", base64.b64decode(text)) == pytest.approx(numbers)


def test_fewer_dimensions_are_normalised_again(server):
    (whole,), (part,) = embed(server, [5, 6]), embed(server, [5, 6], dimensions=3)
    assert len(part) == 3 and sum(x * x for x in part) == pytest.approx(1)
    assert part[0] / part[2] == pytest.approx(whole[0] / whole[2])


def test_2048_texts_keep_their_order_and_take_few_places(server):
    server.engine.max_waiting = 64
    vectors = embed(server, [[i % 200 + 1] for i in range(2048)])
    assert len(vectors) == 2048 and vectors[3] != vectors[4]
    assert vectors[3][0] == pytest.approx(4 / math.sqrt(16 + 25))


def test_a_vector_of_zeros_stays():
    assert unit([0.0, 0.0]) == [0.0, 0.0] and unit([3.0, 4.0]) == [0.6, 0.8]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": None}, "input", "required"),
        ({"input": ""}, "input", "an empty text"),
        ({"input": []}, "input", "an empty list"),
        ({"input": [[]]}, "input", "input is"),
        ({"input": ["a", ""]}, "input", "an empty text"),
        ({"input": ["a", 1]}, "input", "input is"),
        ({"input": {}}, "input", "input is"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": [999999]}, "input", "out of vocabulary"),
        ({"input": [5] * 65}, "input", "maximum context length is 64"),
        ({"input": "x" * 70000}, "input", "maximum context length is 64"),
        ({"input": "a", "dimensions": 0}, "dimensions", "dimensions is 0"),
        ({"input": "a", "dimensions": 5}, "dimensions", "dimensions is 5; tiny has 4"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "hex"),
    ],
)
def test_embeddings_refuse(server, body, param, words):
    found = error(server.post("/v1/embeddings", body))
    assert found["param"] == param and words in found["message"]
    assert server.engine.sequences == []


def test_an_unknown_model_is_not_found(server):
    assert error(server.post("/v1/embeddings", {"input": "a", "model": "x"}), 404)["code"] == "model_not_found"


def test_they_can_be_turned_off(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, enable_embeddings_backend=False)
    reply = server.post("/v1/embeddings", {"input": "a"})
    assert error(reply, 501)["type"] == "not_implemented_error" and reply.headers["x-should-retry"] == "false"


def test_a_failure_is_a_server_error_and_gives_the_place_back(server):
    embed_one = server.engine.embed

    def fail(*args):
        generation = embed_one(*args)
        server.engine.sequences[-1].events.get()
        server.engine.finish(server.engine.sequences[-1], FinishReason.ERROR, Failure.STEP)
        return generation

    server.engine.embed = fail
    assert error(server.post("/v1/embeddings", {"input": "a"}), 500)["code"] == "engine_error"
    assert server.app.extensions["language_model_server"].streams.open == 0


def test_an_engine_that_stalls_ends_the_wait_and_gives_the_place_back(server):
    embed_one, ctx = server.engine.embed, server.app.extensions["language_model_server"]

    def stall(*args):
        generation = embed_one(*args)
        server.engine.sequences[-1].events.get()  # the end never comes
        ctx.stalled.set()
        return generation

    server.engine.embed = stall
    reply = server.post("/v1/embeddings", {"input": "a"})
    assert error(reply, 503)["code"] == "engine_down" and reply.headers["Retry-After"]
    assert ctx.streams.open == 0 and server.engine.sequences[-1].cancelled


# ---- the engine


def engine_of(model: GPT, tmp_path: Path) -> Engine:
    """Return an engine that serves a model with the runner that this machine has for it."""
    engine = Engine(
        Workspace(tmp_path),
        dtype="fp32",
        slots=3,
        loader=lambda *_: SimpleNamespace(model=model, tokenizer=FakeTokenizer()),  # type: ignore[arg-type,return-value]
        build=build_runner,
    )
    engine.load(ModelReference("tiny", "trained", None, "tiny"))
    return engine


@pytest.fixture
def engine(tmp_path):
    made = engine_of(tiny(), tmp_path)
    yield made
    made.close(0.0)


def finish(generation) -> list[float]:
    while generation.finish_reason is None:
        assert generation.next(20) is not None, "the engine gave nothing"
    assert generation.finish_reason is FinishReason.LENGTH, generation.error
    return generation.embedding


def test_an_embedding_is_the_mean_of_the_final_hidden_states(engine):
    prompts = [[i % 60 for i in range(start, start + 7 * start)] for start in range(1, 6)]
    generations = [engine.embed(engine.served(), ids) for ids in prompts]
    model = tiny()
    for ids, generation in zip(prompts, generations, strict=True):
        with torch.inference_mode():
            expected = model.hidden(torch.tensor([ids]))[0].mean(0)
        assert torch.allclose(torch.tensor(finish(generation)), expected, atol=1e-4)


def test_a_text_has_the_same_embedding_again_and_after_it_was_completed(engine):
    served, ids = engine.served(), list(range(40))
    first = finish(engine.embed(served, ids))
    list(engine.submit(served, ids, SamplingParams(max_new_tokens=2)))
    assert finish(engine.embed(served, ids)) == pytest.approx(first, abs=1e-4)


def test_running_streams_say_the_same_beside_embeddings(engine):
    served = engine.served()
    params = SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True)
    alone = [token.token_id for token in engine.submit(served, [5, 6, 7], params)]
    stream = engine.submit(served, [5, 6, 7], params)
    others = [engine.embed(served, [i] * 40) for i in range(8)]
    assert [token.token_id for token in stream] == alone
    assert all(len(finish(other)) == 32 for other in others)


def test_a_step_that_fails_ends_the_embedding_at_fault_alone(engine):
    served = engine.served()
    runner = engine._pool.lane(served).runner
    hidden = runner.hidden

    def fail(tokens, *rest):
        if 59 in tokens:
            raise RuntimeError("the test's fault")
        return hidden(tokens, *rest)

    runner.hidden = fail
    good, bad, last = (engine.embed(served, [i] * 5) for i in (1, 59, 2))
    assert finish(good) and finish(last)
    assert list(bad) == [] and bad.error is Failure.STEP


def test_a_cancelled_embedding_gives_its_place_back(engine):
    generation = engine.embed(engine.served(), [5] * 48)
    generation.cancel()
    assert list(generation) == []
    end = time.monotonic() + 10
    while engine.info()["running"]:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert finish(engine.embed(engine.served(), [5]))


def test_a_model_whose_states_are_no_numbers_says_so(engine):
    runner = engine._pool.lane(engine.served()).runner
    hidden = runner.hidden
    runner.hidden = lambda *args: hidden(*args) * float("nan")
    generation = engine.embed(engine.served(), [5])
    assert list(generation) == [] and generation.error is Failure.NOT_A_NUMBER
