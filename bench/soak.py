"""Soak: a server under many clients for minutes, and what it has left behind.

    .venv/bin/python -m bench.soak [--minutes 10] [--clients 16] [--model_path models/tiny-shakespeare]

Of the requests 70 % are served, half of them streamed; 10 % are left by their client in the middle, half of
those by RST; 20 % are wrong in some way. Nothing may be lost, and memory (RssAnon and VmSwap of the worker, after
the first 500 requests), descriptors, threads and latency must stay as they were. Exit code 1 when one does not.
"""

import argparse
import http.client
import json
import math
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 500  # requests
MOST_KIB = 2.0  # per request
MOST_MIB = 20.0
MOST_SLOWER = 1.2  # p99 at the end by p99 at the beginning
WRONG = (  # path, body, content type, status
    ("/api/generate", b'{"prompt": ', "application/json", 400),
    ("/api/generate", b'{"prompt": "a", "temperature": -1}', "application/json", 400),
    ("/api/generate", b'{"prompt": "a", "unknown": 1}', "application/json", 400),
    ("/v1/completions", b'{"prompt": [99999999], "model": null}', "application/json", 400),
    ("/api/generate", b"prompt=a", "application/x-www-form-urlencoded", 415),
    ("/nowhere", b"{}", "application/json", 404),
    ("/v1/completions", b'{"prompt": "a", "model": "another"}', "application/json", 404),
)


