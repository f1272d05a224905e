"""OpenAI's inference API: completions, models, tokenizing, and what they refuse."""

import pytest
from fakes import FakeServer, byte_tokenizer, events

from storage.errors import NotFound
from storage.tokenizer import char_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def server(tmp_path, tokenizer):
    return FakeServer(tmp_path, tokenizer)


def complete(server, **body):
    reply = server.post("/v1/completions", {"prompt": "Once", "max_tokens": 4, **body})
    assert reply.status_code == 200, reply.json
    return reply.json


def error(reply, status: int = 400) -> dict:
    assert reply.status_code == status
    found = reply.json["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


# ---- the reply


def test_a_reply_has_every_key_of_the_specification(server):
    reply = complete(server)
    assert reply["id"].startswith("cmpl-") and reply["object"] == "text_completion" and reply["model"] == "tiny"
    assert isinstance(reply["created"], int) and reply["system_fingerprint"] == "fp_fake"
    choice = reply["choices"][0]
    assert choice["index"] == 0 and choice["logprobs"] is None and choice["finish_reason"] == "length"
    usage = reply["usage"]
    assert usage["completion_tokens"] == 4 and usage["total_tokens"] == usage["prompt_tokens"] + 4


@pytest.mark.parametrize("path", ["/completions", "/v1/completions"])
def test_both_paths_are_the_same_and_model_is_optional(server, path):
    reply = server.post(path, {"prompt": "The future of AI is", "max_tokens": 5, "temperature": 0.8}).json
    assert reply["object"] == "text_completion" and reply["usage"]["completion_tokens"] <= 5


def test_sixteen_tokens_are_the_default(server):
    assert server.post("/v1/completions", {"prompt": "Once"}).json["usage"]["completion_tokens"] == 16


def test_the_default_gives_way_to_the_context_and_a_request_does_not(server):
    ids = [5] * 60
    assert server.post("/v1/completions", {"prompt": ids}).json["usage"]["completion_tokens"] == 4
    assert server.post("/v1/completions", {"prompt": ids, "max_tokens": 4}).status_code == 200
    refused = error(server.post("/v1/completions", {"prompt": ids, "max_tokens": 5}))
    assert refused["code"] == "context_length_exceeded"
    assert "maximum context length is 64 tokens" in refused["message"] and "65 tokens" in refused["message"]


@pytest.mark.parametrize("prompt", [["Once"], [[5, 6, 7]], [5, 6, 7], "Once"])
def test_a_prompt_may_be_text_ids_or_lists_of_them(server, prompt):
    assert len(complete(server, prompt=prompt)["choices"]) == 1


def test_choices_are_counted_prompt_by_prompt_and_prompt_tokens_once(server):
    reply = complete(server, prompt=[[5, 5], [6, 6], [7, 7]], n=2, echo=True, temperature=0, max_tokens=1)
    texts = [choice["text"] for choice in reply["choices"]]
    text = {i: server.engine.tokenizer.decode([i] * 3) for i in (5, 6, 7)}
    assert texts == [text[5], text[5], text[6], text[6], text[7], text[7]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3, 4, 5]
    assert reply["usage"]["prompt_tokens"] == 6 and reply["usage"]["completion_tokens"] == 6


def test_zero_and_null_are_different_things(server):
    body = {"temperature": 0, "seed": 0, "top_p": 0, "logprobs": 0}
    complete(server, **body)
    params = server.engine.sequences[-1].params
    assert params.temperature == 0 and params.seed == 0 and params.top_p == 0 and params.logprobs == 0
    complete(server, **dict.fromkeys(body))
    params = server.engine.sequences[-1].params
    assert params.temperature == 1 and params.top_p == 1 and params.logprobs is None


def test_no_tokens_can_be_asked_for(server):
    choice = complete(server, max_tokens=0, echo=True)["choices"][0]
    assert choice["text"] == "Once" and choice["finish_reason"] == "length"


def test_extras_reach_the_engine(server):
    extras = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [9]}
    complete(server, **extras, min_tokens=2, logit_bias={"7": -100}, presence_penalty=1, frequency_penalty=-1)
    params = server.engine.sequences[-1].params
    assert (params.top_k, params.min_p, params.ignore_eos, params.min_tokens) == (0, 0.1, True, 2)
    assert params.stop_token_ids == {9} and params.logit_bias == ((7, -100.0),)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 1, -1)


