"""What a run starts with: its model, its tokenizer, and the saved state if it goes on from a checkpoint.

From scratch the tokenizer decides the vocabulary's size. Fine-tuning takes weights and tokenizer of a trained model,
and adds what the data needs: the tokens of the chat format for chats. Which model that is, is in
training/starting_point.py.
"""

import contextlib
from dataclasses import replace
from typing import Any

import torch

from learning import lora
from learning.team import Team
from learning.vocabulary import rows_for, with_rows
from model import GPT, GPTConfig
from storage import checkpoints, tokenizer
from storage.datasets import Splits, dataset
from storage.errors import StorageError
from storage.runs import Run, Workspace
from storage.tokenizer import Tokenizer
from storage.tokenizer_choice import fitting, tokenizer_for
from training.config import TrainConfig
from training.progress import PreparationLine
from training.resumption import require_resumable
from training.starting_point import check_fit, reference, require_known_tokens, require_memory, shorter_context


def give(model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Make these tensors the weights of a model that has none yet, in fp32; new adapters stay as they are."""
    model.load_state_dict(model.state_dict() | {name: w.float() for name, w in weights.items()}, assign=True)
    if model.config.tied:
        model.lm_head.weight = model.get_parameter("transformer.wte.weight")


def start(config: TrainConfig, workspace: Workspace, run: Run, first: bool) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return model and tokenizer, and the saved state if this resumes a run, else {}.

    The tokenizer goes into the run's folder, so that the run can be served without its dataset.
    """
    weights: dict[str, torch.Tensor] | None = None
    state: dict[str, Any] = {}
    data = dataset(workspace, config.dataset)
    if config.init_from == "resume":
        path = checkpoints.newest_valid(run, print)
        print(f"resuming from {run.relative}/{path.name}")
        state = checkpoints.load_training_state(path)
        require_resumable(state, path.name, config)
        shape = GPTConfig(**state["model_args"], activation=state["activation"], tied=state["tied"])
        weights = {name: w.clone() for name, w in lora.take_weights(state).items()}  # they lie in a file until then
    elif config.init_from == "scratch":
        if first:
            tokenizer_for(config.tokenizer, data, workspace, PreparationLine()).save(run.tokenizer)
        text, sizes = tokenizer.load(run.tokenizer), ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
        vocab_size = rows_for(text)
        shape = GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in sizes})
        require_memory(shape.n_layer, shape.n_embd, shape.block_size, vocab_size)
    else:
        loaded = checkpoints.load_model(reference(config, workspace), workspace, print)
        if first:
            fitting(loaded.tokenizer, data, PreparationLine()).save(run.tokenizer)
        weights, shape, n_vocab = loaded.model.state_dict(), loaded.model.config, tokenizer.load(run.tokenizer).n_vocab
        shape = replace(shape, block_size=shorter_context(config, shape.block_size), dropout=config.dropout or 0.0)
        if n_vocab > loaded.tokenizer.n_vocab:
            require_known_tokens(config, known=False)
            weights = with_rows(weights, loaded.tokenizer.n_vocab, n_vocab)
            shape = replace(shape, vocab_size=max(shape.vocab_size, n_vocab))
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: shape.block_size]
    torch.manual_seed(config.seed)
    with torch.device("cpu" if weights is None else "meta"):
        model = GPT(shape)
    if config.lora_rank is not None and config.lora_alpha is not None:
        lora.adapt(model, config.lora_rank, config.lora_alpha)
    if weights is not None:
        give(model, weights)
    return model, tokenizer.load(run.tokenizer), state


def prepare(config: TrainConfig, workspace: Workspace, run: Run, team: Team) -> tuple[GPT, Splits, dict[str, Any]]:
    """Return the model to begin with, the data, and the saved state if this resumes a run, else {}."""
    if team.rank > 0:
        team.sum(0)  # process 0 prepares what the others then find
    model, text, state = start(config, workspace, run, team.rank == 0)
    splits = dataset(workspace, config.dataset).prepare(text, PreparationLine())
    check_fit(config, splits, model.config, team.world)
    if team.rank == 0:
        team.sum(0)  # a sum waits for all
    return model, splits, state


def last_good(run: Run) -> dict[str, Any] | None:
    """Return the training state in the newest checkpoint from before the losses rose, None if there is none."""
    for path in (run.checkpoint, run.previous):
        with contextlib.suppress(StorageError):
            state = checkpoints.load_training_state(path)
            if state.get("roll_backs", {}).get("spikes", 0) == 0:
                return state
    return None
