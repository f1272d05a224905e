"""EleutherAI's evaluation harness scores models through the server as it is: multiple choice, whole texts, generation.

Two oracles: a model of zeros, whose perplexity is its vocabulary's size, and the harness's own scores of the
exported folder, without any server.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
from clients import BYTES, TASKS, run

QUESTIONS = (
    ("The sky is", (" blue", " square", " loud"), 0),
    ("Two and two are", (" five", " four", " none"), 1),
    ("Water is", (" dry", " a number", " wet"), 2),
    ("Küche heißt", (" kitchen", " Keller", " 厨房"), 0),
)
TEXTS = ("A short text.", "Once upon a time there was a server 🙂. " * 20)  # the second is longer than the context
NAMES = ("choice", "rolling", "continuation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the tasks and their data."""
    folder = tmp_path_factory.mktemp("harness")
    for name in NAMES:
        shutil.copy(TASKS / f"{name}.yaml", folder)
    questions = [{"question": q, "choices": list(choices), "answer": a} for q, choices, a in QUESTIONS]
    for name, rows in (("choice", questions), ("rolling", [{"text": text} for text in TEXTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Scores:
    """What the harness wrote: its results, and its samples by task."""

    def __init__(self, written: Path):
        self.results = json.loads(next(written.rglob("results_*.json")).read_text())["results"]
        self.samples = {}
        for name in NAMES:
            lines = next(written.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
            self.samples[name] = sorted((json.loads(line) for line in lines), key=lambda s: s["doc_id"])

    def likelihoods(self, name: str) -> list[float]:
        """Return the log-likelihood of every request, in order."""
        return [float(answer[0][0] if name == "choice" else answer[0]) for answer in self.answers(name)]

    def answers(self, name: str) -> list:
        """Return what was answered to every request, in order."""
        return [answer for sample in self.samples[name] for answer in sample["resps"]]


def evaluate(folder: Path, label: str, backend: str, **arguments: object) -> Scores:
    """Run the harness as one would on the command line."""
    about = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["-m", "lm_eval", "run", "--model", backend, "--model_args", about, "--device", "cpu", "--tasks", *NAMES]
    run([*command, "--include_path", str(folder), "--output_path", str(folder / label), "--log_samples"], folder)
    return Scores(folder / label)


@pytest.fixture(scope="module")
def through_server(folder, server):
    """Return a function that scores a model through the server."""

    def score(name: str) -> Scores:
        address = {"base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote"}
        return evaluate(folder, name, "local-completions", model=name, max_length=512, num_concurrent=4, **address)

    return score


@pytest.mark.timeout(300)
def test_a_model_of_zeros_has_the_perplexity_of_its_vocabulary(through_server, server):
    assert server.post("/api/load_model", {"model_path": "models/zero"}).status_code == 200
    scores = through_server("zero")
    assert scores.results["rolling"]["byte_perplexity,none"] == pytest.approx(BYTES, rel=1e-7)  # 32-bit floats
    lengths = [len(choice.encode()) for _, choices, _ in QUESTIONS for choice in choices]
    expected = [-length * math.log(BYTES) for length in lengths]
    assert scores.likelihoods("choice") == pytest.approx(expected, rel=1e-6)


@pytest.mark.timeout(300)
def test_the_scores_are_those_of_the_harness_on_the_exported_model(through_server, server, folder, models):
    assert server.post("/api/load_model", {"model_path": "models/random"}).status_code == 200
    ours = through_server("random")
    there = {"pretrained": models / "models" / "random", "dtype": "float32"}
    peers = evaluate(folder, "peer", "hf", max_length=510, **there)  # of the server's 512 it leaves two
    for name in ("choice", "rolling"):
        assert ours.likelihoods(name) == pytest.approx(peers.likelihoods(name), rel=1e-5)
    assert ours.answers("continuation") == peers.answers("continuation")
    greedy = [[answer[0][1] for answer in scores.answers("choice")] for scores in (ours, peers)]
    assert greedy[0] == greedy[1]
    assert ours.results["choice"]["acc,none"] == peers.results["choice"]["acc,none"]
