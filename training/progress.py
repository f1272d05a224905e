"""The line that shows how a run goes: rewritten in place on a terminal, a plain line per report in a file."""

import shutil
import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 45s, 3m20s, 2h05m, 3d04h."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def quantity(n: float) -> str:
    """Return a large number in three digits: 950, 12.3k, 4.56M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.0f}"


def bar(done: float, width: int = 24) -> str:
    """Return a bar for a fraction `done` from 0 to 1, in eighths of a character."""
    eighths = round(min(max(done, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(width, "░")


class ProgressLine:
    """Progress of up to `total` iterations; a terminal is rewritten at most ten times a second."""

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total = total
        self.stream = sys.stdout if stream is None else stream
        self.terminal = self.stream.isatty()
        self.drawn = 0.0  # when, by the monotonic clock
        self.open = False  # whether an unfinished line stands on the terminal

    def show(
        self, iter_num: int, loss: float, val_loss: float | None, speed: float, left: float, keep: bool = False
    ) -> None:
        """Show one report: `speed` in tokens per second, `left` in seconds; `keep` leaves it on the terminal."""
        val = "" if val_loss is None else f"  val {val_loss:.4f}"
        text = f"loss {loss:.4f}{val}  {quantity(speed)} tok/s  {duration(left)} left"
        if self.terminal and not keep:
            self._draw(f"{bar(iter_num / self.total)} {iter_num}/{self.total}  {text}")
        else:
            self.say(f"{iter_num:>{len(str(self.total))}}/{self.total}  {text}")

    def _draw(self, line: str) -> None:
        now = time.monotonic()
        if now - self.drawn < 0.1:
            return
        self.drawn, self.open = now, True
        self.stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self.stream.flush()

    def say(self, text: str) -> None:
        """Write a line of its own; the progress line is drawn again below it."""
        if self.open:
            self.stream.write("\r\x1b[K")
            self.open = False
        self.stream.write(text + "\n")
        self.stream.flush()


class PreparationLine:
    """Progress of preparing a dataset, at most every two seconds and once per kind of work."""

    def __init__(self) -> None:
        self.stage, self.shown = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes or pieces of `stage` are done; total 0 is unknown."""
        now = time.monotonic()
        if stage == self.stage and (now - self.shown < 2 or done == total):
            return
        self.stage, self.shown = stage, now
        share = f" {100 * done / total:.0f}%" if total > 0 else f" {quantity(done)}" if done else ""
        print(f"{stage}{share}", flush=True)
