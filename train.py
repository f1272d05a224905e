"""Train or fine-tune a GPT: build the config, tokenizer, data, model and optimizer, then loop.

    python train.py --dataset stdlib --model_type nano --max_iters 500
    python train.py --config out/my_run/train_config.json           (how the server runs a job)
    python train.py --output_dir out/my_run --init_from resume      (goes on exactly where it stopped)
    torchrun --nproc_per_node 2 train.py --dataset stdlib …         (the same batch, shared by two processes)

Everything goes into out/<name>/: ckpt.pt, best.pt, tokenizer.json, metrics.jsonl, samples.jsonl and, last,
result.json. A checkpoint holds all that decides the next iteration, so that a resumed run repeats the losses
and weights of one that was never stopped, on a CPU to the last bit. What needs no tensors is in training/.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from storage import checkpoints, tokenizer
from storage.datasets import Splits, dataset
from storage.registry import pretrained_names
from storage.runs import Run, Workspace
from storage.tokenizer import Tokenizer
from storage.tokenizer_choice import tokenizer_for
from training import generators
from training.command_line import parse
from training.config import ConfigError, TrainConfig, resolve
from training.hardware import process_memory
from training.outcome import Diverged, Outcome
from training.progress import PreparationLine
from training.report import Report, Work, losses
from training.run_folder import claim
from training.schedule import learning_rate
from training.starting_point import check_fit, reference
from training.stop_signal import StopSignal
from training.windows import Tokens, WindowOrder, gather

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLE_TEMPERATURE, SAMPLE_TOP_K, PROMPT_TOKENS = 0.8, 40, 16
NO_LOSS = 1e9  # nanoGPT's best_val_loss before there is one


class Team:
    """The processes that train together: one, or those that torchrun started. Each takes its share of a batch."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let process 0 run a block before the others do: it prepares what they then find."""
        if self.world > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()

    def sum(self, value: float) -> float:
        """Return the sum of a number over all processes, in float64."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.item()

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in order of rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


@dataclass(frozen=True)
class Machine:
    """Where the arithmetic happens, and in which precision."""

    device: torch.device
    dtype: str

    @classmethod
    def of(cls, config: TrainConfig) -> "Machine":
        """Return the machine that the config asks for. Raises ConfigError if it is not there."""
        cuda, mps, name = torch.cuda.is_available(), torch.backends.mps.is_available(), config.device
        if name == "auto":
            name = "cuda" if cuda else "mps" if mps else "cpu"
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        if (device.type == "mps" and not mps) or (device.index or 0) >= max(1, torch.cuda.device_count()):
            raise ConfigError(f"device is {name}, which this machine does not have; use cpu or auto")
        if device.type == "cuda":
            if not cuda:
                raise ConfigError(f"device is {name}, and this machine has no CUDA device; use cpu or auto")
            torch.cuda.set_device(device)
        has_bf16 = {"cpu": torch.cpu._is_avx512_bf16_supported, "cuda": torch.cuda.is_bf16_supported}
        bf16 = device.type in has_bf16 and has_bf16[device.type]()
        dtype = config.dtype if config.dtype != "auto" else "bf16" if bf16 else "fp32"
        if dtype == "fp16" and device.type != "cuda":
            raise ConfigError("dtype is fp16, which needs a CUDA device; use bf16, fp32 or auto")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        return cls(device, dtype)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        plain = self.dtype == "fp32"
        return contextlib.nullcontext() if plain else torch.autocast(self.device.type, DTYPES[self.dtype])

    def memory_bytes(self) -> int:
        """Return the most memory held so far: the device's on a GPU, the process's elsewhere."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else process_memory()

    def name(self) -> str:
        """Return the maker's name of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def generators(self) -> dict[str, Any]:
        """Return the state of every global generator."""
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        return generators.state() | {"torch": torch.get_rng_state(), "cuda": cuda}

    def restore_generators(self, saved: dict[str, Any]) -> None:
        """Put every global generator back to a saved state."""
        generators.restore(saved)
        torch.set_rng_state(saved["torch"])
        if saved["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"])


def start(config: TrainConfig, workspace: Workspace, run: Run, first: bool) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return model and tokenizer, and the saved state if this resumes a run, else {}."""
    weights, state = None, {}
    if config.init_from == "resume":
        path = checkpoints.newest_valid(run, print)
        print(f"resuming from {run.relative}/{path.name}")
        state = checkpoints.load_training_state(path)
        shape = GPTConfig(**state["model_args"], activation=state["activation"], tied=state["tied"])
        weights, text = state.pop("model"), tokenizer.load(run.tokenizer)
    elif config.init_from == "scratch":
        data = dataset(workspace, config.dataset)
        text = (
            tokenizer_for(config.tokenizer, data, workspace, PreparationLine())
            if first
            else tokenizer.load(run.tokenizer)
        )
        sizes = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
        vocab_size = 50304 if text.name == "gpt2" else text.n_vocab  # 50 257, and up to a size that is fast
        shape = GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in sizes})
    else:
        loaded = checkpoints.load_model(reference(config, workspace), workspace)
        weights, text, shape = loaded.model.state_dict(), loaded.tokenizer, loaded.model.config
        block_size = config.block_size or shape.block_size
        if block_size > shape.block_size:
            raise ConfigError(f"block_size is {block_size}; the model's context is {shape.block_size}")
        shape = replace(shape, block_size=block_size, dropout=config.dropout or 0.0)
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
    torch.manual_seed(config.seed)
    model = GPT(shape)
    if weights is not None:
        model.load_state_dict(weights)
    return model, text, state


