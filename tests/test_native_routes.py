"""The native API: status, models, loading and generating."""

import pytest
from fakes import FakeServer, byte_tokenizer, events

from inference.sequence import SamplingParams
from storage.tokenizer import char_tokenizer
from web.schemas import GenerateBody


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def server(tmp_path, tokenizer):
    return FakeServer(tmp_path, tokenizer)


def sentence(reply) -> str:
    assert reply.status_code == 400
    return reply.json["error"]


def follow(server, text: str, end: int | None = None) -> None:
    """Have the fake engine say `text`, then `end` for ever."""
    ids = server.engine.tokenizer.encode(text)
    server.engine.script = lambda prompt, k: ids[k] if k < len(ids) else (end if end is not None else ids[-1])


# ---- status and models


def test_status_tells_model_device_queue_and_jobs(server):
    status = server.get("/api/status").json
    assert status["status"] == "online" and status["model_loaded"] is True and status["device"] == "cpu"
    assert isinstance(status["timestamp"], float) and status["model"]["id"] == "tiny"
    assert status["queue"]["running"] == 0 and status["jobs"] == {"queued": 0, "running": 0}


def test_models_lists_the_pretrained_names_in_order(server):
    models = server.get("/api/models").json
    assert models["pretrained_models"][:4] == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert models["trained_models"] == []


@pytest.mark.parametrize(
    ("body", "found"), [({}, "neither is"), ({"model_type": "gpt2", "model_path": "out/x"}, "both are")]
)
def test_load_model_says_which_of_its_two_fields_it_found(server, body, found):
    expected = f"give exactly one of model_path and model_type; {found} given"
    assert sentence(server.post("/api/load_model", body)) == expected


def test_load_model_serves_another_and_says_so(server):
    reply = server.post("/api/load_model", {"model_type": "gpt2"})
    assert reply.json["message"] == "Model loaded successfully" and reply.json["model"]["id"] == "gpt2"
    assert server.get("/api/status").json["model"]["id"] == "gpt2"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"model_type": "gpt2", "model_path": "out/x/ckpt.pt"}, 400),
        ({"model_type": 5}, 400),
        ({"model_path": ""}, 400),
        ({"model_path": "../../etc/passwd"}, 400),
        ({"model_path": "/etc/passwd"}, 400),
        ({"model_path": "out/nowhere/ckpt.pt"}, 404),
        ({"model_type": "gpt5"}, 404),
        ({"model_type": "gpt2", "trust_remote_code": True}, 400),
    ],
)
def test_load_model_refuses(server, body, status):
    reply = server.post("/api/load_model", body)
    assert reply.status_code == status and isinstance(reply.json["error"], str)
    assert server.get("/api/status").json["model"]["id"] == "tiny"


def test_a_load_while_another_runs_is_refused(server):
    server.engine.loading = True
    assert server.post("/api/load_model", {"model_type": "gpt2"}).status_code == 409


def test_the_allow_list_restricts_what_loads_and_what_is_listed(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, model_allow_list=("gpt2",))
    assert server.get("/api/models").json["pretrained_models"] == ["gpt2"]
    assert server.post("/api/load_model", {"model_type": "gpt2"}).status_code == 200
    reply = server.post("/api/load_model", {"model_type": "gpt2-xl"})
    assert reply.status_code == 403 and "allow list" in reply.json["error"]


def test_without_a_model_generation_says_how_to_load_one(server):
    assert server.post("/api/unload_model", {"model": "tiny"}).status_code == 400
    assert server.post("/api/unload_model", {}).status_code == 200
    reply = server.post("/api/generate", {"prompt": "a"})
    assert reply.status_code == 409 and "/api/load_model" in reply.json["error"]
    assert server.post("/api/unload_model", {}).status_code == 409
    assert server.get("/api/status").json["model_loaded"] is False


# ---- generating


