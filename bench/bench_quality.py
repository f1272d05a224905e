"""Precision: what bf16 and int8 cost in validation loss, against fp32 on the same text. This decides what `auto` is.

    .venv/bin/python -m bench.bench_quality [--model_path out/NAME/ckpt.pt] [--text FILE] [--windows 40]

The text's last tenth in windows of the whole context, spread evenly, each from its first token on. Beside the bundled
model, and the one given, the same model with channels far out: a few gains of its norms, and a few of its values, are
30 to 100 times as large and the weights that meet them as much smaller, so that in fp32 it computes the same. Trained
GPT-2 has such channels, and they are what 8-bit activations fail at.
"""

import argparse
import copy
import math
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import machine
from inference.native_runner import NativeRunner
from model import GPT
from storage.checkpoints import load_model
from storage.registry import resolve
from storage.runs import Workspace

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = "tiny-shakespeare"
SHARE = 0.01  # of the channels are made far out
LEAST, MOST = 30.0, 100.0  # times as large
BOUND = 0.5  # percent that int8 may lose to be what auto means


def _scale(draw: random.Random, gains: list[Tensor], weights: Tensor) -> None:
    """Make a few channels of `gains` larger and the columns of `weights` that they meet smaller, in place."""
    channels = weights.size(1)
    for channel in draw.sample(range(channels), max(2, round(SHARE * channels))):
        times = math.exp(draw.uniform(math.log(LEAST), math.log(MOST)))
        for gain in gains:
            gain[channel] *= times
        weights[:, channel] /= times


@torch.no_grad()
def with_channels_far_out(model: GPT, seed: int = 0) -> GPT:
    """Return a copy that computes the same function through channels of very unequal size."""
    draw, model = random.Random(seed), copy.deepcopy(model)
    C = model.config.n_embd
    for block in model.transformer["h"]:  # type: ignore[attr-defined]
        attention, mlp = block.attn, block.mlp
        pairs = [
            ([block.ln_1.weight, block.ln_1.bias], attention.c_attn.weight),
            ([block.ln_2.weight, block.ln_2.bias], mlp.c_fc.weight),
        ]
        values = [
            attention.c_attn.weight[2 * C :],
            None if attention.c_attn.bias is None else attention.c_attn.bias[2 * C :],
        ]
        for gains, weights in [*pairs, (values, attention.c_proj.weight)]:
            _scale(draw, [gain for gain in gains if gain is not None], weights)
    return model


def windows(ids: list[int], size: int, count: int) -> list[list[int]]:
    """Return up to `count` pieces of size + 1 ids that share at most their ends, spread evenly."""
    starts = range(0, len(ids) - size, size)
    step = max(1, len(starts) / count)
    return [ids[start : start + size + 1] for start in (starts[int(i * step)] for i in range(min(count, len(starts))))]


def losses(runner: NativeRunner, pieces: list[list[int]]) -> Tensor:
    """Return the mean cross-entropy of each piece, in nats a token."""
    found = []
    for piece in pieces:
        n = len(piece) - 1
        logits = runner.rows(piece[:-1], [0] * n, list(range(n)), list(range(n)))
        found.append(F.cross_entropy(logits, torch.tensor(piece[1:])))
    return torch.stack(found)


def compare(title: str, model: GPT, pieces: list[list[int]]) -> list[str]:
    """Return lines of a table: the loss in each precision, and how far above fp32 with twice the standard error."""
    lines, reference = [], None
    for dtype in ("fp32", "bf16", "int8"):
        runner = NativeRunner(model, slots=1, dtype=dtype)
        found = losses(runner, pieces)
        runner.close()
        if reference is None:
            reference = found
            lines.append(f"| {title} | {dtype} | {found.mean():.4f} | |")
            continue
        change = (found - reference) / reference.mean() * 100
        error = 2 * change.std() / math.sqrt(len(pieces))
        holds = "holds" if change.mean() <= BOUND else "does not hold"
        lines.append(f"| {title} | {dtype} | {found.mean():.4f} | {change.mean():+.3f} % ± {error:.3f}: {holds} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="also this model: a checkpoint or folder under out/ or models/")
    parser.add_argument("--text", type=Path, default=ROOT / "data" / "shakespeare" / "input.txt")
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    workspace = Workspace(ROOT)
    text = args.text.read_text(encoding="utf-8")
    references = [resolve(workspace, model_type=BUNDLED)]
    if args.model_path is not None:
        references.append(resolve(workspace, model_path=args.model_path))
    print(machine())
    print(f"\n| model | precision | loss, nats a token | above fp32 (bound {BOUND} %) |\n|---|---|---|---|")
    for reference in references:
        loaded = load_model(reference, workspace)
        model = loaded.model.float()
        ids = loaded.tokenizer.encode(text[int(len(text) * 0.9) :])
        pieces = windows(ids, model.config.block_size, args.windows)
        for title, tried in (
            (reference.label, model),
            (f"{reference.label}, channels far out", with_channels_far_out(model)),
        ):
            print("\n".join(compare(title, tried, pieces)), flush=True)


if __name__ == "__main__":
    main()
