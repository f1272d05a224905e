"""What a sequence's text and parameters change in its logits, as it grows: against the same worked out anew."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.sampling import penalize
from inference.sequence import SamplingParams, Sequence

V = 12
ids = st.integers(0, V - 1)


def slow_change(logits: list[float], p: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """Change one row of logits number by number, in the order that sampling.py names; 3 stops."""
    changed = []
    for i, z in enumerate(logits):
        z += dict(p.logit_bias).get(i, 0.0)
        if i in prompt or i in output:
            z = z / p.repetition_penalty if z > 0 else z * p.repetition_penalty
        z -= p.presence_penalty * (i in output) + p.frequency_penalty * output.count(i)
        changed.append(-math.inf if i == 3 and len(output) < p.min_tokens else z)
    return changed


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(ids, min_size=1, max_size=5),
    pieces=st.lists(st.lists(ids, max_size=3), max_size=4),
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    presence=st.sampled_from([0.0, 0.5, -0.5]),
    frequency=st.sampled_from([0.0, 0.25]),
    bias=st.sampled_from([(), ((3, 5.0),), ((1, 2.0), (2, -100.0))]),
    min_tokens=st.integers(0, 4),
)
def test_logits_change_as_worked_out_anew_after_each_piece_of_text(
    prompt, pieces, repetition, presence, frequency, bias, min_tokens
):
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        min_tokens=min_tokens,
    )
    sequence, plain = Sequence(prompt, params, stop_ids=frozenset([3])), Sequence([0], SamplingParams())
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    raw = logits.clone()
    for piece in pieces:
        sequence.output_ids.extend(piece)
        changed = penalize(logits, [plain.penalties, sequence.penalties])
        expected = slow_change(raw[1].tolist(), params, prompt, sequence.output_ids)
        assert torch.allclose(changed[1], torch.tensor(expected)) and torch.equal(changed[0], raw[0])
        assert torch.equal(logits, raw)


def test_a_sequence_that_nothing_changes_has_no_penalties_and_its_logits_are_not_copied():
    plain = Sequence([1, 2], SamplingParams(min_tokens=1), output_ids=[4])
    logits = torch.zeros(1, V)
    assert plain.penalties is None and penalize(logits, [plain.penalties]) is logits


def test_a_stop_token_that_is_no_number_is_held_back_too():
    early = Sequence([1], SamplingParams(min_tokens=1), stop_ids=frozenset([3]))
    logits = torch.zeros(2, V)
    logits[:, 3] = torch.tensor([math.nan, math.inf])
    assert penalize(logits, [early.penalties] * 2)[:, 3].tolist() == [-math.inf] * 2


def test_what_is_kept_grows_by_the_new_tokens_alone():
    sequence = Sequence([1, 2, 1], SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5), output_ids=[2, 5, 5])
    kept = sequence.penalties
    assert kept.ids.tolist() == [1, 2, 5] and kept.values.tolist() == [0, 2, 0, 0, 2, 0.5, 0, 2, 1]
    sequence.output_ids.append(1)
    assert sequence.penalties is kept
    assert kept.ids.tolist() == [1, 2, 5] and kept.values.tolist() == [0, 2, 0.5, 0, 2, 0.5, 0, 2, 1]
