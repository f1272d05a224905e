"""The learning rate at each iteration: a linear warm-up, then a fall to min_lr along a cosine or a line."""

import math

from training.config import TrainConfig


def learning_rate(config: TrainConfig, iter_num: int) -> float:
    """Return the rate for the update that follows `iter_num` finished ones; the config must be resolved."""
    highest, lowest, warmup, end = config.learning_rate, config.min_lr, config.warmup_iters, config.lr_decay_iters
    assert highest is not None and lowest is not None and warmup is not None and end is not None
    if iter_num < warmup:
        return highest * (iter_num + 1) / (warmup + 1)
    if config.schedule == "constant":
        return highest
    if iter_num >= end:
        return lowest
    done = (iter_num - warmup) / (end - warmup)  # 0 after the warm-up, 1 at the end
    share = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return lowest + share * (highest - lowest)
