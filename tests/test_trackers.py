"""Trackers: TensorBoard's event files as TensorBoard reads them, and Weights & Biases by a fake of its package."""

import json
import math
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from storage.runs import Workspace
from training import metrics, trackers
from training.config import ConfigError, TrainConfig
from training.event_file import PATTERN, EventFile
from training.report import Report

TENSORS = {"tensors": 0}  # no limit to how many are kept


@pytest.fixture
def run(tmp_path):
    found = Workspace(tmp_path).run("my_run")
    found.folder.mkdir(parents=True)
    return found


@pytest.fixture
def wandb(monkeypatch):
    """The calls that a run makes, by a module in place of wandb."""
    fake = types.ModuleType("wandb")
    fake.calls = []
    fake.Settings = lambda **given: given
    fake.__spec__ = types.SimpleNamespace(origin="wandb.py")
    fake.init = lambda **given: fake.calls.append(given) or FakeWandbRun(fake.calls)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


class FakeWandbRun:
    def __init__(self, calls):
        self.calls = calls

    def define_metric(self, name, step_metric):
        self.calls.append((name, step_metric))

    def log(self, data):
        json.dumps(data, allow_nan=False)
        self.calls.append(data)


def config(**fields) -> TrainConfig:
    return TrainConfig.parse({"dataset": "sums", "output_dir": "out/my_run", "max_iters": 9} | fields)


def seen(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), TENSORS).Reload()


def scalars(folder, tag) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in seen(folder).Scalars(tag)]


# ---- TensorBoard


def test_tensorboard_reads_the_rows_and_samples_of_a_run(run):
    events = EventFile(run.folder)
    events.row(
        {"iter_num": 300, "loss": 2.5, "val_loss": None, "mfu": math.nan, "time": 7.0, "note": "x", "much": 1e300}
    )
    events.sample(300, "To be,\nor *not*")
    assert seen(run.folder).Tags()["scalars"] == ["loss"] and scalars(run.folder, "loss") == [(300, 2.5)]
    assert seen(run.folder).Tensors("sample")[0].tensor_proto.string_val == [b"    To be,\n    or *not*"]
    assert abs(seen(run.folder).FirstEventTimestamp() - run.folder.stat().st_mtime) < 60


def test_what_a_resumed_run_repeats_is_there_once(run, monkeypatch):
    for first, last in ((0, 9), (6, 12)):
        monkeypatch.setattr("training.event_file.time.time", lambda first=first: 1.7e9 + first)
        events = EventFile(run.folder)
        if first:
            events.cut(5)
        for i in range(first, last):
            events.row({"iter_num": i, "loss": float(i)})
    assert len(list(run.folder.glob(PATTERN))) == 2
    assert scalars(run.folder, "loss") == [(i, float(i)) for i in range(12)]


def test_a_record_that_was_cut_short_hides_nothing_before_it(run):
    events = EventFile(run.folder)
    for i in range(3):
        events.row({"iter_num": i, "loss": 1.0})
    events.path.write_bytes(events.path.read_bytes()[:-5])
    assert scalars(run.folder, "loss") == [(0, 1.0), (1, 1.0)]


def test_a_run_that_starts_anew_drops_what_an_earlier_start_left(run):
    (run.folder / PATTERN.replace("*", "old")).touch()
    (tracker,) = trackers.trackers(run, config(tensorboard=True))
    assert [path.name for path in run.folder.glob(PATTERN)] == [tracker.path.name]
    assert trackers.trackers(run, config()) == []


# ---- Weights & Biases


def test_wandb_gets_rows_and_samples_and_the_same_id_after_a_resume(run, wandb):
    (tracker,) = trackers.trackers(run, config(wandb=True, wandb_project="mine"))
    tracker.row({"iter_num": 3, "loss": 1.5, "val_loss": None, "time": 7.0})
    tracker.sample(3, "hello")
    begun, defined, row, sample = wandb.calls
    assert (
        begun["name"] == "my_run"
        and begun["project"] == "mine"
        and begun["config"]["max_iters"] == 9
        and begun["dir"] == str(run.folder)
    )
    assert defined == ("*", "iter_num") and row == {"iter_num": 3, "loss": 1.5}
    assert sample == {"iter_num": 3, "sample": "hello"}
    trackers.trackers(run, config(wandb=True, init_from="resume"))
    trackers.trackers(run, config(wandb=True))
    assert wandb.calls[4]["id"] == begun["id"] != wandb.calls[6]["id"]
    assert (begun["entity"], begun["tags"]) == (None, None)


def test_wandb_gets_the_name_the_entity_and_the_tags_that_were_asked_for(run, wandb):
    trackers.trackers(run, config(wandb=True, wandb_name="first", wandb_entity="us", wandb_tags="a, b c"))
    begun = wandb.calls[0]
    assert (begun["name"], begun["entity"], begun["tags"]) == ("first", "us", ["a", "b c"])


def test_a_missing_package_is_refused_and_a_mere_folder_of_its_name_is_none(run, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    with pytest.raises(ConfigError, match="wandb is true, and the package wandb is not installed here; pip install it"):
        trackers.require(config(wandb=True))
    trackers.require(config(tensorboard=True))


def test_a_new_run_that_cannot_reach_wandb_is_refused_and_a_resumed_one_goes_on(run, wandb, capsys):
    def fail(**_):
        raise RuntimeError("No API key configured")

    wandb.init = fail
    with pytest.raises(ConfigError, match="wandb cannot be used: No API key configured; WANDB_MODE=offline needs"):
        trackers.trackers(run, config(wandb=True))
    assert trackers.trackers(run, config(wandb=True, init_from="resume")) == []
    assert "No API key configured; the run goes on without it" in capsys.readouterr().out


# ---- the reports of a run


class Failing:
    name = "board"

    def row(self, row):
        raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_is_told_once_and_does_not_end_the_run(run, capsys):
    report = Report(run, config(log_interval=1, batch_size=1), [Failing(), EventFile(run.folder)])
    for i in (1, 2):
        report.iteration(i, {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}, None, float(i), 100)
    assert capsys.readouterr().out.count("board failed and gets nothing more of this run: [Errno 28] No space") == 1
    assert len(metrics.read(run.metrics)) == 2 and scalars(run.folder, "loss") == [(1, 1.0), (2, 1.0)]
