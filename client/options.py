"""What can be given on the command line: the options of sampling and training, and how their values are read.

Values are checked by the server, which knows the bounds; only what cannot be sent is refused here.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import click

from client.api import Reply

Options = dict[str, tuple[Any, str]]  # name -> type, help

SAMPLING: Options = {
    "temperature": (float, "0 always takes the likeliest token."),
    "top_k": (int, "Choose among the k likeliest tokens; 0 switches this off."),
    "top_p": (float, "Choose among the likeliest tokens that hold this share; 1 switches this off."),
    "min_p": (float, "Drop tokens below this share of the likeliest one's."),
    "repetition_penalty": (float, "Above 1: repeat less."),
    "presence_penalty": (float, "Above 0: fewer tokens that are already there."),
    "frequency_penalty": (float, "Above 0: the same, growing with each repetition."),
    "seed": (int, "The same seed gives the same text."),
    "num_samples": (int, "Number of texts; several are printed when all are complete."),
}
TRAINING: Options = {
    "model_type": (str, "Preset from scratch (nano, micro, mini, ...) or pretrained name to fine-tune."),
    "init_from": (str, "scratch, a pretrained name, or a run or checkpoint to start from."),
    "overwrite": (bool, "Replace a finished run in output_dir; it moves to out/.trash."),
    "tokenizer": (str, "For a model from scratch: gpt2, char or bpe:<size>."),
    "max_iters": (int, "Iterations: updates of the weights."),
    "batch_size": (int, "Windows of text in one step."),
    "gradient_accumulation_steps": (int, "Steps in one iteration."),
    "block_size": (int, "Context in tokens."),
    "learning_rate": (float, "Highest learning rate."),
    "warmup_iters": (int, "Iterations until the highest learning rate."),
    "weight_decay": (float, "Decay of the matrices."),
    "optimizer": (str, "adamw or muon."),
    "eval_interval": (int, "Iterations between evaluations."),
    "eval_iters": (int, "Batches in one evaluation."),
    "patience": (int, "Evaluations without a better validation loss after which it ends."),
    "keep_every": (int, "Keep the checkpoint of every so many evaluations."),
    "n_layer": (int, "Layers of a model from scratch."),
    "n_head": (int, "Attention heads per layer."),
    "n_embd": (int, "Width."),
    "dropout": (float, "Dropout while training."),
    "lora_rank": (int, "Fine-tuning: train adapters of this rank in place of all weights."),
    "seed": (int, "Seed of weights, data order and samples."),
    "dtype": (str, "auto, fp32, bf16 or fp16."),
    "device": (str, "auto, cpu, cuda or mps."),
    "tensorboard": (bool, "Write TensorBoard's event files, too."),
    "wandb": (bool, "Send rows and samples to Weights & Biases, too."),
    "nproc_per_node": (int, "Processes that share each batch, on a GPU each or on the CPU."),
    "max_restarts": (int, "How often several processes go on from the last checkpoint when one was killed."),
    "shard": (bool, "Split weights and moments among the processes."),
}


def options(table: Options) -> Callable[..., Any]:
    """Add an option for each row of a table."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, (kind, help) in reversed(table.items()):
            more = {"is_flag": True, "default": None} if kind is bool else {"type": kind}
            command = click.option(f"--{name}", help=help, **more)(command)
        return command

    return add


def given(values: Reply) -> Reply:
    """Return the options that were given; JSON has no word for a number that is not finite."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise click.UsageError(f"--{name} is {value}; give a finite number")
    return {name: value for name, value in values.items() if value is not None and value != ()}


def check_name(context: click.Context, option: click.Parameter, value: str) -> str:
    """Take `out/my_model` for the job my_model, as its folder is called."""
    name = value.removeprefix("out/").rstrip("/")
    if name.strip(".") == "" or "/" in name:
        raise click.BadParameter(f"{value!r} is not a name; `jobs`, `datasets` and `list` show what there is")
    return name


def check_names(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Take each value for a job's name."""
    return tuple(check_name(context, option, value) for value in values)


def parse_settings(settings: tuple[str, ...]) -> Reply:
    """Return `key=value` words as a dictionary; a value is JSON, or text where it is none."""
    found: Reply = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise click.UsageError(f"--set {setting!r} is not of the form key=value")
        try:
            found[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[key.replace("-", "_")] = value
    return given(found) | {key: None for key, value in found.items() if value is None}


def read_prompt(prompt: str) -> str:
    """Return the prompt itself, or standard input for `-`."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not UTF-8: byte {error.start} is wrong") from None
