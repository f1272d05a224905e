"""Drawing tokens and log-probabilities in the native step: against sampling.py, the softmax, and sorting."""

import math
import random

import pytest
import torch

from inference.native_runner import NativeRunner
from inference.sampling import sample, score
from inference.sequence import SamplingParams, Sequence
from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=40, vocab_size=70)
REASON = NativeRunner.unsupported(CONFIG, "fp32")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def native(threads: int = 2) -> NativeRunner:
    torch.manual_seed(0)
    return NativeRunner(GPT(CONFIG).eval(), slots=2, dtype="fp32", threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [5, 64, 65, 1000, 4111])
@pytest.mark.parametrize("scale", [0.3, 5])
def test_tokens_are_drawn_as_sampling_draws_them(width, scale, threads):
    runner = native(threads)
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(60, width + 3, generator=generator) * scale)[:, :width]  # rows lie apart
    logits[40:45], logits[45:50] = logits[40:45].round(), logits[45:50].sign()  # some tie, and many
    asked = [
        SamplingParams(
            seed=i,
            temperature=(0.1, 0.8, 1.5)[i % 3],
            top_k=(0, 1, 0, 4, 300)[i % 5],
            top_p=(1, 0.9, 0.3, 0.9999)[i // 3 % 4],
            min_p=(0, 0, 0, 0.02)[i % 4],
        )
        for i in range(60)
    ]
    expected = sample(logits, [Sequence([0], p) for p in asked])
    best = logits.argmax(1).tolist()
    assert sample(logits, [Sequence([0], p) for p in asked], best, runner.draw) == expected
    few = runner.draw(logits, list(range(60)), [(0.5, 1.0, 1.0, 0.1, 2) for _ in asked], [None] * 60)
    assert min(few[:40]) >= 0 and (set(few[45:50]) == {-1} or width == 5)
    step = ([1, 2], [0, 0], [0, 1], [0, 1])
    assert torch.equal(runner.rows(*step).clone(), runner.rows(*step))  # steps go on


def row_of(kind, width):
    """Return a row of logits: scattered, flat, all alike, with equals, some forbidden, one far ahead, uneven parts."""
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(1)) * (0.2 if kind in ("flat", "uneven") else 3)
    if kind == "alike":
        row.zero_()
    elif kind == "equals":
        row = (row / 3).round()
    elif kind == "forbidden":
        row[:, ::3] = -torch.inf
    elif kind == "ahead":
        row[:, 7] = 90.0
    elif kind == "uneven":  # a sample of groups of 64, say every 16th, misleads
        row[:, torch.arange(width) // 64 % 16 == 0] -= 1
    return row


@pytest.mark.parametrize("kind", ["scattered", "flat", "alike", "equals", "forbidden", "ahead", "uneven"])
@pytest.mark.parametrize(
    "knobs",
    [
        (1.0, 1.0, 0.0),
        (0.7, 1.0, 0.0),
        (1.0, 0.6, 0.0),
        (0.7, 0.95, 0.0),
        (1.0, 0.0, 0.0),
        (1.0, 1 - 2**-53, 0.0),
        (1.0, 1.0, 0.02),
        (1.0, 0.9, 0.01),
        (1.0, 0.9, 1.0),
        (1e-5, 0.9, 0.0),
    ],
)
@pytest.mark.parametrize("width", [1, 300, 3000])
def test_what_is_drawn_follows_the_softmax_and_its_cuts(kind, knobs, width):
    temperature, top_p, min_p = knobs
    runner = native()
    logits = row_of(kind, max(width, 8))[:, -width:]
    weights = ((logits[0] - logits.max()).double() / temperature).exp()
    order = weights.argsort(descending=True, stable=True)
    before = weights[order].cumsum(0) - weights[order]
    weights[order[(before >= top_p * weights.sum()) & (before > 0) & (torch.tensor(top_p) < 1)]] = 0
    weights[weights < min_p] = 0
    draws = 4000
    evenly = [((i + 0.5) / draws, temperature, top_p, min_p, 0) for i in range(draws)]
    drawn = torch.tensor(runner.draw(logits, [0] * draws, evenly, [None] * draws))
    counts = torch.bincount(drawn, minlength=width)
    assert (counts / draws - weights / weights.sum()).abs().max() < 1.5 / draws
    assert drawn.diff().min() >= 0  # laid out by id


@pytest.mark.parametrize("rest", [{}, {"min_p": 0.3}, {"top_p": 0.9}, {"top_p": 0.5, "min_p": 0.001}], ids=str)
def test_a_flat_row_is_drawn_from_as_sampling_does(rest):
    logits = torch.randn(40, 50257, generator=torch.Generator().manual_seed(1)) * 0.3
    asked = [SamplingParams(temperature=0.8, top_k=0, seed=i, **rest) for i in range(40)]
    expected = sample(logits, [Sequence([0], p) for p in asked])
    for threads in (1, 2):
        runner = native(threads)
        found = sample(logits, [Sequence([0], p) for p in asked], logits.argmax(1).tolist(), runner.draw)
        assert [token == other for token, other in zip(found, expected, strict=True)].count(False) <= 1  # rounding


def test_a_row_that_is_no_number_has_no_token_drawn_and_disturbs_no_other():
    runner = native(threads=1)
    logits = torch.randn(6, 200)
    logits[1], logits[2], logits[3, 7], logits[4, ::2] = -torch.inf, torch.nan, torch.inf, -torch.inf
    logits[5] = 0.0  # all tie
    found = runner.draw(logits, list(range(6)), [(0.99, 1.0, 1.0, 0.0, 5)] * 6, [None] * 6)
    assert found[1:4] == [-2, -2, -2] and found[4] % 2 == 1 and found[5] == -1
    assert found[0] in logits[0].topk(5).indices.tolist()


@pytest.mark.parametrize("threads", [1, 2])
def test_penalties_change_what_is_drawn_as_sampling_does_and_leave_the_logits_as_they_were(threads):
    runner, width = native(threads), 300
    logits = torch.randn(32, width + 3, generator=torch.Generator().manual_seed(5))[:, :width]  # rows lie apart
    logits[::4] = logits[::4].sign()  # many tie with the k-th
    raw, rng = logits.clone(), random.Random(6)
    asked = [
        SamplingParams(
            seed=i,
            temperature=(0.8, 0.0)[i % 5 == 0],
            top_k=(0, 6, 1)[i % 3],
            repetition_penalty=(1.0, 1.3)[i % 2],
            presence_penalty=(0.0, 0.5, -0.5)[i % 3],
            frequency_penalty=(0.0, 0.3)[i // 4 % 2],
            logit_bias=((7, 2.0), (299, -100.0))[: i % 3],
            min_tokens=(0, 4)[i // 2 % 2],
        )
        for i in range(32)
    ]
    one, other = ([Sequence([*range(i)], p, frozenset([3])) for i, p in enumerate(asked)] for _ in range(2))
    for _ in range(6):
        expected = sample(logits, one)
        assert sample(logits, other, logits.argmax(1).tolist(), runner.draw) == expected and torch.equal(logits, raw)
        for s, t in zip(one, other, strict=True):
            s.output_ids.append(rng.randrange(width))
            t.output_ids.append(s.output_ids[-1])


@pytest.mark.parametrize("token_id", [-1, 9, 10**15])
def test_penalties_out_of_bounds_or_of_a_row_that_comes_twice_are_refused(token_id):
    runner, logits, knobs = native(), torch.zeros(2, 9), (0.5, 1.0, 1.0, 0.0, 0)
    bad, good = (Sequence([0], SamplingParams(logit_bias=((i, 5.0),))).penalties for i in (token_id, 8))
    with pytest.raises(ValueError, match="among the 9"):
        runner.draw(logits, [0, 1], [knobs] * 2, [good, bad])
    assert not logits.any()
    for rows, part in (([0, 0], logits), ([0, 1], torch.zeros(1, 9).expand(2, -1))):
        with pytest.raises(ValueError, match="each comes once"):
            runner.draw(part, rows, [knobs] * 2, [good, None])
    with pytest.raises(ValueError, match="do not match"):
        runner.draw(logits, [0], [knobs], [])


@pytest.mark.parametrize("width", [1, 5, 65, 1000, 50257])
def test_log_probabilities_are_those_of_the_softmax_and_equals_come_by_id(width):
    logits = (torch.randn(12, width + 3, generator=torch.Generator().manual_seed(width)) * 3)[
        :, :width
    ]  # rows lie apart
    logits[3:6], logits[6, 1::2] = logits[3:6].round(), -torch.inf
    rows, tops = [11, 0, 3, 3, 4, 5, 6, 7], [min(top, width) for top in (0, 1, 5, 20, 70, 10**6, 10**6, 3)]
    ids = [i % width for i in range(0, 80, 10)]
    runner = native()
    expected = logits.double().log_softmax(-1)
    found = runner.logprobs(logits, rows, ids, tops)
    for row, token_id, top, (own, others) in zip(rows, ids, tops, found, strict=True):
        assert own == pytest.approx(float(expected[row, token_id]), abs=2e-6)
        order = sorted(range(width), key=lambda i: (-float(logits[row, i]), i)) if top else []
        assert [i for i, _ in others] == order[:top]
        assert torch.tensor([p for _, p in others]).allclose(expected[row, order[:top]].float(), rtol=0, atol=2e-6)
        assert all(p == own for i, p in others if i == token_id)
    one = native(threads=1)
    assert [one.logprobs(logits, [rows[i]], [ids[i]], [tops[i]])[0] for i in range(8)] == found


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [slice(None), slice(70, 71)])
def test_a_row_that_is_no_number_has_no_log_probabilities_and_disturbs_no_other(bad, part):
    logits = torch.randn(3, 200)
    runner = native()
    expected = runner.logprobs(logits, [0, 2], [1, 2], [3, 4])
    logits[1, part] = bad
    found = runner.logprobs(logits, [0, 1, 2], [1, 5, 2], [3, 6, 4])
    assert [found[0], found[2]] == expected and len(found[1][1]) == 6
    assert all(math.isnan(p) for p in (found[1][0], *(p for _, p in found[1][1])))


@pytest.mark.parametrize(
    ("rows", "ids", "tops"),
    [([2], [0], [0]), ([-1], [0], [0]), ([0], [9], [0]), ([0], [-1], [0]), ([0], [0], [10]), ([0], [0], [-1])]
    + [([0, 1], [0], [0])],
)
def test_log_probabilities_out_of_bounds_are_refused(rows, ids, tops):
    runner = native(threads=1)
    with pytest.raises(ValueError, match=r"rows|ids"):
        runner.logprobs(torch.zeros(2, 9), rows, ids, tops)


def test_a_draw_out_of_bounds_is_refused_and_none_asked_for_is_none():
    runner = native(threads=1)
    knobs = (0.5, 1.0, 1.0, 0.0, 0)
    for logits, rows in ((torch.zeros(2, 9), [2]), (torch.zeros(2, 9), [0, 1]), (torch.zeros(2, 9).double(), [0])):
        with pytest.raises(ValueError, match="row"):
            runner.draw(logits, rows, [knobs], [None])
    assert runner.draw(torch.zeros(2, 9), [], [], []) == runner.logprobs(torch.zeros(2, 9), [], [], []) == []
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.draw(torch.zeros(2, 9), [0], [knobs], [None])


def test_the_sum_of_a_prompts_log_probabilities_is_the_models_loss():
    torch.manual_seed(0)
    model, ids = GPT(CONFIG).eval(), [i * i % 70 for i in range(30)]
    runner = native()
    scores = score(runner.rows(ids, [0] * 30, list(range(30)), list(range(29))), ids[1:], 2, runner.logprobs)
    _, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    assert [t.token_id for t in scores] == ids[1:] and all(len(t.top) == 2 for t in scores)
    assert -sum(t.logprob or 0.0 for t in scores) / len(scores) == pytest.approx(loss.item(), abs=1e-5)
