"""train.py: it learns, resumes to the last bit, stops when asked, and refuses what cannot work before it starts."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from two_processes import train_in_two

import train
from learning import start
from model import GPTConfig
from storage import checkpoints, registry
from storage.checkpoint_files import bring_back
from storage.datasets import Splits
from storage.errors import NoSpace
from storage.registry import BUNDLED
from storage.runs import Run, Workspace
from storage.tokenizer import char_tokenizer
from training import metrics
from training.config import ConfigError, TrainConfig, resolve
from training.job import Job
from training.starting_point import check_fit

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"{a} and {b} make {a + b}, or {a * b} if you multiply.\n" for a in range(30) for b in range(30))
TINY = {"dataset": "sums", "tokenizer": "char", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
TINY |= {"batch_size": 4, "eval_interval": 6, "eval_iters": 2, "log_interval": 1, "max_iters": 12, "sample_tokens": 4}
TINY |= {"dtype": "fp32", "device": "cpu", "optimizer": "adamw", "learning_rate": 0.01}


class Place:
    """A workspace with a small dataset, in which train.py runs in this process."""

    def __init__(self, root: Path):
        self.workspace = Workspace(root)
        (root / "data" / "sums").mkdir(parents=True)
        (root / "data" / "sums" / "sums.txt").write_text(TEXT)
        self.before = None

    def argv(self, name: str, **fields) -> list[str]:
        flags = {"output_dir": f"out/{name}"} | (fields if "init_from" in fields else TINY | fields)
        parts = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        return ["--root", str(self.workspace.root), *parts]

    def train(self, name: str, **fields) -> int:
        return train.main(self.argv(name, **fields))

    def run(self, name: str) -> Run:
        return self.workspace.run(name)

    def result(self, name: str) -> dict:
        return json.loads(self.run(name).result.read_text())

    def state(self, name: str) -> dict:
        return checkpoints.load_training_state(self.run(name).checkpoint)

    def losses(self, name: str) -> list[tuple]:
        """Every loss of a run, as the bits of its float."""
        bits = lambda x: None if x is None else float(x).hex()  # noqa: E731
        rows = metrics.read(self.run(name).metrics)
        return [(r["iter_num"], bits(r.get("loss")), bits(r.get("val_loss")), bits(r.get("grad_norm"))) for r in rows]


@pytest.fixture
def place(tmp_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Place(tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop_at(monkeypatch, iteration: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal right after an iteration."""
    update = train.Trainer.update

    def updated(self):
        result = update(self)
        if self.iter_num == iteration:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(train.Trainer, "update", updated)


def same_weights(a: dict, b: dict) -> bool:
    return a["model"].keys() == b["model"].keys() and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


# ---- a whole run


def test_a_run_learns_and_leaves_everything_in_its_folder(place, capsys):
    assert place.train("a", max_iters=48, learning_rate=0.01, optimizer="muon") == 0
    run, rows = place.run("a"), metrics.read(place.run("a").metrics)
    assert [r["iter_num"] for r in rows] == list(range(49)) and "val_loss" in rows[0] and "loss" not in rows[0]
    untrained = math.log(place.state("a")["model_args"]["vocab_size"])
    assert rows[0]["val_loss"] == pytest.approx(untrained, abs=0.2) and rows[-1]["val_loss"] < 0.6 * untrained
    assert {"train_loss", "val_perplexity", "val_bits_per_byte", "tokens_per_second", "memory_bytes"} <= rows[-1].keys()
    assert {"learning_rate", "grad_norm"} <= rows[-1].keys() and 0 < rows[-1]["mfu"] < 1 < rows[-1]["flops_per_second"]
    samples = metrics.read(run.samples)
    assert [s["iter_num"] for s in samples] == [6, 12, 18, 24, 30, 36, 42, 48] and len(
        {s["prompt"] for s in samples}
    ) == 1
    assert place.result("a")["state"] == "succeeded" and place.result("a")["best_val_loss"] == rows[-1]["best_val_loss"]
    assert "48/48  loss" in capsys.readouterr().out


