"""Time to loss: how long our `nano` preset takes to the validation loss at which nanoGPT's CPU recipe ends.

    .venv/bin/python data/shakespeare_char/prepare.py
    .venv/bin/python -m bench.bench_time_to_loss [--rounds 1] [--seeds 1337,1,2] [--png FILE] [--max_iters 300 …]

Tiny Shakespeare, character by character. Both train in processes of their own; a round is the recipe, with the seed
that it has, and then ours with each seed.
Their clocks run from the start of the process, so that imports, evaluations, samples and checkpoints count for both:
seconds on the wall, and of CPU, which still compare on a machine that others use if each has one thread.
A watcher keeps each checkpoint that appears, with the time; afterwards all are evaluated in the same way: in fp32,
on the whole validation split in windows of the context. Other arguments go to train.py, for trying settings.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.measure import TICKS, Figure, Noise, machine
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
SHAPE = GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False)
POLL = 0.02  # seconds
LIMIT = 570  # seconds that one contestant may take
AIM = 5.0  # times as fast
COLUMNS = (("seconds", 1), ("cpu_seconds", 1), ("loss", 4))  # of a point, with digits


@dataclass(frozen=True)
class Point:
    """A checkpoint: how many iterations and seconds it took, and its loss on the validation split."""

    iteration: int
    seconds: float
    cpu_seconds: float
    loss: float


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def watched(command: Sequence[str], checkpoint: Path, kept: Path, threads: int) -> list[tuple[float, float, Path]]:
    """Run a command; return each checkpoint that it put in place, as a link in `kept`, with both clocks' seconds."""
    found: list[tuple[float, float, Path]] = []
    kept.mkdir()
    log = kept / "log.txt"
    with open(log, "w") as f:
        began, last = time.perf_counter(), -1
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT)
        try:
            while True:
                used, ended = cpu_seconds(process.pid), process.poll() is not None  # in this order: then it is gone
                seconds = time.perf_counter() - began
                if checkpoint.exists() and checkpoint.stat().st_ino != last:
                    link = kept / f"{len(found)}.pt"
                    os.link(checkpoint, link)  # it stays what it is: checkpoints are replaced, never changed
                    last = link.stat().st_ino
                    found.append((seconds, used, link))
                if ended or seconds > LIMIT:
                    break
                time.sleep(POLL)
        finally:
            process.kill()
            process.wait()
    if not ended or process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return found


@torch.inference_mode()
def loss(weights: dict[str, torch.Tensor], val: np.ndarray) -> float:
    """Return the mean loss on all windows of the validation split, in nats per character."""
    model = GPT(SHAPE).eval()
    model.load_state_dict(weights)
    windows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(val, 65)[::64].astype(np.int64))
    parts = [model(part[:, :-1], part[:, 1:].contiguous())[1] for part in windows.split(256)]
    return sum(float(x) * len(part) for x, part in zip(parts, windows.split(256), strict=True)) / len(windows)


def curve(command: Sequence[str], checkpoint: Path, kept: Path, val: np.ndarray, threads: int) -> list[Point]:
    """Return what a training came to, checkpoint by checkpoint."""
    points = []
    for seconds, used, path in watched(command, checkpoint, kept, threads):
        state = torch.load(path, weights_only=True)
        points.append(Point(state["iter_num"], seconds, used, loss(state["model"], val)))
    return points


def one_round(data: Path, given: Sequence[str], seeds: Sequence[str], threads: int) -> list[list[Point]]:
    """Run the recipe and then ours, in a workspace that is thrown away; return their curves, the recipe's first."""
    val = np.fromfile(data / "val.bin", dtype=np.uint16)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as folder:
        home = Path(folder)
        shutil.copytree(data, home / "data" / "text")
        (home / "recipe").mkdir()
        recipe = [sys.executable, "-m", "bench.nanogpt_recipe", str(data.resolve()), str(home / "recipe")]
        found = [curve(recipe, home / "recipe" / "ckpt.pt", home / "recipe_kept", val, threads)]
        for seed in seeds:
            name = f"ours_{seed}"
            run = ["--root", folder, "--dataset", "text", "--output_dir", f"out/{name}", "--seed", seed]
            command = [sys.executable, "train.py", *run, "--model_type", "nano", *given]
            found.append(curve(command, home / "out" / name / "ckpt.pt", home / name, val, threads))
        return found


