"""Choosing tokens: filters, penalties, seeds, and that a row's choice is its own."""

import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.sampling import penalize, sample, score
from inference.sequence import SamplingParams, Sequence

V = 97
WIDE = 64 * 40 + 17  # enough groups of logits for the ways that look into few of them


def sequence(
    output: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), stop: tuple[int, ...] = (), **p: Any
) -> Sequence:
    params = SamplingParams(**{"temperature": 1.0, "top_k": 0, "seed": 1, **p})
    return Sequence(list(prompt), params, stop_ids=frozenset(stop), output_ids=list(output), output_limit=100)


@pytest.fixture(params=[V, WIDE])
def size(request: pytest.FixtureRequest) -> int:
    return request.param  # type: ignore[no-any-return]


def row(size: int = V, **logits: float) -> torch.Tensor:
    """Return one row of logits, -20 but for those given as t3=1.5."""
    values = torch.full((1, size), -20.0)
    for name, value in logits.items():
        values[0, int(name[1:])] = value
    return values


def support(logits: torch.Tensor, draws: int = 300, **params: Any) -> Counter[int]:
    """Return how often each token is chosen from one row over many seeds."""
    many = [sequence(**{**params, "seed": seed}) for seed in range(draws)]
    tokens = sample(logits.expand(draws, -1), many)
    return Counter(t.token_id for t in tokens if t is not None)


def test_greedy_takes_the_most_probable_token_and_the_first_of_equals() -> None:
    logits = torch.cat([row(t5=3.0, t9=2.0), row(t7=4.0, t3=4.0)])
    assert [t.token_id for t in sample(logits, [sequence(temperature=0.0)] * 2) if t] == [5, 3]
    assert [t.token_id for t in sample(logits, [sequence(top_k=1, temperature=2.0)] * 2) if t] == [5, 3]


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_k": 60}, {"top_p": 0.9999}, {"min_p": 1e-6}])
def test_draws_follow_the_softmax(size: int, params: dict[str, Any]) -> None:
    logits = row(size, t1=math.log(0.6), t2=math.log(0.3), t3=math.log(0.1))
    counts = support(logits, draws=1000, **params)
    for token_id, p in ((1, 0.6), (2, 0.3), (3, 0.1)):
        assert abs(counts[token_id] / 1000 - p) < 4 * math.sqrt(p * (1 - p) / 1000)


def test_temperature_sharpens_and_flattens() -> None:
    logits = row(t1=2.0, t2=1.0)
    cold, warm, hot = (support(logits, temperature=t)[1] for t in (0.2, 1.0, 2.0))
    assert cold > warm > hot > 150


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    assert support(row(t1=2.0, t2=1.99), temperature=2e-5) == {1: 300}


@pytest.mark.parametrize("k", [2, 9, 50])  # found among candidates, or by sorting everything
def test_top_k_keeps_k_tokens_and_those_that_tie_with_the_last(size: int, k: int) -> None:
    logits = torch.full((1, size), -5.0)
    logits[0, :k] = 2.0
    logits[0, 0] = 3.0
    logits[0, 90] = 2.0  # ties with the k-th
    assert set(support(logits, draws=1000, top_k=k)) == {*range(k), 90}


def test_top_k_beyond_the_vocabulary_is_off(size: int) -> None:
    logits = torch.zeros(1, size)
    assert support(logits, top_k=10**9) == support(logits, top_k=0) == support(logits, top_k=size)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = row(t1=math.log(0.5), t2=math.log(0.3), t3=math.log(0.2))
    assert set(support(logits, top_p=0.75)) == {1, 2}
    assert set(support(logits, top_p=0.81)) == {1, 2, 3}
    assert set(support(logits, top_p=0.3)) == set(support(logits, top_p=0.0)) == {1}


def test_top_p_counts_within_top_k() -> None:
    logits = row(t1=math.log(0.5), t2=math.log(0.3), t3=math.log(0.2))
    assert set(support(logits, top_k=2, top_p=0.62)) == {1}  # 0.5 of the 0.8 that top_k leaves is 0.625


def test_min_p_drops_what_is_less_probable_than_a_part_of_the_best() -> None:
    logits = row(t1=0.0, t2=math.log(0.5), t3=math.log(0.1))
    assert set(support(logits, min_p=0.3)) == {1, 2}
    assert set(support(logits, min_p=1.0)) == {1}


