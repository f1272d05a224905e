"""The optimizers of a run: which parameters each of them moves, and how. Their learning rate comes from outside."""

import torch

from learning.light_optimizer import AdamW
from learning.muon import Muon
from model import GPT
from training.config import TrainConfig


def optimizers(config: TrainConfig, model: GPT) -> dict[str, torch.optim.Optimizer]:
    """Return AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both.
    """
    decay = float(config.weight_decay or 0.0)
    groups = model.parameter_groups(decay)
    found: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        matrices = {p: None for p in model.transformer["h"].parameters() if p.dim() == 2}  # a set in order
        groups = [group | {"params": [p for p in group["params"] if p not in matrices]} for group in groups]
        found["muon"] = Muon(matrices, weight_decay=decay)
    found["adamw"] = AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    return found
