"""TrainConfig: one class for HTTP, file and command line, strict in what it takes and plain in what it refuses."""

import json

import pytest
from pydantic import ValidationError

from storage.errors import StorageError
from storage.files import write_json
from training.command_line import parse, to_argv
from training.config import PRESETS, ConfigError, TrainConfig, errors_to_sentence, resolve
from training.disk_space import needed
from training.hardware import choose_device, choose_dtype
from training.schedule import learning_rate
from training.starting_point import window_of

MINIMAL = {"dataset": "stdlib", "output_dir": "out/x"}


def config(**fields) -> TrainConfig:
    return TrainConfig.parse(MINIMAL | fields)


REFUSED = [
    ({"keep_every": 0}, "keep_every is 0; it must be at least 1 and at most 1,000,000"),
    ({"learning_rate": -1}, "learning_rate is -1; it must be greater than 0 and at most 10"),
    ({"learning_rate": True}, "learning_rate is true; it must be a number"),
    ({"learning_rate": "3e-5"}, "learning_rate is '3e-5'; it must be a number"),
    ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a finite number"),
    ({"learning_rate": 10**400}, "learning_rate is a number of more than 20 digits; it must be a number"),
    ({"batch_size": 0}, "batch_size is 0; it must be at least 1 and at most 4,096"),
    ({"batch_size": True}, "batch_size is true; it must be a whole number"),
    ({"batch_size": 10**400}, "batch_size is a number of more than 20 digits; it must be at least 1 and at most 4,096"),
    ({"max_iters": 1.5}, "max_iters is 1.5; it must be a whole number"),
    ({"max_iters": "20"}, "max_iters is '20'; it must be a whole number"),
    ({"max_iters": [1]}, "max_iters is a list; it must be a whole number"),
    ({"max_iter": 20}, "unknown field 'max_iter'; did you mean 'max_iters'?"),
    ({"env": {"LD_PRELOAD": "x"}}, "unknown field 'env'; /docs and `train.py --help` list the fields"),
    ({"lr": 0.001}, "unknown field 'lr'; did you mean 'learning_rate'?"),
    ({"epochs": 3}, "unknown field 'epochs'; did you mean 'max_iters'?"),
    ({"steps": 3}, "unknown field 'steps'; did you mean 'max_iters'?"),
    ({"compile": 1}, "compile is 1; it must be true or false"),
    ({"schedule": "step"}, "schedule is 'step'; it must be one of cosine, linear, constant"),
    ({"device": "cuda:x"}, "device is 'cuda:x'; it must be auto, cpu, cuda, cuda:<number> or mps"),
    ({"tokenizer": "bpe:10"}, "tokenizer is 'bpe:10'; it must be auto, gpt2, char or bpe:<257 to 65,536>"),
    ({"dataset": 3}, "dataset is 3; it must be text"),
    ({"dataset": "../x"}, 'dataset is "../x"; a name has'),
    ({"dataset": None}, "dataset is required"),
    ({"seed": -1, "dropout": 1}, "seed is -1; it must be at least 0 and less than 4,294,967,296; dropout is 1; it"),
]


@pytest.mark.parametrize("fields, sentence", REFUSED, ids=[str(list(f.items()))[:40] for f, _ in REFUSED])
def test_a_wrong_field_is_refused_naming_field_value_and_bound(fields, sentence):
    with pytest.raises(ConfigError) as refused:
        config(**fields)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize("body", [None, [], 3, "x", True])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(ConfigError, match=r"the body is .*; it must be an object"):
        TrainConfig.parse(body)


def test_the_sentence_of_an_error_is_there_for_other_classes_too():
    with pytest.raises(ValidationError) as error:
        TrainConfig.model_validate(MINIMAL | {"learning_rate": 11})
    assert errors_to_sentence(error.value) == "learning_rate is 11; it must be at most 10"
    assert errors_to_sentence(error.value, TrainConfig).endswith("greater than 0 and at most 10")


def test_null_means_the_default():
    assert config(batch_size=None, seed=None, compile=None) == config()


