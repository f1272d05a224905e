"""Requests and their parameters: what is refused, what is drawn, and what the caller's handle shows."""

import math
import threading
from typing import Any

import pytest

from inference.sequence import Finished, FinishReason, Generation, SamplingParams, Sequence, Token


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", 1e9),
        ("min_tokens", 151),
        ("seed", -1),
        ("seed", 2**63),
        ("logprobs", -1),
        ("logit_bias", ((3, math.nan),)),
    ],
)
def test_a_bad_parameter_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_zero_is_a_value() -> None:
    params = SamplingParams(max_new_tokens=0, temperature=0.0, top_k=0, seed=0, logprobs=0)
    assert params.greedy and Sequence([1], params).seed == 0


@pytest.mark.parametrize(("params", "greedy"), [({"temperature": 1e-6}, True), ({"top_k": 1}, True), ({}, False)])
def test_greedy_is_what_leaves_one_choice(params: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**params).greedy is greedy


def test_a_seed_that_is_not_given_is_drawn_and_can_be_reported() -> None:
    first, second = Sequence([1], SamplingParams()), Sequence([1], SamplingParams())
    assert first.seed != second.seed
    again = Sequence([1], SamplingParams(seed=first.seed))
    assert again.generator.random() == first.generator.random()


def test_every_sequence_has_an_id_of_its_own() -> None:
    assert Sequence([1], SamplingParams()).id != Sequence([1], SamplingParams()).id


def test_iterating_gives_the_tokens_and_leaves_the_reason() -> None:
    sequence = Sequence([1], SamplingParams())
    generation = Generation(sequence)
    for event in (Token(4), Token(5), Finished(FinishReason.STOP)):
        sequence.events.put(event)
    assert [t.token_id for t in generation] == [4, 5]
    assert generation.finish_reason == FinishReason.STOP and generation.error is None
    assert list(generation) == []


def test_waiting_for_an_event_has_a_limit() -> None:
    assert Generation(Sequence([1], SamplingParams())).next(timeout=0.01) is None


def test_an_error_comes_with_its_text() -> None:
    sequence = Sequence([1], SamplingParams())
    sequence.events.put(Finished(FinishReason.ERROR, "why"))
    generation = Generation(sequence)
    assert list(generation) == [] and generation.error == "why"


def test_cancelling_only_sets_a_flag_from_any_thread() -> None:
    sequence = Sequence([1], SamplingParams())
    thread = threading.Thread(target=Generation(sequence).cancel)
    thread.start()
    thread.join(5)
    assert sequence.cancelled and sequence.state == "waiting"
