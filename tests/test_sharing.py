"""A model split among processes: what is saved of it is whole, and what is whole can be put into it."""

import copy
import math

import pytest
import torch
import torch.distributed as dist

from learning import sharing
from model import GPT, GPTConfig
from training.config import TrainConfig

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11)
CONFIG = TrainConfig(dataset="sums", output_dir="a", nproc_per_node=2, shard=True)


@pytest.fixture
def alone(tmp_path):
    """Be a team of one, which shards as a larger one does."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "meeting"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(seed: int, split: bool, tied: bool = True) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE.__dict__, "tied": tied}))
    if split:
        assert sharing.shared(CONFIG, model, torch.device("cpu"), 1) is model
    return model, torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2, fused=True)


def learn(model: GPT, optimizer: torch.optim.Optimizer) -> float:
    tokens = torch.arange(9).remainder(7)[None]
    loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("tied", [True, False])
def test_a_split_model_learns_and_is_saved_as_a_whole_one(alone, tied):
    split, whole = made(1, True, tied), made(1, False, tied)
    assert [learn(*split) for _ in range(3)] == pytest.approx([learn(*whole) for _ in range(3)], abs=1e-6)
    weights, expected = sharing.saved(split[0], keep=True)["model"], whole[0].state_dict()
    assert list(weights) == list(expected) and all(type(w) is torch.Tensor for w in weights.values())
    assert all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in expected)
    assert (weights["lm_head.weight"] is weights["transformer.wte.weight"]) == tied
    moments = sharing.whole_moments(split[1], keep=True)
    assert moments["param_groups"] == whole[1].state_dict()["param_groups"]
    assert all(type(m["exp_avg"]) is torch.Tensor for m in moments["state"].values())
    assert set(sharing.saved(split[0], keep=False)["model"].values()) == {None}


def test_whole_weights_and_moments_go_into_a_split_model_which_goes_on_as_the_whole_one(alone):
    whole, split = made(1, False), made(2, True)
    for _ in range(3):
        learn(*whole)
    learn(*split)
    sharing.take_weights(split[0], sharing.saved(whole[0], keep=True)["model"])
    sharing.take_moments(split[1], copy.deepcopy(sharing.whole_moments(whole[1], keep=True)))
    assert [learn(*split) for _ in range(3)] == pytest.approx([learn(*whole) for _ in range(3)], abs=1e-6)


def test_a_number_that_is_none_is_found_in_a_split_model_too(alone):
    for split in (True, False):
        model = made(1, split)[0]
        assert sharing.finite(model.parameters())
        with torch.no_grad():
            model.transformer["ln_f"].weight.mul_(math.inf)
        assert not sharing.finite(model.parameters())