def test_the_reply_repeats_prompt_and_parameters_and_begins_with_the_prompt(server):
    body = {"prompt": "Once upon a time", "max_new_tokens": 5, "temperature": 0, "top_k": 3, "seed": 9}
    reply = server.post("/api/generate", body).json
    assert reply["prompt"] == body["prompt"] and reply["generated_text"].startswith(body["prompt"])
    assert all(reply["parameters"][name] == value for name, value in body.items() if name != "prompt")
    assert reply["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 5


def test_what_is_left_out_has_the_documented_defaults(server):
    parameters = server.post("/api/generate", {"prompt": "Hi"}).json["parameters"]
    expected = {"max_new_tokens": 150, "temperature": 0.8, "top_k": 40, "top_p": 1.0, "min_p": 0.0, "num_samples": 1}
    assert {name: parameters[name] for name in expected} == expected


def test_null_means_the_default_and_switches_top_k_off(server):
    body = {"prompt": "Hi", "temperature": None, "top_k": None, "stop": None, "seed": None, "max_new_tokens": 2}
    parameters = server.post("/api/generate", body).json["parameters"]
    assert parameters["temperature"] == 0.8 and parameters["top_k"] == 0 and isinstance(parameters["seed"], int)


def test_the_seed_that_was_drawn_is_told_and_repeats_the_text(server):
    first = server.post("/api/generate", {"prompt": "Once upon", "max_new_tokens": 9}).json
    body = {"prompt": "Once upon", "max_new_tokens": 9, "seed": first["parameters"]["seed"]}
    assert server.post("/api/generate", body).json["generated_text"] == first["generated_text"]


def test_several_samples_differ_and_come_in_a_list(server):
    reply = server.post("/api/generate", {"prompt": "Once upon", "num_samples": 3, "seed": 1}).json
    texts = [sample["generated_text"] for sample in reply["samples"]]
    assert len(set(texts)) == 3 and reply["generated_text"] == texts[0]


def test_the_end_of_text_token_ends_the_text_and_is_not_in_it(server):
    follow(server, "time", end=server.engine.tokenizer.eot)
    reply = server.post("/api/generate", {"prompt": "Once ", "max_new_tokens": 20}).json
    assert reply["generated_text"] == "Once time" and reply["finish_reason"] == "stop"


def test_a_stop_string_ends_the_text_before_it(server):
    follow(server, "small model that told")
    reply = server.post("/api/generate", {"prompt": "A ", "stop": ["that", "told"], "max_new_tokens": 40}).json
    assert reply["generated_text"] == "A small model " and reply["finish_reason"] == "stop"
    assert server.engine.sequences[-1].cancelled


@pytest.mark.parametrize(
    ("prompt", "said", "stop", "expected"),
    [
        ("say stop", " it is", "stop", " it is"),  # whole in the prompt
        ("say st", "op it", "stop", "op it"),  # half in the prompt
        ("日本", "語です。終", "本語", "語です。終"),
        ("cafe", "\u0301 au lait", "e\u0301", "\u0301 au lait"),
        ("👩", "\u200d👩\u200d👧 x", "👩\u200d👩", "\u200d👩\u200d👧 x"),
        ("say st", "op, stop", "stop", "op, "),  # and once more in the reply
    ],
)
def test_a_stop_string_that_begins_in_the_prompt_stops_nothing(server, prompt, said, stop, expected):
    follow(server, said)
    length = len(server.engine.tokenizer.encode(said))
    body = {"prompt": prompt, "max_new_tokens": length, "stop": stop}
    whole = server.post("/api/generate", body).json
    assert whole["generated_text"] == prompt + expected
    streamed = events(server.post("/api/generate", {**body, "stream": True}))
    assert "".join(event["text"] for event in streamed[:-2] if "text" in event) == expected
    assert streamed[-2]["generated_text"] == prompt + expected


@pytest.mark.parametrize(
    "text", ["plain words", "naïve 日本語 and 👩‍👩‍👧 too", "half a stop: tol", "a stop: told. More"]
)
def test_streamed_text_equals_unstreamed_text(server, text):
    follow(server, text, end=server.engine.tokenizer.eot)
    body = {"prompt": "X", "stop": ["told"], "max_new_tokens": 50}
    whole = server.post("/api/generate", body).json
    *pieces, last, done = events(server.post("/api/generate", {**body, "stream": True}))
    assert done == "[DONE]" and "X" + "".join(piece["text"] for piece in pieces) == whole["generated_text"]
    assert last["generated_text"] == whole["generated_text"] and last["finish_reason"] == whole["finish_reason"]


def test_a_cut_in_the_middle_of_a_character_is_the_same_in_both_ways(server):
    follow(server, "🙂")
    body = {"prompt": "X", "max_new_tokens": 2, "temperature": 0}
    assert server.post("/api/generate", body).json["generated_text"] == "X\ufffd"
    assert events(server.post("/api/generate", {**body, "stream": True}))[-2]["generated_text"] == "X\ufffd"


def test_special_tokens_in_a_prompt_are_text(server):
    server.post("/api/generate", {"prompt": "<|endoftext|>", "max_new_tokens": 1})
    assert server.engine.tokenizer.eot not in server.engine.sequences[-1].prompt_ids


def test_an_empty_prompt_starts_from_the_end_of_text_token(server):
    assert server.post("/api/generate", {"prompt": "", "max_new_tokens": 1}).status_code == 200
    assert server.engine.sequences[-1].prompt_ids == [server.engine.tokenizer.eot]


def test_a_character_model_names_what_it_does_not_know(tmp_path):
    server = FakeServer(tmp_path, char_tokenizer("abc "))
    assert "'z'" in sentence(server.post("/api/generate", {"prompt": "abz"}))
    assert "empty" in sentence(server.post("/api/generate", {"prompt": ""}))


def test_a_prompt_longer_than_the_context_is_refused_and_never_cut(server):
    assert "64 tokens" in sentence(server.post("/api/generate", {"prompt": "x" * 65}))
    assert "64 tokens" in sentence(server.post("/api/generate", {"prompt": "x" * 1_000_000}))


def test_generation_goes_to_the_end_of_the_context_and_says_length(server):
    reply = server.post("/api/generate", {"prompt": "x" * 60, "max_new_tokens": 4}).json
    assert reply["usage"]["completion_tokens"] == 4
    reply = server.post("/api/generate", {"prompt": "x" * 60, "max_new_tokens": 100}).json
    assert reply["usage"]["completion_tokens"] == 4 and reply["finish_reason"] == "length"
    assert reply["parameters"]["max_new_tokens"] == 100


def test_a_lower_context_can_be_set(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, max_context_tokens=10)
    assert "10 tokens" in sentence(server.post("/api/generate", {"prompt": "x" * 11}))
    reply = server.post("/api/generate", {"prompt": "x" * 8, "max_new_tokens": 100}).json
    assert reply["usage"]["total_tokens"] == 10


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "prompt is required"),
        ({"prompt": None}, "prompt is required"),
        ({"prompt": 3}, "prompt is 3; it must be text"),
        ({"prompt": "a", "max_new_tokens": -1}, "max_new_tokens is -1; it must be at least 0"),
        ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens is true; it must be a whole number"),
        ({"prompt": "a", "max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be a whole number"),
        ({"prompt": "a", "max_new_tokens": 10**12}, "max_new_tokens is 1000000000000; it must be"),
        ({"prompt": "a", "max_new_tokenz": 3}, "unknown field 'max_new_tokenz'; did you mean 'max_new_tokens'?"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"prompt": "a", "temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"prompt": "a", "temperature": []}, "temperature is a list; it must be a number"),
        ({"prompt": "a", "top_k": "40"}, "top_k is '40'; it must be a whole number"),
        ({"prompt": "a", "top_p": 2}, "top_p is 2"),
        ({"prompt": "a", "stop": [""]}, "stop has a text that is empty"),
        ({"prompt": "a", "stop": [None]}, "stop is a list; it must be a text or a list of texts"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop has 17 texts; it may have at most 16"),
        ({"prompt": "a", "num_samples": 17}, "num_samples is 17; it must be at least 1 and at most 16"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "max_tokens": 3}, "unknown field 'max_tokens'; did you mean 'max_new_tokens'?"),
        ({"prompt": "a", "n": 3}, "unknown field 'n'; did you mean 'num_samples'?"),
        ({"text": "a"}, "unknown field 'text'; did you mean 'prompt'?"),
        ({"input": "a"}, "unknown field 'input'; did you mean 'prompt'?"),
        (
            {"prompt": "a", "__class__": "x"},
            f"unknown field '__class__'; there are: {', '.join(GenerateBody.model_fields)}",
        ),
    ],
)
def test_generate_refuses(server, body, expected):
    assert sentence(server.post("/api/generate", body)).startswith(expected)
    assert server.engine.sequences == []


