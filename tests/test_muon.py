"""The Muon optimizer: the steps of torch's own, but q, k and v each by themselves."""

import pytest
import torch
from torch import nn

from learning.muon import Muon, matrices, orthogonalized

SIZES = [(16, 16), (64, 16), (16, 64), (16, 16), (64, 16)]


def weights(sizes):
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=random)) for size in sizes]


def steps(optimizer, params, count=3):
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
    return params


def test_a_step_is_that_of_torchs_muon():
    mine, theirs = weights(SIZES), weights(SIZES)
    steps(Muon(mine, lr=0.02, weight_decay=0.1), mine)
    same = {"momentum": 0.9, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}
    steps(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, **same), theirs)
    for a, b, start in zip(mine, theirs, weights(SIZES), strict=True):
        moved = (b - start).norm()
        assert (a - b).norm() < 0.02 * moved  # bf16 rounds differently in another order


def test_q_k_and_v_in_one_weight_move_as_three_matrices():
    (fused,) = weights([(48, 16)])
    apart = [nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    whole, parts = Muon([fused], lr=0.02), Muon(apart, lr=0.02)
    gradient = torch.randn(48, 16, generator=torch.Generator().manual_seed(2))
    fused.grad = gradient
    for p, g in zip(apart, gradient.chunk(3), strict=True):
        p.grad = g
    whole.step()
    parts.step()
    assert torch.equal(fused, torch.cat(apart))


def test_singular_values_come_near_one():
    x = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e3]).view(3, 1, 1)
    values = torch.linalg.svdvals(orthogonalized(x).float())
    assert values.min() > 0.5 and values.max() < 1.4


def test_a_zero_gradient_moves_nothing_and_none_is_left_out():
    p, q = weights([(8, 8), (8, 8)])
    before = [p.detach().clone(), q.detach().clone()]
    p.grad = torch.zeros(8, 8)
    Muon([p, q], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])


@pytest.mark.parametrize(
    ("size", "parts"), [((48, 16), [(16, 16)] * 3), ((64, 16), [(16, 64)]), ((16, 64), [(16, 64)])]
)
def test_matrices_lie_down_and_share_memory(size, parts):
    weight = torch.zeros(size)
    found = matrices(weight)
    assert [tuple(part.shape) for part in found] == parts
    for part in found:
        part.add_(1)
    assert weight.sum() == weight.numel()
