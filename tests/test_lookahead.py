"""The step that is begun before its turn: when, and that tokens are the same whatever happens meanwhile."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_runner import PlainRunner

from inference.admission import Admission
from inference.lane import Lane
from inference.sequence import Failure, Finished, SamplingParams, Sequence

V = 32


class CountingRunner(PlainRunner):
    """Each token is followed by the next number. Notes what it was asked for, and what was begun and then computed."""

    name, slots, block_size, vocab_size, independent = "counting", 4, 64, V, True

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int], list[int], list[int]]] = []
        self.begun: list[tuple[list[int], list[int], list[int], list[int]]] = []
        self.hits = 0
        self.on_begin = lambda: None
        self.fails = 0

    def begin(self, tokens: list[int], slots: list[int], positions: list[int], want: list[int], plain: bool) -> None:
        assert not plain, "it has nothing but rows"
        self.begun.append((tokens, slots, positions, want))
        self.on_begin()

    def rows(self, *step: list[int]) -> torch.Tensor:
        self.hits += self.begun[-1:] == [step]
        self.asked.append(step)
        if self.fails:
            self.fails -= 1
            raise RuntimeError("a fault that was asked for")
        tokens, _, _, want = step
        self.last_argmax = [(tokens[i] + 1) % V for i in want]
        return torch.nn.functional.one_hot(torch.tensor(self.last_argmax, dtype=torch.long), V).float()

    def hidden(self, *step: list[int]) -> torch.Tensor:
        return self.rows(*step)[:, :4]


class At:
    """A lane with sequences in it; `quiet` is what the engine says of its inbox."""

    def __init__(self, runner: Any = None, speculation: bool = False) -> None:
        self.runner, self.quiet = runner or CountingRunner(), True
        served: Any = SimpleNamespace(vocab_size=V, parameters=1000, tokenizer=SimpleNamespace(n_vocab=V))
        self.lane = Lane(
            served,
            self.runner,
            Admission(64, 10**6),
            prefill_tokens=64,
            speculation=speculation,
            undisturbed=lambda: self.quiet,
        )

    def join(
        self, first: int, n: int, stop: frozenset[int] = frozenset(), embeds: bool = False, **more: Any
    ) -> Sequence:
        params = SamplingParams(max_new_tokens=n, **{"temperature": 0.0, **more})
        sequence = Sequence([first], params, output_limit=n, stop_ids=stop, embeds=embeds)
        sequence.cache_scope = sequence.id
        self.lane.admission.enter(sequence)
        self.lane.add(sequence)
        return sequence

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.lane.sweep()
            self.lane.step()

    def finish(self) -> None:
        while self.lane.busy:
            self.steps(1)


def outcome(sequence: Sequence) -> tuple[list[int], Finished]:
    events = []
    while not sequence.events.empty():
        events.append(sequence.events.get())
    assert isinstance(events[-1], Finished)
    return [event.token_id for event in events[:-1]], events[-1]


def test_the_next_step_is_begun_before_the_tokens_of_this_one_are_handed_out() -> None:
    at = At()
    a, b = at.join(1, 5), at.join(7, 5)
    handed_out: list[int] = []
    at.runner.on_begin = lambda: handed_out.append(a.events.qsize() + b.events.qsize())
    at.finish()
    assert handed_out == [0, 2, 4, 6]
    assert at.runner.hits == 4 == len(at.runner.asked) - 1
    assert outcome(a)[0] == [2, 3, 4, 5, 6] and outcome(b)[0] == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("more", [{"temperature": 1.0, "top_k": 0, "logit_bias": ((9, 100.0),)}, {"logprobs": 1}])
def test_a_step_after_drawn_tokens_or_with_log_probabilities_is_begun_once_they_are_known(more: dict[str, Any]) -> None:
    at = At()
    a = at.join(1, 4, **more)
    at.finish()
    assert at.runner.hits == 3 and len(outcome(a)[0]) == 4


def test_sequences_that_end_are_not_in_the_step_that_is_begun() -> None:
    at = At()
    stops, short, goes_on = at.join(1, 9, stop=frozenset({4})), at.join(10, 2), at.join(20, 6)
    at.finish()
    assert [outcome(s)[0] for s in (stops, short, goes_on)] == [[2, 3, 4], [11, 12], [21, 22, 23, 24, 25, 26]]
    assert at.runner.hits == 5 == len(at.runner.asked) - 1
    assert all(begun in at.runner.asked for begun in at.runner.begun)


def test_a_sequence_that_is_cancelled_while_its_step_is_computed_gets_no_more_tokens() -> None:
    at = At()
    leaves, stays = at.join(1, 9), at.join(11, 4)
    at.steps(2)
    leaves.cancelled = True
    at.steps(1)
    enters = at.join(21, 3)  # into the slot that became free
    at.finish()
    assert outcome(leaves)[0] == [2, 3] and outcome(stays)[0] == [12, 13, 14, 15] and outcome(enters)[0] == [22, 23, 24]


def test_nothing_is_begun_while_a_request_is_about_to_enter_or_prompts_are_to_embed() -> None:
    at = At()
    at.quiet = False
    a = at.join(1, 4)
    at.steps(2)
    assert at.runner.begun == []
    at.quiet = True
    embedding = at.join(5, 0, embeds=True, prompt_logprobs=True)
    at.steps(1)
    assert at.runner.begun == [] and embedding.finish_reason is not None
    at.finish()
    assert outcome(a)[0] == [2, 3, 4, 5]


def test_with_all_slots_taken_those_who_wait_hold_nothing_up() -> None:
    at = At()
    sequences = [at.join(i, 3) for i in range(6)]
    at.steps(1)
    assert len(at.runner.begun) == 1
    at.finish()
    assert [outcome(s)[0] for s in sequences] == [[i + 1, i + 2, i + 3] for i in range(6)]


def test_a_begun_step_that_fails_ends_only_the_sequence_at_fault() -> None:
    at = At()
    a, b = at.join(1, 6), at.join(11, 6)
    at.steps(2)
    at.runner.fails = 2  # the step, and then the first sequence alone
    at.finish()
    assert outcome(a) == ([2, 3], Finished(a.finish_reason, Failure.STEP))
    assert outcome(b)[0] == [12, 13, 14, 15, 16, 17]


def test_a_begun_step_that_fails_when_one_of_its_sequences_has_left_ends_nobody_else() -> None:
    at = At()
    leaves, stays = at.join(1, 6), at.join(11, 6)
    at.steps(2)
    leaves.cancelled = True
    at.runner.fails = 1
    at.finish()
    assert outcome(leaves)[0] == [2, 3] and outcome(stays)[0] == [12, 13, 14, 15, 16, 17]


def test_a_draft_takes_the_place_of_the_step_that_was_begun() -> None:
    at = At(speculation=True)
    a = at.join(1, 60)  # it repeats after 32 tokens
    at.finish()
    assert outcome(a)[0] == [(2 + i) % V for i in range(60)]
    assert at.lane.figures()["accepted_tokens"] > 10
    assert at.runner.hits < len(at.runner.begun)


def test_a_token_that_is_padding_or_no_number_is_never_looked_ahead_from() -> None:
    at = At()
    at.lane.vocab_size = 5
    a = at.join(1, 6)
    at.finish()
    assert all(token < 5 for tokens, *_ in at.runner.begun for token in tokens)
    assert outcome(a)[0][:3] == [2, 3, 4]
