"""A chat model made by the server itself: conversations go in as JSONL, and what it learned is what it answers.

A tiny one is trained through OpenAI's client; the README's recipe is followed to the letter.
"""

import json
import re
import shutil
from collections.abc import Iterator

import openai
import pytest
from clients import output
from live_server import ROOT, Process, until
from openai_shapes import checked

ANSWERS = {"Who are you?": "A small model.", "What is red?": "Red is a colour."}
TINY = {"from_scratch": True, "tokenizer": "char", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64}
FAST = {"eval_iters": 1, "sample_tokens": 0, "threads": 1, "batch_size": 16, "learning_rate": 0.01}


def conversations(count):
    """Return conversations that begin with a question of ANSWERS and all go on differently."""
    for i in range(count):
        asked = list(ANSWERS)[i % len(ANSWERS)]
        turns = ((asked, ANSWERS[asked]), (f"{i} + 0?", f"{i}"))
        yield [{"role": role, "content": text} for q, a in turns for role, text in (("user", q), ("assistant", a))]


LINES = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations(60))


@pytest.fixture(scope="module")
def client(server):
    with checked(server.url) as made:
        yield made


@pytest.fixture(scope="module")
def model(client) -> str:
    file = client.files.create(file=("chat.jsonl", LINES.encode()), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.2).status == "processed"
    extra = TINY | FAST | {"max_iters": 200, "eval_interval": 200}
    job = client.fine_tuning.jobs.create(model="nano", training_file=file.id, suffix="chat", extra_body=extra)
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status not in ("queued", "running"), 90)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded", done.error
    return done.fine_tuned_model


@pytest.mark.timeout(150)
@pytest.mark.parametrize("question", list(ANSWERS))
def test_it_answers_what_it_learned_and_streams_the_same(client, model, question):
    messages = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert reply.choices[0].message.content == ANSWERS[question] and reply.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWERS[question]


def test_it_is_the_one_that_chats(client, model):
    assert {found.id for found in client.models.list() if found.chat} >= {model}
    assert client.models.retrieve(model).chat is True and client.models.retrieve("random").chat is False
    with pytest.raises(openai.APIStatusError, match="/v1/completions") as refused:
        client.chat.completions.create(model="random", messages=[{"role": "user", "content": "a"}])
    assert refused.value.status_code == 501


# ---- the recipe of the README


def commands(part: str) -> str:
    """Return the block of shell commands of the README that has `part` in it."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if part in block]
    return found


@pytest.fixture
def alone(tmp_path) -> Iterator[Process]:
    shutil.copytree(ROOT / "models", tmp_path / "models")
    (tmp_path / "data" / "stdlib").mkdir(parents=True)
    shutil.copy(ROOT / "data" / "stdlib" / "prepare.py", tmp_path / "data" / "stdlib")
    process = Process(tmp_path, "--drain", "2", "--training_priority", "normal")
    yield process
    process.end()


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_the_readmes_recipe_makes_a_chat_model(alone, tmp_path):
    (tmp_path / "chat.jsonl").write_text(LINES)
    for part in ("--output_dir out/my_model", "--output_dir out/my_chat"):
        code = commands(part).replace("http://127.0.0.1:5000", alone.url)
        code = code.replace("python api_client.py", f"python {ROOT / 'api_client.py'} --url {alone.url}")
        said = output(["bash", "-e", "-o", "pipefail", "-s"], tmp_path, code)
    assert said.splitlines()[-1] == "A small model."