def test_a_little_text_is_enough_to_validate_on(place):
    (place.workspace.data / "sums" / "sums.txt").write_text(TEXT[:300])
    assert place.train("a", block_size=64) == 0
    assert "val_loss" in metrics.last(place.run("a").metrics)
    assert place.train("b", block_size=290) == 2, "and not enough to train on"


def test_the_checkpoint_loads_as_a_model_with_its_tokenizer_and_no_dataset(place):
    place.train("a")
    (place.workspace.data / "sums" / "sums.txt").unlink()
    for path in ("out/a/ckpt.pt", "out/a/best.pt", "out/a"):
        loaded = checkpoints.load_model(registry.resolve(place.workspace, model_path=path), place.workspace)
        assert loaded.model.config.n_layer == 2 and loaded.tokenizer.decode(loaded.tokenizer.encode("1 and")) == "1 and"
        assert loaded.iter_num == 12 and loaded.config["dataset"] == "sums"


def test_one_iteration_leaves_a_checkpoint_and_so_does_a_loss_that_never_improves(place):
    assert place.train("a", max_iters=1) == 0
    assert place.state("a")["iter_num"] == 1
    assert place.train("b", learning_rate=1e-9) == 0
    assert place.state("b")["iter_num"] == 12


def test_the_same_weights_write_the_same_sample_at_each_evaluation(place):
    place.train("a", learning_rate=1e-9, sample_prompt="1 and", sample_tokens=11)
    texts = [row["text"] for row in metrics.read(place.run("a").samples)]
    assert len(texts) == 2 and len(texts[0]) == 11 and len(set(texts)) == 1


def test_training_is_the_same_twice_and_differs_by_seed(place):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        place.train(name, seed=seed, dropout=0.1)
    assert place.losses("a") == place.losses("b") != place.losses("c")


def test_evaluation_and_samples_change_nothing_in_the_training(place):
    place.train("often", dropout=0.1, eval_interval=2, eval_iters=3)
    place.train("rarely", dropout=0.1, eval_interval=12, sample_tokens=0)
    assert same_weights(place.state("often"), place.state("rarely"))


def test_accumulated_steps_make_the_same_batch(place):
    place.train("whole", batch_size=8, learning_rate=1e-3)
    place.train("parts", batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-3)
    whole, parts = (place.state(name)["model"] for name in ("whole", "parts"))
    assert all(torch.allclose(whole[k], parts[k], atol=1e-5) for k in whole)


# ---- stop and resume


@pytest.mark.fault("F5", "SIGTERM in the middle of a run, then resume")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_and_resumed_run_is_bitwise_the_uninterrupted_one(place, monkeypatch, optimizer):
    fields = {"max_iters": 20, "dropout": 0.1, "optimizer": optimizer}
    place.train("straight", **fields)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert place.train("stopped", **fields) == 0
    assert (place.result("stopped")["state"], place.result("stopped")["iter_num"]) == ("stopped", 8)
    assert place.train("stopped", init_from="resume") == 0
    assert place.losses("stopped") == place.losses("straight") and len(place.losses("straight")) == 21
    assert same_weights(place.state("stopped"), place.state("straight"))
    assert place.run("stopped").samples.read_text() == place.run("straight").samples.read_text()


def test_a_run_killed_between_checkpoints_repeats_the_lost_iterations_exactly(place, monkeypatch):
    class Killed(BaseException):
        pass

    place.train("straight")
    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoints, "save_checkpoint", save_until(6, Killed))
        patch.setattr(train.Outcome, "__exit__", lambda self, kind, error, trace: kind is Killed)
        place.train("killed")
    assert len(place.losses("killed")) == 13 and place.state("killed")["iter_num"] == 6
    assert place.train("killed", init_from="resume") == 0
    assert place.losses("killed") == place.losses("straight")