def optimizers(config: TrainConfig, model: GPT) -> dict[str, torch.optim.Optimizer]:
    """Return AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both.
    """
    groups, decay = model.parameter_groups(config.weight_decay), config.weight_decay
    found: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        matrices = [p for p in model.transformer["h"].parameters() if p.dim() == 2]
        ids = {id(p) for p in matrices}
        groups = [group | {"params": [p for p in group["params"] if id(p) not in ids]} for group in groups]
        found["muon"] = torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    found["adamw"] = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    return found


class Trainer:
    """A run in memory: everything that the next iteration depends on."""

    def __init__(self, config: TrainConfig, machine: Machine, team: Team, model: GPT, splits: Splits):
        self.config, self.machine, self.team, self.splits = config, machine, team, splits
        self.window = config.window or model.config.block_size
        self.model = model.to(machine.device)
        self.optimizers = optimizers(config, self.model)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "fp16")
        self.forward: nn.Module = torch.compile(self.model) if config.compile else self.model
        if team.world > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.order = WindowOrder(len(splits.train), self.window, config.seed)
        self.iter_num, self.best_val_loss, self.seconds = 0, NO_LOSS, 0.0
        torch.manual_seed(config.seed + team.rank)  # dropout differs between processes

    def batch(self, tokens: Tokens, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T) of the windows at `starts`; they travel in two bytes a token."""
        rows = gather(tokens, starts, self.window)
        if rows.max() >= self.model.config.vocab_size:
            raise ConfigError(f"the data has token {rows.max()}, beyond a vocabulary of {self.model.config.vocab_size}")
        windows = torch.from_numpy(rows).to(self.machine.device).long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def update(self) -> dict[str, float]:
        """Make one iteration; return the loss before it, its learning rate and the gradient's norm."""
        accumulation, world = self.config.gradient_accumulation_steps, self.team.world
        share = np.array_split(self.order.next(accumulation * self.config.batch_size), world)[self.team.rank]
        steps = np.array_split(share, accumulation // world if accumulation % world == 0 else accumulation)
        total = torch.zeros((), device=self.machine.device)
        for i, starts in enumerate(steps):
            wait = world > 1 and i < len(steps) - 1  # processes exchange gradients in the last step only
            with self.forward.no_sync() if wait else contextlib.nullcontext(), self.machine.autocast():
                loss = self.forward(*self.batch(self.splits.train, starts))[1] / len(steps)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        loss = self.team.sum(total.item()) / world
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at iteration {self.iter_num}; lower learning_rate")
        return {"loss": loss, **self.step()}

    def step(self) -> dict[str, float]:
        """Let the optimizers move the weights along the clipped gradients."""
        rate = learning_rate(self.config, self.iter_num)
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.iter_num += 1
        return {"learning_rate": rate, "grad_norm": norm.item()}

    @torch.no_grad()
    def loss_on(self, tokens: Tokens) -> float:
        """Return the mean loss on a split: the same windows each time, and no generator of the training is used."""
        order, size = WindowOrder(len(tokens), self.window, self.config.seed), self.config.batch_size
        starts = order.next(min(self.config.eval_iters * size, len(order.order)))
        share, total = np.array_split(starts, self.team.world)[self.team.rank], 0.0
        self.model.eval()
        for i in range(0, len(share), size):
            with self.machine.autocast():
                loss = self.model(*self.batch(tokens, share[i : i + size]))[1]
            total += loss.item() * len(share[i : i + size])
        self.model.train()
        return self.team.sum(total) / len(starts)

    def evaluate(self) -> tuple[dict[str, float], bool]:
        """Return the losses on both splits, and whether val has never been better. Raises Diverged."""
        train, val = self.loss_on(self.splits.train), self.loss_on(self.splits.val)
        if not math.isfinite(train + val):
            raise Diverged(f"the evaluated loss is {train + val} at iteration {self.iter_num}; lower learning_rate")
        better = self.iter_num > 0 and val < self.best_val_loss
        self.best_val_loss = val if better else self.best_val_loss
        return losses(train, val, self.best(), self.splits.bytes_per_token), better

    def best(self) -> float | None:
        """Return the best validation loss so far."""
        return self.best_val_loss if self.best_val_loss < NO_LOSS else None

    def sample(self) -> tuple[str, str]:
        """Return a prompt and its continuation, from the same prompt and random numbers each time."""
        text, given = self.splits.tokenizer, self.config.sample_prompt
        ids = (
            text.encode(given)[: self.model.config.block_size - 1]
            if given
            else self.splits.val[:PROMPT_TOKENS].tolist()
        )
        device, new = self.machine.device, self.config.sample_tokens
        generator = torch.Generator(device).manual_seed(self.config.seed)
        with self.machine.autocast():
            idx = torch.tensor([ids], device=device)
            idx = self.model.generate(idx, new, SAMPLE_TEMPERATURE, SAMPLE_TOP_K, generator, text.eot)
        self.model.train()
        return text.decode(ids), text.decode(idx[0, len(ids) :].tolist())

    def state(self) -> dict[str, Any]:
        """Return the checkpoint: nanoGPT's keys, and all that decides the next iteration."""
        named = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Diverged(f"a weight is no longer a number at iteration {self.iter_num}; lower learning_rate")
        return {
            "model": self.model.state_dict(),
            "optimizer": named["adamw"] if len(named) == 1 else named,
            "model_args": self.model.config.model_args(),
            "activation": self.model.config.activation,
            "tied": self.model.config.tied,
            "iter_num": self.iter_num,
            "best_val_loss": self.best_val_loss,
            "config": self.config.given(),
            "scaler": self.scaler.state_dict(),
            "rng": self.team.gather(self.machine.generators()),
            "data_state": self.order.state(),
            "seconds": self.seconds,
            "made_by": {
                "torch": str(torch.__version__),
                "threads": torch.get_num_threads(),
                "dtype": self.machine.dtype,
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; its weights are in the model already."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizer"] if len(self.optimizers) == 1 else state["optimizer"][name])
        self.iter_num, self.best_val_loss = state["iter_num"], state["best_val_loss"]
        self.seconds = state["seconds"]
        self.order.restore(state["data_state"])
        self.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == self.team.world:
            self.machine.restore_generators(state["rng"][self.team.rank])


def save(trainer: Trainer, run: Run, best: bool) -> None:
    """Write ckpt.pt, and best.pt (weights alone) if this is the best; process 0 writes, all take part."""
    state = trainer.state()
    if trainer.team.rank == 0:
        checkpoints.save_checkpoint(run.checkpoint, state)
        if best:
            checkpoints.save_checkpoint(run.best, state | {"optimizer": None})


def train(config: TrainConfig, workspace: Workspace, run: Run, team: Team, outcome: Outcome, stop: StopSignal) -> None:
    """Train: the whole of a run, from its data to its last checkpoint."""
    machine, first = Machine.of(config), team.rank == 0
    with team.first_alone():
        model, text, state = start(config, workspace, run, first)
        if first and not state:
            text.save(run.tokenizer)  # the run can be served without its dataset
        splits = dataset(workspace, config.dataset).prepare(text, PreparationLine())
    check_fit(config, splits, model.config.vocab_size, model.config.block_size, team.world)
    trainer = Trainer(config, machine, team, model, splits)
    tokens = config.gradient_accumulation_steps * config.batch_size * trainer.window
    work = Work(model.num_params(), tokens, tokens * model.flops_per_token(trainer.window), machine.name())
    report = Report(run if first else None, config, work)
    if state:
        trainer.restore(state)
        report.resume(trainer.iter_num, trainer.seconds)
    else:
        report.first(trainer.evaluate()[0])

    saved, stop.looping = trainer.iter_num if state else None, True
    while trainer.iter_num < config.max_iters and not team.sum(stop.requested):
        began = time.perf_counter()
        update = trainer.update()
        trainer.seconds += time.perf_counter() - began
        evaluation, best = None, False
        if due := trainer.iter_num % config.eval_interval == 0 or trainer.iter_num == config.max_iters:
            evaluation, best = trainer.evaluate()
        outcome.reached(trainer.iter_num, trainer.best())
        report.iteration(trainer.iter_num, update, trainer.seconds, machine.memory_bytes(), evaluation)
        if due:
            if first and config.sample_tokens:
                report.sample(trainer.iter_num, *trainer.sample())
            save(trainer, run, best)
            saved = trainer.iter_num
    if saved != trainer.iter_num:
        save(trainer, run, best=False)
    outcome.stopped = trainer.iter_num < config.max_iters


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 for an end as asked, 1 a failure, 2 a refusal."""
    sys.stdout.reconfigure(line_buffering=True)
    stop = StopSignal()
    stop.install()
    with Outcome() as outcome:
        command = parse(sys.argv[1:] if argv is None else argv, Path(__file__).resolve().parent)
        workspace = Workspace(command.root, command.pretrained_dir)
        config = resolve(command.config, pretrained_names(workspace))
        run = workspace.run_from_output_dir(config.output_dir)
        team = Team()
        with claim(run, config) if team.rank == 0 else contextlib.nullcontext():
            outcome.of(run, config)
            train(config, workspace, run, team, outcome, stop)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
