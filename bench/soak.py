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
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.contestant import ROOT
from bench.http_servers import Server, free_port

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


class Watched(Server):
    """Our server in a process of its own, with a folder of its own, and what the system tells of its worker."""

    def __init__(self, folder: Path, model: Path, *flags: str):
        shutil.copytree(model, folder / "models" / model.name)
        port = free_port()
        flags = ("--port", str(port), "--root", str(folder), "--model_path", f"models/{model.name}", *flags)
        super().__init__("our server", [sys.executable, str(ROOT / "api_server.py"), *flags], port)

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
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        worker = Path("/proc") / children[0]
        status = dict(line.split(":", 1) for line in (worker / "status").read_text().splitlines())
        kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
        return Usage(children[0], kib, len(list((worker / "fd").iterdir())), int(status["Threads"]))


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

    def total(self) -> int:
        """Return how many requests are over."""
        with self.lock:
            return self.counts.total()


def serve_one(server: Watched, dice: random.Random, record: Record) -> None:
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


def leave_one(server: Watched, dice: random.Random, record: Record) -> None:
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


def fail_one(server: Watched, dice: random.Random, record: Record) -> None:
    """Send a wrong request and check how it is refused."""
    path, body, kind, expected = dice.choice(WRONG)
    status, data = server.ask("POST", path, body, kind)
    if status != expected:
        with record.lock:
            record.lost.append(f"{path} {body!r}: {status}, not {expected}: {data[:80]!r}")


KINDS = ((0.7, "served", serve_one), (0.8, "left", leave_one), (1.0, "wrong", fail_one))


@dataclass(frozen=True)
class Goal:
    """When the clients stop: after so many seconds, or requests."""

    seconds: float = math.inf
    requests: float = math.inf


def client(server: Watched, seed: int, begun: float, goal: Goal, record: Record) -> None:
    """Send requests until the goal is reached."""
    dice = random.Random(seed)
    while time.monotonic() < begun + goal.seconds and record.total() < goal.requests:
        die = dice.random()
        _, kind, act = next(row for row in KINDS if die < row[0])
        try:
            act(server, dice, record)
        except (OSError, http.client.HTTPException) as error:
            with record.lock:
                record.lost.append(f"{kind}: {type(error).__name__}: {error}")
        with record.lock:
            record.counts[kind] += 1


def p99(served: Sequence[tuple[float, float]]) -> float:
    """Return the p99 of seconds per token."""
    values = sorted(seconds for _, seconds in served)
    return values[len(values) * 99 // 100] if values else math.nan


def latency(record: Record, begun: float, ended: float, goal: Goal) -> tuple[bool, str]:
    """Compare the first minute with the last one; where requests are the goal, the first 1000 with the last."""
    rows = sorted(record.served)
    if goal.requests < math.inf:
        count = min(1000, len(rows) // 3)
        first, last, what = p99(rows[:count]), p99(rows[-count:]), f"{count} served requests"
    else:
        span = min(60.0, goal.seconds / 3)
        first, last = p99([r for r in rows if r[0] < begun + span]), p99([r for r in rows if r[0] >= ended - span])
        what = f"{span:.0f} s"
    text = f"p99 {first * 1e3:.1f} ms per token in the first {what}, {last * 1e3:.1f} in the last"
    return last <= MOST_SLOWER * first, f"{text}: {last / first:.2f} times, at most {MOST_SLOWER:g}"


def memory(warm: Usage, after: Usage, requests: int) -> tuple[bool, str]:
    """Compare what the worker holds after some requests with what it held before them."""
    drift, each = after.kib - warm.kib, (after.kib - warm.kib) / max(1, requests)
    text = f"{warm.kib / 1024:.1f} MiB before {requests} requests, {after.kib / 1024:.1f} after: {each:.2f} KiB each"
    return drift <= MOST_MIB * 1024 and each <= MOST_KIB, f"{text}, at most {MOST_KIB:g}, and {MOST_MIB:g} MiB in all"


def soak(server: Watched, clients: int, goal: Goal, warm_up: int = WARM_UP) -> dict[str, bool]:
    """Run the clients; print what came of it, and return what holds."""
    record, begun = Record(), time.monotonic()
    arguments = [(server, seed, begun, goal, record) for seed in range(clients)]
    threads = [threading.Thread(target=client, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    while record.total() < warm_up and any(thread.is_alive() for thread in threads):
        time.sleep(0.1)
    warm, before = server.usage(), record.total()
    for thread in threads:
        thread.join()
    ended = time.monotonic()
    time.sleep(3.0)  # for what lingers
    after, total = server.usage(), record.total()
    queue = json.loads(server.ask("GET", "/queue")[1])
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(record.counts.items()))
    found = {
        "nothing lost": (not record.lost, f"{total} in {ended - begun:.0f} s ({counts}); {len(record.lost)} lost"),
        "nothing left": (queue["running"] == queue["waiting"] == queue["open_requests"] == 0, f"{queue}"),
        "same worker": (warm.pid == after.pid, f"{warm.pid}, {after.pid}"),
        "memory": memory(warm, after, total - before),
        "descriptors": (after.descriptors <= warm.descriptors, f"{warm.descriptors}, {after.descriptors}"),
        # each client may have left one request behind while it is at the next: so far the pool of threads may grow
        "threads": (after.threads <= warm.threads + clients, f"{warm.threads}, {after.threads}, clients {clients}"),
        "latency": latency(record, begun, ended, goal),
    }
    for line in record.lost[:5]:
        print("  lost: " + line)
    for name, (holds, text) in found.items():
        print(f"{'holds' if holds else 'FAILS':5}  {name}: {text}", flush=True)
    return {name: holds for name, (holds, _) in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "tiny-shakespeare")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Watched(Path(folder), args.model_path.resolve())
        try:
            return 0 if all(soak(server, args.clients, Goal(seconds=60 * args.minutes)).values()) else 1
        finally:
            server.close()


if __name__ == "__main__":
    sys.exit(main())
