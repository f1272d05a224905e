"""Training speed: our loop against a plain transformers loop on the same shapes, in one run.

    .venv/bin/python -m bench.bench_train [--jobs nano,gpt2] [--rounds 3] [--threads 2]

`nano` is the preset from scratch (4 layers, 128 wide, block 64, batch 32) at character level; `gpt2` is
fine-tuning of GPT-2 124M on 4 windows of 256 tokens. Both loops: random windows, forward, backward, clipping to 1,
the optimizer's step. Ours is `train.Trainer` as `train.py` runs it, in its own precision and optimizer and, for a
like-for-like row, in theirs (AdamW). The peers are GPT2LMHeadModel in the usual loop, fp32 and bf16 autocast, and
in transformers' own Trainer in bf16.
The tokens are random: only speed is measured here.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.measure import machine, rounds, table
from learning.machine import Machine
from learning.team import Team
from model import GPT, GPTConfig
from storage.token_files import Splits
from train import Trainer
from training.config import TrainConfig, resolve
from training.rank import Rank
from training.stop_signal import StopSignal


@dataclass
class RandomTokenizer:
    """A tokenizer of which the loop only needs a size: the tokens are random."""

    n_vocab: int
    eot: int | None = None
    fingerprint: str = "0" * 16


SHAPES: dict[str, dict[str, Any]] = {
    "nano": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257, "bias": True},
}
BATCH = {"nano": (32, 64), "gpt2": (4, 256)}  # windows, tokens of each
STEPS = {"nano": 60, "gpt2": 1}  # iterations of one sample


def tokens(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, 1_000_000).astype(np.uint16)


def ours(job: str, threads: int, **given: Any) -> Callable[[], float]:
    """Return a sample of our loop: tokens per second."""
    batch, window = BATCH[job]
    start: dict[str, Any] = {"model_type": job, "init_from": "scratch"} if job == "nano" else {"model_type": "gpt2"}
    config = resolve(
        TrainConfig.parse(
            {"dataset": "random", "output_dir": "out/bench", "batch_size": batch, "window": window, "threads": threads}
            | start
            | given
        )
    )
    data = tokens(SHAPES[job]["vocab_size"])
    tokenizer: Any = RandomTokenizer(SHAPES[job]["vocab_size"])
    splits = Splits(train=data, val=data, bytes_per_token=1.0, tokenizer=tokenizer, name="random")
    model, team = GPT(GPTConfig(**SHAPES[job])).train(), Team(Rank())
    trainer = Trainer(config, Machine.of(config), team, model, splits, StopSignal())
    return partial(speed, trainer.update, batch * window, STEPS[job])


def their_model(job: str) -> Any:
    """Return transformers' model in our shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    s = SHAPES[job]
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {name: s[name] for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=s["block_size"], **none)).train()


def theirs(job: str, bf16: bool) -> Callable[[], float]:
    """Return a sample of the plain loop around transformers' model: tokens per second."""
    model, (batch, window), data = their_model(job), BATCH[job], tokens(SHAPES[job]["vocab_size"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.1)

    def update() -> None:
        starts = torch.randint(len(data) - window - 1, (batch,)).tolist()
        ids = torch.stack([torch.from_numpy(data[i : i + window].astype(np.int64)) for i in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return partial(speed, update, batch * window, STEPS[job])


def their_trainer(job: str, bf16: bool) -> Callable[[], float]:
    """Return a sample of transformers' Trainer: tokens per second, its preparation and first step not counted."""
    from transformers import Trainer as TheirTrainer
    from transformers import TrainerCallback, TrainingArguments

    model, (batch, window), steps = their_model(job), BATCH[job], STEPS[job] + 1
    data = torch.from_numpy(tokens(SHAPES[job]["vocab_size"]).astype(np.int64))
    rows = [{"input_ids": ids, "labels": ids} for ids in data[: batch * window * steps].view(-1, window)]

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def sample() -> float:
        ends.clear()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=batch,
                max_steps=steps,
                learning_rate=1e-4,
                weight_decay=0.1,
                bf16=bf16,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            TheirTrainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
        return batch * window * (steps - 1) / (ends[-1] - ends[0])

    return sample


def speed(update: Callable[[], Any], tokens_each: int, steps: int) -> float:
    """Return tokens per second of `steps` iterations."""
    start = time.perf_counter()
    for _ in range(steps):
        update()
    return tokens_each * steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="nano,gpt2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()}; {args.threads} threads\n")
    for job in args.jobs.split(","):
        contestants = {
            "ours": ours(job, args.threads),
            "ours, AdamW in fp32": ours(job, args.threads, optimizer="adamw", dtype="fp32"),
            "transformers fp32": theirs(job, bf16=False),
            "transformers bf16 autocast": theirs(job, bf16=True),
            "transformers Trainer, bf16": their_trainer(job, bf16=True),
        }
        for run in contestants.values():
            run()  # warm
        figures, others = rounds(contestants, args.rounds)
        batch, window = BATCH[job]
        print(table(f"{job}, {batch} x {window} tokens an iteration", "tokens/s", figures, "ours"))
        print(f"({args.rounds} rounds; others used {others:.2f} cores meanwhile)\n", flush=True)


if __name__ == "__main__":
    main()