def test_validation_comes_before_capacity(server):
    server.engine.max_waiting = 0
    assert server.post("/api/generate", {"prompt": 3}).status_code == 400
    reply = server.post("/api/generate", {"prompt": "a"})
    assert reply.status_code == 429 and reply.headers["Retry-After"] == "2"


def test_a_batch_that_does_not_fit_is_refused_as_a_whole(server):
    server.engine.manual, server.engine.max_waiting = True, 2
    assert server.post("/api/generate", {"prompt": "a", "num_samples": 3}).status_code == 429
    assert all(sequence.cancelled for sequence in server.engine.sequences)
    assert server.get("/queue").json["open_requests"] == 0


def test_open_requests_are_bounded(tmp_path, tokenizer):
    server = FakeServer(tmp_path, tokenizer, max_streams=1)
    server.engine.manual = True
    first = server.post("/api/generate", {"prompt": "a", "stream": True}, buffered=False)
    assert server.post("/api/generate", {"prompt": "a"}).status_code == 429
    first.close()
    assert server.engine.sequences[0].cancelled and server.get("/queue").json["open_requests"] == 0


def test_a_failed_request_is_an_error_in_both_ways(server):
    server.engine.fail_after = 1
    assert server.post("/api/generate", {"prompt": "abc"}).status_code == 500
    frames = events(server.post("/api/generate", {"prompt": "abc", "stream": True}))
    assert frames[-1] == {"error": "The server failed while it computed this request."}