def test_a_preset_fills_what_was_left_out_and_never_what_was_given():
    given = {"batch_size": 7, "learning_rate": 0.5, "n_layer": 2, "max_iters": 9}
    resolved = resolve(config(model_type="nano", **given))
    assert {name: getattr(resolved, name) for name in given} == given
    assert resolved.n_head == PRESETS["nano"]["n_head"] and resolved.init_from == "scratch"
    assert resolved.lr_decay_iters == 9 and resolved.warmup_iters == 0
    assert resolve(resolved) == resolved


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete_from_scratch(name):
    resolved = resolve(config(model_type=name, init_from="scratch"))
    missing = [field for field, value in resolved.model_dump().items() if value is None]
    others = {"threads", "patience", "keep_every", "sample_prompt"}
    others |= {f"wandb_{name}" for name in ("project", "name", "entity", "tags")}
    optional = {"window", "lora_rank", "lora_alpha"} | others
    assert set(missing) <= optional and needed(resolved) > 50_000_000


STARTS = [
    ({}, ("nano", "scratch")),
    ({"model_type": "mini"}, ("mini", "scratch")),
    ({"model_type": "gpt2"}, ("gpt2", "pretrained")),
    ({"model_type": "distilgpt2"}, ("distilgpt2", "pretrained")),
    ({"model_type": "gpt2", "init_from": "scratch"}, ("gpt2", "scratch")),
    ({"init_from": "gpt2-medium"}, ("gpt2-medium", "gpt2-medium")),
    ({"init_from": "my_run/best"}, (None, "my_run/best")),
    ({"model_type": "nano", "init_from": "out/x/ckpt.pt"}, ("nano", "out/x/ckpt.pt")),
]


@pytest.mark.parametrize("fields, expected", STARTS, ids=[str(expected) for _, expected in STARTS])
def test_model_type_and_init_from_say_where_a_run_starts(fields, expected):
    resolved = resolve(config(**fields))
    assert (resolved.model_type, resolved.init_from) == expected
    assert (resolved.n_layer is not None) == (expected[1] == "scratch"), "the shape comes with trained weights"


RATES = [(768, 3e-5), (1600, 3e-5), (384, 1.2e-4), (192, 4.8e-4), (128, 1.1e-3), (16, 3e-3)]


@pytest.mark.parametrize(("width", "rate"), RATES)
def test_a_narrower_model_is_tuned_at_a_higher_rate_and_gpt2_at_its_own(width, rate):
    tuning = {"init_from": "my_run"}
    made = resolve(config(**tuning), width=width)
    assert made.learning_rate == rate and made.min_lr == rate / 10
    assert resolve(config(**tuning | {"lora_rank": 8}), width=width).learning_rate == pytest.approx(10 * rate, rel=0.05)
    assert resolve(config(**tuning | {"learning_rate": 0.01}), width=width).learning_rate == 0.01
    assert resolve(config(**tuning | {"model_type": "mini"}), width=width).learning_rate == 2e-3, (
        "a preset's is its own"
    )


MISMATCHES = [
    {"model_type": "evil/repo"},
    {"model_type": "distilgpt2", "init_from": "scratch"},
    {"model_type": "nano", "init_from": "pretrained"},
    {"model_type": "gpt2", "n_layer": 3},
    {"init_from": "my_run", "tokenizer": "char"},
    {"n_embd": 30, "n_head": 4},
    {"window": 65},
    {"min_lr": 1.0, "learning_rate": 0.1},
]


@pytest.mark.parametrize("fields", MISMATCHES, ids=str)
def test_fields_that_contradict_each_other_are_refused(fields):
    with pytest.raises(ConfigError):
        resolve(config(**fields))


# ---- the command line


def test_flags_are_read_by_their_types_with_dashes_or_underscores(tmp_path):
    argv = ["--dataset", "stdlib", "--max-iters", "5", "--learning_rate=1e-3", "--compile", "--dropout", "none"]
    parsed, workspace = parse(argv, tmp_path)
    assert parsed == config(max_iters=5, learning_rate=1e-3, compile=True, output_dir="out/stdlib-nano")
    assert workspace.root == tmp_path


def test_a_config_survives_the_command_line_and_the_file(tmp_path):
    given = config(max_iters=5, compile=True, sample_prompt="Once upon a time", dropout=0.1)
    assert parse(to_argv(given), tmp_path)[0] == given
    write_json(tmp_path / "c.json", given.given())
    assert parse(["--config", str(tmp_path / "c.json"), "--max_iters", "7"], tmp_path)[0].max_iters == 7