def save_until(last: int, error: BaseException | type[BaseException]):
    save = checkpoints.save_checkpoint

    def saved(path, state, **how):
        if state["iter_num"] > last:
            raise error
        save(path, state, **how)

    return saved


def test_a_run_goes_back_to_a_checkpoint_that_was_kept_and_repeats_itself_bitwise(place):
    assert place.train("a", keep_every=2, eval_interval=3) == 0
    run = place.run("a")
    losses, last = place.losses("a"), place.state("a")
    assert [path.name for path in run.kept()] == ["ckpt-12.pt", "ckpt-6.pt"]
    bring_back(run.folder, 6)
    assert place.train("a", init_from="resume") == 0
    assert place.losses("a") == losses and same_weights(place.state("a"), last)
    assert place.train("b", init_from="out/a/ckpt-6.pt", dataset="sums", max_iters=1, eval_interval=1) == 0


def test_a_finished_run_goes_on_with_more_iterations(place):
    place.train("a", max_iters=6)
    assert place.train("a", init_from="resume", max_iters=9) == 0
    assert place.state("a")["iter_num"] == 9
    saved = json.loads(place.run("a").config.read_text())
    assert (saved["max_iters"], saved["lr_decay_iters"], saved["init_from"]) == (9, 6, "scratch")


def evaluated_as(monkeypatch, *val_losses: float) -> None:
    """Make the evaluations of a run find these validation losses."""
    found = iter([each for val in val_losses for each in (1.0, val)])
    monkeypatch.setattr(train.Trainer, "loss_on", lambda self, tokens: next(found))


def test_a_run_ends_when_its_validation_loss_has_not_improved_for_long_enough(place, monkeypatch, capsys):
    evaluated_as(monkeypatch, 0.5, 3.0, 2.0, 2.1, 2.0)
    assert place.train("a", max_iters=60, patience=2) == 0
    note = "stopped early at iteration 24: val loss has not improved for 2 evaluations"
    assert place.result("a") | {"state": "succeeded", "note": note, "iter_num": 24} == place.result("a")
    assert note in capsys.readouterr().out and place.state("a")["iter_num"] == 24
    assert place.result("a")["best_val_loss"] == 2.0 and checkpoints.load_training_state(place.run("a").checkpoint)


def test_a_resumed_run_has_waited_as_long_as_before(place, monkeypatch):
    stop_at(monkeypatch, 20)
    evaluated_as(monkeypatch, 4.0, 2.0, 2.5, 2.4, 2.3, 1.0)
    assert place.train("a", max_iters=60, patience=3) == 0
    assert place.result("a")["state"] == "stopped" and place.state("a")["waited"] == 2
    assert place.train("a", init_from="resume") == 0
    assert place.result("a")["iter_num"] == 24 and "3 evaluations" in place.result("a")["note"]


def test_a_run_that_stopped_early_and_is_resumed_waits_anew(place, monkeypatch):
    evaluated_as(monkeypatch, 4.0, 2.0, 2.5, 2.6, 2.7)
    place.train("a", max_iters=24, patience=1)
    assert place.result("a")["iter_num"] == 12
    place.train("a", init_from="resume")
    assert place.result("a")["iter_num"] == 18 and "1 evaluation" in place.result("a")["note"]


def test_a_signal_during_an_evaluation_saves_at_once_and_evaluates_after_the_resume(place, monkeypatch):
    place.train("straight")
    loss_on = train.Trainer.loss_on

    def interrupted(self, tokens):
        self.stop.requested |= self.iter_num == 6
        return loss_on(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "loss_on", interrupted)
        place.train("stopped")
    assert place.result("stopped")["iter_num"] == 6 and place.losses("stopped")[-1][2] is None
    place.train("stopped", init_from="resume")
    straight = place.losses("straight")
    assert place.losses("stopped")[7:] == [(6, None, straight[6][2], None), *straight[7:]]


