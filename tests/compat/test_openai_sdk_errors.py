"""What the `openai` package raises when the real server process refuses, and that it asks again where that helps.

One server with a key, a list of allowed models and room for one stream; its steps can be slowed.
"""

import os
import signal
from collections.abc import Iterator

import openai
import pytest
from live_server import FAULTY, Process, set_fault, until
from openai import OpenAI
from openai_shapes import checked

NAME = "tiny-shakespeare"


@pytest.fixture(scope="module")
def strict(models, tmp_path_factory) -> Iterator[Process]:
    root = tmp_path_factory.mktemp("strict")
    (root / "models").symlink_to(models / "models")
    flags = ("--threads", "1", "--drain", "2", "--api_key", "secret", "--max_streams", "1", "--model_allow_list", NAME)
    process = Process(root, *flags, script=FAULTY)
    yield process
    process.end()


@pytest.fixture
def client(strict):
    with checked(strict.url, api_key="secret") as made:
        yield made


def refusal(error, call, **body):
    with pytest.raises(error) as refused:
        call(**body)
    assert set(refused.value.body) == {"message", "type", "param", "code"} and refused.value.request_id
    return refused.value


def test_a_wrong_key_is_an_authentication_error(strict):
    with checked(strict.url, api_key="wrong") as stranger:
        assert refusal(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"


def test_what_is_wrong_is_a_bad_request_that_names_the_field(client):
    complete = client.completions.create
    assert refusal(openai.BadRequestError, complete, model=NAME, prompt="a", temperature=-1).param == "temperature"
    long = refusal(openai.BadRequestError, complete, model=NAME, prompt=[1] * 600)
    assert long.code == "context_length_exceeded" and "maximum context length is 512 tokens" in long.message
    assert refusal(openai.BadRequestError, client.files.create, file=b"a", purpose="").param == "purpose"


def test_what_is_not_there_is_not_found(client):
    complete = client.completions.create
    assert refusal(openai.NotFoundError, complete, model="nobody", prompt="a").code == "model_not_found"
    for call, wanted in (
        (client.models.retrieve, "nobody"),
        (client.files.retrieve, "file-nope"),
        (client.fine_tuning.jobs.retrieve, "ftjob-nope"),
    ):
        with pytest.raises(openai.NotFoundError):
            call(wanted)


def test_a_model_that_is_not_allowed_is_a_permission_error(client):
    refused = refusal(openai.PermissionDeniedError, client.completions.create, model="models/zero", prompt="a")
    assert "allow list" in refused.message and refused.type == "permission_error"


def test_a_damaged_model_cannot_be_processed(server):
    folder = server.root / "out" / "damaged"
    folder.mkdir(parents=True)
    (folder / "ckpt.pt").write_bytes(b"no checkpoint")
    with checked(server.url) as client:
        body = {"model": "damaged", "prompt": "a"}
        assert refusal(openai.UnprocessableEntityError, client.completions.create, **body).code == "not_loadable"


def test_a_busy_server_says_when_to_ask_again_and_then_answers(strict):
    with OpenAI(base_url=f"{strict.url}/v1", api_key="secret") as client:
        set_fault(strict, "slow")
        stream = client.completions.create(model=NAME, prompt="Once", max_tokens=500, stream=True)
        try:
            hurried = client.with_options(max_retries=0).completions
            refused = refusal(openai.RateLimitError, hurried.create, model=NAME, prompt="a")
            assert refused.code == "queue_full" and refused.response.headers["retry-after"] == "1"
            stream.close()
            patient = client.with_options(max_retries=5).completions
            assert patient.create(model=NAME, prompt="a", max_tokens=2).usage.completion_tokens == 2
        finally:
            (strict.root / "fault").unlink()
            stream.close()


@pytest.mark.timeout(120)
def test_a_client_outlives_a_worker_that_is_killed(strict, client):
    before = strict.worker()
    os.kill(before, signal.SIGKILL)
    patient = client.with_options(max_retries=12).completions
    assert patient.create(model=NAME, prompt="a", max_tokens=2).usage.completion_tokens == 2
    assert until(strict.worker) != before
