"""TrainConfig: everything a training run can be told. One class is the HTTP body, the JSON file and the command line.

A field left out or null means the default. Some defaults depend on the model: `resolve` fills those from the
preset, and never touches what was given. What needs the disk (does the dataset exist, is the run free) is not
checked here. Words: a window is the run of tokens that one row of a batch holds.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from storage.errors import BadName
from storage.files import check_name
from storage.registry import BUNDLED, PRETRAINED
from training.presets import COMMON, FINE_TUNING, GPT2_WIDTH, PRESETS, fine_tuning_rate
from training.strict_model import ConfigError, StrictModel, errors_to_sentence

__all__ = ["PRESETS", "ConfigError", "TrainConfig", "errors_to_sentence", "resolve"]

Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw", "muon"]
DType = Literal["auto", "fp32", "bf16", "fp16"]
MOST_KEPT = 1000  # checkpoints of a run: they stay until the run is deleted
FROM_SCRATCH = ("tokenizer", "n_layer", "n_head", "n_embd", "bias")  # else they come with the weights


def option(group: str, help: str, default: Any = None, **bounds: Any) -> Any:
    """Return a field with its help, and the heading it stands under in `--help`."""
    return Field(default, description=help, json_schema_extra={"group": group}, **bounds)


class TrainConfig(StrictModel):
    """A training run. Fields without a default of their own take the preset's."""

    dataset: str = option("run", "name of a dataset: data/<name>/, or one this project can prepare", ...)
    output_dir: str = option("run", "folder of the run: out/<name>", ..., max_length=200)
    overwrite: bool = option("run", "replace a finished run in output_dir; its folder moves to out/.trash", False)
    seed: int = option("run", "seed of weights, data order and samples", 1337, ge=0, lt=2**32)

    model_type: str | None = option(
        "model", f"a preset ({', '.join(PRESETS)}) or a pretrained name to fine-tune; nano when init_from is absent too"
    )
    init_from: str | None = option(
        "model",
        '"scratch", "pretrained", "resume" (this output_dir), a pretrained name, or a run or checkpoint: my_run, '
        "my_run/best, out/my_run/ckpt.pt",
        max_length=200,
    )
    tokenizer: str | None = option(
        "model", "from scratch: gpt2, char, bpe:<size>, or auto: the one of the dataset's token files, else bpe:1024"
    )
    n_layer: int | None = option("model", "layers", ge=1, le=200)
    n_head: int | None = option("model", "attention heads per layer", ge=1, le=200)
    n_embd: int | None = option("model", "width; a multiple of n_head", ge=1, le=16384)
    block_size: int | None = option("model", "context in tokens; a trained model's may be lowered", ge=1, le=65536)
    bias: bool | None = option("model", "biases in linear layers and layer norms")
    dropout: float | None = option("model", "dropout while training", ge=0, lt=1)
    lora_rank: int | None = option(
        "model",
        "fine-tuning: train adapters of this rank, a fraction of the memory; default: all weights",
        ge=1,
        le=1024,
    )
    lora_alpha: float | None = option(
        "model", "the adapters count lora_alpha / lora_rank times; default: twice", gt=0, le=65536
    )

    batch_size: int | None = option("batches", "windows per step of all processes together", ge=1, le=4096)
    gradient_accumulation_steps: int | None = option("batches", "steps per iteration", ge=1, le=65536)
    window: int | None = option("batches", "tokens per window; block_size when absent or larger", ge=1, le=65536)

    max_iters: int | None = option("optimizer", "iterations: updates of the weights", ge=1, le=1_000_000_000)
    optimizer: Optimizer | None = option("optimizer", "adamw, or muon for the matrices and adamw for the rest")
    learning_rate: float | None = option("optimizer", "highest learning rate", gt=0, le=10)
    schedule: Schedule | None = option("optimizer", "how the learning rate falls after the warm-up")
    warmup_iters: int | None = option("optimizer", "iterations of linear warm-up", ge=0, le=1_000_000_000)
    lr_decay_iters: int | None = option(
        "optimizer", "iteration at which min_lr is reached; default max_iters", ge=1, le=1_000_000_000
    )
    min_lr: float | None = option("optimizer", "last learning rate; default 0 if linear, else a tenth", ge=0, le=10)
    weight_decay: float | None = option("optimizer", "decay of matrices and embeddings", ge=0, le=10)
    beta1: float = option("optimizer", "AdamW's first beta", 0.9, ge=0, lt=1)
    beta2: float = option("optimizer", "AdamW's second beta", 0.95, ge=0, lt=1)
    grad_clip: float = option("optimizer", "largest gradient norm; 0 does not clip", 1.0, ge=0, le=1e6)

    eval_interval: int | None = option("reports", "iterations between evaluations", ge=1, le=1_000_000_000)
    eval_iters: int | None = option("reports", "batches per split in an evaluation", ge=1, le=100_000)
    patience: int | None = option(
        "reports", "evaluations without a better val loss after which the run ends; default: never", ge=1, le=1_000_000
    )
    keep_every: int | None = option(
        "reports",
        f"keep the checkpoint of every so many evaluations, as ckpt-<iteration>.pt, {MOST_KEPT:,} at most; default: "
        "only the latest two and the best stay",
        ge=1,
        le=1_000_000,
    )
    log_interval: int = option("reports", "iterations between rows of metrics", 10, ge=1, le=1_000_000_000)
    tensorboard: bool = option("reports", "write TensorBoard's event files, too, for tensorboard --logdir out", False)
    wandb: bool = option("reports", "send rows and samples to Weights & Biases, whose package must be installed", False)
    wandb_project: str | None = option("reports", "its project there; default: WANDB_PROJECT", max_length=128)
    wandb_name: str | None = option("reports", "the run's name there; default: that of its folder", max_length=128)
    wandb_entity: str | None = option("reports", "whose it is there, a user or a team; default: yours", max_length=128)
    wandb_tags: str | None = option("reports", "its tags there, separated by commas", max_length=1024)
    sample_prompt: str | None = option("reports", "prompt of the samples; default: val's first tokens", max_length=4096)
    sample_tokens: int | None = option("reports", "tokens of the sample at each evaluation; 0 for none", ge=0, le=4096)

    device: str = option("machine", "auto, cpu, cuda, cuda:<n> or mps", "auto")
    dtype: DType = option("machine", "auto: bf16 autocast where the device has it, else fp32", "auto")
    compile: bool = option("machine", "use torch.compile", False)
    threads: int | None = option("machine", "CPU threads of all processes together; default: torch's", ge=1, le=1024)
    nproc_per_node: int = option(
        "machine", "processes that share each batch, on a GPU each or on the CPU", 1, ge=1, le=64
    )
    shard: bool = option(
        "machine", "split weights and moments among the processes (FSDP2), if one device cannot hold them", False
    )
    max_restarts: int = option(
        "machine",
        "of several processes: how often all go on from the last checkpoint when one was killed",
        3,
        ge=0,
        le=100,
    )

    @field_validator("dataset")
    @classmethod
    def _dataset_is_a_name(cls, value: str) -> str:
        try:
            return check_name("dataset", value)
        except BadName as error:
            raise ValueError(str(error)) from None

    @field_validator("device")
    @classmethod
    def _device_is_a_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
            return value
        raise ValueError(f"device is {value[:60]!r}; it must be auto, cpu, cuda, cuda:<number> or mps")

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_is_known(cls, value: str) -> str:
        size = re.fullmatch(r"bpe:([0-9]{3,5})", value)
        if value in ("auto", "gpt2", "char") or (size is not None and 257 <= int(size[1]) <= 65536):
            return value
        raise ValueError(f"tokenizer is {value[:60]!r}; it must be auto, gpt2, char or bpe:<257 to 65,536>")

    def given(self) -> dict[str, Any]:
        """Return the fields that are not None, as JSON has them."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def keeps(self, iter_num: int) -> bool:
        """Say whether the checkpoint of an iteration of this resolved config is to be kept."""
        return self.keep_every is not None and iter_num % ((self.eval_interval or 1) * self.keep_every) == 0

    def kept(self) -> int:
        """Return how many checkpoints a run by this resolved config keeps beside the latest and the best."""
        if self.keep_every is None or self.max_iters is None:
            return 0
        return self.max_iters // ((self.eval_interval or 1) * self.keep_every)


def _start(config: TrainConfig, pretrained: Sequence[str]) -> tuple[str | None, str]:
    """Return model_type and init_from with their defaults, checked against each other."""
    model_type, init_from = config.model_type, config.init_from
    if model_type is None:
        if init_from in (None, "scratch"):
            model_type = "nano"
        elif init_from in pretrained:
            model_type = init_from
    known = [*PRESETS, *(name for name in pretrained if name not in PRESETS)]
    if model_type is not None and model_type not in known:
        raise ConfigError(f"model_type is {model_type[:60]!r}; it must be one of {', '.join(known)}")
    if init_from is None:
        init_from = "pretrained" if model_type in pretrained else "scratch"
    if init_from == "scratch" and model_type not in PRESETS:
        raise ConfigError(f"model_type {model_type} has no preset to start from scratch: {', '.join(PRESETS)} have")
    if init_from == "pretrained" and model_type is None:
        raise ConfigError("model_type is required with init_from pretrained: " + ", ".join(pretrained))
    if init_from == "pretrained" and model_type not in pretrained:
        raise ConfigError(f"model_type {model_type} is not pretrained: {', '.join(pretrained)} are")
    return model_type, init_from


def resolve(
    config: TrainConfig, pretrained: Sequence[str] = (*PRETRAINED, BUNDLED), width: int = GPT2_WIDTH
) -> TrainConfig:
    """Return the config with every default filled in; what comes with a trained model's weights stays None.

    `pretrained` are the names that may be fine-tuned, `width` is that of the model which is (starting_point.settled
    finds it). Raises ConfigError.
    """
    model_type, init_from = _start(config, pretrained)
    given_shape = [name for name in FROM_SCRATCH if getattr(config, name) is not None]
    if given_shape and init_from not in ("scratch", "resume"):
        raise ConfigError(f'{given_shape[0]} comes with the weights; give it with init_from "scratch" only')
    if init_from == "scratch":
        defaults = PRESETS[str(model_type)]
    elif model_type is None or model_type in pretrained:
        defaults = FINE_TUNING
    else:
        defaults = {k: v for k, v in PRESETS[model_type].items() if k not in (*FROM_SCRATCH, "block_size")}
    if defaults is FINE_TUNING or config.lora_rank is not None:
        defaults = defaults | {"learning_rate": fine_tuning_rate(width, config.lora_rank is not None)}
    fields = COMMON | defaults | config.given() | {"model_type": model_type, "init_from": init_from}
    return TrainConfig.parse(fields | _following(fields, config))


def _following(fields: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Return the defaults that follow from other fields: warm-up, decay, evaluation interval."""
    max_iters, rate = fields["max_iters"], fields["learning_rate"]
    rest = {"lr_decay_iters": max_iters, "min_lr": 0.0 if fields["schedule"] == "linear" else rate / 10} | fields
    if config.warmup_iters is None:
        rest["warmup_iters"] = min(fields["warmup_iters"], max_iters // 10)
    if rest["min_lr"] > rate:
        raise ConfigError(f"min_lr {rest['min_lr']:g} is greater than learning_rate {rate:g}")
    if fields["init_from"] == "scratch":
        _check_shape(rest)
    _check_kept(rest)
    _check_adapters(rest)
    _check_processes(rest)
    _check_shard(rest)
    if rest.get("lora_rank") is not None:
        rest = {"lora_alpha": 2.0 * rest["lora_rank"]} | rest
    return rest


def _check_shape(fields: dict[str, Any]) -> None:
    if fields["n_embd"] % fields["n_head"]:
        raise ConfigError(f"n_embd is {fields['n_embd']}; it must be a multiple of n_head {fields['n_head']}")
    window = fields.get("window")
    if window is not None and window > fields["block_size"]:
        raise ConfigError(f"window is {window}; it must be at most block_size {fields['block_size']}")


def _check_kept(fields: dict[str, Any]) -> None:
    every, evaluations = fields.get("keep_every"), fields["max_iters"] // fields["eval_interval"]
    if every is not None and evaluations // every > MOST_KEPT:
        least = -(-evaluations // MOST_KEPT)
        raise ConfigError(
            f"keep_every is {every}; it must be at least {least}: at most {MOST_KEPT:,} of {evaluations:,} checkpoints "
            "are kept"
        )


def _check_adapters(fields: dict[str, Any]) -> None:
    rank, alpha = fields.get("lora_rank"), fields.get("lora_alpha")
    if rank is None and alpha is not None:
        raise ConfigError(f"lora_alpha is {alpha:g} without lora_rank; it belongs to adapters")
    if rank is not None and fields["init_from"] == "scratch":
        raise ConfigError(
            f"lora_rank is {rank}; adapters are for fine-tuning, and a model from scratch has no weights yet"
        )


def _check_processes(fields: dict[str, Any]) -> None:
    count, size, steps = fields.get("nproc_per_node", 1), fields["batch_size"], fields["gradient_accumulation_steps"]
    if size % count and steps % count:
        batch = f"batch_size {size} or gradient_accumulation_steps {steps}"
        raise ConfigError(f"nproc_per_node is {count}; {batch} must be a multiple of it")
    device = fields.get("device", "auto")
    if count > 1 and (":" in device or device == "mps"):
        raise ConfigError(f"device is {device}, and nproc_per_node {count}; several processes need cuda, cpu or auto")


def _check_shard(fields: dict[str, Any]) -> None:
    if not fields.get("shard"):
        return
    if fields.get("nproc_per_node", 1) < 2:
        raise ConfigError("shard splits a model among several processes; give nproc_per_node, at least 2")
    unfit = {"optimizer": ("muon", "it needs whole matrices; use adamw"), "dtype": ("fp16", "use bf16 or fp32")}
    for name, (value, instead) in unfit.items():
        if fields.get(name) == value:
            raise ConfigError(f"{name} is {value}, which does not go with shard: {instead}")
    for name in ("lora_rank", "compile"):
        if fields.get(name):
            raise ConfigError(f"{name} is {fields[name]}, which does not go with shard; leave out one of them")


def choices(annotation: Any) -> list[Any]:
    """Return the non-None alternatives of a field's annotation: its type, or a Literal's values."""
    parts = [part for part in get_args(annotation) or (annotation,) if part is not type(None)]
    return [value for part in parts for value in (get_args(part) or (part,))]
