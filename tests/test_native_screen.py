"""The greatest logits by a head in 8 bits first: the same tokens as of all logits, whatever the weights."""

import ctypes
import math
import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lookahead import At, outcome
from test_native_runner import compile_with_the_sources, model_of

from inference.footprint import memory_bytes
from inference.native import build
from inference.native.packing import BF16, LEAST_SCREENED, Packer, Screen, up_to
from inference.native_runner import NativeRunner
from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=80, vocab_size=LEAST_SCREENED + 5)
REASON = NativeRunner.unsupported(CONFIG, "bf16") or ("" if build.screens() else "this processor has no BF16 or VNNI")
pytestmark = pytest.mark.skipif(bool(REASON), reason=str(REASON))


def steps(config: GPTConfig, slots: int, count: int, seed: int = 1) -> list[tuple[list[int], ...]]:
    """Return steps in which sequences decode, some with several rows, and some rows are wanted."""
    rng, at, made = random.Random(seed), [0] * slots, []
    for _ in range(count):
        rows = []
        for slot in range(slots):
            n = min(rng.choice((0, 1, 1, 1, 4)), config.block_size - at[slot])
            rows += [(rng.randrange(config.vocab_size), slot, p) for p in range(at[slot], at[slot] + n)]
            at[slot] += n
        if rows:
            tokens, places, positions = map(list, zip(*rows, strict=True))
            want = [i for i in range(len(rows)) if rng.random() < 0.9]
            made.append((tokens, places, positions, want))
    return made


def agrees(model: GPT, slots: int = 6, count: int = 20, threads: int = 2) -> tuple[int, int]:
    """Compare `greatest` with all logits; return for how many steps these were not computed, and of how many."""
    plain, runner = (NativeRunner(model, slots, "bf16", threads) for _ in range(2))
    screened, all_steps = 0, steps(model.config, slots, count)
    for step in all_steps:
        plain.rows(*step)
        runner._logits.fill_(math.nan)
        assert runner.greatest is not None
        assert runner.greatest(*step) == plain.last_argmax
        screened += bool(runner._logits.isnan().all())
    return screened, len(all_steps)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("bias", "tied"), [(True, True), (False, False)])
@pytest.mark.parametrize("vocab_size", [LEAST_SCREENED, LEAST_SCREENED + 5, 5000])
def test_tokens_are_those_of_all_logits_which_are_not_computed(vocab_size, bias, tied, threads):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=80, vocab_size=vocab_size, bias=bias, tied=tied)
    screened, of = agrees(model_of(config), threads=threads)
    assert screened == of


def test_weights_that_do_not_fit_into_12_bits_are_screened_too():
    model = model_of(CONFIG)
    with torch.no_grad():
        model.transformer["h"][0].mlp.c_fc.weight.mul_(2 ** (40 * torch.rand(4 * 64, 64) - 20))
    assert NativeRunner(model, 1, "bf16").packed_bytes > 1.9 * sum(
        p.numel() for p in model.parameters() if p.dim() == 2
    )
    screened, of = agrees(model)
    assert screened > of / 2


def test_padding_of_the_head_is_no_logit_where_all_are_negative():
    config = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=80, vocab_size=LEAST_SCREENED + 5, tied=False)
    model = model_of(config)
    with torch.no_grad():
        model.transformer["ln_f"].weight.fill_(0.1), model.transformer["ln_f"].bias.fill_(1)
        model.lm_head.weight.mul_(15).sub_(1)
    screened, of = agrees(model)
    assert screened == of


def test_of_equal_logits_the_first_is_the_greatest():
    model = model_of(CONFIG)
    with torch.no_grad():
        weight = model.transformer["wte"].weight
        weight[::7] = 4 * weight[0]  # the greatest, or the least
    screened, _ = agrees(model)
    assert screened < 20  # in many panels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), near=st.floats(1e-4, 0.1), many=st.integers(2, 60), far=st.booleans())
def test_logits_that_8_bits_cannot_tell_apart_are_told_apart(seed, near, many, far):
    """Some rows of the head differ by less than 8 bits show; in some models a few channels are far out."""
    model = model_of(CONFIG, seed)
    with torch.no_grad():
        head = model.transformer["wte"].weight
        alike = torch.randperm(len(head))[:many]
        head[alike] = 3 * head[alike[0]] * (1 + near * torch.randn(many, 64))
        if far:
            model.transformer["ln_f"].weight[3], head[:, 3] = 60.0, head[:, 3] / 60
    agrees(model, slots=9, count=6)