def test_resume_takes_the_runs_own_config(tmp_path):
    (tmp_path / "out" / "x").mkdir(parents=True)
    write_json(tmp_path / "out" / "x" / "train_config.json", config(batch_size=3).given())
    parsed, _ = parse(["--output_dir", "out/x", "--init_from", "resume"], tmp_path)
    assert (parsed.batch_size, parsed.init_from) == (3, "resume")


@pytest.mark.parametrize(
    "argv",
    [["--max_iters", "5"], ["--dataset", "x", "--max_iters", "abc"], ["--config", "nowhere.json"]]
    + [["--output_dir", "out/../x", "--init_from", "resume"], ["--config", "/dev/null"], [], ["stdlib"]],
    ids=str,
)
def test_a_wrong_command_line_is_refused_in_a_sentence(argv, tmp_path):
    with pytest.raises((ConfigError, StorageError)) as refused:
        parse(argv, tmp_path)
    assert "\n" not in str(refused.value)


def test_a_flag_that_is_not_there_is_refused_with_the_one_that_is_meant(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown argument .--max_iter=5.; did you mean --max_iters\?"):
        parse(["--dataset", "x", "--max-iter=5"], tmp_path)
    with pytest.raises(ConfigError, match=r"unknown argument '--lr'; did you mean --learning_rate\?"):
        parse(["--dataset", "x", "--lr", "0.1"], tmp_path)


def test_help_shows_every_field_with_its_default(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"], tmp_path)
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"--{name}" in shown for name in TrainConfig.model_fields)
    assert "(default: 1337)" in " ".join(shown.split()) and shown.startswith("usage: train.py")
    with pytest.raises(SystemExit):
        parse(["--help"], tmp_path, "dry_run.py")
    assert "train.py --dataset" not in capsys.readouterr().out


def test_the_schema_for_the_documentation_describes_every_field():
    schema = TrainConfig.model_json_schema()
    assert all("description" in field for field in schema["properties"].values()) and json.dumps(schema)
    assert schema["required"] == ["dataset", "output_dir"]


# ---- what follows from a config


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_falls_to_its_last_value(schedule):
    made = resolve(config(schedule=schedule, learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100))
    rates = [learning_rate(made, i) for i in range(120)]
    assert rates[:11] == sorted(rates[:11]) and rates[10] == 1.0 and rates[0] == pytest.approx(1 / 11)
    assert rates[10:] == sorted(rates[10:], reverse=True) and max(rates) == 1.0
    assert rates[100:] == [1.0 if schedule == "constant" else 0.1] * 20


def test_a_device_is_chosen_only_if_it_is_there():
    gpus = {"cuda": 2, "mps": 0, "cpu": 1}
    assert [choose_device(asked, gpus, 1) for asked in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]
    for asked in ("mps", "cuda:2"):
        with pytest.raises(ConfigError, match=f"device is {asked}, and this machine has"):
            choose_device(asked, gpus, 0)


def test_the_precision_follows_the_device():
    assert [choose_dtype("auto", "cpu", has) for has in (True, False)] == ["bf16", "fp32"]
    assert choose_dtype("fp16", "cuda", True) == "fp16"
    with pytest.raises(ConfigError, match="fp16, which needs a cuda device"):
        choose_dtype("fp16", "cpu", True)


def test_a_window_is_never_longer_than_the_context_of_the_model():
    fine_tuning = resolve(TrainConfig.parse({"dataset": "d", "output_dir": "out/a", "init_from": "my_nano"}))
    assert (window_of(fine_tuning, 64), window_of(fine_tuning, 1024)) == (64, 256)
    assert window_of(TrainConfig.parse({"dataset": "d", "output_dir": "out/a"}), 64) == 64


def test_what_is_kept_is_counted_and_bounded():
    config = resolve(TrainConfig.parse(MINIMAL | {"max_iters": 100, "eval_interval": 10, "keep_every": 3}))
    assert [i for i in range(1, 101) if config.keeps(i)] == [30, 60, 90] and config.kept() == 3
    assert not resolve(TrainConfig.parse(MINIMAL)).keeps(100)
    with pytest.raises(ConfigError, match="keep_every is 1; it must be at least 5: at most 1,000 of 5,000 checkpoints"):
        resolve(TrainConfig.parse(MINIMAL | {"max_iters": 5000, "eval_interval": 1, "keep_every": 1}))
