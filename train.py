"""Train or fine-tune a GPT: build the config, tokenizer, data, model and optimizer, then loop.

    python train.py --dataset stdlib --model_type nano --max_iters 500
    python train.py --config out/my_run/train_config.json           (how the server runs a job)
    python train.py --output_dir out/my_run --init_from resume      (goes on exactly where it stopped)
    python train.py --nproc_per_node 2 --dataset stdlib …           (the same batch, shared by two processes)

Everything goes into out/<name>/: ckpt.pt, best.pt, tokenizer.json, metrics.jsonl, samples.jsonl and, last,
result.json. A checkpoint holds all that decides the next iteration, so that a resumed run repeats the losses
and weights of one that was never stopped, on a CPU to the last bit. What needs no tensors is in training/; the parts
that do (devices, processes, optimizers) are in learning/.
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from torch import nn
except ModuleNotFoundError as error:  # a Python without the project's packages
    sys.exit(f"{error.name} is not installed for this Python; after `make setup` use .venv/bin/python train.py")

from learning import lora, sharing
from learning.batches import Batches
from learning.launcher import launch
from learning.machine import Machine
from learning.optimizers import optimizers
from learning.start import last_good, prepare, start
from learning.team import Team, leave
from model import GPT
from storage import checkpoints
from storage.datasets import Splits
from storage.runs import Run, Workspace
from training.best import BestLoss
from training.command_line import parse
from training.config import TrainConfig
from training.examples import Part, order_of
from training.log import patient_output
from training.outcome import Diverged, Outcome
from training.probe import probe
from training.rank import Rank
from training.report import Report, losses
from training.resumption import warn_of_differences
from training.roll_back import RollBacks
from training.run_folder import claim
from training.schedule import learning_rate
from training.starting_point import settled, window_of
from training.stop_signal import StopSignal
from training.trackers import trackers

SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 40


class Trainer:
    """A run in memory: everything that the next iteration depends on."""

    def __init__(self, config: TrainConfig, machine: Machine, team: Team, model: GPT, splits: Splits, stop: StopSignal):
        self.config, self.machine, self.team, self.splits, self.stop = config, machine, team, splits, stop
        self.window = window_of(config, model.config.block_size)
        lora.hold_fixed(model, machine.product_dtype)
        self.model, self.forward = model, sharing.shared(config, model, machine.device, team.world)
        self.saved: int | None = None  # the iteration of the newest checkpoint
        self.roll_backs = RollBacks(model.config.vocab_size)
        self.begin()

    def begin(self) -> None:
        """Stand before the first iteration; weights, and how often the run was rolled back, stay."""
        self.model.zero_grad(set_to_none=True)
        self.roll_backs.forget_losses()
        self.optimizers = optimizers(self.config, self.model)
        self.scaler = torch.amp.GradScaler(self.machine.device.type, enabled=self.machine.dtype == "fp16")
        self.batches = self.batches_of((self.splits.train, self.splits.train_mask), self.config.seed)
        self.iter_num, self.evaluated, self.seconds = 0, -1, 0.0
        self.best = BestLoss()

    def batches_of(self, part: Part, seed: int) -> Batches:
        """Return the batches of a split in the order of a seed, from the first one on."""
        vocab_size, device = self.model.config.vocab_size, self.machine.device
        return Batches(part, order_of(*part, self.window, seed), self.config, vocab_size, self.team, device)

    def interrupted(self) -> bool:
        """Say whether to drop work that can be done again; several processes only stop together, after an iteration."""
        return self.stop.requested and self.team.world == 1

    def update(self) -> dict[str, float]:
        """Make one iteration; return the loss before it, its learning rate and the gradient's norm.

        If it is interrupted between two steps, it has not happened, and {} is returned. Dropout's generator is
        seeded anew by the iteration's number, so that there is none whose state a checkpoint has to hold.
        """
        began, before, world, rank = time.perf_counter(), self.batches.state(), self.team.world, self.team.rank
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, self.iter_num, rank)).generate_state(1)[0]))
        total = torch.zeros((), device=self.machine.device)
        for i, step in enumerate(self.batches.next()):
            if i > 0 and self.interrupted():
                self.batches.restore(before)
                return {}
            with sharing.exchange(self.forward, last=step.last), self.machine.autocast():
                loss = self.forward(step.inputs, step.targets)[1] / step.divisor
            self.scaler.scale(loss).backward()
            total += loss.detach()
        loss = self.team.sum(total.item()) / world
        self.roll_backs.see(self.iter_num, loss)
        result = {"loss": loss, **self.step()}
        self.seconds += time.perf_counter() - began
        return result

    def step(self) -> dict[str, float]:
        """Let the optimizers move the weights along the clipped gradients, if those are numbers."""
        rate = learning_rate(self.config, self.iter_num) * self.roll_backs.factor
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf).item()
        if not (math.isfinite(norm) or self.scaler.is_enabled()):  # the scaler leaves such an iteration out by itself
            raise Diverged(f"the gradient's norm is {norm} at iteration {self.iter_num}; lower learning_rate")
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.iter_num += 1
        return {"learning_rate": rate, "grad_norm": norm}

    @torch.no_grad()
    def loss_on(self, part: Part) -> float:
        """Return the mean loss on a split: the same windows each time, and no generator of the training is used."""
        batches, size = self.batches_of(part, self.config.seed + 1), self.config.batch_size
        starts = batches.order.next(min(self.config.eval_iters * size, len(batches.order.order)))
        shares, total, weights = np.array_split(starts, self.team.world), 0.0, 0
        self.model.eval()
        for i in range(0, 0 if self.interrupted() else len(shares[0]), size):  # the first share is the longest
            mine = shares[self.team.rank][i : i + size]
            with self.machine.autocast():  # who has nothing left still takes part where the model is split
                loss = self.model(*batches.batch(mine if len(mine) else starts[:1]))[1]
            if count := batches.weight(mine):
                total, weights = total + loss.item() * count, weights + count
        self.model.train()
        return self.team.sum(total) / max(self.team.sum(weights), 1)  # 0 only if it was interrupted

    def evaluate(self) -> tuple[dict[str, Any] | None, bool]:
        """Return the losses on both splits if they are due, and whether val has never been better."""
        due = self.iter_num % self.config.eval_interval == 0 or self.iter_num == self.config.max_iters
        if not due or self.evaluated == self.iter_num:
            return None, False
        train = self.loss_on((self.splits.train, self.splits.train_mask))
        val = self.loss_on((self.splits.val, self.splits.val_mask))
        if self.interrupted():
            return None, False
        if not math.isfinite(train + val):
            raise Diverged(f"the evaluated loss is {train + val} at iteration {self.iter_num}; lower learning_rate")
        self.evaluated, better = self.iter_num, self.best.see(self.iter_num, val)
        return losses(train, val, self.best.loss, self.splits.bytes_per_token), better

    def samples(self) -> bool:
        """Say whether this process takes part in making a sample now: process 0, or all where the model is split."""
        if self.config.sample_tokens and self.config.shard:
            return not self.team.sum(self.stop.requested)
        return self.team.rank == 0 and bool(self.config.sample_tokens) and not self.stop.requested

    def sample(self) -> tuple[str, str]:
        """Return a prompt and its continuation, from the same prompt and random numbers each time."""
        text = self.splits.tokenizer
        ids, end = probe(self.splits, self.config.sample_prompt, self.model.config.block_size)
        generator = torch.Generator(self.machine.device).manual_seed(self.config.seed)
        idx, new = torch.tensor([ids], device=self.machine.device), self.config.sample_tokens
        with self.machine.autocast():
            idx = self.model.generate(idx, new, SAMPLE_TEMPERATURE, SAMPLE_TOP_K, generator, end)
        self.model.train()
        return text.decode(ids), text.decode(idx[0, len(ids) :].tolist())

    def state(self) -> dict[str, Any]:
        """Return the checkpoint: nanoGPT's keys, and all that decides the next iteration."""
        first = self.team.rank == 0
        named = {name: sharing.whole_moments(optimizer, first) for name, optimizer in self.optimizers.items()}
        if self.team.sum(not sharing.finite(self.model.parameters())):
            raise Diverged(f"a weight is no longer a number at iteration {self.iter_num}; lower learning_rate")
        shape = self.model.config
        weights = sharing.saved(self.model, first) | {"optimizer": named["adamw"] if len(named) == 1 else named}
        about = {"model_args": shape.model_args(), "activation": shape.activation, "tied": shape.tied}
        reached = {"iter_num": self.iter_num, "evaluated": self.evaluated, **self.best.state()}
        reached["roll_backs"] = self.roll_backs.state()
        position = {"data_state": self.batches.state(), "scaler": self.scaler.state_dict(), "seconds": self.seconds}
        return weights | about | reached | position | {"config": self.config.given(), "made_by": self.made_by()}

    def made_by(self) -> dict[str, Any]:
        """Return what the last bits of a result depend on, beside the checkpoint."""
        found = {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "processes": self.team.world}
        return found | {"device": self.machine.name, "dtype": self.machine.dtype}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; its weights are in the model already."""
        for name, optimizer in self.optimizers.items():
            whole = state["optimizer"]
            sharing.take_moments(optimizer, whole if len(self.optimizers) == 1 else whole[name])
        self.iter_num, self.evaluated = state["iter_num"], state["evaluated"]
        self.best.restore(state, self.config.patience)
        self.roll_backs.restore(state.get("roll_backs", {}))
        self.seconds = state["seconds"]
        warn_of_differences(state["made_by"], self.made_by())
        self.batches.restore(state["data_state"])
        self.scaler.load_state_dict(state["scaler"])


def save(trainer: Trainer, run: Run, report: Report, best: bool) -> None:
    """Write ckpt.pt, and best.pt (weights alone) if this is the best; process 0 writes, all take part.

    A failed write, as on a full disk, does not end the run: the checkpoint before it stays.
    """
    state = trainer.state()

    def write() -> None:
        checkpoints.save_checkpoint(run.checkpoint, state, kept=trainer.config.keeps(trainer.iter_num))
        if best:
            checkpoints.save_checkpoint(run.best, {**state, "optimizer": None, "lora": {}})

    if not trainer.team.sum(trainer.team.rank == 0 and not report.attempt(trainer.iter_num, write)):
        trainer.saved = trainer.iter_num


def roll_back(trainer: Trainer, workspace: Workspace, run: Run, report: Report, reason: Diverged) -> None:
    """Go back to the last good checkpoint, or to the start if none was written yet, with half the rate.

    Raises Diverged when that has been done often enough, or cannot be done.
    """
    state = None if trainer.saved is None else last_good(run)
    if state is None and trainer.config.init_from == "resume":
        raise reason
    trainer.roll_backs.again(reason, 0 if state is None else state["iter_num"])
    to = {"model": start(trainer.config, workspace, run, first=False)[0].state_dict()} if state is None else state
    sharing.take_weights(trainer.model, lora.take_weights(to))
    trainer.begin()
    if state is not None:
        trainer.restore(state)
        trainer.team.sum(0)  # nobody may still be reading what process 0 replaces
        save(trainer, run, report, best=False)
    report.rolled_back(trainer.iter_num, trainer.seconds, trainer.roll_backs.note)


def loop(trainer: Trainer, run: Run, report: Report, outcome: Outcome) -> None:
    """Iterate from where the trainer stands to the end, which is also an early or a requested one, and save."""
    config, update = trainer.config, {}
    while True:
        evaluation, best = trainer.evaluate()
        outcome.reached(trainer.iter_num, trainer.best.loss)
        memory = trainer.machine.memory_bytes()
        report.iteration(trainer.iter_num, update, evaluation, trainer.seconds, memory, trainer.roll_backs.note)
        if evaluation is not None and trainer.iter_num > 0:
            if trainer.samples():
                report.sample(trainer.iter_num, *trainer.sample())
            save(trainer, run, report, best)
        early = trainer.best.verdict(trainer.iter_num, config)
        if trainer.iter_num >= config.max_iters or early is not None or trainer.team.sum(trainer.stop.requested):
            break
        update = trainer.update()
    if trainer.saved != trainer.iter_num:
        save(trainer, run, report, best=False)
    if report.failure is not None:  # now its work would be lost
        raise report.failure
    outcome.note = "; ".join(filter(None, (trainer.roll_backs.note, early))) or None
    outcome.stopped = trainer.iter_num < config.max_iters and early is None


def train(config: TrainConfig, workspace: Workspace, run: Run, team: Team, outcome: Outcome, stop: StopSignal) -> None:
    """Train: the whole of a run, from its data to its last checkpoint."""
    machine = Machine.of(config)
    told = trackers(run, config) if team.rank == 0 else []
    model, splits, state = prepare(config, workspace, run, team)
    trainer = Trainer(config, machine, team, model, splits, stop)
    report = Report(run if team.rank == 0 else None, config, told)
    if state:
        trainer.restore(state)
        trainer.saved = trainer.iter_num
        report.resume(trainer.iter_num, trainer.seconds)
    report.tell(trainer.iter_num, team.place.note)
    window = trainer.batches.window
    operations = model.flops_per_token(window)
    report.start(model.num_params(), window, operations, machine.peak(), team.world)

    stop.enter_loop()
    while True:
        try:
            return loop(trainer, run, report, outcome)
        except Diverged as error:
            reason = error.with_traceback(None)  # its frames hold memory of the device
        roll_back(trainer, workspace, run, report, reason)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 for an end as asked, 1 a failure, 2 a refusal."""
    sys.stdout.reconfigure(line_buffering=True)
    stop = StopSignal.installed()
    place, argv, script = Rank.of(os.environ), sys.argv[1:] if argv is None else argv, Path(__file__).resolve()
    place.bind()
    with patient_output(), Outcome() as outcome:
        config, workspace = parse(argv, script.parent)
        config = settled(config, workspace)
        run = workspace.run_from_output_dir(config.output_dir)
        if config.nproc_per_node > 1 and place.world == 1:
            launch(script, argv, config, run, outcome, stop)
        else:
            team = Team(place)
            ranks, first = team.pids(), team.rank == 0
            with claim(run, config, place.launcher, ranks) if first else contextlib.nullcontext():
                outcome.of(run if first else None, config)
                train(config, workspace, run, team, outcome, stop)
    leave()
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