def test_where_all_panels_may_hold_the_greatest_all_logits_are_computed():
    model = model_of(CONFIG)
    with torch.no_grad():
        head = model.transformer["wte"].weight
        head.copy_(head[0] * (1 + 1e-3 * torch.randn_like(head)))
    runner = NativeRunner(model, 1, "bf16", 2)
    plain = NativeRunner(model, 1, "bf16", 2)
    for position in range(60):
        step = [position], [0], [position], [0]
        plain.rows(*step)
        runner._logits.fill_(math.nan)
        assert runner.greatest(*step) == plain.last_argmax
        assert not runner._logits[0, : CONFIG.vocab_size].isnan().any()


def test_after_a_look_in_vain_some_steps_go_without_one():
    model = model_of(CONFIG)
    with torch.no_grad():
        model.transformer["wpe"].weight[0, 7] = math.nan  # in slot 1 alone
    runner = NativeRunner(model, 2, "bf16", 2)
    runner.greatest([1], [1], [0], [0])
    computed = []
    for position in range(1, 21):
        runner._logits.fill_(math.nan)
        runner.greatest([position], [0], [position], [0])
        computed.append(not runner._logits[0, : CONFIG.vocab_size].isnan().any())
    assert computed == [True] * 16 + [False] * 4


SOURCE = """
#include "screen.h"
// Between which numbers the product of each x[i] and the first row of panel i lies.
extern "C" __attribute__((visibility("default")))
void bounds(const float *x, const Screen *all, long count, float *low, float *high) {
    for (long i = 0; i < count; i++) {
        Screen one = *all;
        one.head.weights += i * PANEL * one.head.width, one.head.rows = PANEL;
        one.head.scale += i * PANEL, one.lost += i * PANEL, one.length += i * PANEL;
        Look look(one, 1, 1);
        look.begin(1);
        std::copy_n(x + i * look.width, look.width, look.rows.at);
        const float *rows[] = {look.rows};
        look.read<BF16>(0);
        write_tile<INT8>(look.input(1), 0, rows);
        look.compare(look.input(1), 0);
        look.bound(look.input(1), 0, 0, {});
        high[i] = look.reach[0], low[i] = _mm512_reduce_max_ps(load(*look.sure[0]));
    }
}"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_with_the_sources(SOURCE, tmp_path_factory.mktemp("bounds"))))


def bounds(library: ctypes.CDLL, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, for pairs of rows (n, width), the lower bounds of their products, these, and the upper ones."""
    n, width = w.shape
    head = torch.zeros(n, 32, width)
    head[:, 0] = w
    packer = Packer(
        GPTConfig(n_layer=1, n_head=1, n_embd=width, block_size=1, vocab_size=max(32 * n, LEAST_SCREENED)), BF16
    )
    screen = packer.screen((32 * n, width), [head.view(-1, width)])
    assert isinstance(screen, Screen)
    low, high = torch.empty(2, n)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x.float().contiguous(), low, high))
    at, *to = pointers
    library.bounds(at, ctypes.byref(screen), ctypes.c_long(n), *to)
    exact = (x.bfloat16().double() * w.bfloat16().double()).sum(1)
    return low.double(), exact, high.double()


@pytest.mark.parametrize("width", [16, 192, 1024, 16384])
@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_a_logit_lies_between_its_bounds(library, width, scale):
    generator = torch.Generator().manual_seed(width)
    x, w = torch.randn(2, 40, width, generator=generator)
    x[10:20, ::50] *= 100
    w[15:25, 3::40] *= 50
    x[30:] = torch.randn(10, width, generator=generator).sign()
    w[35:] = x[35:] * 0.37  # all errors of weights add up
    low, exact, high = bounds(library, x * scale, w * 0.02)
    assert (low < exact).all() and (exact < high).all()
    assert ((high - low) < 0.15 * (x * scale).norm(dim=1) * (w * 0.02).norm(dim=1)).all()


def test_bounds_hold_where_all_errors_add_up_and_are_no_wider(library):
    halves = torch.arange(-63, 64, dtype=torch.float) + 0.5  # each lies in the middle of two steps
    first = torch.cat([torch.tensor([127.0]), halves])
    signs = torch.cat([torch.tensor([0.0]), (halves - halves.round()).sign()])  # of what is lost
    far = torch.ones(128)
    far[0], far[1] = 1016, 804  # 804 is 100.5 steps of 8
    one = torch.zeros(128)
    one[1] = 1
    x = torch.stack([first, first, signs, signs, far, far])
    w = torch.stack([signs, -signs, first, -first, one, -one])
    low, exact, high = bounds(library, x, w)
    nearest = torch.minimum(exact - low, high - exact) / (high - low)
    assert (nearest > 0).all() and (nearest[:4] < 0.01).all()
    assert (nearest[4:] < 0.16).all()  # the other far value, which loses nothing, counts like this one


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 79])
def test_any_number_of_rows_may_be_wanted(rows):
    model = model_of(CONFIG)
    plain, runner = (NativeRunner(model, 2, "bf16", 2) for _ in range(2))
    step = random.Random(0).choices(range(CONFIG.vocab_size), k=rows), [1] * rows, list(range(rows)), list(range(rows))
    plain.rows(*step)
    assert runner.greatest(*step) == plain.last_argmax
    assert runner.greatest([1], [0], [0], []) == []
    for want in ([0, 0], [rows - 1, 0]):
        plain.rows(*step[:3], want)
        assert runner.greatest(*step[:3], want) == plain.last_argmax


