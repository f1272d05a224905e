"""bfloat16 in 12 bits: every weight comes back, and the step computes with it what it computes with 16."""

import pytest
import torch
from torch import Tensor

from inference.footprint import memory_bytes
from inference.native import packing
from inference.native.compact import compact, compact_bytes
from inference.native_runner import NativeRunner
from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=40, vocab_size=70)
REASON = NativeRunner.unsupported(CONFIG, "bf16")
native = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def weights(rows: int, width: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return (0.02 * torch.randn(rows, width)).bfloat16()


def expand(panels: Tensor, rest: Tensor, rows: int, width: int) -> Tensor:
    """Return the weights that compact.h describes, written down a second time."""
    table, lines = panels[:, :16].int(), panels[:, 64:].int().view(len(panels), -1, 3, 64)
    vectors = []
    for i in range(4):
        code = lines[:, :, 2] >> 4 * (i // 2) & 15
        bits = lines[:, :, i // 2] | table.gather(1, code.flatten(1).long()).view_as(code) << 8
        vectors.append(bits.view(len(panels), -1, 4, 2, 8)[:, :, :, i % 2].flatten(2))
    every = torch.stack(vectors, 2).view(len(panels), -1, 2, 2, 16, 2).permute(0, 3, 4, 1, 2, 5).reshape(rows, width)
    for panel, step, row, pair in rest.tolist():
        half = pair & 0xFFFF == 0
        every[32 * panel + row, 2 * step + half] = pair >> 16 * half & 0xFFFF
    return every.to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("width", [16, 48, 768])
def test_every_weight_comes_back_in_three_quarters_of_the_bytes(width):
    w = weights(96, width)
    w[0, 0], w[33, 1], w[34, 2], w[95, 3] = -0.0, 1e-30, 1e-39, 3e38  # 1e-39 is subnormal
    w[40] *= 2.0**-40
    panels, rest = compact(w)
    assert panels.shape == (3, compact_bytes(width)) and compact_bytes(width) == 64 + 48 * width
    assert len(rest) >= 2  # 1e-30 and 1e-39 at least
    assert torch.equal(expand(panels, rest, 96, width).view(torch.int16), w.view(torch.int16))


def test_weights_that_are_all_zero_have_no_rest():
    panels, rest = compact(torch.zeros(32, 16, dtype=torch.bfloat16))
    assert len(rest) == 0 and not expand(panels, rest, 32, 16).any()


def few_high_bytes(model: GPT) -> GPT:
    """Set weights to 0 below 2^-11 of the greatest: 12 exponents, with signs at most 14 high bytes beside 0."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p[p.abs() < 2.0**-11 * p.abs().max()] = 0
    return model


def logits(model: GPT, monkeypatch, kinds: tuple[int, ...]) -> tuple[Tensor, int]:
    monkeypatch.setitem(packing.KINDS, "bf16", kinds)
    runner = NativeRunner(model, slots=1, dtype="bf16", threads=2)
    return runner.rows(list(range(30)), [0] * 30, list(range(30)), list(range(30))).clone(), runner.packed_bytes


def random_model() -> GPT:
    torch.manual_seed(5)
    return GPT(CONFIG).eval()


@native
def test_the_step_computes_the_same_bits_from_12_as_from_16(monkeypatch):
    model = few_high_bytes(random_model())
    twelve, small = logits(model, monkeypatch, (packing.COMPACT,))
    sixteen, large = logits(model, monkeypatch, (packing.BF16,))
    assert torch.equal(twelve, sixteen) and 0.74 < small / large < 0.8


@native
def test_weights_without_a_code_are_multiplied_all_the_same(monkeypatch):
    model = random_model()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p[::40, ::40] = 1e-6  # a few are far from the others
                p[1::50, 3::50] = 3.0  # and a few are so large that the others' small ones lose theirs
    twelve, _ = logits(model, monkeypatch, (packing.COMPACT,))
    sixteen, _ = logits(model, monkeypatch, (packing.BF16,))
    assert torch.allclose(twelve, sixteen, atol=1e-5 * sixteen.abs().max().item())
    assert not torch.equal(twelve, sixteen)  # the order of the sums tells that some were


@native
def test_a_model_with_weights_of_all_sizes_is_kept_in_16_bits(monkeypatch):
    model = random_model()
    with torch.no_grad():
        model.transformer["h"][1].mlp.c_fc.weight.mul_(2.0 ** torch.randint(-40, 0, (256, 64)))
    chosen, used = logits(model, monkeypatch, packing.KINDS["bf16"])
    sixteen, large = logits(model, monkeypatch, (packing.BF16,))
    assert torch.equal(chosen, sixteen) and used == large


@native
@pytest.mark.parametrize("dtype", packing.KINDS)
def test_the_memory_that_is_told_is_that_of_the_packed_weights_and_the_cache(dtype):
    model = random_model()
    runner = NativeRunner(model, slots=1, dtype=dtype, threads=2)
    others = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1 or "wpe" in name)
    one, two = (memory_bytes(CONFIG, "native", "cpu", dtype, slots) for slots in (1, 2))
    assert two - one == packing.up_to(CONFIG.block_size, packing.CACHE_BLOCK) * runner.position_bytes
    assert one - (two - one) == runner.packed_bytes + 4 * others


def test_the_memory_of_a_loaded_model_that_does_not_fit_into_12_bits_is_told_as_it_is():
    usual = memory_bytes(CONFIG, "native", "cpu", "bf16", 1)
    twelve, sixteen = (packing.packed_bytes(CONFIG, kind) for kind in packing.KINDS["bf16"])
    assert memory_bytes(CONFIG, "native", "cpu", "bf16", 1, packed=sixteen) - usual == sixteen - twelve > 0