def test_a_signal_between_accumulated_steps_loses_no_finished_iteration(place, monkeypatch):
    fields = {"gradient_accumulation_steps": 3, "dropout": 0.1}
    place.train("straight", **fields)
    interrupted = train.Trainer.interrupted

    def interrupting(self):
        self.stop.requested |= self.iter_num == 7
        return interrupted(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "interrupted", interrupting)
        place.train("stopped", **fields)
    assert place.state("stopped")["iter_num"] == 7
    place.train("stopped", init_from="resume")
    assert place.losses("stopped") == place.losses("straight")


@pytest.mark.fault("F4", "the newest checkpoint damaged before a resume")
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(place, capsys):
    place.train("a")
    data = bytearray(place.run("a").checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    place.run("a").checkpoint.write_bytes(data)
    assert place.train("a", init_from="resume") == 0
    assert "ckpt.pt is damaged" in (out := capsys.readouterr().out) and "resuming from out/a/ckpt.prev.pt" in out
    assert place.state("a")["iter_num"] == 12


# ---- fine-tuning


def test_fine_tuning_starts_from_the_weights_of_a_run_with_its_tokenizer(place):
    place.train("base", max_iters=24, learning_rate=0.01)
    start = metrics.read(place.run("base").metrics)[-1]["val_loss"]
    for name, source in (("t1", "base"), ("t2", "base/best"), ("t3", "out/base/ckpt.pt")):
        fields = {"dataset": "sums", "init_from": source, "max_iters": 2, "block_size": 8, "dropout": 0.2}
        assert place.train(name, **fields, window=8, batch_size=4, eval_iters=5, sample_tokens=0) == 0
        state = place.state(name)
        assert state["model_args"]["block_size"] == 8 and state["model_args"]["dropout"] == 0.2
        assert state["model"]["transformer.wpe.weight"].shape == (8, 32)
        assert metrics.read(place.run(name).metrics)[0]["val_loss"] < start + 0.5
        assert place.run(name).tokenizer.read_bytes() == place.run("base").tokenizer.read_bytes()


def test_a_window_below_the_context_leaves_the_context_as_it_is(place):
    assert place.train("a", window=8, max_iters=2) == 0
    assert place.state("a")["model_args"]["block_size"] == 16


# ---- refusals


REFUSED = {
    "an unknown device": ({"device": "cuda:7"}, "device is cuda:7, and this machine has"),
    "fp16 on a cpu": ({"dtype": "fp16"}, "dtype is fp16, which needs a cuda device"),
    "no dataset": ({"dataset": "nowhere"}, 'there is no dataset "nowhere"'),
    "too little text": ({"block_size": 60_000}, "tokens"),
    "a model beyond all memory": ({"n_layer": 200, "n_embd": 16384}, "GB to train"),
    "a bpe larger than the text allows": ({"tokenizer": "bpe:60000"}, "too small for the tokenizer"),
    "a foreign path": ({"output_dir": "out/../../x"}, "output_dir is"),
    "a run that is not there": ({"init_from": "nowhere", "dataset": "sums"}, "nowhere"),
    "nothing to resume": ({"init_from": "resume"}, "train_config.json does not exist"),
}


@pytest.mark.parametrize("fields, sentence", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence_with_exit_code_2(place, capsys, fields, sentence):
    assert place.train("a", **fields) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and "\n" not in said and not place.run("a").folder.exists()


def test_a_refusal_in_a_folder_that_a_server_made_is_told_in_its_result(place, capsys):
    place.run("a").folder.mkdir(parents=True)
    assert place.train("a", block_size=60_000) == 2
    assert place.result("a") | {"finished": 0} == {
        "state": "failed", "iter_num": 0, "best_val_loss": None, "note": None, "exit_code": 2, "finished": 0,
        "error": capsys.readouterr().err.strip().removeprefix("train.py: "),
    }  # fmt: skip


def test_a_model_and_data_of_different_tokenizers_are_refused(place, capsys):
    folder = place.workspace.data / "chars"
    folder.mkdir()
    ids = np.arange(1000, dtype="<u2") % 5
    ids.tofile(folder / "train.bin")
    ids.tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"stoi": {c: i for i, c in enumerate("abcde")}}))
    place.train("base", max_iters=1)
    assert place.train("a", init_from="base", dataset="chars", max_iters=1) == 2
    assert "holds only tokens of 5 characters and no text" in capsys.readouterr().err
    assert place.train("b", dataset="chars", tokenizer="auto", max_iters=1) == 0


