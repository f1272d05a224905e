"""Chat completions: conversations in, the assistant's next message out, with a model that knows the chat format."""

import pytest
from fakes import FakeServer, byte_tokenizer, events

from storage.chat_format import end_of_turn, parse_messages, render, with_chat_tokens
from storage.tokenizer import char_tokenizer

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}]


@pytest.fixture(scope="module")
def tokenizer():
    return with_chat_tokens(byte_tokenizer())


@pytest.fixture
def server(tmp_path, tokenizer):
    """Return a server whose model always says "Hello 🙂"."""
    server = FakeServer(tmp_path, tokenizer)
    ids = [*tokenizer.encode("Hello 🙂"), end_of_turn(tokenizer)]
    server.engine.script = lambda prompt, k: ids[k]
    return server


def chat(server, **body):
    reply = server.post(PATH, {"messages": MESSAGES, **body})
    assert reply.status_code == 200, reply.json
    return reply.json


def chunks(server, **body):
    reply = server.post(PATH, {"messages": MESSAGES, "stream": True, **body})
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    *found, done = events(reply)
    assert done == "[DONE]"
    return found


def error(reply, status: int = 400) -> dict:
    assert reply.status_code == status, reply.json
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    return reply.json["error"]


# ---- the reply


def test_a_reply_has_every_key_and_ends_with_the_turn(server, tokenizer):
    reply = chat(server)
    assert reply["id"].startswith("chatcmpl-") and reply["object"] == "chat.completion" and reply["model"] == "tiny"
    assert type(reply["created"]) is int and reply["system_fingerprint"] == "fp_fake"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello 🙂", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert choice["stop_reason"] == end_of_turn(tokenizer)
    prompt, said = len(render(tokenizer, parse_messages(MESSAGES))), len(tokenizer.encode("Hello 🙂")) + 1
    assert reply["usage"]["prompt_tokens"] == prompt and reply["usage"]["completion_tokens"] == said


def test_the_prompt_is_the_conversation_in_the_chat_format(server, tokenizer):
    chat(server)
    text = tokenizer.decode(server.engine.sequences[-1].prompt_ids)
    assert text == "<|system|>Be brief.<|end|><|user|>Hi 🙂<|end|><|assistant|>"


def test_a_content_that_spells_a_special_token_stays_text(server, tokenizer):
    chat(server, messages=[{"role": "user", "content": "<|end|>"}])
    assert server.engine.sequences[-1].prompt_ids.count(end_of_turn(tokenizer)) == 1


def test_contents_may_be_parts_of_text(server):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]
    chat(server, messages=[{"role": "developer", "content": parts}, {"role": "user", "content": "a"}])


def test_the_default_is_the_room_that_the_context_has(server):
    chat(server)
    sequence = server.engine.sequences[-1]
    assert sequence.params.max_new_tokens == 64 - len(sequence.prompt_ids)


@pytest.mark.parametrize(
    "body", [{"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_tokens": 9, "max_completion_tokens": 2}]
)
def test_the_length_can_be_bounded_by_either_name(server, body):
    reply = chat(server, **body)
    assert reply["usage"]["completion_tokens"] == 2 and reply["choices"][0]["finish_reason"] == "length"


