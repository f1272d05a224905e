"""A real server process for tests, with a tiny random model, and how to talk to it.

`Process` starts `api_server.py` (or a test's own variant of it) on a free port and collects what it prints.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parent.parent
FAULTY = ROOT / "tests" / "faults" / "faulty_server.py"
PATIENCE = 40.0  # seconds; a machine that runs other tests is slow
LONG = {"prompt": "Once", "max_new_tokens": 2000, "temperature": 1.5}


class Process:
    """A server process with its address, and its own end."""

    def __init__(
        self,
        root: Path,
        *flags: str,
        script: Path = ROOT / "api_server.py",
        before: Sequence[str] = (),
        native: bool = False,
    ):
        """Start the server; `before` are words of the command before it, of a program that becomes it."""
        self.root = root
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LM_SERVER_")}
        if not native:  # without a compiler the torch runner serves
            environ |= {"PATH": "", "LM_SERVER_NATIVE_CACHE": str(root / "cache")}
        command = [*before, sys.executable, str(script), "--port", "0", "--root", str(root), *flags]
        self.child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = until(self.address)
            self.port = int(self.url.rsplit(":", 1)[1])
            until(self.ready)
        except BaseException:  # nobody else could end it
            self.end()
            raise

    def address(self) -> str | None:
        assert self.child.poll() is None, self.lines
        return next((m[0] for m in map(re.compile(r"http://\S+").search, self.lines) if m), None)

    def _read(self) -> None:
        for line in self.child.stdout:
            self.lines.append(line)
        self.child.stdout.close()

    def ready(self) -> bool:
        assert self.child.poll() is None, self.lines
        with contextlib.suppress(requests.RequestException):
            return requests.get(self.url + "/healthz", timeout=5).status_code == 200
        return False

    def post(self, path: str, body: dict, **more) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=30, **more)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=30)

    def worker(self) -> int:
        children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        return int(children[0]) if children else 0  # 0 between one worker and the next

    def memory(self) -> int:
        """Return the KiB that the worker alone holds."""
        status = Path(f"/proc/{self.worker()}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon:", "VmSwap:")))

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        self._reader.join()


def alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(found: Callable[[], object], patience: float = PATIENCE, pause: float = 0.02):
    """Return what `found` returns once it is true; fail when that takes too long."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(pause)
    raise AssertionError(f"{found} was not to be")


def make_root(folder: Path) -> Path:
    """Put a tiny random model where the bundled one is expected, another beside it, and one trained by nanoGPT.

    It never ends a text by itself, so that what a test has started still runs when the test looks.
    """
    import torch

    from model import GPT, GPTConfig
    from storage import pretrained
    from storage.tokenizer import train_bpe

    torch.manual_seed(0)
    tokenizer = train_bpe(["Once upon a time there was a server.\n" * 9], 280)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=2048, vocab_size=280))
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 10.0
        model.transformer.wte.weight[tokenizer.eot] = 0.0
        model.transformer.wte.weight[tokenizer.eot, 0] = -10.0  # a logit of about -100
    for name in ("tiny-shakespeare", "other"):
        pretrained.export(model, tokenizer, folder / "models" / name)
    run = folder / "out" / "trained"
    run.mkdir(parents=True)
    config = {"model_args": model.config.model_args(), "iter_num": 3, "best_val_loss": 2.5, "config": {}}
    torch.save({"model": model.state_dict(), **config}, run / "ckpt.pt")
    tokenizer.save(run / "tokenizer.json")
    return folder


def raw(server: Process, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(data)
    return connection


def request_of(server: Process, body: dict, length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /api/generate HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data


def streamed(server: Process, body: dict) -> list[str]:
    """Return the events of a streamed completion."""
    with server.post("/v1/completions", body | {"stream": True}, stream=True) as reply:
        lines = reply.iter_lines(decode_unicode=True)
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


class Streams:
    """Clients that read a stream to its end, each in a thread of its own; `lines` is what they were told."""

    def __init__(self, server: Process, count: int, tokens: int = 2000):
        self.lines: list[list[str]] = [[] for _ in range(count)]
        self.threads = [threading.Thread(target=self._read, args=(server, lines, tokens)) for lines in self.lines]
        for thread in self.threads:
            thread.start()

    def _read(self, server: Process, lines: list[str], tokens: int) -> None:
        body = {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        with (
            contextlib.suppress(requests.RequestException),
            server.post("/v1/completions", body, stream=True) as reply,
        ):
            for line in reply.iter_lines(decode_unicode=True):
                if line.startswith("data: ") or reply.status_code != 200:
                    lines.append(line.removeprefix("data: "))

    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)


def set_fault(server: Process, kind: str) -> None:
    """Have the next step of `faulty_server.py` go wrong; "slow" lasts until `fault` is deleted."""
    (server.root / "fault.new").write_text(kind)
    (server.root / "fault.new").rename(server.root / "fault")
