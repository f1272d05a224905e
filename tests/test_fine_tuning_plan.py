"""From OpenAI's hyperparameters to a TrainConfig: sizes, epochs, windows, and which model."""

import pytest

from storage.datasets import dataset
from storage.errors import BadName, NotFound
from storage.runs import Workspace
from training import fine_tuning
from training.config import ConfigError
from training.fine_tuning_plan import Sizes, base, plan, sizes
from training.presets import PRESETS

AUTO = dict.fromkeys(fine_tuning.HYPERPARAMETERS, "auto")
NANO = {"model_type": "nano", "init_from": "scratch", "dataset": "text", "output_dir": "out/x"}


@pytest.fixture
def workspace(tmp_path):
    (tmp_path / "data/text").mkdir(parents=True)
    (tmp_path / "data/text/text.txt").write_text("To be or not to be.\n" * 5000)
    return Workspace(tmp_path)


def planned(workspace, fields=None, **asked):
    return plan(workspace, dataset(workspace, "text"), NANO | (fields or {}), AUTO | asked)


def test_sizes_are_those_of_the_split(workspace):
    assert sizes(dataset(workspace, "text")) == Sizes(90_000, 10_000)
    (workspace.data / "text/val.txt").write_text("é" * 10)
    assert sizes(dataset(workspace, "text")) == Sizes(100_000, 20)


def test_a_dataset_without_text_yet_is_taken_for_a_large_one(workspace):
    (workspace.data / "later").mkdir()
    (workspace.data / "later/prepare.py").write_text("")
    assert sizes(dataset(workspace, "later")).val > 10**6


def test_auto_from_scratch_is_the_preset(workspace):
    config, used = planned(workspace)
    preset = PRESETS["nano"]
    assert (config.max_iters, config.learning_rate, config.window) == (
        preset["max_iters"],
        preset["learning_rate"],
        None,
    )
    assert used["batch_size"] == 32 and used["learning_rate_multiplier"] == 1


@pytest.mark.parametrize(("tokenizer", "tokens"), [("char", 90_000), ("gpt2", 22_500), ("bpe:500", 36_000)])
def test_an_epoch_is_all_windows_of_the_text(workspace, tokenizer, tokens):
    config, used = planned(workspace, {"tokenizer": tokenizer}, n_epochs=2)
    assert config.max_iters == 2 * -(-tokens // (32 * 64)) and used["n_epochs"] == 2


def test_what_is_given_by_name_wins_over_the_hyperparameters(workspace):
    given = {"max_iters": 8, "batch_size": 2, "learning_rate": 0.01, "eval_interval": 3, "log_interval": 4, "window": 5}
    config, _ = planned(workspace, given, n_epochs=9, batch_size=64, learning_rate_multiplier=3)
    assert {name: getattr(config, name) for name in given} == given


def test_short_jobs_are_evaluated_all_the_same(workspace):
    config, _ = planned(workspace, {"max_iters": 8})
    assert (config.eval_interval, config.log_interval) == (2, 1)


def test_windows_shrink_to_the_text_there_is(workspace):
    (workspace.data / "text/val.txt").write_text("x" * 60)
    config, _ = planned(workspace)
    assert config.window == 15 and config.block_size is None


@pytest.mark.parametrize(
    ("model", "from_scratch", "expected"),
    [
        ("gpt2", False, {"model_type": "gpt2", "init_from": "pretrained"}),
        ("gpt2", True, {"model_type": "gpt2", "init_from": "scratch"}),
        ("nano", False, {"model_type": "nano", "init_from": "scratch"}),
        ("anything", "micro", {"model_type": "micro", "init_from": "scratch"}),
        ("my_run/best", False, {"init_from": "my_run/best"}),
    ],
)
def test_a_models_name_says_where_to_begin(workspace, model, from_scratch, expected):
    run = workspace.run("my_run")
    run.folder.mkdir(parents=True)
    run.best.write_bytes(b"weights")
    assert base(workspace, model, from_scratch) == expected


def test_what_cannot_begin_a_job_is_refused(workspace):
    with pytest.raises(ConfigError, match="preset"):
        base(workspace, "distilgpt2", True)
    with pytest.raises(NotFound):
        base(workspace, "ft:nano:local:x:123", False)
    with pytest.raises(NotFound):
        planned(workspace, {"init_from": "nobody", "model_type": None})
    with pytest.raises(BadName):
        planned(workspace, {"init_from": "../../etc", "model_type": None})


def test_ids_are_the_runs_names_or_made_of_them(workspace):
    name = fine_tuning.new_name()
    assert fine_tuning.job_id(name) == name and fine_tuning.ID.fullmatch(fine_tuning.job_id("by_hand"))
    for run in (name, "by_hand"):
        workspace.run(run).folder.mkdir(parents=True)
        assert fine_tuning.run_of(workspace, fine_tuning.job_id(run)).name == run


def test_the_record_keeps_what_a_change_leaves_out(workspace):
    run = workspace.run("x")
    run.folder.mkdir(parents=True)
    fine_tuning.keep(run, {"suffix": "a", "paused": 1.0})
    fine_tuning.keep(run, {"paused": None})
    assert fine_tuning.record(run) == {"suffix": "a"}


@pytest.mark.parametrize("text", ["{", "[]", '{"suffix": 3, "hyperparameters": [], "metadata": "x", "evil": 1}'])
def test_a_damaged_record_is_no_record(workspace, text):
    run = workspace.run("x")
    run.folder.mkdir(parents=True)
    (run.folder / "openai.json").write_text(text)
    assert fine_tuning.record(run) == {}
