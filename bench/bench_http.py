"""HTTP: our server, its engine without HTTP, and llama-server, in one run, on GPT-2 124M with random weights.

    .venv/bin/python -m bench.bench_http [--dtype bf16|int8] [--llama_dir FOLDER] [--peer_python PYTHON]
        [--clients 16] [--rounds 3] [--small]

All take turns at the same work: prompts of 64 random tokens, 128 new ones, greedy, end-of-text ignored, 2 threads;
one client and 16 at once, streamed and in one piece. What HTTP costs a request is told by requests for one token,
each beside one of the engine. A peer that is not installed is said to be absent.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import http_servers, peer_llama
from bench.contestant import Absent, Process
from bench.http_servers import Server, free_port
from bench.measure import Figure, Noise, comparison, machine
from bench.reference_model import WORK, model_folder, prompts
from storage.pretrained import load_folder

NEW, PROMPT = 128, 64
ASKS = 10  # requests for one token in each round
OURS, ENGINE = "our server", "our engine"
KINDS = {"streamed": True, "in one piece": False}
TIMES_LLAMA = {"bf16": 2.5, "int8": 3.5}  # what is aimed at with all clients
OF_ENGINE = 0.85
MOST_MS = 2.0

Prompts = Callable[[int], list[list[int]]]


def title(clients: int, kind: str) -> str:
    """Return a column's title."""
    return f"{clients} client{'s' if clients > 1 else ''}, {kind}, tokens/s"


def one_round(
    engine: Process, servers: list[Server], clients: int, new: int, make: Prompts
) -> dict[str, dict[str, float]]:
    """Return tokens per second by column and contestant; the engine's figure stands in both kinds' columns."""
    whole = clients * new
    alone = whole / engine.run(make(clients), new).seconds
    return {
        title(clients, kind): {s.name: whole / s.run(make(clients), new, stream) for s in servers} | {ENGINE: alone}
        for kind, stream in KINDS.items()
    }


def costs(engine: Process, server: Server, make: Prompts, count: int) -> dict[str, Figure]:
    """Return by kind how many ms a request for one token takes beyond the engine, each beside one of the engine's."""
    more = {kind: Figure() for kind in KINDS}
    for _ in range(count):
        alone = engine.run(make(1), 1).seconds
        for kind, stream in KINDS.items():
            more[kind].samples.append((server.run(make(1), 1, stream) - alone) * 1e3)
    return more


def measure(
    engine: Process, servers: list[Server], clients: int, rounds: int, make: Prompts
) -> tuple[dict[str, dict[str, Figure]], dict[str, Figure]]:
    """Return tokens per second by column and contestant, and what HTTP costs by kind; servers[0] is ours."""
    figures: dict[str, dict[str, Figure]] = {}
    more = {kind: Figure() for kind in KINDS}
    counts = sorted({1, clients})
    for count in counts:
        one_round(engine, servers, count, 8, make)  # warms up
    costs(engine, servers[0], make, 2)
    for _ in range(rounds):
        for count in counts:
            for column, values in one_round(engine, servers, count, NEW, make).items():
                for name, value in values.items():
                    figures.setdefault(column, {}).setdefault(name, Figure()).samples.append(value)
        for kind, figure in costs(engine, servers[0], make, ASKS).items():
            more[kind].samples += figure.samples
    return figures, more


def report(figures: dict[str, dict[str, Figure]], more: dict[str, Figure], dtype: str, clients: int, llama: str) -> str:
    """Return the tables and a line for each kind on what HTTP costs, with what is aimed at."""
    columns = [title(clients, kind) for kind in KINDS]
    targets = {(ENGINE, column): OF_ENGINE for column in columns}
    if dtype in TIMES_LLAMA:
        targets |= {(llama, column): TIMES_LLAMA[dtype] for column in columns}
    names = [name for name in next(iter(figures.values())) if name != OURS]
    text = comparison(figures, dict.fromkeys(figures, 0), set(), [(OURS, name) for name in names], targets)
    for kind, figure in more.items():
        verdict = "holds" if figure.median <= MOST_MS else "does not hold"
        text += f"\nHTTP costs {figure.text(2)} ms a request {kind}; aim at most {MOST_MS:g}: {verdict}."
    return text + "\n"


def start(args: argparse.Namespace, folder: Path, root: Path, servers: list[Server]) -> list[str]:
    """Add the servers that can take part, ours first; return what there is to say of the peer."""
    port = free_port()
    command = http_servers.ours(folder, root, args.dtype, args.threads, args.clients, port)
    servers.append(Server(OURS, command, port))
    name = f"llama-server {peer_llama.KINDS[args.dtype]}"
    try:
        model = peer_llama.gguf_file(folder, folder.parent, args.dtype, args.peer_python)
        port = free_port()
        command = http_servers.llama_server(model, args.llama_dir, PROMPT + NEW + 64, args.threads, args.clients, port)
        servers.append(Server(name, command, port))
    except Absent as e:
        return [f"absent: {name} ({e})"]
    return [f"{name}: {peer_llama.version(args.llama_dir)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bf16", "int8", "fp32"), default="bf16")
    parser.add_argument("--llama_dir", type=Path, help="folder of llama.cpp's programs; default: PATH")
    parser.add_argument("--peer_python", default=sys.executable, help="Python that has gguf")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the models, made at first use")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small model, to try this")
    args = parser.parse_args()
    folder = model_folder(args.work.resolve(), args.small)
    vocab_size, seeds = load_folder(folder)[0].config.vocab_size, itertools.count()
    flags = ["--dtype", args.dtype, "--threads", str(args.threads), "--slots", str(args.clients)]
    engine = Process(ENGINE, [sys.executable, "-m", "bench.ours", str(folder), *flags])
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as root:
        try:
            said = [f"{ENGINE}: {engine.versions}", *start(args, folder, Path(root), servers)]
            print(f"{machine()}; {args.threads} threads\n" + "".join(f"- {x}\n" for x in said), flush=True)
            noise = Noise()
            make: Prompts = lambda count: prompts(count, PROMPT, vocab_size, next(seeds))  # noqa: E731
            figures, more = measure(engine, servers, args.clients, args.rounds, make)
            print(report(figures, more, args.dtype, args.clients, servers[-1].name))
            print(f"({args.rounds} rounds; others used {noise.cores():.2f} cores meanwhile)\n", flush=True)
        finally:
            for server in servers:
                server.close()
            engine.close()


if __name__ == "__main__":
    main()
