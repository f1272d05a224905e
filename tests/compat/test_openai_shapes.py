"""The shapes themselves: they know every route of ours and every key that the openai package requires, and can fail."""

import re

import pytest
from fakes import FakeServer
from openai import types
from openai.types import chat, fine_tuning
from openai.types.fine_tuning import jobs
from openai_shapes import (
    CHAT,
    CHAT_CHUNK,
    CHECKPOINT,
    COMPLETION,
    COMPLETION_CHUNK,
    EMBEDDINGS,
    EVENT,
    FILE,
    FILE_DELETED,
    JOB,
    MODEL,
    MODEL_DELETED,
    ROUTES,
    fault,
    mismatch,
    stream_fault,
)

MODEL_REPLY = {"id": "a", "object": "model", "created": 1, "owned_by": "local"}
CHUNK = '{"id": "a", "object": "text_completion", "created": 1, "model": "m", "choices": [%s]}'
LAST = CHUNK % '{"index": 0, "text": "", "logprobs": null, "finish_reason": "stop"}'


def test_every_route_under_v1_has_a_shape(tmp_path):
    paths = FakeServer(tmp_path, None).get("/openapi.json").json["paths"]
    ours = {(method.upper(), path) for path in paths if path.startswith("/v1/") for method in paths[path]}
    assert len(ours) >= 19
    for method, path in ours:
        plain = re.sub(r"\{.*?\}", "x", path)
        assert any(method == wanted and re.fullmatch(way, plain) for wanted, way, _ in ROUTES), (method, path)


@pytest.mark.parametrize(
    ("shape", "theirs"),
    [
        (COMPLETION, types.Completion),
        (COMPLETION["choices"][0], types.CompletionChoice),
        (COMPLETION["usage"], types.CompletionUsage),
        (COMPLETION_CHUNK, types.Completion),
        (CHAT, chat.ChatCompletion),
        (CHAT["choices"][0], chat.chat_completion.Choice),
        (CHAT["choices"][0]["message"], chat.ChatCompletionMessage),
        (CHAT_CHUNK, chat.ChatCompletionChunk),
        (CHAT_CHUNK["choices"][0], chat.chat_completion_chunk.Choice),
        (EMBEDDINGS, types.CreateEmbeddingResponse),
        (EMBEDDINGS["data"][0], types.Embedding),
        (MODEL, types.Model),
        (MODEL_DELETED, types.ModelDeleted),
        (FILE, types.FileObject),
        (FILE_DELETED, types.FileDeleted),
        (JOB, fine_tuning.FineTuningJob),
        (EVENT, fine_tuning.FineTuningJobEvent),
        (CHECKPOINT, jobs.FineTuningJobCheckpoint),
    ],
)
def test_a_shape_has_every_key_that_the_openai_package_requires(shape, theirs):
    required = {name for name, field in theirs.model_fields.items() if field.is_required()}
    assert required and required <= set(shape)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"created": 1.5}, "created is 1.5"), ({"object": "list"}, "object"), ({"id": None}, "id is None")],
)
def test_a_reply_of_another_type_is_a_fault(change, said):
    assert mismatch(MODEL_REPLY, MODEL) is None
    assert said in mismatch(MODEL_REPLY | change, MODEL)


@pytest.mark.parametrize("key", list(MODEL_REPLY))
def test_a_missing_key_is_a_fault(key):
    assert f"lacks {key}" in mismatch({k: v for k, v in MODEL_REPLY.items() if k != key}, MODEL)


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([LAST], "lacks error"),
        ([LAST, LAST, "[DONE]"], "each must end once"),
        ([LAST.replace('"a"', '"b"'), LAST.replace('"stop"', "null"), "[DONE]"], "differ in ['id']"),
        ([CHUNK % "", LAST, "[DONE]"], "no choice"),
        ([], "empty"),
    ],
)
def test_a_stream_that_is_not_one_whole_reply_is_a_fault(frames, said):
    text = "".join(f"data: {frame}\n\n" for frame in frames)
    assert said in stream_fault(text, COMPLETION_CHUNK)
    assert stream_fault(f"data: {LAST}\n\ndata: [DONE]\n\n", COMPLETION_CHUNK) is None


def test_an_error_has_four_keys_and_a_route_without_a_shape_is_a_fault():
    whole = b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}'
    assert fault("GET", "/v1/models", 404, "application/json", whole) is None
    assert "lacks code" in fault("GET", "/v1/models", 404, "application/json", whole.replace(b', "code": null', b""))
    assert fault("GET", "/v1/nothing", 200, "application/json", b"{}") == "no shape is known"
