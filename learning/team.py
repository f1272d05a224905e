"""The processes that train together. Nothing here is specific to a model: ranks, and sums over them."""

import datetime
import os
import signal

import torch
import torch.distributed as dist

from training.rank import Rank

PATIENCE = datetime.timedelta(hours=12)  # the others wait while process 0 prepares data; a death is noticed at once


class Team:
    """The processes that train together: one, or those that torchrun started. Each takes its share of a batch."""

    def __init__(self, place: Rank) -> None:
        self.place = place
        self.rank, self.world = self.place.number, self.place.world
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            if self.place.folder is None:
                dist.init_process_group(backend, timeout=PATIENCE)
            else:  # a file to meet at, and no port that others could reach
                file = str(self.place.folder / "meeting")
                store = dist.FileStore(file, self.world)  # type: ignore[attr-defined]  # it is there
                dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=PATIENCE)

    def sum(self, value: float) -> float:
        """Return the sum of a number over all processes, in float64."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.item()

    def pids(self) -> list[int]:
        """Return the process ids of all, by rank; all must ask."""
        found = torch.zeros(self.world, dtype=torch.int64)
        found[self.rank] = os.getpid()
        if self.world > 1:
            dist.all_reduce(found)
        return [int(pid) for pid in found]


def leave() -> None:
    """End the talk with the other processes, if there was any; a request to stop has nothing left to stop."""
    if dist.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.destroy_process_group()
