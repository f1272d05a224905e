"""Many clients at once: 16 of OpenAI's stream from two models while a job trains, for a while or for two minutes.

The models are random, but far from indifferent, so that each prompt has a greedy text of its own. What a model says
alone is what it must say in the crowd: no error, nothing of another's text, and [DONE] at the end of every stream.
"""

import json
import string
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx2 as httpx
import pytest
from live_server import Process, until
from openai import OpenAI

CLIENTS, TOKENS, MODELS = 16, 60, ("tiny-shakespeare", "other")
PROMPTS = [f"{letter} said to {letter.lower()}" for letter in string.ascii_uppercase[:12]]
TEXT = "".join(json.dumps({"text": f"{n} and {n} is {2 * n}. " * 8}) + "\n" for n in range(40))
TINY = {"from_scratch": True, "tokenizer": "char", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}
ENDLESS = {"max_iters": 10**6, "eval_interval": 10**6, "log_interval": 1, "eval_iters": 1, "threads": 1}


class Tail(httpx.SyncByteStream):
    """The body of a reply as it comes, and its last bytes."""

    def __init__(self, stream: httpx.SyncByteStream):
        self.stream, self.bytes = stream, b""

    def __iter__(self) -> Iterator[bytes]:
        for data in self.stream:
            self.bytes = (self.bytes + data)[-32:]
            yield data

    def close(self) -> None:
        self.stream.close()


class Watched(httpx.HTTPTransport):
    """A transport that keeps the tail of the last reply."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        reply = super().handle_request(request)
        self.tail = Tail(reply.stream)
        return httpx.Response(reply.status_code, headers=reply.headers, stream=self.tail)


class Client(threading.Thread):
    """A client that streams one text after another until it is told to stop, and notes what is not as it should be."""

    def __init__(self, url: str, number: int, expected: dict[tuple[str, str], str], stop: threading.Event):
        super().__init__()
        self.url, self.number, self.expected, self.stop = url, number, expected, stop
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()  # streams by model

    def run(self) -> None:
        transport, asked = Watched(), list(self.expected)
        at = self.number * 5  # each begins elsewhere and takes both models in turn
        with OpenAI(
            base_url=f"{self.url}/v1", api_key="-", max_retries=0, http_client=httpx.Client(transport=transport)
        ) as client:
            while not self.stop.is_set():
                at = (at + 1) % len(asked)
                try:
                    self._stream(client, transport, *asked[at])
                except Exception as error:
                    self.wrong.append(f"{asked[at]}: {error!r}")

    def _stream(self, client: OpenAI, transport: Watched, model: str, prompt: str) -> None:
        about = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        chunks = list(client.completions.create(**about, stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        if text != self.expected[model, prompt] or {chunk.model for chunk in chunks} != {model}:
            self.wrong.append(f"{model} {prompt!r}: {text!r}")
        if not transport.tail.bytes.endswith(b"data: [DONE]\n\n"):
            self.wrong.append(f"{model} {prompt!r} ends with {transport.tail.bytes!r}")
        self.done[model] += 1


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> Iterator[Process]:
    """Serve two models that tell prompts apart."""
    import torch

    from model import GPT, GPTConfig
    from storage import pretrained
    from storage.tokenizer import char_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("crowded"), char_tokenizer(string.ascii_letters + " .")
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=tokenizer.n_vocab)
    for seed, name in enumerate(MODELS):
        torch.manual_seed(seed)
        model = GPT(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8.0)
        pretrained.export(model, tokenizer, folder / "models" / name)
    process = Process(folder, "--threads", "1", "--drain", "2", "--dtype", "fp32", "--training_priority", "normal")
    yield process
    process.end()


@pytest.fixture(scope="module")
def expected(crowded) -> dict[tuple[str, str], str]:
    """Return what each model says to each prompt when nobody else asks."""
    found = {}
    with OpenAI(base_url=f"{crowded.url}/v1", api_key="-") as client:
        for prompt in PROMPTS:
            for model in MODELS:
                about = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
                found[model, prompt] = client.completions.create(**about).choices[0].text
    assert len(set(found.values())) == len(found)
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_a_crowd_gets_the_texts_that_each_would_get_alone_while_a_job_trains(crowded, expected, seconds):
    with OpenAI(base_url=f"{crowded.url}/v1", api_key="-", timeout=60) as client:
        jobs = client.fine_tuning.jobs
        file = client.files.create(file=("sums.jsonl", TEXT.encode()), purpose="fine-tune")
        job = jobs.create(model="nano", training_file=file.id, extra_body=TINY | ENDLESS)
        until(lambda: jobs.retrieve(job.id).iter_num, 90)
        stop = threading.Event()
        crowd = [Client(crowded.url, number, expected, stop) for number in range(CLIENTS)]
        before = jobs.retrieve(job.id).iter_num
        for one in crowd:
            one.start()
        until(lambda: all(one.done or one.wrong for one in crowd))  # to make 16 clients takes seconds on busy cores
        time.sleep(seconds)
        after = jobs.retrieve(job.id)
        stop.set()
        for one in crowd:
            one.join()
        assert jobs.cancel(job.id).status == "cancelled"
    done = sum((one.done for one in crowd), Counter())
    print(
        f"{done.total()} streams of {TOKENS} tokens in {seconds} s beside {after.iter_num - before} iterations: {done}"
    )
    assert [wrong for one in crowd for wrong in one.wrong] == []
    assert all(one.done.total() > 0 for one in crowd) and set(done) == set(MODELS)
    assert after.status == "running" and after.iter_num > before