def test_a_trained_model_is_not_overwritten_unasked(place, capsys):
    place.train("a", max_iters=1)
    assert place.train("a", max_iters=2) == 2
    assert "out/a holds a trained model" in capsys.readouterr().err
    assert place.state("a")["iter_num"] == 1 and place.result("a")["state"] == "succeeded"
    assert place.train("a", max_iters=2, overwrite="true") == 0
    assert place.state("a")["iter_num"] == 2 and len(list((place.workspace.out / ".trash").iterdir())) == 1


def test_two_trainers_never_share_a_folder(place, capsys):
    with train.claim(place.run("a"), train.parse(place.argv("a"), ROOT)[0]):
        assert place.train("a") == 2
    assert "another process is training in out/a" in capsys.readouterr().err


# ---- failures on the way


def test_a_loss_that_is_no_number_fails_and_never_reaches_a_checkpoint(place, monkeypatch):
    update = train.Trainer.update

    def spoiling(self):
        if self.iter_num == 9:
            with torch.no_grad():
                self.model.lm_head.weight[0] = math.nan
        return update(self)

    monkeypatch.setattr(train.Trainer, "update", spoiling)
    assert place.train("a") == 1
    often = "after 4 roll-backs and with 1/16 of learning_rate"
    assert place.result("a")["error"] == f"the loss is nan at iteration 9, {often}; lower learning_rate"
    assert place.state("a")["iter_num"] == 6 and all(p.isfinite().all() for p in place.state("a")["model"].values())


def test_a_gradient_that_is_no_number_moves_no_weight(place, monkeypatch):
    def spoiling(self):
        if self.iter_num == 7:
            for p in self.model.parameters():
                p.grad = torch.full_like(p, math.inf)
        with torch.no_grad():
            before = [p.clone() for p in self.model.parameters()]
            try:
                return step(self)
            except train.Diverged:
                assert all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True))
                raise

    step = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", spoiling)
    assert place.train("a") == 1
    assert "the gradient's norm is inf at iteration 7" in place.result("a")["error"]
    assert place.state("a")["iter_num"] == 6


def test_a_weight_that_is_no_number_is_never_saved(place, monkeypatch):
    step = train.Trainer.step

    def spoiling(self):
        result = step(self)
        if self.iter_num == 8:
            self.stop.requested = True
            with torch.no_grad():
                self.model.lm_head.weight[0] = math.nan
        return result

    monkeypatch.setattr(train.Trainer, "step", spoiling)
    assert place.train("a") == 0
    assert (place.result("a")["state"], place.state("a")["iter_num"]) == ("stopped", 6)
    assert "a weight is no longer a number at iteration 8" in place.result("a")["note"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["cuda", "python"])
def test_running_out_of_memory_says_what_to_lower(place, monkeypatch, error):
    def full(self):
        raise error

    monkeypatch.setattr(train.Trainer, "update", full)
    assert place.train("a") == 1
    assert place.result("a")["error"] == "out of memory; lower batch_size (4) or window, or choose a smaller model"


def test_a_full_disk_fails_the_run_with_that_reason_and_keeps_the_last_checkpoint(place, monkeypatch):
    monkeypatch.setattr(train.checkpoints, "save_checkpoint", save_until(6, NoSpace("the disk is full")))
    assert place.train("a") == 1
    assert place.result("a")["error"] == "the disk is full" and place.state("a")["iter_num"] == 6


