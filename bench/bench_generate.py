"""Generation: our engine and its peers, side by side in one run, on GPT-2 124M with random weights.

    .venv/bin/python -m bench.bench_generate [--dtype bf16] [--peers llama,openvino,transformers] [--rounds 3]
        [--llama_dir FOLDER] [--peer_python PYTHON] [--small]

The reference work: prompts of 64 random tokens, 128 new ones, greedy, end-of-text ignored, 2 threads; one
request, and 16 at once; and the first token of a prompt of 512. A peer that is not installed is said to be
absent. Each contestant has a process of its own and they take turns at each work; before every round the memory's
read bandwidth is measured, which bounds one request: all weights are read for each token.
`--dtype torch` compares the torch runner, which serves where the native one cannot.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import peer_llama
from bench.contestant import Absent, Contestant, Process, Result
from bench.measure import Figure, Noise, comparison, machine, ratio, read_bandwidth
from bench.reference_model import BYTES, WORK, decode_bytes, model_folder, prompts
from storage.pretrained import load_folder

NEW = 128


@dataclass(frozen=True)
class Column:
    """One figure of the table: of which work (requests, prompt tokens, new tokens), and what of its result."""

    title: str
    work: tuple[int, int, int]
    value: Callable[[Result], float]
    digits: int = 0
    less_is_better: bool = False


ONE, SIXTEEN, LONG = (1, 64, NEW), (16, 64, NEW), (1, 512, 1)
COLUMNS = (
    Column("1 request, tokens/s", ONE, lambda r: r.decode),
    Column("16 requests, tokens/s", SIXTEEN, lambda r: r.decode),
    Column("16, with prompts, tokens/s", SIXTEEN, lambda r: r.total),
    Column("first token, ms", ONE, lambda r: r.first * 1e3, 1, True),
    Column("of 512, ms", LONG, lambda r: r.first * 1e3, 0, True),
    Column("of 16 x 64, ms", SIXTEEN, lambda r: r.first * 1e3, 0, True),
    Column("peak RSS, MB", SIXTEEN, lambda r: r.peak_mb, 0, True),
)

# What is aimed at: at least so many times as fast as the peer, by the start of its name, in a column.
TARGETS: dict[str, dict[tuple[str, str], float]] = {
    "bf16": {
        ("llama.cpp", COLUMNS[0].title): 1.25,
        ("OpenVINO", COLUMNS[0].title): 1.25,
        ("llama.cpp", COLUMNS[1].title): 2.6,
        ("OpenVINO", COLUMNS[1].title): 1.6,
        ("transformers", COLUMNS[0].title): 4.0,
    },
    "int8": {
        ("llama.cpp", COLUMNS[0].title): 1.6,
        ("OpenVINO", COLUMNS[0].title): 1.6,
        ("llama.cpp", COLUMNS[1].title): 3.3,
        ("OpenVINO", COLUMNS[1].title): 1.6,
        ("transformers", COLUMNS[0].title): 4.0,
    },
    "torch": {("transformers", COLUMNS[0].title): 1.5, ("transformers", COLUMNS[1].title): 1.5},
}
for _dtype in ("bf16", "int8"):
    TARGETS[_dtype] |= {("OpenVINO", column.title): 1.0 for column in COLUMNS[3:6]}


class Lineup:
    """The contestants that can take part, ours first, and why the others cannot."""

    def __init__(self) -> None:
        self.present: list[Contestant] = []
        self.said: list[str] = []

    def add(self, name: str, make: Callable[[], Contestant], versions: str = "") -> None:
        """Start a contestant, or note why it is absent."""
        try:
            contestant = make()
        except Absent as e:
            self.said.append(f"absent: {name} ({e})")
            return
        self.present.append(contestant)
        self.said.append(f"{name}: {contestant.versions if isinstance(contestant, Process) else versions}")

    def close(self) -> None:
        """End all."""
        for contestant in self.present:
            contestant.close()


def ours(folder: Path, dtype: str, threads: int, *more: str, name: str | None = None) -> Contestant:
    """Start our engine."""
    command = [sys.executable, "-m", "bench.ours", str(folder), "--dtype", dtype, "--threads", str(threads), *more]
    return Process(name or f"ours {dtype}", command)


def transformers(folder: Path, dtype: str, args: argparse.Namespace, *more: str) -> Contestant:
    """Start transformers."""
    command = [args.peer_python, "-m", "bench.peer_transformers", str(folder), "--dtype", dtype]
    return Process(f"transformers {dtype}", [*command, "--threads", str(args.threads), *more])


def openvino(folder: Path, dtype: str, args: argparse.Namespace) -> Contestant:
    """Start OpenVINO."""
    command = [args.peer_python, "-m", "bench.peer_openvino", str(folder), "--dtype", dtype]
    work = str(folder.parent / "openvino")
    return Process(f"OpenVINO {dtype}", [*command, "--threads", str(args.threads), "--work", work])


def llama(folder: Path, dtype: str, args: argparse.Namespace) -> Contestant:
    """Prepare llama.cpp."""
    bench = peer_llama.program("llama-batched-bench", args.llama_dir)
    model = peer_llama.gguf_file(folder, folder.parent, dtype, args.peer_python)
    return peer_llama.Llama(f"llama.cpp {peer_llama.KINDS[dtype]}", bench, model, args.threads)


def lineup(folder: Path, args: argparse.Namespace) -> Lineup:
    """Start the contestants of one table."""
    found, peers, dtype = Lineup(), args.peers.split(","), args.dtype
    if dtype == "torch":
        for kind in ("fp32", "bf16"):
            name = f"ours {kind}, torch runner"
            found.add(name, partial(ours, folder, kind, args.threads, "--runner", "torch", name=name))
            if "transformers" in peers:
                found.add(f"transformers {kind}", partial(transformers, folder, kind, args))
        return found
    found.add(f"ours {dtype}", partial(ours, folder, dtype, args.threads))
    if "llama" in peers:
        try:
            versions = peer_llama.version(args.llama_dir)
        except Absent:
            versions = ""
        found.add(f"llama.cpp {peer_llama.KINDS[dtype]}", partial(llama, folder, dtype, args), versions)
    if "openvino" in peers:
        found.add(f"OpenVINO {dtype}", partial(openvino, folder, dtype, args))
    if "transformers" in peers:
        kind = "fp32" if dtype == "fp32" else "bf16"
        found.add(f"transformers {kind}", partial(transformers, folder, kind, args))
    return found


def measure(
    contestants: list[Contestant], columns: tuple[Column, ...], vocab_size: int, rounds: int, warm_up: int = 4
) -> tuple[dict[str, dict[str, Figure]], Figure, float]:
    """Return figures by column and contestant, the read bandwidth in GB/s, and the cores that others used.

    Before the first round every work is done once with at most `warm_up` new tokens.
    """
    works = list(dict.fromkeys(column.work for column in columns))
    figures = {column.title: {c.name: Figure() for c in contestants} for column in columns}
    bandwidth, noise = Figure(), Noise()
    for turn in range(-1, rounds):  # the first warms up
        for place, (count, length, new) in enumerate(works):
            ids = prompts(count, length, vocab_size, 100 * turn + place)
            if turn >= 0 and place == 0:
                bandwidth.samples.append(read_bandwidth())
            for c in contestants:
                result = c.run(ids, new if turn >= 0 else min(new, warm_up))
                for column in columns:
                    if turn >= 0 and column.work == (count, length, new):
                        figures[column.title][c.name].samples.append(column.value(result))
        if turn < 0:
            noise = Noise()
    return figures, bandwidth, noise.cores()


def report(
    figures: Mapping[str, Mapping[str, Figure]], columns: tuple[Column, ...], against: list[tuple[str, str]], dtype: str
) -> str:
    """Return the tables: all figures, and how many times as fast each of ours is as its peers, with the targets."""
    shown = {column.title: column.digits for column in columns}
    less = {column.title for column in columns if column.less_is_better}
    targets = {
        (peer, title): bound
        for _, peer in against
        for (start, title), bound in TARGETS.get(dtype, {}).items()
        if peer.startswith(start)
    }
    return comparison(figures, shown, less, against, targets)


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Return (ours, peer) for each peer: against the one of ours at its precision, or the only one."""
    mine = [name for name in names if name.startswith("ours")]
    precision = {name.split()[1].rstrip(","): name for name in mine}
    return [(precision.get(name.split()[1], mine[0]), name) for name in names if name not in mine]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bf16", "int8", "fp32", "torch"), default="bf16")
    parser.add_argument("--peers", default="llama,openvino,transformers", help="separated by commas; may be empty")
    parser.add_argument("--llama_dir", type=Path, help="folder of llama.cpp's programs; default: PATH")
    parser.add_argument("--peer_python", default=sys.executable, help="Python that has openvino, gguf, transformers")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the models, made at first use")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    args = parser.parse_args()
    folder = model_folder(args.work.resolve(), args.small)
    config = load_folder(folder)[0].config
    found = lineup(folder, args)
    print(f"{machine()}; {args.threads} threads\n" + "".join(f"- {line}\n" for line in found.said), flush=True)
    try:
        figures, bandwidth, others = measure(found.present, COLUMNS, config.vocab_size, args.rounds)
    finally:
        found.close()
    names = [c.name for c in found.present]
    print(report(figures, COLUMNS, pairs(names), args.dtype))
    if args.dtype in BYTES and names:
        limit = Figure([b * 1e9 / decode_bytes(config, args.dtype) for b in bandwidth.samples])
        share = ratio(figures[COLUMNS[0].title][names[0]], limit)
        print(f"Reading memory: {bandwidth.text(1)} GB/s, so at most {limit.text()} tokens/s for one request.")
        print(f"{names[0]} reaches {share} of that (aim 0.9).")
    print(f"({args.rounds} rounds; others used {others:.2f} cores meanwhile)\n", flush=True)


if __name__ == "__main__":
    main()
