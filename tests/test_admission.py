"""Admission: the queue's limits, counted before it is joined, and what is known of each request."""

import pytest

from inference import admission as module
from inference.admission import Admission
from inference.sequence import FinishReason, QueueFull, SamplingParams, Sequence


def sequence(prompt: int = 3, name: str | None = None) -> Sequence:
    made = Sequence([0] * prompt, SamplingParams())
    made.id = made.id if name is None else name
    return made


def start(admission: Admission, s: Sequence) -> None:
    s.started_at = s.submitted_at + 1.0
    admission.started(s)


def end(admission: Admission, s: Sequence) -> None:
    s.finished_at, s.finish_reason = s.submitted_at + 2.0, FinishReason.STOP
    admission.ended(s)


def test_requests_count_from_the_moment_they_enter() -> None:
    admission = Admission(max_waiting=2, max_waiting_tokens=100)
    first, second = sequence(), sequence()
    admission.enter(first)
    admission.enter(second)
    with pytest.raises(QueueFull, match="2 requests wait; the limit is 2"):
        admission.enter(sequence())
    start(admission, first)
    admission.enter(sequence())
    assert (admission.running, admission.waiting, admission.waiting_tokens) == (1, 2, 6)


def test_prompt_tokens_count_too_and_a_refused_request_leaves_no_trace() -> None:
    admission = Admission(max_waiting=9, max_waiting_tokens=10)
    admission.enter(sequence(7))
    refused = sequence(4)
    with pytest.raises(QueueFull, match="7 prompt tokens wait; with this request's 4 they would pass the limit of 10"):
        admission.enter(refused)
    assert admission.describe(refused.id) is None
    admission.enter(sequence(3))


def test_who_comes_back_is_told_when_a_place_should_be_free() -> None:
    admission = Admission(max_waiting=1, max_waiting_tokens=100)
    for _ in range(60):  # requests that took a minute each
        slow = sequence()
        admission.enter(slow)
        slow.started_at = slow.submitted_at
        admission.started(slow)
        slow.finished_at = slow.submitted_at + 60.0
        admission.ended(slow)
    running, waiting = sequence(), sequence()
    admission.enter(running)
    start(admission, running)
    admission.enter(waiting)
    with pytest.raises(QueueFull) as refusal:
        admission.enter(sequence())
    assert 50 <= refusal.value.retry_after <= 60


def test_a_place_in_the_queue_is_the_number_of_those_ahead() -> None:
    admission = Admission(max_waiting=9, max_waiting_tokens=100)
    a, b, c = (sequence() for _ in range(3))
    for s in (a, b, c):
        admission.enter(s)
    start(admission, a)
    assert [admission.describe(s.id)["position"] for s in (a, b, c)] == [None, 0, 1]
    end(admission, b)
    assert admission.describe(c.id)["position"] == 0


def test_figures_stay_after_the_end_with_their_timings() -> None:
    admission = Admission(max_waiting=9, max_waiting_tokens=100)
    s = sequence(5, "mine")
    admission.enter(s)
    start(admission, s)
    end(admission, s)
    found = admission.describe("mine")
    assert found["state"] == "finished" and found["finish_reason"] == "stop" and found["prompt_tokens"] == 5
    assert (found["waited_seconds"], found["seconds"], found["first_token_seconds"]) == (1.0, 2.0, None)
    assert found["seed"] == s.seed


def test_an_id_is_taken_until_its_request_ends() -> None:
    admission = Admission(max_waiting=9, max_waiting_tokens=100)
    first, second = sequence(name="x"), sequence(name="x")
    admission.enter(first)
    with pytest.raises(ValueError, match="request id 'x'"):
        admission.enter(second)
    end(admission, first)
    admission.enter(second)
    assert admission.describe("x")["state"] == "waiting"


def test_old_requests_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    admission = Admission(max_waiting=9, max_waiting_tokens=100)
    for name in "abc":
        s = sequence(name=name)
        admission.enter(s)
        end(admission, s)
    assert [admission.describe(n) is not None for n in "abc"] == [False, True, True]
    assert admission.finished == 3


def test_waiting_for_the_last_one_has_a_limit() -> None:
    admission = Admission(max_waiting=9, max_waiting_tokens=100)
    assert admission.wait_empty(0.0)
    s = sequence()
    admission.enter(s)
    assert not admission.wait_empty(0.01)
    end(admission, s)
    assert admission.wait_empty(0.0)