@pytest.mark.fault("F3", "a save of a running trainer fails")
def test_a_save_that_fails_is_told_and_the_next_one_tries_again(place, monkeypatch):
    save, tried = checkpoints.save_checkpoint, []

    def failing(path, state, **how):
        tried.append(state["iter_num"])
        if state["iter_num"] == 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        save(path, state, **how)

    monkeypatch.setattr(train.checkpoints, "save_checkpoint", failing)
    assert place.train("a", max_iters=24) == 0 and place.state("a")["iter_num"] == 24
    told = {
        r["iter_num"]: r["checkpoint_error"] for r in metrics.read(place.run("a").metrics) if "checkpoint_error" in r
    }
    sentence = "no checkpoint could be written at iteration 12: Input/output error; the next save tries again"
    assert told == {12: sentence, 18: None}
    assert Job(place.run("a")).describe()["checkpoint_error"] is None
    metrics.cut(place.run("a").metrics, 12)
    assert Job(place.run("a")).describe()["checkpoint_error"] == sentence


def test_rows_that_cannot_be_written_do_not_end_a_run(place, monkeypatch, capsys):
    def full(path, row):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics, "append", full)
    assert place.train("a") == 0 and place.state("a")["iter_num"] == 12
    said = capsys.readouterr().out
    assert said.count("could not be written, and rows will be missing: No space left on device") == 1


def test_output_that_cannot_be_written_does_not_end_a_run(place, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert place.train("a") == 0
        patch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert place.result("a")["state"] == "succeeded"


def test_a_signal_before_the_first_iteration_stops_at_once(place, monkeypatch):
    monkeypatch.setattr(start, "check_fit", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert place.train("a") == 0
    assert place.result("a")["state"] == "stopped" and not place.run("a").checkpoint.exists()


# ---- as a process of its own


def test_two_processes_make_the_losses_of_one(place):
    place.train("one", max_iters=3)
    assert train_in_two(place.argv("two", max_iters=3)) == [0, 0]
    one, two = (metrics.read(place.run(name).metrics) for name in ("one", "two"))
    assert [row["loss"] for row in two[1:]] == pytest.approx([row["loss"] for row in one[1:]], abs=1e-5)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], abs=1e-5)


def test_a_fine_tune_of_the_bundled_model_learns_a_small_text_with_its_defaults(place):
    shutil.copytree(ROOT / "models" / BUNDLED, place.workspace.models / BUNDLED)
    short = {"max_iters": 40, "eval_interval": 40, "window": 64, "eval_iters": 2, "sample_tokens": 0}
    assert place.train("a", dataset="sums", init_from=BUNDLED, **short) == 0
    before, after = (row["val_loss"] for row in metrics.read(place.run("a").metrics) if "val_loss" in row)
    config = json.loads(place.run("a").config.read_text())
    assert config["learning_rate"] == 4.8e-4, "its width of 192 is a quarter of GPT-2's"
    assert after < before / 4


def test_what_cannot_fit_is_refused_before_it_is_tried():
    tokens = np.zeros(10_000, np.uint16)
    splits = Splits(tokens, tokens, 1.0, char_tokenizer("ab"), "sums")
    config = resolve(TrainConfig(dataset="sums", output_dir="a", batch_size=4096, block_size=1024))
    with pytest.raises(ConfigError, match=r"GB for activations alone, and .* are free; lower batch_size or window"):
        check_fit(config, splits, GPTConfig(n_layer=12, n_embd=768), world=1)
    with pytest.raises(ConfigError, match="tokenizer char has 2 tokens, more than the model's vocabulary of 1"):
        check_fit(config, splits, GPTConfig(vocab_size=1), world=1)
    odd = config.model_copy(update={"batch_size": 3})
    with pytest.raises(ConfigError, match="batch_size is 3; 2 processes need a multiple of 2"):
        check_fit(odd, splits, GPTConfig(), world=2)