def test_biases_are_added_to_logits() -> None:
    biased = sequence(temperature=0.0, logit_bias=((4, 10.0), (5, -100.0)))
    assert sample(row(t5=5.0, t4=-1.0), [biased])[0].token_id == 4


def test_repetition_is_penalised_in_prompt_and_output_and_on_both_sides_of_zero() -> None:
    def best(**p: Any) -> int:
        return sample(torch.tensor([[2.0, 1.9, -1.0, 1.8]]), [sequence(temperature=0.0, **p)])[0].token_id

    assert best() == 0
    assert best(repetition_penalty=1.2, prompt=(0,)) == 1
    assert best(repetition_penalty=1.2, prompt=(0,), output=(1,)) == 3
    negative = torch.tensor([[-1.0, -1.5]])
    assert sample(negative, [sequence(temperature=0.0, repetition_penalty=2.0, prompt=(0,))])[0].token_id == 1


def test_presence_and_frequency_count_the_output_only() -> None:
    def best(**p: Any) -> int:
        return sample(torch.tensor([[2.0, 1.5, 1.4]]), [sequence(temperature=0.0, **p)])[0].token_id

    assert best(presence_penalty=1.0, prompt=(0,)) == 0
    assert best(presence_penalty=1.0, output=(0,)) == 1
    assert best(frequency_penalty=0.4, output=(0,)) == 0
    assert best(frequency_penalty=0.4, output=(0, 0, 1)) == 2


def test_stop_tokens_are_masked_before_min_tokens_only() -> None:
    logits = row(t7=5.0, t8=4.0)
    early = sequence(temperature=0.0, min_tokens=2, max_new_tokens=9, stop=(7,), output=(1,))
    late = sequence(temperature=0.0, min_tokens=2, max_new_tokens=9, stop=(7,), output=(1, 1))
    assert [t.token_id for t in sample(logits.expand(2, -1), [early, late]) if t] == [8, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_row_that_is_not_finite_has_no_token_and_disturbs_no_other(bad: float, params: dict[str, Any]) -> None:
    good = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    logits = good.clone()
    logits[1, 11] = bad
    tokens = sample(logits, [sequence(**params) for _ in range(3)])
    assert tokens[1] is None
    assert [tokens[0], tokens[2]] == sample(good[[0, 2]], [sequence(**params) for _ in range(2)])


def test_a_row_with_nothing_left_to_choose_has_no_token() -> None:
    nothing = sequence(min_tokens=1, stop=tuple(range(V)), logprobs=1)
    assert sample(torch.zeros(1, V), [nothing]) == [None]


def test_minus_infinity_is_never_chosen(size: int) -> None:
    logits = torch.full((1, size), -math.inf)
    logits[0, [3, size - 1]] = 1.0
    for params in ({}, {"top_k": 5}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.01}):
        assert set(support(logits, **params)) == {3, size - 1}


def test_the_last_tokens_of_a_vocabulary_can_be_chosen(size: int) -> None:
    logits = torch.full((1, size), -20.0)
    logits[0, -2:] = torch.tensor([1.0, 1.1])
    assert sample(logits, [sequence(temperature=0.0)])[0].token_id == size - 1
    for params in ({}, {"top_k": 2}, {"top_p": 0.9}):
        assert set(support(logits, **params)) == {size - 2, size - 1}


def test_the_seed_decides_and_each_token_takes_the_next_number() -> None:
    def text(seed: int | None) -> list[int]:
        s = sequence(seed=seed)
        return [t.token_id for _ in range(20) for t in sample(torch.zeros(1, V), [s]) if t]

    assert text(0) == text(0) != text(1)
    assert text(None) != text(None)


rows_of_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 6, 20, V, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.2]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "logprobs": st.sampled_from([None, 0, 2]),
        "seed": st.integers(0, 5),
        "output": st.lists(st.integers(0, V - 1), max_size=4).map(tuple),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(rows_of_params, min_size=2, max_size=9),
    seed=st.integers(0, 1000),
    size=st.sampled_from([V, WIDE]),
    coarse=st.booleans(),
    data=st.data(),
)
def test_a_row_gets_the_same_token_in_any_company(
    rows: list[Any], seed: int, size: int, coarse: bool, data: Any
) -> None:
    logits = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(seed)) * 2
    if coarse:
        logits = logits.round()  # many ties
    together = sample(logits, [sequence(**p) for p in rows])
    some = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
    apart = sample(logits[some], [sequence(**rows[i]) for i in some])
    assert apart == [together[i] for i in some]


