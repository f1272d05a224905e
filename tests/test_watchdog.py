"""The watchdog's judgement, by the clock of the test; its deeds are in tests/faults."""

import logging
import threading

import pytest
from live_server import until

from web.watchdog import REFUSE, REPLACE, Watchdog, log_stacks


class Patient:
    """An engine whose age is set by hand, and the watchdog over it."""

    def __init__(self):
        self.age = 0.0
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.dog = Watchdog(lambda: self.age, self.stalled, self.closing)

    def wait(self, seconds: float, tick: float = 0.5) -> bool:
        """Let time pass without a sign of life; say whether the engine is to be replaced."""
        replace = False
        for _ in range(round(seconds / tick)):
            self.age += tick
            replace = self.dog.look(tick)
        return replace


@pytest.fixture
def patient() -> Patient:
    return Patient()


def test_a_quiet_engine_is_first_refused_then_replaced(patient):
    assert not patient.wait(REFUSE - 0.5) and not patient.stalled.is_set()
    assert not patient.wait(0.5) and patient.stalled.is_set()
    assert not patient.wait(REPLACE - REFUSE - 0.5)
    assert patient.wait(0.5)


def test_a_beat_makes_all_well_again(patient):
    patient.wait(REFUSE)
    patient.age = 0.1
    assert not patient.dog.look(0.5) and not patient.stalled.is_set() and patient.dog.quiet == 0.1


def test_a_machine_that_slept_has_not_stalled(patient):
    patient.age = 3600.0
    assert not patient.dog.look(3600.0) and not patient.stalled.is_set() and patient.dog.quiet == 1.0


def test_the_log_says_what_threads_were_doing_those_that_do_the_same_together(caplog):
    go = threading.Event()
    threads = [threading.Thread(target=go.wait, name=f"waits-{i}", daemon=True) for i in range(5)]
    for thread in threads:
        thread.start()

    def said() -> list[str] | None:
        caplog.clear()
        log_stacks()
        lines = [record.getMessage() for record in caplog.records]
        return lines if sum("waits-" in line for line in lines) == 1 else None

    with caplog.at_level(logging.CRITICAL):
        lines = until(said)  # a thread that has just started may be on its way to where the others wait
    go.set()
    for thread in threads:
        thread.join()
    assert any(line.startswith("waits-0, waits-1, waits-2 …: ") for line in lines)
    assert any("log_stacks" in line and "MainThread" in line for line in lines)
