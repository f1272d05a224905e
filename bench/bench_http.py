"""HTTP: what the server costs over its engine, in one run, on GPT-2 124M with random weights.

    .venv/bin/python -m bench.bench_http [--dtype bf16] [--clients 16] [--rounds 5] [--small]

The engine alone (bench/ours.py) and the server take turns at the same work: prompts of 64 random tokens, 128 new
ones, greedy, end-of-text ignored, 2 threads; streamed, and in one piece. One thread reads all streams, so that
the clients' own work stays small beside the server's, with which it shares the machine.
"""

import argparse
import json
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.contestant import ROOT, Process
from bench.measure import Figure, Noise, machine, ratio
from bench.reference_model import WORK, model_folder, prompts

NEW, PROMPT = 128, 64


class Server:
    """The server in a process of its own."""

    def __init__(self, root: Path, folder: Path, dtype: str, slots: int):
        flags = ["--port", "0", "--root", str(root), "--model_type", "gpt2", "--pretrained_dir", str(folder.parent)]
        flags += ["--threads", "2", "--slots", str(slots), "--dtype", dtype, "--prefill_tokens", "2048"]
        command = [sys.executable, str(ROOT / "api_server.py"), *flags]
        self.child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.port = 0
        while not self.port:
            line = self.child.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise SystemExit("the server did not start")
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            self.port = int(found[1]) if found else 0

    def run(self, works: list[list[int]], stream: bool) -> float:
        """Continue all prompts at once; return the seconds until the last has ended."""
        selector, waiting = selectors.DefaultSelector(), {}
        begun = time.perf_counter()
        for prompt in works:
            connection = socket.create_connection(("127.0.0.1", self.port))
            connection.sendall(request(prompt, stream))
            selector.register(connection, selectors.EVENT_READ)
            waiting[connection] = bytearray()
        left = set(waiting)
        while left:
            for key, _ in selector.select():
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                waiting[key.fileobj] += data  # type: ignore[index]
                if not data:
                    selector.unregister(key.fileobj)
                    left.discard(key.fileobj)  # type: ignore[arg-type]
        seconds = time.perf_counter() - begun
        for connection, said in waiting.items():
            connection.close()
            if f'"completion_tokens":{NEW}'.encode() not in bytes(said).replace(b" ", b""):
                raise RuntimeError(f"not {NEW} tokens: {bytes(said[-300:])!r}")
        return seconds

    def close(self) -> None:
        """End it."""
        self.child.terminate()
        self.child.wait(60)


def request(prompt: list[int], stream: bool) -> bytes:
    """Return the bytes of a request whose connection the server closes after the reply."""
    body = {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def report(clients: int, figures: dict[str, Figure]) -> None:
    """Print tokens per second, the share of the engine's, and milliseconds per request over the engine."""
    engine = figures["engine"]
    print(f"\n**{clients} at once**\n\n| | tokens/s | of the engine's | ms a request over it |\n|---|---|---|---|")
    for name, figure in figures.items():
        speed = Figure([clients * NEW / seconds for seconds in figure.samples])
        more = Figure([(a - b) * 1e3 / clients for a, b in zip(figure.samples, engine.samples, strict=True)])
        print(f"| {name} | {speed.text()} | {ratio(engine, figure)} | {more.text(2)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a small model, to try this")
    args = parser.parse_args()
    folder = model_folder(WORK, args.small)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    flags = ["--dtype", args.dtype, "--threads", "2", "--slots", str(args.clients)]
    engine = Process("engine", [sys.executable, "-m", "bench.ours", str(folder), *flags])
    with tempfile.TemporaryDirectory() as root:
        server = Server(Path(root), folder, args.dtype, args.clients)
        try:
            print(f"{machine()}; {engine.versions}")
            noise = Noise()
            for clients in (1, args.clients):
                figures = {name: Figure() for name in ("engine", "streamed", "in one piece")}
                for turn in range(args.rounds + 1):
                    works = [prompts(clients, PROMPT, vocab_size, 3 * turn + i) for i in range(3)]
                    seconds = [
                        engine.run(works[0], NEW).seconds,
                        server.run(works[1], stream=True),
                        server.run(works[2], stream=False),
                    ]
                    for figure, value in zip(figures.values(), seconds, strict=True):
                        if turn > 0:  # the first one warms up
                            figure.samples.append(value)
                report(clients, figures)
            print(f"\nothers used {noise.cores():.2f} cores")
        finally:
            server.close()
            engine.close()


if __name__ == "__main__":
    main()
