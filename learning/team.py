"""The processes that train together. Nothing here is specific to a model: ranks, and sums over them."""

import os

import torch
import torch.distributed as dist


class Team:
    """The processes that train together: one, or those that torchrun started. Each takes its share of a batch."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def sum(self, value: float) -> float:
        """Return the sum of a number over all processes, in float64."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.item()