def test_a_step_begun_before_it_is_asked_for_gives_the_same_tokens():
    model, rng = model_of(CONFIG), random.Random(3)
    plain, runner = (NativeRunner(model, 6, "bf16", threads) for threads in (1, 3))
    for step in steps(CONFIG, 6, 40):
        expected = plain.rows(*step).clone()
        runner.begin(*step, True)
        time.sleep(rng.choice((0, 0, 2e-5, 1e-4, 2e-3)))
        if rng.random() < 0.2:  # it is not what was begun
            assert torch.equal(runner.rows(*step), expected)
        assert runner.greatest(*step) == plain.last_argmax


def test_what_is_no_finite_number_is_no_token():
    model = model_of(CONFIG)
    with torch.no_grad():
        model.transformer["wpe"].weight[1, 7] = math.nan
        model.transformer["wpe"].weight[2] = 0
    runner = NativeRunner(model, 3, "bf16", 2)
    best = runner.greatest([1, 1], [0, 0], [0, 1], [0, 1])
    assert best[0] < CONFIG.vocab_size == best[1]


@pytest.mark.parametrize("times", [1e-30, 1e-12, 1e12, 1e17])
def test_rows_too_short_or_too_long_for_the_bounds_are_computed(times):
    for tied in (True, False):
        config = GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=80, vocab_size=LEAST_SCREENED, tied=tied)
        model = model_of(config)
        with torch.no_grad():
            if tied:
                model.transformer["ln_f"].weight.mul_(times), model.transformer["ln_f"].bias.mul_(times)
            else:
                model.lm_head.weight.mul_(times)
        if NativeRunner(model, 1, "bf16").greatest is None:
            assert times == 1e17 and not tied
        else:
            agrees(model, slots=2, count=5)


def test_its_memory_is_counted_and_small_heads_and_other_precisions_have_none():
    runner = NativeRunner(model_of(CONFIG), 2, "bf16")
    matrices = sum(p.numel() for name, p in model_of(CONFIG).named_parameters() if p.dim() == 2 and "wpe" not in name)
    head = up_to(CONFIG.vocab_size, 32) * 64
    assert 1.49 < (runner.packed_bytes - head) / matrices < 1.6
    assert memory_bytes(CONFIG, "native", "cpu", "bf16", 2) == memory_bytes(
        CONFIG, "native", "cpu", "bf16", 2, packed=runner.packed_bytes
    )
    few = GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=8, vocab_size=LEAST_SCREENED - 1)
    for config, dtype in ((CONFIG, "int8"), (CONFIG, "fp32"), (few, "bf16")):
        assert NativeRunner(model_of(config), 1, dtype).greatest is None


def test_a_processor_that_cannot_multiply_both_formats_has_none(monkeypatch):
    fewer = build.cpu_flags() - {"avx512_vnni"}
    monkeypatch.setattr(build, "cpu_flags", lambda: fewer)
    runner = NativeRunner(model_of(CONFIG), 1, "bf16")
    assert runner.greatest is None
    runner.rows([1], [0], [0], [0])
    assert 0 <= runner.last_argmax[0] < CONFIG.vocab_size


@pytest.mark.parametrize("speculation", [False, True])
def test_whatever_joins_texts_are_the_same_with_and_without_the_look(speculation):
    class Whole(NativeRunner):
        greatest = None

    model, rng = model_of(CONFIG), random.Random(5)
    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"logprobs": 2},
        {"repetition_penalty": 1.3},
        {"min_tokens": 9},
    ]
    joins = [
        (rng.randrange(30), rng.randrange(CONFIG.vocab_size), rng.randint(9, 40), rng.choice(asked)) for _ in range(25)
    ]
    texts = []
    for kind in (NativeRunner, Whole):
        at = At(kind(model, 6, "bf16", 2), speculation)
        at.lane.vocab_size = CONFIG.vocab_size
        sequences = []
        for step in range(30):
            sequences += [at.join(first, n, **more) for when, first, n, more in joins if when == step]
            at.steps(1)
        at.finish()
        texts.append([outcome(sequence) for sequence in sequences])
    assert texts[0] == texts[1]
