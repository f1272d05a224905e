"""Who may come in, who is here, and who was: requests by id, counted before they join the queue.

Shared by the callers' threads and the engine's; every method locks. Knows nothing of models.
"""

import math
import threading
import time
from collections import OrderedDict
from typing import Any

from inference.sequence import QueueFull, Sequence

KEPT = 1024  # finished requests that can still be asked for


class Admission:
    """Bound what waits, in requests and in prompt tokens, and answer for each request by its id."""

    def __init__(self, max_waiting: int, max_waiting_tokens: int):
        self.max_waiting, self.max_waiting_tokens = max_waiting, max_waiting_tokens
        self.waiting = self.waiting_tokens = self.running = self.finished = 0
        self._changed = threading.Condition()
        self._active: OrderedDict[str, Sequence] = OrderedDict()  # in the order they came
        self._past: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._seconds = 1.0  # that a request took of late, as an average over slots

    def enter(self, sequence: Sequence) -> None:
        """Count a new request in. Raises QueueFull, or ValueError when its id is taken."""
        tokens = len(sequence.prompt_ids)
        with self._changed:
            if sequence.id in self._active:
                raise ValueError(f"request id {sequence.id!r} belongs to a request that has not ended")
            if self.waiting >= self.max_waiting:
                raise QueueFull(f"{self.waiting} requests wait; the limit is {self.max_waiting}", self._retry_after())
            if self.waiting_tokens + tokens > self.max_waiting_tokens:
                raise QueueFull(
                    f"{self.waiting_tokens} prompt tokens wait; with this request's {tokens} they would pass "
                    f"the limit of {self.max_waiting_tokens}",
                    self._retry_after(),
                )
            self._active[sequence.id] = sequence
            self.waiting += 1
            self.waiting_tokens += tokens

    def started(self, sequence: Sequence) -> None:
        """Note that a waiting request now runs."""
        with self._changed:
            self.waiting -= 1
            self.waiting_tokens -= len(sequence.prompt_ids)
            self.running += 1

    def ended(self, sequence: Sequence) -> None:
        """Note that a request is over; its figures stay for a while."""
        with self._changed:
            if sequence.started_at is None:
                self.waiting -= 1
                self.waiting_tokens -= len(sequence.prompt_ids)
            else:
                self.running -= 1
            self.finished += 1
            del self._active[sequence.id]
            self._past.pop(sequence.id, None)
            self._past[sequence.id] = _describe(sequence, position=None)
            while len(self._past) > KEPT:
                self._past.popitem(last=False)
            if sequence.started_at is not None and sequence.finished_at is not None:
                self._seconds += 0.1 * (sequence.finished_at - sequence.started_at - self._seconds)
            self._changed.notify_all()

    def describe(self, request_id: str) -> dict[str, Any] | None:
        """Return a request's state, place in the queue, tokens so far and timings; None when unknown."""
        with self._changed:
            sequence = self._active.get(request_id)
            if sequence is None:
                past = self._past.get(request_id)
                return None if past is None else dict(past)
            position = None
            if sequence.state == "waiting":
                earlier = list(self._active.values())
                earlier = earlier[: earlier.index(sequence)]
                position = sum(s.state == "waiting" for s in earlier)
            return _describe(sequence, position)

    def wait_empty(self, timeout: float) -> bool:
        """Wait until no request is here; say whether that came within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._active, timeout)

    def _retry_after(self) -> int:
        """Return whole seconds after which a place should be free: when the next running request ends."""
        return min(60, max(1, math.ceil(self._seconds / max(1, self.running))))


def _describe(sequence: Sequence, position: int | None) -> dict[str, Any]:
    end = sequence.finished_at if sequence.finished_at is not None else time.monotonic()

    def since_submit(moment: float | None) -> float | None:
        return None if moment is None else round(moment - sequence.submitted_at, 6)

    return {
        "id": sequence.id,
        "state": sequence.state,
        "position": position,  # requests ahead of it in the queue; null once it runs
        "prompt_tokens": len(sequence.prompt_ids),
        "cached_tokens": sequence.cached_tokens,
        "output_tokens": len(sequence.output_ids),
        "max_new_tokens": sequence.params.max_new_tokens,
        "seed": sequence.seed,
        "finish_reason": None if sequence.finish_reason is None else sequence.finish_reason.value,
        "waited_seconds": since_submit(sequence.started_at if sequence.started_at is not None else end),
        "first_token_seconds": since_submit(sequence.first_token_at),
        "seconds": since_submit(end),
    }
