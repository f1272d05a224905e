"""The real server whose steps go wrong on request: `python faulty_server.py <flags of api_server.py>`.

In the worker `TorchRunner.rows` is replaced by one that first looks for a file `fault` in --root. The file is
taken away when its fault begins, so that it happens once:

    stall       the step never ends
    hold        the same with the interpreter's lock held, so that nothing in the process moves
    raise       the step raises
    slow        each step takes 20 ms more, for as long as the file is there

A step that holds the last token of the vocabulary always raises: that is the end-of-text token, which the tests' model
never says, so that only who asks for it in a prompt of token ids meets the fault. With a file `quick` in --root the
server loses patience sooner with an engine that does not move, a sender who is slow and a reader who stops.
"""

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import api_server  # noqa: E402

build = api_server.build


def hurry() -> None:
    """Shorten the times after which the server acts."""
    from web import health_routes, receiving, watchdog, worker

    health_routes.STALLED, watchdog.REFUSE, watchdog.REPLACE, receiving.DEADLINE = 2.0, 3.0, 6.0, 4.0
    worker.WRITE_SECONDS = 2


def faulty_build(settings: Any, workspace: Any) -> Any:
    """Build the app as ever, in the worker, then put the faulty step in place."""
    built = build(settings, workspace)
    from inference.torch_runner import TorchRunner

    if (settings.root / "quick").exists():
        hurry()
    fault, rows = settings.root / "fault", TorchRunner.rows

    def faulty_rows(self: Any, *step: Any) -> Any:
        kind = fault.read_text() if fault.exists() else ""
        if kind == "slow":
            time.sleep(0.02)
        elif kind:
            fault.unlink()
        if kind == "stall":
            time.sleep(1e6)
        elif kind == "hold":
            ctypes.PyDLL(None).sleep(10**6)
        elif kind == "raise":
            raise RuntimeError("a fault that was asked for")
        if self.vocab_size - 1 in step[0]:
            raise RuntimeError("a fault of one request")
        return rows(self, *step)

    TorchRunner.rows = faulty_rows  # type: ignore[method-assign]
    return built


if __name__ == "__main__":
    api_server.build = faulty_build
    sys.exit(api_server.main())