def test_every_reply_has_an_id_by_which_its_request_is_found(server):
    reply = server.post("/api/generate", {"prompt": "a", "max_new_tokens": 1})
    found = server.get(f"/requests/{reply.headers['X-Request-Id']}").json
    assert found == {"id": reply.headers["X-Request-Id"], "state": "finished"}
    assert server.get("/nowhere").headers["X-Request-Id"].startswith("req-")


def test_defaults_and_bounds_are_those_of_the_engine():
    body = GenerateBody(prompt="a")
    assert body.params(body.max_new_tokens) == SamplingParams()
    for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature"):
        for bound in GenerateBody.model_fields[name].metadata:
            SamplingParams(**{name: getattr(bound, "ge", getattr(bound, "le", None))})


# ---- an engine that does not move


def test_while_the_engine_is_stalled_requests_are_refused_and_what_waits_ends(server):
    server.engine.manual = True
    stalled = server.app.extensions["language_model_server"].stalled
    reply = server.post("/api/generate", {"prompt": "a", "stream": True})
    stalled.set()
    assert "does not respond" in events(reply)[-1]["error"] and server.engine.sequences[0].cancelled
    refused = server.post("/api/generate", {"prompt": "a"})
    assert refused.status_code == 503 and "Retry-After" in refused.headers
    stalled.clear()
    server.engine.manual = False
    assert server.post("/api/generate", {"prompt": "a"}).status_code == 200