def reached(points: Sequence[Point], level: float) -> Point | None:
    """Return the first checkpoint that is at least as good as `level`."""
    return next((p for p in points if p.loss <= level), None)


def draw(curves: dict[str, list[list[Point]]], level: float, path: Path) -> None:
    """Write a picture of the curves of all rounds."""
    from matplotlib.figure import Figure as Picture

    axes = (picture := Picture(figsize=(7, 4), layout="constrained")).subplots()
    for (name, rounds), colour in zip(curves.items(), ("tab:gray", "tab:blue"), strict=True):
        for i, points in enumerate(rounds):
            seconds, losses = [p.seconds for p in points], [p.loss for p in points]
            axes.plot(seconds, losses, "o-", color=colour, label=name if i == 0 else None)
    axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="seconds since the start of the process", ylabel="validation loss, nats per character")
    axes.set(title="Tiny Shakespeare, 4 layers of 128")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)


def table(name: str, rounds: Sequence[Sequence[Point]]) -> str:
    """Return a Markdown table of the curves: rounds and seeds beside each other."""
    lines = [f"**{name}**", "", "| iteration | seconds | CPU seconds | validation loss |", "|---|---|---|---|"]
    for points in zip(*rounds, strict=False):
        cells = (", ".join(f"{getattr(p, what):.{digits}f}" for p in points) for what, digits in COLUMNS)
        lines.append(f"| {points[0].iteration} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdict(theirs: Sequence[Sequence[Point]], ours: Sequence[Sequence[Point]]) -> str:
    """Return how many times as fast ours was at the recipe's last loss, and how the two compare after iterations."""
    times, cpu, lines = Figure(), Figure(), []
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        there = reached(b, a[-1].loss)
        if there is None:
            return f"run {i}: ours never reached {a[-1].loss:.4f}; it ended at {b[-1].loss:.4f}\n"
        times.samples.append(a[-1].seconds / there.seconds)
        cpu.samples.append(a[-1].cpu_seconds / there.cpu_seconds)
        lines.append(
            f"run {i}: the recipe is at {a[-1].loss:.4f} after {a[-1].seconds:.1f} s; "
            f"ours at {there.loss:.4f} after {there.seconds:.1f} s, in {there.iteration} iterations"
        )
        same = {p.iteration: p.loss for p in a}
        pairs = [f"{p.loss:.3f} and {same[p.iteration]:.3f} at {p.iteration}" for p in b if p.iteration in same]
        lines.append(f"run {i}: ours and theirs at equal iterations: {', '.join(pairs) or 'none'}")
    result = "holds" if times.median >= AIM else "does not hold"
    return (
        "\n".join([*lines, f"ours is {times.text(2)} times as fast, in CPU time {cpu.text(2)}; aim {AIM:g}: {result}"])
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "shakespeare_char")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seeds", default="1337,1,2", help="of ours, separated by commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--png", type=Path, default=ROOT / "out" / "time_to_loss.png")
    args, given = parser.parse_known_args()
    (ROOT / "out").mkdir(exist_ok=True)
    print(f"{machine()}, {args.threads} threads\n")
    seeds, noise = args.seeds.split(","), Noise()
    found = [one_round(args.data, given, seeds, args.threads) for _ in range(args.rounds)]
    theirs, ours = [curves[0] for curves in found], [curve for curves in found for curve in curves[1:]]
    print(table("nanoGPT's recipe", theirs))
    print(table(f"ours, seeds {args.seeds}", ours))
    print(verdict([curves[0] for curves in found for _ in seeds], ours))
    print(f"({args.rounds} rounds; others used {noise.cores():.2f} cores meanwhile)")
    draw({"nanoGPT's recipe": theirs, "ours": ours}, theirs[0][-1].loss, args.png)


if __name__ == "__main__":
    main()
