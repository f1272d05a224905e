"""Optimizers without torch's compiler: the same numbers as torch's own."""

import copy

import torch
from torch import nn

from learning.light_optimizer import AdamW


def stepped(kind, count=5, **options):
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, generator=random)), nn.Parameter(torch.randn(3, generator=random))]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.01, betas=(0.9, 0.95), **options)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return params, optimizer


def test_a_step_is_bit_for_bit_that_of_torchs_adamw():
    mine, _ = stepped(AdamW, fused=True)
    theirs, _ = stepped(torch.optim.AdamW, fused=True)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(mine, theirs, strict=True))


def test_states_go_both_ways_between_torchs_adamw_and_ours():
    for first, second in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)):
        params, old = stepped(first, fused=True)
        copies, new = stepped(second, count=0, fused=True)
        new.load_state_dict(copy.deepcopy(old.state_dict()))
        with torch.no_grad():
            for mine, p in zip(copies, params, strict=True):
                mine.copy_(p)
        for optimizer, weights in ((old, params), (new, copies)):
            for p in weights:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
