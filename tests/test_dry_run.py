"""Dry runs: what a training will be before it starts, from its tokens and three iterations, and nothing left behind."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeServer, byte_tokenizer

import dry_run
from storage.runs import Workspace
from storage.token_files import BEGINS, LEARNED
from training.config import TrainConfig, resolve
from training.dry_run_process import DryRunFailed, try_out
from training.preflight import example_lengths, expected_seconds, hashes, overlap, warnings

TINY = {"dataset": "sums", "tokenizer": "char", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
TINY |= {"batch_size": 4, "max_iters": 5000, "dtype": "fp32", "device": "cpu", "output_dir": "out/a"}
FINE = {"epochs": 2.0, "train_bytes": 50_000, "val_tokens": 10_000, "duplicate_rate": 0.01, "leak_rate": 0.0}
FINE |= {"cut_rate": None}
FINE |= {
    "start_loss": 4.1,
    "expected_start_loss": 4.0,
    "uniform_loss": 4.0,
    "peak_memory_bytes": 1,
    "expected_seconds": 9,
}


@pytest.fixture
def workspace(tmp_path):
    (tmp_path / "data" / "sums").mkdir(parents=True)
    text = "".join(f"{a} and {b} make {a + b}.\n" for a in range(30) for b in range(30))
    (tmp_path / "data" / "sums" / "sums.txt").write_text(text)
    return Workspace(tmp_path)


def tried(workspace, capsys, **fields) -> tuple[int, dict]:
    flags = [part for key, value in (TINY | fields).items() for part in (f"--{key}", str(value))]
    code = dry_run.main(["--root", str(workspace.root), *flags])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_dry_run_tells_tokens_epochs_time_memory_and_losses_and_leaves_no_run(workspace, capsys):
    code, found = tried(workspace, capsys)
    assert code == 0 and not workspace.out.exists()
    assert found["epochs"] == pytest.approx(5000 * 4 * 16 / found["train_tokens"])
    assert found["start_loss"] == pytest.approx(found["expected_start_loss"], abs=0.3)
    assert found["expected_start_loss"] == pytest.approx(math.log(19), abs=0.2)
    assert found["expected_seconds"] > 5000 * found["seconds_per_iteration"] > 0 and found["peak_memory_bytes"] > 1e7
    assert "it will memorise" in found["warnings"][0] and "kB" in found["warnings"][0]


def test_the_bytes_of_the_training_text_are_not_those_of_vals_tokens(workspace, capsys):
    folder = workspace.data / "two"
    folder.mkdir()
    text = "".join(f"{i} and so on, " for i in range(300))
    (folder / "text.txt").write_text(text)
    (folder / "val.txt").write_text("".join(chr(0x4E00 + i) for i in range(200)))  # bytes alone are its tokens
    _, found = tried(workspace, capsys, dataset="two", tokenizer="bpe:280")
    assert found["train_bytes"] == pytest.approx(len(text), abs=1)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dataset": "nobody"}, "there is no dataset"),
        ({"block_size": 100_000 // 2}, "tokens"),
        ({"device": "cuda:77"}, "cuda devices"),
        ({"max_iters": 0}, "max_iters is 0"),
    ],
)
def test_what_would_fail_is_told_in_a_sentence(workspace, capsys, fields, sentence):
    code, found = tried(workspace, capsys, **fields)
    assert code == 2 and sentence in found["error"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_dry_run_of_several_processes_takes_as_many(workspace):
    config = resolve(TrainConfig.parse(TINY | {"nproc_per_node": 2, "optimizer": "adamw", "shard": True}))
    found, alone = (try_out(workspace, c) for c in (config, resolve(TrainConfig.parse(TINY | {"optimizer": "adamw"}))))
    assert found["start_loss"] == pytest.approx(alone["start_loss"], abs=1e-4)
    assert found["peak_memory_bytes"] > 1.5 * alone["peak_memory_bytes"]
    with pytest.raises(DryRunFailed, match="tokens"):
        try_out(workspace, config.model_copy(update={"block_size": 50_000}))


def test_a_run_that_has_begun_is_not_tried(workspace, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"init_from": "resume"}))
    assert dry_run.main(["--root", str(tmp_path), "--config", str(tmp_path / "config.json")]) == 2
    assert "has not begun" in capsys.readouterr().out


def splits(train, val):
    arrays = {"train": np.array(train, np.uint16), "val": np.array(val, np.uint16)}
    return SimpleNamespace(**arrays, bytes_per_token=10.0, train_mask=None, val_mask=None)


def test_text_that_is_there_again_is_found_wherever_it_stands():
    random = np.random.default_rng(1)
    once, twice = random.integers(0, 500, 2000), random.integers(0, 500, 1000)
    found = overlap(splits([*once, *twice, 7, 7, 7, *twice], [*random.integers(0, 500, 500), *once[3:503]]))
    assert found["duplicate_rate"] == pytest.approx(0.5, abs=0.01) and found["leak_rate"] == pytest.approx(
        0.5, abs=0.02
    )


def test_different_text_has_nothing_in_common_and_too_little_has_no_rate():
    random = np.random.default_rng(2)
    apart = overlap(splits(random.integers(0, 500, 5000), random.integers(0, 500, 500)))
    assert apart == {"duplicate_rate": 0.0, "leak_rate": 0.0}
    assert overlap(splits([1, 2, 3], [1])) == {"duplicate_rate": None, "leak_rate": None}


def examples(*texts: list[int]):
    """Return the tokens and the mask of examples."""
    parts = [np.array([BEGINS] + [LEARNED] * (len(text) - 1), np.uint8) for text in texts]
    return np.array([token for text in texts for token in text], np.uint16), np.concatenate(parts)


def test_examples_are_the_same_only_as_wholes():
    train, train_mask = examples([1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 3], [0, 0], [0, 0, 0])
    val, val_mask = examples([5, 6], [2, 3], [6, 5], [1, 2])
    given = SimpleNamespace(train=train, val=val, train_mask=train_mask, val_mask=val_mask, bytes_per_token=1.0)
    assert overlap(given) == {"duplicate_rate": pytest.approx(2 / 6), "leak_rate": 1 / 4}
    assert example_lengths(train_mask).tolist() == [3, 3, 2, 3, 2, 3]


def test_a_dry_run_of_chats_says_so_and_what_of_them_is_learned(workspace, capsys):
    asked = [{"role": "user", "content": "and " * 9}, {"role": "assistant", "content": "no"}]
    lines = [json.dumps({"messages": [*asked, {"role": "user", "content": str(i)}]}) + "\n" for i in range(40)]
    (workspace.data / "chats").mkdir()
    (workspace.data / "chats" / "a.jsonl").write_text("".join(lines * 2))
    code, found = tried(workspace, capsys, dataset="chats")
    assert code == 0 and (found["format"], found["duplicate_rate"], found["cut_rate"]) == ("chat", 1.0, 1.0)
    assert found["learned_tokens"] == 3 * 72 < found["train_tokens"] / 10
    assert any("longer than a window of 16 tokens" in warning for warning in found["warnings"])
    assert tried(workspace, capsys)[1]["format"] == "text"


def test_hashes_tell_orders_and_zeros_apart():
    assert len(set(hashes(np.array([0, 0, 1, 0, 1, 1, 0, 0], np.uint16), 3).tolist())) == 6


def test_the_time_counts_evaluations():
    config = resolve(TrainConfig.parse(TINY | {"max_iters": 100, "eval_interval": 50, "eval_iters": 10}))
    assert expected_seconds(config, 3.0) == pytest.approx(100 * 3 + 3 * 2 * 10 * 1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epochs": 400.0}, "400 epochs over 50kB: it will memorise"),
        ({"epochs": 0.1}, "10 %"),
        ({"val_tokens": 50}, "noisy"),
        ({"duplicate_rate": 0.3}, "30 % of the training text is there more than once"),
        ({"leak_rate": 0.2}, "20 % of the validation text"),
        ({"cut_rate": 0.5}, "50 % of the examples are longer than a window of 16"),
        ({"start_loss": 5.0}, "starts at a loss of 5.00, not near 4.00"),
        ({"start_loss": 5.0, "expected_start_loss": None}, "worse than guessing"),
        ({"peak_memory_bytes": 10**15}, "of memory"),
        ({"expected_seconds": 90_000}, "1d01h"),
    ],
)
def test_each_danger_has_a_warning_and_a_sound_training_has_none(wrong, words):
    assert warnings(FINE, 16) == []
    (warning,) = warnings(FINE | wrong, 16)
    assert words in warning


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('preparing'); print('{\"error\": \"too little text\"}')", "too little text"),
        ("raise SystemExit(3)", "code 3"),
        ("import os; os.kill(os.getpid(), 9)", "memory"),
        ("import time; time.sleep(60)", "not done after"),
    ],
)
def test_a_trial_that_fails_says_why(workspace, tmp_path, code, words):
    script = tmp_path / "trial.py"
    script.write_text(code)
    with pytest.raises(DryRunFailed, match=words):
        try_out(workspace, resolve(TrainConfig.parse(TINY)), 0.5 if "sleep" in code else 30, script)


def test_a_trial_takes_no_more_memory_than_it_may(workspace, tmp_path):
    script = tmp_path / "trial.py"
    script.write_text(
        "import json, resource, time; time.sleep(0.2)\n"
        "print(json.dumps({'bounds': resource.getrlimit(resource.RLIMIT_DATA)}))"
    )
    found = try_out(workspace, resolve(TrainConfig.parse(TINY)), 30, script, memory=2**30)
    assert found == {"bounds": [2**30, 2**30]}


def test_a_trial_answers_with_its_last_line_and_gets_the_config(workspace, tmp_path):
    script = tmp_path / "trial.py"
    script.write_text("import json, sys; print('...'); print(json.dumps(json.load(open(sys.argv[2]))))")
    config = resolve(TrainConfig.parse(TINY))
    assert try_out(workspace, config, 30, script) == config.given()


# ---- over HTTP


@pytest.fixture
def server(workspace):
    return FakeServer(workspace.root, byte_tokenizer())


def test_a_dry_run_over_http_starts_nothing(server, monkeypatch):
    monkeypatch.setattr("web.job_routes.try_out", lambda *_, **__: {"epochs": 2.0, "warnings": []})
    reply = server.post("/api/train", TINY | {"dry_run": True}).json
    assert reply["dry_run"] == {"epochs": 2.0, "warnings": []} and reply["config"]["max_iters"] == 5000
    assert server.get("/api/jobs").json == {"jobs": []} and not server.workspace.run("a").folder.exists()
    assert server.post("/api/train", TINY | {"dry_run": False}).json["message"] == "Training started"
    assert (
        "run on this machine now: 1;"
        in server.post("/api/train", TINY | {"dry_run": True}).json["dry_run"]["warnings"][0]
    )


@pytest.mark.parametrize(
    ("wrong", "status"),
    [({"dataset": "nobody"}, 404), ({"dry_run": "yes"}, 400), ({"n_head": 3}, 400), ({"output_dir": "/tmp/x"}, 400)],
)
def test_a_wrong_dry_run_is_refused_before_a_process_starts(server, monkeypatch, wrong, status):
    monkeypatch.setattr("web.job_routes.try_out", lambda *_, **__: pytest.fail("it was started"))
    assert server.post("/api/train", TINY | {"dry_run": True} | wrong).status_code == status


def test_a_dry_run_that_fails_is_422_and_one_goes_on_at_a_time(server, monkeypatch):
    def nested(workspace, config, memory):
        assert server.post("/api/train", TINY | {"dry_run": True}).status_code == 409
        raise DryRunFailed("too little text")

    monkeypatch.setattr("web.job_routes.try_out", nested)
    for _ in range(2):
        reply = server.post("/api/train", TINY | {"dry_run": True})
        assert reply.status_code == 422 and reply.json["error"] == "too little text"