def test_unknown_fields_are_ignored_and_named(server):
    reply = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "foo": 1, "metadata": {}, "user": "x"})
    assert reply.status_code == 200 and reply.headers["X-Ignored-Params"] == "foo, metadata"


def test_unknown_fields_that_no_header_can_name_are_ignored_in_silence(server):
    reply = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "𝑐": 1, "a\nb": 1, "foo": 1})
    assert reply.status_code == 200 and reply.headers["X-Ignored-Params"] == "foo"


def test_stream_options_without_a_stream_do_no_harm(server):
    complete(server, stream=False, stream_options={"include_usage": True, "continuous_usage_stats": True})


def test_a_stop_token_and_a_stop_string_are_both_stop_and_told_apart(server):
    ids = server.engine.tokenizer.encode("time")
    server.engine.script = lambda prompt, k: ids[k % len(ids)]
    choice = complete(server, stop="im")["choices"][0]
    assert choice["text"] == "t" and choice["finish_reason"] == "stop" and choice["stop_reason"] == "im"
    choice = complete(server, stop_token_ids=[ids[1]])["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == ids[1]


def test_best_of_returns_the_most_probable_and_counts_all(server):
    reply = complete(server, best_of=4, n=2)
    assert len(reply["choices"]) == 2 and reply["usage"]["completion_tokens"] == 16
    assert reply["choices"][0]["logprobs"] is None


# ---- log-probabilities


def test_logprobs_have_one_entry_per_token_with_its_place(server):
    logprobs = complete(server, logprobs=2, temperature=0)["choices"][0]["logprobs"]
    assert {len(logprobs[key]) for key in logprobs} == {4}
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
    text = "".join(logprobs["tokens"])
    assert [text[offset] for offset in logprobs["text_offset"]] == [token[0] for token in logprobs["tokens"]]


def test_echoed_logprobs_begin_with_null_and_cover_the_prompt(server):
    logprobs = complete(server, prompt=[[5, 6, 7]], logprobs=1, echo=True, max_tokens=1)["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 4 and logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None and None not in logprobs["token_logprobs"][1:]


def test_the_end_of_text_token_has_an_entry_and_no_text(server):
    eot = server.engine.tokenizer.eot
    server.engine.script = lambda prompt, k: eot
    choice = complete(server, logprobs=1)["choices"][0]
    assert choice["text"] == "" and choice["logprobs"]["tokens"] == ["<|endoftext|>"]


def test_tokens_that_are_no_text_stay_distinguishable(server):
    ids = server.engine.tokenizer.encode("🙂")
    server.engine.script = lambda prompt, k: ids[k]
    tokens = complete(server, logprobs=0, max_tokens=len(ids))["choices"][0]["logprobs"]["tokens"]
    assert len(set(tokens)) == len(ids) and tokens[0] == "bytes:\\xf0"


# ---- streams


def chunks(server, **body):
    reply = server.post("/v1/completions", {"prompt": "Once", "max_tokens": 4, "stream": True, **body})
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    *found, done = events(reply)
    assert done == "[DONE]"
    return found


def test_a_stream_says_what_the_reply_says(server):
    whole = complete(server, seed=5, max_tokens=20)
    found = chunks(server, seed=5, max_tokens=20)
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == whole["choices"][0]["text"]
    assert {chunk["id"] for chunk in found} == {found[0]["id"]} and found[0]["object"] == "text_completion"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in found]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert all("usage" not in chunk for chunk in found)


def test_every_choice_has_one_end_in_a_stream(server):
    found = chunks(server, prompt=["Once", "upon"], n=2)
    ends = [chunk["choices"][0]["index"] for chunk in found if chunk["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


def test_usage_comes_in_a_chunk_of_its_own(server):
    *found, last = chunks(server, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in found)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4


def test_echo_streams_the_prompt_first_and_logprobs_add_up(server):
    whole = complete(server, echo=True, logprobs=1, seed=5)["choices"][0]
    found = [chunk["choices"][0] for chunk in chunks(server, echo=True, logprobs=1, seed=5)]
    assert found[0]["text"].startswith("Once") and "".join(c["text"] for c in found) == whole["text"]
    for key in whole["logprobs"]:
        assert [entry for c in found for entry in c["logprobs"][key]] == whole["logprobs"][key]


def test_a_failure_in_a_stream_is_an_error_frame_without_done(server):
    server.engine.fail_after = 2
    found = events(server.post("/v1/completions", {"prompt": "Once", "stream": True}))
    assert set(found[-1]["error"]) == {"message", "type", "param", "code"} and "[DONE]" not in found


# ---- refusals


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": 5}, "prompt", "prompt is 5"),
        ({"prompt": {}}, "prompt", "prompt is"),
        ({"prompt": []}, "prompt", "an empty list"),
        ({"prompt": ["a", 1]}, "prompt", "prompt is"),
        ({"prompt": [["a"]]}, "prompt", "prompt is"),
        ({"prompt": [[]]}, "prompt", "prompt is"),
        ({"prompt": [True, False]}, "prompt", "prompt is"),
        ({"prompt": [-1]}, "prompt", "out of vocabulary"),
        ({"prompt": [999999999]}, "prompt", "out of vocabulary"),
        ({"prompt": ["a"] * 300}, "prompt", "at most 256"),
        ({"prompt": "a", "n": 0}, "n", "n is 0"),
        ({"prompt": "a", "n": 129}, "n", "at most 128"),
        ({"prompt": "a", "n": 1.5}, "n", "a whole number"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of", "at least n"),
        ({"prompt": "a", "n": 1, "best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"prompt": "a", "logprobs": 6}, "logprobs", "at most 5"),
        ({"prompt": "a", "max_tokens": "all"}, "max_tokens", "a whole number"),
        ({"prompt": "a", "max_tokens": 10**12}, "max_tokens", "max_tokens is 1000000000000"),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature is -1"),
        ({"prompt": "a", "top_p": -1}, "top_p", "top_p is -1"),
        ({"prompt": "a", "presence_penalty": "x"}, "presence_penalty", "a number"),
        ({"prompt": "a", "presence_penalty": 2.1}, "presence_penalty", "at least -2 and at most 2"),
        ({"prompt": "a", "frequency_penalty": -2.1}, "frequency_penalty", "at least -2 and at most 2"),
        ({"prompt": "a", "stop": 5}, "stop", "stop is 5"),
        ({"prompt": "a", "logit_bias": {"abc": 5}}, "logit_bias", "token ids"),
        ({"prompt": "a", "logit_bias": {"999999999": 5}}, "logit_bias", "out of range"),
        ({"prompt": "a", "logit_bias": {"5": 100.5}}, "logit_bias", "at least -100 and at most 100"),
        ({"prompt": "a", "logit_bias": {"\u0665": 5}}, "logit_bias", "token ids"),
        ({"prompt": "a", "seed": -(2**63) - 1}, "seed", "at least -9,223,372,036,854,775,808"),
        ({"prompt": "a", "suffix": "x"}, "suffix", "suffix is not supported"),
        ({"prompt": "a", "guided_regex": "(a+)+$"}, "guided_regex", "guided_regex is not supported"),
        ({"prompt": "a", "response_format": {"type": "regex"}}, "response_format", "response_format is not supported"),
        ({"prompt": "a", "model": 3}, "model", "model is 3"),
    ],
)
def test_completions_refuse(tmp_path, server, body, param, words):
    if "logit_bias" in body and "999999999" in body["logit_bias"]:
        server.engine.submit = lambda *a, **k: (_ for _ in ()).throw(ValueError("logit_bias is out of range"))
    found = error(server.post("/v1/completions", body))
    assert found["type"] == "invalid_request_error" and words in found["message"]
    assert found["param"] == param


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "1" * 21, '"\\ud800"'])
def test_what_is_not_strict_json_is_said_of_its_field(server, value):
    body = f'{{"prompt": "a", "temperature": {value}}}'
    found = error(server.client.post("/v1/completions", data=body, content_type="application/json"))
    assert found["param"] == "temperature" and found["message"].startswith("temperature ")


def test_an_empty_suffix_is_none(server):
    assert server.post("/v1/completions", {"prompt": "a", "suffix": ""}).status_code == 200


def test_a_seed_may_be_negative(server):
    texts = [server.post("/v1/completions", {"prompt": "a", "seed": seed}).json["choices"] for seed in (-1, -1)]
    assert texts[0] == texts[1] and server.engine.sequences[-1].params.seed == 2**63 - 1


def test_a_model_that_goes_while_it_is_asked_for_is_not_found(server, monkeypatch):
    def gone(reference):
        raise NotFound("ckpt.pt does not exist")

    monkeypatch.setattr(server.engine, "using", gone)
    found = error(server.post("/v1/completions", {"prompt": "a", "model": "tiny"}), 404)
    assert found["code"] == "model_not_found" and "there is no model" in found["message"]


def test_an_unknown_model_is_not_found(server):
    found = error(server.post("/v1/completions", {"prompt": "a", "model": "gpt-9"}), 404)
    assert found["code"] == "model_not_found" and found["param"] == "model"


def test_without_a_model_it_is_not_found_rather_than_a_conflict_that_clients_retry(server):
    server.post("/api/unload_model", {})
    assert error(server.post("/v1/completions", {"prompt": "a"}), 404)["code"] == "model_not_found"


def test_a_full_queue_says_when_to_come_again(server):
    server.engine.max_waiting = 0
    reply = server.post("/v1/completions", {"prompt": "a"})
    assert error(reply, 429)["code"] == "queue_full" and reply.headers["Retry-After"] == "2"


# ---- models and tokens


def test_models_lists_what_answers(server):
    listed = server.get("/v1/models").json
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny"]
    model = server.get("/v1/models/tiny").json
    assert model["object"] == "model" and isinstance(model["created"], int) and model["max_model_len"] == 64
    assert server.get("/v1/models/out/tiny/ckpt.pt").json["id"] == "tiny"
    assert error(server.get("/v1/models/..%2f..%2fetc%2fpasswd"), 404)["code"] == "model_not_found"


def test_the_end_of_text_token_is_one_id(server):
    info = server.get("/tokenizer_info").json
    tokens = server.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}).json
    assert tokens["tokens"] == [server.engine.tokenizer.eot] and tokens["count"] == 1


def test_detokenize_undoes_tokenize(server):
    tokens = server.post("/tokenize", {"content": "naïve 🙂"}).json["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json["prompt"] == "naïve 🙂"


@pytest.mark.parametrize("token", [-1, 99_999, 10**18])
def test_detokenize_refuses_ids_outside_the_vocabulary(server, token):
    found = error(server.post("/detokenize", {"tokens": [1, token]}))
    assert found["param"] == "tokens" and "out of vocabulary" in found["message"]


def test_tokenize_refuses_what_it_cannot(tmp_path):
    server = FakeServer(tmp_path, char_tokenizer("abc"))
    assert "'z'" in error(server.post("/tokenize", {"prompt": "z"}))["message"]
    assert error(server.post("/tokenize", {}))["param"] == "prompt"
    assert server.get("/tokenizer_info").json["eos_token"] is None