def slow_choice(logits: list[float], p: SamplingParams) -> int:
    """Choose a token by sorting everything and adding up, with the same one random number."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    best = logits[order[0]]
    if 0 < p.top_k < len(logits):
        order = [i for i in order if logits[i] >= logits[order[p.top_k - 1]]]
    weights = {i: math.exp((logits[i] - best) / p.temperature) for i in order}
    total, before, kept = sum(weights.values()), 0.0, []
    for i in order:
        if not kept or ((p.top_p == 1.0 or before < p.top_p * total) and weights[i] >= p.min_p):
            kept.append(i)
        before += weights[i]
    if not 0 < p.top_k < len(logits):
        kept.sort()  # laid out by id
    target = random.Random(p.seed).random() * sum(weights[i] for i in kept)
    for i in kept:
        target -= weights[i]
        if target < 0:
            return i
    return kept[-1]


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.sampled_from([0.1, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 2, 9, 20]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.2]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    scale=st.sampled_from([0.5, 4.0]),
    seed=st.integers(0, 1000),
    size=st.sampled_from([5, V, WIDE]),
)
def test_the_choice_is_that_of_the_slow_way(scale: float, seed: int, size: int, **knobs: Any) -> None:
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * scale
    values = logits[0].double().tolist()
    for draw in range(5):
        chosen = sample(logits, [sequence(**knobs, seed=draw)])[0]
        assert chosen.token_id == slow_choice(values, SamplingParams(**knobs, seed=draw))


def test_log_probabilities_are_of_the_raw_distribution_and_agree_with_each_other() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(3))
    token = sample(logits, [sequence(temperature=0.0, logprobs=4, logit_bias=((50, 90.0),))])[0]
    raw = logits[0].log_softmax(-1)
    assert token.token_id == 50 and token.logprob == float(raw[50]) and len(token.top) == 4
    greedy = sample(logits, [sequence(temperature=0.0, logprobs=4)])[0]
    assert greedy.top[0] == (greedy.token_id, greedy.logprob)
    assert [p for _, p in greedy.top] == sorted((p for _, p in greedy.top), reverse=True)


def test_log_probabilities_may_be_asked_for_without_alternatives_or_with_all() -> None:
    logits = torch.randn(1, V)
    assert sample(logits, [sequence(logprobs=0)])[0].top == ()
    assert len(sample(logits, [sequence(logprobs=10**6)])[0].top) == V
    assert sample(logits, [sequence()])[0].logprob is None


def test_prompt_scores_name_the_prompts_tokens() -> None:
    logits = torch.randn(3, V)
    scores = score(logits, [4, 5, 6], 2)
    assert [t.token_id for t in scores] == [4, 5, 6] and all(len(t.top) == 2 for t in scores)
    assert [t.logprob for t in scores] == [float(logits[i].log_softmax(-1)[4 + i]) for i in range(3)]


# --- what the runner knows already


def test_a_plain_greedy_row_takes_the_known_place_and_others_do_not() -> None:
    logits = torch.cat([row(t3=1.0, t5=2.0)] * 4)
    sequences = [sequence(temperature=0.0), sequence(temperature=0.0, logit_bias=((3, 5.0),)), sequence(top_k=1)]
    sequences.append(sequence(temperature=0.0, min_tokens=1, stop=(5,)))
    known = [9, 9, 9, 9]  # not where the greatest is, to tell who looks there
    assert [t and t.token_id for t in sample(logits, sequences, known)] == [9, 3, 9, 3]
    assert [t and t.token_id for t in sample(logits, sequences, None)] == [5, 3, 5, 3]


def test_a_known_place_has_its_log_probabilities() -> None:
    logits, asked = row(t3=1.0, t5=2.0), sequence(temperature=0.0, logprobs=2)
    assert sample(logits, [asked], [5]) == sample(logits, [asked])


def test_a_known_place_past_the_tokens_or_that_is_no_number_is_looked_for() -> None:
    logits = torch.cat([row(t5=2.0), row(t5=2.0, t7=math.inf), row(t5=math.nan)])
    found = sample(logits, [sequence(temperature=0.0) for _ in range(3)], [V, V, V])
    assert [t and t.token_id for t in found] == [5, None, None]


def greatest(logits: torch.Tensor) -> list[int]:
    """Return what a runner knows of logits: the place of each row's greatest, past the end where it is not finite."""
    unsound = ~logits.amax(-1).isfinite()  # NaN comes out as the greatest
    return torch.where(unsound, logits.size(-1), logits.argmax(-1)).tolist()


