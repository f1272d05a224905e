"""Steps of which only the greatest logits matter: when a lane asks for no more, and that tokens are the same."""

from typing import Any

import pytest
import torch
from test_lookahead import At, CountingRunner, outcome


class LookingRunner(CountingRunner):
    """Says where the greatest logits are without computing all. Notes for which steps it was asked how."""

    def __init__(self) -> None:
        super().__init__()
        self.looked: list[bool] = []
        self.begun_looks: list[bool] = []

    def begin(self, tokens: list[int], slots: list[int], positions: list[int], want: list[int], plain: bool) -> None:
        self.begun_looks.append(plain)
        super().begin(tokens, slots, positions, want, False)

    def rows(self, *step: list[int]) -> torch.Tensor:
        self.looked.append(False)
        return super().rows(*step)

    def greatest(self, *step: list[int]) -> list[int]:
        self.looked.append(True)
        super().rows(*step)
        return self.last_argmax or []


def looking(text: int = 32) -> At:
    at = At(LookingRunner())
    at.lane.vocab_size = text
    return at


def test_greedy_requests_ask_for_no_more_than_the_greatest_also_ahead() -> None:
    at = looking()
    a, b = at.join(1, 5), at.join(7, 3)
    at.finish()
    assert outcome(a)[0] == [2, 3, 4, 5, 6] and outcome(b)[0] == [8, 9, 10]
    assert at.runner.looked == [True] * 5 and at.runner.begun_looks == [True] * 4 and at.runner.hits == 4


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 1.0, "logit_bias": ((9, 100.0),)},
        {"logprobs": 1},
        {"repetition_penalty": 1.1},
    ],
)
def test_a_request_that_needs_logits_gets_them_and_so_do_those_beside_it(more: dict[str, Any]) -> None:
    at = looking()
    a, needs = at.join(1, 6), at.join(7, 3, **more)
    at.finish()
    assert outcome(a)[0] == [2, 3, 4, 5, 6, 7] and len(outcome(needs)[0]) == 3
    assert at.runner.looked == [False] * 3 + [True] * 3
    assert at.runner.begun_looks == at.runner.looked[1:]


def test_log_probabilities_are_there_where_they_were_asked_for() -> None:
    at = looking()
    a = at.join(1, 2, logprobs=2)
    at.finish()
    tokens = [a.events.get() for _ in range(2)]
    assert all(token.logprob is not None and len(token.top) == 2 for token in tokens)


def test_a_greatest_logit_whose_id_has_no_text_makes_the_others_matter() -> None:
    at = looking(text=30)
    a = at.join(26, 6)
    at.finish()
    assert outcome(a)[0] == [27, 28, 29, 0, 1, 2]
    assert at.runner.looked == [True, True, True, True, False, True, True]


def test_a_failed_look_ends_only_the_sequence_at_fault() -> None:
    at = looking()
    a, b = at.join(1, 4), at.join(11, 4)
    at.runner.fails = 2
    at.finish()
    ends = [outcome(s) for s in (a, b)]
    assert [len(tokens) for tokens, _ in ends] == [0, 4] and ends[0][1].error is not None
