"""The `openai` package, unchanged, completes, chats, embeds and names models: the real app over a fake engine."""

import openai
import pytest
from fakes import FakeEngine, byte_tokenizer
from test_openai_sdk_jobs import Served

from inference.sequence import EngineDown, QueueFull
from storage.chat_format import end_of_turn, with_chat_tokens

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}]


@pytest.fixture(scope="module")
def tokenizer():
    return with_chat_tokens(byte_tokenizer())


@pytest.fixture
def served(tmp_path, tokenizer):
    engine = FakeEngine(tokenizer)
    ids = [*tokenizer.encode("Hello 🙂"), end_of_turn(tokenizer)]
    engine.script = lambda prompt, k: ids[k % len(ids)]
    found = Served(tmp_path, engine)
    yield found
    found.close()


def test_a_chat_and_its_stream(served, client):
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1, n=2)
    assert [choice.message.content for choice in reply.choices] == ["Hello 🙂"] * 2
    assert reply.choices[0].finish_reason == "stop" and reply.choices[0].logprobs.content[0].top_logprobs
    options = {"include_usage": True}
    stream = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, stream_options=options))
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello 🙂"
    assert (
        last.choices == [] and last.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens // 2
    )
    assert served.requests == 2


def test_the_helper_that_puts_a_stream_together(client):
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == stream.get_final_completion().choices[0].message.content == "Hello 🙂"


def test_a_model_that_completes_text_is_not_asked_again(served, client):
    served.engine.tokenizer = byte_tokenizer()
    served.engine.load(served.engine.loads[0])
    with pytest.raises(openai.APIStatusError, match="/v1/completions") as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert refused.value.status_code == 501 and served.requests == 1


def test_a_completion_and_its_stream(client):
    reply = client.completions.create(model="tiny", prompt=["Once", "upon"], max_tokens=3, logprobs=1, echo=True)
    assert len(reply.choices) == 2 and reply.choices[1].text.startswith("upon") and reply.usage.completion_tokens == 6
    stream = client.completions.create(model="tiny", prompt="Once", max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == reply.choices[0].text.removeprefix("Once")


def test_embeddings_come_as_numbers_whichever_way_they_are_sent(client):
    packed = client.embeddings.create(model="tiny", input=["Once", "upon a time"])  # the package asks for base64
    plain = client.embeddings.create(model="tiny", input=["Once", "upon a time"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6) and len(one.embedding) == 4
    assert len(client.embeddings.create(model="tiny", input=[1, 2], dimensions=2).data[0].embedding) == 2
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.embeddings.create(model="tiny", input="")


def test_models_are_listed_retrieved_named_and_deleted(served, client):
    run = served.workspace.run("mine")
    run.folder.mkdir()
    run.checkpoint.write_bytes(b"weights")
    run.config.write_text("{}")
    assert {"tiny", "mine"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("out/mine/ckpt.pt").id == "mine"
    assert client.completions.create(model="mine", prompt="Once", max_tokens=1).model == "mine"
    assert client.models.delete("mine").deleted is True
    for call in (client.models.retrieve, client.models.delete):
        with pytest.raises(openai.NotFoundError):
            call("mine")


def test_what_is_refused_is_not_asked_again(served, client):
    for body in ({"prompt": "x" * 70000}, {"prompt": "a", "n": 129}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", **body)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="a")
    assert served.requests == 3


def test_a_full_queue_is_a_rate_limit(served, client):
    served.engine.max_waiting = 0
    with pytest.raises(openai.RateLimitError):
        client.with_options(max_retries=0).completions.create(model="tiny", prompt="a")
    assert served.requests == 1


@pytest.mark.parametrize("error", [QueueFull("the queue is full", retry_after=1), EngineDown("the engine starts")])
def test_what_is_refused_for_now_is_asked_again_when_the_server_says(served, client, error):
    errors, submit = [error], served.engine.submit

    def refuse_once(*given, **more):
        if errors:
            raise errors.pop()
        return submit(*given, **more)

    served.engine.submit = refuse_once
    reply = client.completions.with_raw_response.create(model="tiny", prompt="Once", max_tokens=2)
    assert reply.retries_taken == 1 and served.requests == 2
    assert reply.parse().usage.completion_tokens == 2
