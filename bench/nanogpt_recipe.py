"""nanoGPT's published CPU recipe for tiny Shakespeare, as plain code: what bench_time_to_loss measures ours against.

    .venv/bin/python -m bench.nanogpt_recipe data/shakespeare_char /tmp/recipe

4 layers, 4 heads, 128 wide, block 64, batch 12, 2000 iterations of AdamW in fp32, the rate from 1e-3 to 1e-4 along
a cosine; evaluated every 250 iterations on 20 batches of both splits, and saved when it is better. It shares no
code with our trainer, so that nothing which makes ours faster makes this one faster. Parameters have our names.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, HEADS, WIDTH, BLOCK, BATCH, VOCABULARY = 4, 4, 128, 64, 12, 65
ITERATIONS, WARMUP, RATE, LOWEST_RATE = 2000, 100, 1e-3, 1e-4
EVAL_INTERVAL, EVAL_ITERS = 250, 20


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, HEADS, C // HEADS).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH, bias=False), Attention()
        self.ln_2 = nn.LayerNorm(WIDTH, bias=False)
        wide, narrow = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.mlp = nn.ModuleDict({"c_fc": wide, "c_proj": narrow})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        table = {"wte": nn.Embedding(VOCABULARY, WIDTH), "wpe": nn.Embedding(BLOCK, WIDTH)}
        layers = {"h": nn.ModuleList(Layer() for _ in range(LAYERS)), "ln_f": nn.LayerNorm(WIDTH, bias=False)}
        self.transformer = nn.ModuleDict(table | layers)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if name.endswith("c_proj.weight") else 0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(BLOCK))
        for layer in self.transformer["h"].children():
            x = layer(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


def batch(path: Path) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (BATCH, BLOCK) of random windows; the map is made anew each time, as nanoGPT does."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - BLOCK, (BATCH,)).tolist()
    x = torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts])
    return x, y


def rate(iteration: int) -> float:
    """Return the learning rate: a warm-up, then a cosine."""
    if iteration < WARMUP:
        return RATE * (iteration + 1) / (WARMUP + 1)
    done = (iteration - WARMUP) / (ITERATIONS - WARMUP)
    return LOWEST_RATE + 0.5 * (1 + math.cos(math.pi * done)) * (RATE - LOWEST_RATE)


@torch.no_grad()
def evaluated(model: Model, data: Path) -> dict[str, float]:
    """Return the mean loss of some batches of each split."""
    model.eval()
    found = {}
    for split in ("train", "val"):
        losses = torch.tensor([model(*batch(data / f"{split}.bin")).item() for _ in range(EVAL_ITERS)])
        found[split] = losses.mean().item()
    model.train()
    return found


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def main(data: Path, out: Path) -> None:
    """Train; leave ckpt.pt in `out` at every evaluation that was the best so far."""
    torch.manual_seed(1337)
    model, best = Model(), math.inf
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99))
    for iteration in range(ITERATIONS + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(iteration)
        if iteration % EVAL_INTERVAL == 0:
            losses = evaluated(model, data)
            print(f"iteration {iteration}: train {losses['train']:.4f}, val {losses['val']:.4f}", flush=True)
            if losses["val"] < best:
                best = losses["val"]
                if iteration > 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": iteration}
                    save(out / "ckpt.pt", state)
        if iteration == ITERATIONS:
            break
        loss = model(*batch(data / "train.bin"))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # nanoGPT logs every iteration


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
