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
    """What the harness found: its results, and its samples by task."""

    def __init__(self, found: dict):
        self.results = found["results"]
        self.samples = {name: sorted(found["samples"][name], key=lambda s: s["doc_id"]) for name in NAMES}

    def likelihoods(self, name: str) -> list[float]:
        """Return the log-likelihood of every request, in order."""
        return [float(answer[0][0] if name == "choice" else answer[0]) for answer in self.answers(name)]

    def answers(self, name: str) -> list:
        """Return what was answered to every request, in order."""
        return [answer for sample in self.samples[name] for answer in sample["resps"]]


# The harness's own tasks are left out: to read their ten thousand files takes longer than all else here. Its command
# line, which reads them, is run by test_use_it_with.py.
HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

names, models = json.loads(sys.argv[1])
tasks = TaskManager(include_path=".", include_defaults=False)
found = {
    label: simple_evaluate(model, arguments, tasks=names, device="cpu", task_manager=tasks)
    for label, (model, arguments) in models.items()
}
with open("found.json", "w") as f:
    json.dump({label: {key: each[key] for key in ("results", "samples")} for label, each in found.items()}, f)
"""


@pytest.fixture(scope="module")
def scores(folder, server, models) -> dict[str, Scores]:
    """Return what the harness says of the two models through the server, and of `peer`, which is `random` without."""
    address = {"base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote"}
    through_server = {"max_length": 512, "num_concurrent": 4, **address}
    asked = {name: ("local-completions", {"model": name, **through_server}) for name in ("zero", "random")}
    there = {"pretrained": str(models / "models" / "random"), "dtype": "float32"}
    asked["peer"] = ("hf", {"max_length": 510, **there})  # of the server's 512 it leaves two
    run(["-c", HARNESS, json.dumps([NAMES, asked])], folder)
    return {label: Scores(found) for label, found in json.loads((folder / "found.json").read_text()).items()}


@pytest.mark.timeout(300)
def test_a_model_of_zeros_has_the_perplexity_of_its_vocabulary(scores):
    scores = scores["zero"]
    assert scores.results["rolling"]["byte_perplexity,none"] == pytest.approx(BYTES, rel=1e-7)  # 32-bit floats
    lengths = [len(choice.encode()) for _, choices, _ in QUESTIONS for choice in choices]
    expected = [-length * math.log(BYTES) for length in lengths]
    assert scores.likelihoods("choice") == pytest.approx(expected, rel=1e-6)


@pytest.mark.timeout(300)
def test_the_scores_are_those_of_the_harness_on_the_exported_model(scores):
    ours, peers = scores["random"], scores["peer"]
    for name in ("choice", "rolling"):
        assert ours.likelihoods(name) == pytest.approx(peers.likelihoods(name), rel=1e-5)
    assert ours.answers("continuation") == peers.answers("continuation")
    greedy = [[answer[0][1] for answer in scores.answers("choice")] for scores in (ours, peers)]
    assert greedy[0] == greedy[1]
    assert ours.results["choice"]["acc,none"] == peers.results["choice"]["acc,none"]