def test_stop_strings_seeds_and_several_choices(server):
    reply = chat(server, stop="lo", n=2, seed=7, temperature=0.5)
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["Hel", "Hel"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert [sequence.seed for sequence in server.engine.sequences[-2:]] == [7, 8]


def test_with_ignore_eos_the_turns_end_does_not_end_it(server, tokenizer):
    server.engine.script = lambda prompt, k: end_of_turn(tokenizer)
    assert chat(server, ignore_eos=True, max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_completion_ends_with_the_turn_whose_mark_is_not_shown(server, tokenizer, stream):
    reply = server.post("/api/generate", {"prompt": "Hi", "stream": stream})
    reply = events(reply)[-2] if stream else reply.json
    assert (reply["generated_text"], reply["finish_reason"]) == ("HiHello 🙂", "stop")
    reply = server.post("/v1/completions", {"prompt": "Hi", "stream": stream})
    frames = events(reply)[:-1] if stream else [reply.json]
    assert "".join(frame["choices"][0]["text"] for frame in frames) == "Hello 🙂"
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_text_completion_goes_on_after_the_turn_if_asked_to(server, tokenizer):
    server.engine.script = lambda prompt, k: end_of_turn(tokenizer)
    reply = server.post("/v1/completions", {"prompt": "Hi", "ignore_eos": True, "max_tokens": 2}).json
    assert (reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]) == ("length", 2)


def test_logprobs_are_those_of_what_is_said(server, tokenizer):
    content = chat(server, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "Hello 🙂"
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] < 0 for entry in content)
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}
    assert chat(server, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_unknown_fields_are_ignored_and_named(server):
    reply = server.post(PATH, {"messages": MESSAGES, "foo": 1, "tools": [], "store": False})
    assert reply.status_code == 200 and reply.headers["X-Ignored-Params"] == "foo, store, tools"


# ---- streams


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(server):
    found = chunks(server)
    choices = [chunk["choices"][0] for chunk in found]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello 🙂"
    assert {choice["finish_reason"] for choice in choices[:-1]} == {None}
    assert {(chunk["id"], chunk["object"]) for chunk in found} == {(found[0]["id"], "chat.completion.chunk")}
    assert all("usage" not in chunk for chunk in found)


def test_each_choice_has_one_beginning_and_one_end(server):
    choices = [chunk["choices"][0] for chunk in chunks(server, n=3)]
    assert sorted(c["index"] for c in choices if c["delta"].get("role")) == [0, 1, 2]
    assert sorted(c["index"] for c in choices if c["finish_reason"]) == [0, 1, 2]


def test_usage_comes_in_a_chunk_of_its_own(server):
    *found, last = chunks(server, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in found)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("body", [{}, {"stop": "lo"}, {"max_tokens": 3}])
def test_streamed_logprobs_are_those_of_the_reply(server, body):
    whole = chat(server, logprobs=True, top_logprobs=1, **body)["choices"][0]["logprobs"]["content"]
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks(server, logprobs=True, top_logprobs=1, **body)]
    assert [entry for part in found if part is not None for entry in part["content"]] == whole


def test_a_failure_in_a_stream_is_an_error_frame_without_done(server):
    server.engine.fail_after = 2
    found = events(server.post(PATH, {"messages": MESSAGES, "stream": True}))
    assert set(found[-1]["error"]) == {"message", "type", "param", "code"} and "[DONE]" not in found


# ---- refusals


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": None}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1 message"),
        ({"messages": "Hi"}, "messages", "not a list"),
        ({"messages": [5]}, "messages", "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "messages[0].content"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages", "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "only text"),
        ({"messages": [*MESSAGES, {"role": "user", "content": "x" * 70000}]}, "messages", "maximum context length"),
        ({"messages": [*MESSAGES, {"role": "user", "content": "é" * 60}]}, "messages", "maximum context length"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"max_completion_tokens": 64}, "messages", "maximum context length is 64"),
        ({"logprobs": 5}, "logprobs", "logprobs is 5"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"n": 129}, "n", "at most 128"),
        ({"tools": [{"type": "function"}]}, None, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, None, "response_format is not supported"),
    ],
)
def test_chat_refuses(server, body, param, words):
    given = body if not body or "messages" in body else {"messages": MESSAGES} | body
    found = error(server.post(PATH, given))
    assert words in found["message"] and (param is None or found["param"] == param)
    assert server.engine.sequences == []


def test_a_model_that_completes_text_names_the_route_to_use(tmp_path):
    reply = FakeServer(tmp_path, byte_tokenizer()).post(PATH, {"messages": MESSAGES})
    found = error(reply, 501)
    assert "/v1/completions" in found["message"] and found["type"] == "not_implemented_error"
    assert reply.headers["x-should-retry"] == "false"


def test_a_character_that_the_model_does_not_have_is_named(tmp_path):
    server = FakeServer(tmp_path, with_chat_tokens(char_tokenizer("abc")))
    assert "'z'" in error(server.post(PATH, {"messages": [{"role": "user", "content": "z"}]}))["message"]


def test_the_tokenizer_tells_the_chat_template(server, tmp_path):
    assert "<|end|>" in server.get("/tokenizer_info").json["chat_template"]
    assert FakeServer(tmp_path, byte_tokenizer()).get("/tokenizer_info").json["chat_template"] is None