def draw(logits: torch.Tensor, rows: list[int], knobs: list[Any], penalties: list[Any]) -> list[int]:
    """Draw as a runner may: where more logits tie with the k-th than it looks at, it leaves the row."""
    found = []
    for values, (u, temperature, top_p, min_p, top_k) in zip(penalize(logits[rows], penalties), knobs, strict=True):
        if not values.max().isfinite():
            found.append(-2)
        elif top_k and (values >= values.topk(int(top_k)).values[-1]).sum() >= top_k + 8:
            found.append(-1)
        else:
            fixed = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "top_k": int(top_k)}
            one = sequence(**fixed)
            one.generator = SimpleNamespace(random=lambda u=u: u)
            found.append(sample(values[None], [one])[0].token_id)
    return found


def logprobs(logits: torch.Tensor, rows: list[int], ids: list[int], tops: list[int]) -> list[Any]:
    """Find log-probabilities as a runner does."""
    tokens = [score(logits[i : i + 1], [token_id], top)[0] for i, token_id, top in zip(rows, ids, tops, strict=True)]
    return [(token.logprob, token.top) for token in tokens]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(rows_of_params, min_size=1, max_size=9),
    seed=st.integers(0, 1000),
    size=st.sampled_from([5, V, WIDE]),
    coarse=st.booleans(),
    bad=st.sampled_from([0.0, math.nan, math.inf, -math.inf]),
)
def test_a_runner_that_draws_changes_no_token(rows: list[Any], seed: int, size: int, coarse: bool, bad: float) -> None:
    logits = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(seed)) * 2
    if coarse:
        logits = logits.round()  # many ties with the k-th
    if bad:
        logits[0] = bad
    rows = [{**p, "output": tuple(i % size for i in p["output"])} for p in rows]
    expected = sample(logits, [sequence(**p) for p in rows])
    assert sample(logits, [sequence(**p) for p in rows], greatest(logits), draw) == expected
    assert sample(logits, [sequence(**p) for p in rows], greatest(logits), draw, logprobs) == expected


def test_rows_need_no_pass_where_a_runner_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, WIDE)
    asked = [{"top_k": 4}, {"temperature": 0.0, "repetition_penalty": 1.3}, {"top_p": 0.5}, {"logprobs": 2}]
    expected = sample(logits, [sequence(**p) for p in asked])
    known = [token.token_id for token in expected if token is not None]
    monkeypatch.setattr("inference.sampling._sample", lambda *_: pytest.fail("the logits are passed over"))
    monkeypatch.setattr("inference.sampling._tokens", lambda *_: pytest.fail("the logits are passed over"))
    scores = [(token.logprob, token.top) for token in expected[3:] if token is not None]
    found = sample(logits, [sequence(**p) for p in asked], greatest(logits), lambda *_: known, lambda *_: scores)
    assert found == expected


def test_a_prompt_is_scored_by_a_runner_that_can(size: int) -> None:
    logits = torch.randn(3, size)
    expected = score(logits, [4, 5, 6], 2)
    asked: list[Any] = []
    assert score(logits, [4, 5, 6], 2, lambda *p: asked.append(p[1:]) or logprobs(*p)) == expected
    assert asked == [([0, 1, 2], [4, 5, 6], [2, 2, 2])]
    assert len(score(logits, [4], 10**6, logprobs)[0].top) == size


@pytest.mark.parametrize(("logprobs", "reads"), [(None, 1), (3, 2)])
def test_greedy_and_plain_rows_are_read_from_the_device_at_the_end_alone(
    logprobs: int | None, reads: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: seen.append(t.numel()) or tolist(t))
    for name in ("item", "nonzero", "cpu", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the device is waited for"))
    many = [sequence(temperature=float(i % 2), seed=i, logprobs=logprobs) for i in range(4)]
    tokens = sample(torch.cat([row(size, t5=30.0, t6=1.0 + i) for i in range(4)]), many)
    assert [t.token_id for t in tokens if t is not None] == [5] * 4 and len(seen) == reads


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"logprobs": 2}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_row_that_is_no_number_leaves_its_neighbours_their_tokens(
    params: dict[str, Any], bad: float, size: int
) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(3))
    expected = sample(logits, [sequence(**params) for _ in range(3)])
    for broken in (slice(None), slice(size - 1, None)):
        logits[1, broken] = bad
        assert sample(logits, [sequence(**params) for _ in range(3)]) == [expected[0], None, expected[2]]
        logits[1] = 0.0
