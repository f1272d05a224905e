"""A contestant: one engine in one precision, in a process of its own that answers lines of JSON.

A process each makes peak memory comparable, keeps thread pools apart, and lets a peer live in another
Python environment. The children are bench/ours.py and bench/peer_*.py; they import this file, so it needs
the standard library alone. A child says first that it is ready, or why it is absent; then it answers works
until its input ends.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent


class Absent(Exception):
    """A contestant cannot take part here; the message says why."""


@dataclass(frozen=True)
class Result:
    """What one work took: seconds until every prompt had its first token, seconds in all, and peak memory in MB."""

    first: float
    seconds: float
    tokens: int  # of all requests together
    requests: int
    peak_mb: float

    @property
    def decode(self) -> float:
        """Return tokens per second after the first ones."""
        return (self.tokens - self.requests) / max(self.seconds - self.first, 1e-9)

    @property
    def total(self) -> float:
        """Return tokens per second over everything."""
        return self.tokens / self.seconds


class Contestant(Protocol):
    """Whatever can be asked to continue prompts."""

    name: str

    def run(self, prompts: list[list[int]], new: int) -> Result:
        """Continue all prompts at once by `new` tokens each, greedily."""
        ...

    def close(self) -> None:
        """End its process."""
        ...


class Process:
    """A contestant behind a pipe. Raises Absent when it cannot take part."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill and block it
        self._child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        try:
            hello = self._read()
        except BaseException:
            self.close()
            raise
        if "absent" in hello:
            self.close()
            raise Absent(hello["absent"])
        self.versions: str = hello["ready"]

    def _read(self) -> dict[str, Any]:
        line = self._child.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self._child.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()[-1:]
            raise Absent(f"{self.name} ended: {said[0] if said else 'it said nothing'}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def run(self, prompts: list[list[int]], new: int) -> Result:
        """Have the child do a work; see `Contestant.run`."""
        self._child.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")  # type: ignore[union-attr]
        self._child.stdin.flush()  # type: ignore[union-attr]
        return Result(**self._read())

    def close(self) -> None:
        """End the child."""
        for pipe in (self._child.stdin, self._child.stdout):
            pipe.close()  # type: ignore[union-attr]
        end(self._child, 20)
        self._said.close()


def end(child: subprocess.Popen[str], seconds: float) -> None:
    """Wait for the end of a child that was told to, and kill it when it takes too long."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# --- the child's side


def peak_mb() -> float:
    """Return the most memory this process has had, in MB; what getrusage says begins with that of our parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def serve(prepare: Callable[[], tuple[str, Callable[[list[list[int]], int], float]]]) -> None:
    """Answer works on standard input until it ends.

    `prepare` returns versions in words and a function that does a work and returns the seconds to the
    last first token. What libraries print goes to standard error.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        try:
            versions, work = prepare()
        except (ModuleNotFoundError, Absent) as e:
            print(json.dumps({"absent": str(e)}), file=answers)
            return
        print(json.dumps({"ready": versions}), file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            count = len(asked["prompts"])
            start = time.perf_counter()
            first = work(asked["prompts"], asked["new"])
            seconds = time.perf_counter() - start
            result = Result(first, seconds, count * asked["new"], count, peak_mb())
            print(json.dumps(asdict(result)), file=answers, flush=True)
