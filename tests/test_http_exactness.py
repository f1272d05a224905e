"""Exactness through HTTP, on the native runner with the bundled model: log-probabilities and seeded texts."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from live_server import ROOT, Process, streamed

from inference.native_runner import NativeRunner
from model import GPT
from storage.pretrained import load_folder
from storage.tokenizer import Tokenizer

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nYou"
WITHIN = {"fp32": 1e-4, "int8": 0.005}  # of the loss: rounding, and what int8 may cost


@pytest.fixture(scope="module")
def bundled() -> tuple[GPT, Tokenizer]:
    return load_folder(ROOT / "models" / "tiny-shakespeare")


def cached(server: Process, key: str, **more) -> int:
    """Return how many tokens of the prompt were in the cache, as the usage tells it."""
    body = {"prompt": TEXT, "max_tokens": 2, **more}
    with server.post("/v1/completions", body, headers={"Authorization": f"Bearer {key}"}) as reply:
        last = reply.text.strip().split("\n\n")[-2 if "stream" in more else -1]
    return json.loads(last.removeprefix("data: "))["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_usage_tells_what_was_cached_which_is_the_api_keys_own(bundled, tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models")
    server = Process(tmp_path, "--threads", "1", "--api_key", "one,two", native=True)
    pieces = {"stream": True, "stream_options": {"include_usage": True}}
    try:
        found = [cached(server, "one"), cached(server, "one"), cached(server, "two"), cached(server, "two", **pieces)]
    finally:
        server.end()
    most = len(bundled[1].encode(TEXT)) - 1  # the last one is always computed
    assert found == [0, most, 0, most]


@pytest.fixture(scope="module", params=WITHIN)
def server(request, bundled, tmp_path_factory) -> Iterator[Process]:
    if (reason := NativeRunner.unsupported(bundled[0].config, request.param)) is not None:
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("exact")
    shutil.copytree(ROOT / "models", root / "models")
    process = Process(root, "--dtype", request.param, "--threads", "1", "--slots", "8", native=True)
    model = process.get("/api/status").json()["model"]
    assert (model["runner"], model["dtype"]) == ("native", request.param)
    yield process
    process.end()


def completion(server: Process, **body) -> dict:
    reply = server.post("/v1/completions", body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@torch.inference_mode()
def test_the_log_probabilities_of_an_echoed_prompt_add_up_to_the_models_loss(server, bundled):
    model, tokenizer = bundled
    ids = tokenizer.encode(TEXT)
    _, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    reply = completion(server, prompt=TEXT, max_tokens=0, echo=True, logprobs=0)
    first, *logprobs = reply["choices"][0]["logprobs"]["token_logprobs"]
    dtype = server.get("/api/status").json()["model"]["dtype"]
    assert first is None and len(logprobs) == len(ids) - 1
    assert -sum(logprobs) / len(logprobs) == pytest.approx(loss.item(), rel=WITHIN[dtype])


def in_pieces(server: Process, **body) -> tuple[str, str]:
    """Return text and fingerprint of a streamed reply."""
    *lines, end = streamed(server, body)
    chunks = [json.loads(line) for line in lines]
    assert end == "[DONE]"
    (fingerprint,) = {chunk["system_fingerprint"] for chunk in chunks}
    return "".join(chunk["choices"][0]["text"] for chunk in chunks), fingerprint


def whole(server: Process, **body) -> tuple[str, str]:
    reply = completion(server, **body)
    return reply["choices"][0]["text"], reply["system_fingerprint"]


def test_a_seeded_request_has_one_text_alone_and_among_others_streamed_and_not(server):
    bodies = [{"prompt": TEXT[: 20 + 5 * i], "seed": i, "max_tokens": 60, "temperature": 1.0} for i in range(12)]
    alone = [whole(server, **body) for body in bodies]
    with ThreadPoolExecutor(24) as pool:  # more than there are slots
        futures = [pool.submit(ask, server, **body) for body in bodies for ask in (whole, in_pieces)]
        together = [future.result() for future in futures]
    assert together == [each for each in alone for _ in range(2)]
    assert len({text for text, _ in alone}) == 12 and len({fingerprint for _, fingerprint in alone}) == 1