class Server:
    """The server in a process of its own, with a folder of its own, and what the system tells of its worker."""

    def __init__(self, folder: Path, model: Path):
        shutil.copytree(model, folder / "models" / model.name)
        flags = ["--port", "0", "--root", str(folder), "--model_path", f"models/{model.name}"]
        command = [sys.executable, str(ROOT / "api_server.py"), *flags]
        self.child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        said = ""
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)", said)) is None:
            line = self.child.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise SystemExit("the server did not start")
            said += line
        self.port = int(found[1])
        threading.Thread(target=self.child.stdout.read, daemon=True).start()  # type: ignore[union-attr]
        if self.ask("GET", "/health")[0] != 200:
            raise SystemExit("the server is not healthy")

    def ask(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Return status and body of a request with a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def usage(self) -> "Usage":
        """Return what the worker holds now."""
        children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        worker = Path("/proc") / children[0]
        status = dict(line.split(":", 1) for line in (worker / "status").read_text().splitlines())
        kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
        return Usage(children[0], kib, len(list((worker / "fd").iterdir())), int(status["Threads"]))

    def close(self) -> None:
        """End it."""
        self.child.terminate()
        self.child.wait(60)


@dataclass(frozen=True)
class Usage:
    """What a process holds."""

    pid: str
    kib: int
    descriptors: int
    threads: int


@dataclass
class Record:
    """What the clients have seen."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    served: list[tuple[float, float]] = field(default_factory=list)  # when it ended, seconds per token
    lost: list[str] = field(default_factory=list)


def serve_one(server: Server, dice: random.Random, record: Record) -> None:
    """Send a good request and check that the whole reply comes."""
    tokens, stream = dice.randint(8, 40), dice.random() < 0.5
    body = {"prompt": "Once upon a time", "max_new_tokens": tokens, "stream": stream}
    begun = time.monotonic()
    status, data = server.ask("POST", "/api/generate", json.dumps(body).encode())
    ended = time.monotonic()
    whole = data.endswith(b"data: [DONE]\n\n") if stream else status == 200 and b'"generated_text"' in data
    with record.lock:
        record.served.append((ended, (ended - begun) / tokens))
        if status != 200 or not whole:
            record.lost.append(f"{status}: {data[-80:]!r}")


def leave_one(server: Server, dice: random.Random, record: Record) -> None:
    """Send a good request and leave before its end."""
    stream = dice.random() < 0.5
    body = json.dumps({"prompt": "Once", "max_new_tokens": 200, "stream": stream}).encode()
    head = "POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            connection.recv(300)
        else:
            time.sleep(dice.random() * 0.1)
        if dice.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def fail_one(server: Server, dice: random.Random, record: Record) -> None:
    """Send a wrong request and check how it is refused."""
    path, body, kind, expected = dice.choice(WRONG)
    status, data = server.ask("POST", path, body, kind)
    if status != expected:
        with record.lock:
            record.lost.append(f"{path} {body!r}: {status}, not {expected}: {data[:80]!r}")


KINDS = ((0.7, "served", serve_one), (0.8, "left", leave_one), (1.0, "wrong", fail_one))


def client(server: Server, seed: int, until: float, record: Record) -> None:
    """Send requests until the time is over."""
    dice = random.Random(seed)
    while time.monotonic() < until:
        die = dice.random()
        _, kind, act = next(row for row in KINDS if die < row[0])
        try:
            act(server, dice, record)
        except (OSError, http.client.HTTPException) as error:
            with record.lock:
                record.lost.append(f"{kind}: {type(error).__name__}: {error}")
        with record.lock:
            record.counts[kind] += 1


def p99(record: Record, begin: float, end: float) -> float:
    """Return the p99 of the seconds per token of what was served in a span of time."""
    values = sorted(seconds for moment, seconds in record.served if begin <= moment < end)
    return values[len(values) * 99 // 100] if values else math.nan


def verdict(name: str, holds: bool, text: str) -> bool:
    """Print a line and return whether it holds."""
    print(f"{'holds' if holds else 'FAILS':5}  {name}: {text}", flush=True)
    return holds


def soak(server: Server, clients: int, seconds: float) -> bool:
    """Run the clients; print what came of it, and return whether all holds."""
    record, begun = Record(), time.monotonic()
    arguments = [(server, seed, begun + seconds, record) for seed in range(clients)]
    threads = [threading.Thread(target=client, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    while record.counts.total() < WARM_UP and time.monotonic() < begun + seconds:
        time.sleep(0.1)
    warm, before = server.usage(), record.counts.total()
    for thread in threads:
        thread.join()
    ended = time.monotonic()
    time.sleep(3.0)  # for what lingers
    after, total = server.usage(), record.counts.total()
    queue = json.loads(server.ask("GET", "/queue")[1])
    drift, span = after.kib - warm.kib, min(60.0, seconds / 3)
    first, last = p99(record, begun, begun + span), p99(record, ended - span, ended)
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(record.counts.items()))
    for line in record.lost[:5]:
        print("  lost: " + line)
    return all(
        [
            verdict(
                "requests", not record.lost, f"{total} in {ended - begun:.0f} s ({counts}); {len(record.lost)} lost"
            ),
            verdict("nothing left", queue["running"] == queue["waiting"] == queue["open_requests"] == 0, f"{queue}"),
            verdict("same worker", warm.pid == after.pid, f"{warm.pid}, {after.pid}"),
            verdict(
                "memory",
                drift <= MOST_MIB * 1024 and drift <= MOST_KIB * max(1, total - before),
                f"{warm.kib / 1024:.1f} MiB after {before}, {after.kib / 1024:.1f} MiB at the end: "
                f"{drift / max(1, total - before):.2f} KiB per request",
            ),
            verdict("descriptors", after.descriptors <= warm.descriptors, f"{warm.descriptors}, {after.descriptors}"),
            verdict("threads", after.threads <= warm.threads + 4, f"{warm.threads}, {after.threads}"),
            verdict(
                "latency",
                last <= MOST_SLOWER * first,
                f"p99 {first * 1e3:.1f} ms per token in the first {span:.0f} s, {last * 1e3:.1f} in the last",
            ),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "tiny-shakespeare")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), args.model_path.resolve())
        try:
            return 0 if soak(server, args.clients, 60 * args.minutes) else 1
        finally:
            server.close()


if __name__ == "__main__":
    sys.exit(main())
