"""The memory of fine-tuning: the whole of train.py on GPT-2 124M, all weights and adapters alone, in turn.

    .venv/bin/python -m bench.bench_tuning_memory [--rank 8] [--work DIR] [--small]

Peak RSS of the process from its start to its last checkpoint, as the system counts it: loading the model, three
iterations on 4 windows of 256 random tokens in the precision that `auto` means, an evaluation, a save.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.measure import machine
from bench.reference_model import FIRST_CHARACTER, WORK, model_folder

ROOT = Path(__file__).resolve().parent.parent
AIM = 0.5  # of the memory that all weights take
RUN = {"dataset": "text", "model_type": "gpt2", "max_iters": 3, "eval_interval": 3, "eval_iters": 1, "sample_tokens": 0}


def peak_bytes(command: Sequence[str]) -> int:
    """Return the most memory that a command had resident. Raises RuntimeError if it failed."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')[-2000:]}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    args = parser.parse_args()
    folder = model_folder(args.work, args.small)
    with tempfile.TemporaryDirectory() as home:
        text = Path(home) / "data" / "text" / "text.txt"
        text.parent.mkdir(parents=True)
        draw = random.Random(0)
        text.write_text("".join(chr(FIRST_CHARACTER + draw.randrange(500)) for _ in range(50_000)))
        flags = [part for name, value in RUN.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "train.py", "--root", home, "--pretrained_dir", str(folder.parent.resolve()), *flags]
        peaks, sizes = [], []
        for name, more in (("all", []), ("adapters", ["--lora_rank", str(args.rank)])):
            peaks.append(peak_bytes([*command, "--output_dir", f"out/{name}", *more]) / 1e6)
            sizes.append((Path(home) / "out" / name / "ckpt.pt").stat().st_size / 1e6)
    ratio = peaks[1] / peaks[0]
    print(f"{machine()}\n\n| | peak RSS, MB | checkpoint, MB |\n|---|---|---|")
    print(f"| all weights | {peaks[0]:.0f} | {sizes[0]:.0f} |")
    print(f"| adapters of rank {args.rank} | {peaks[1]:.0f} | {sizes[1]:.0f} |\n")
    print(f"adapters take {ratio:.2f} of the memory; aim {AIM}: {'holds' if ratio <= AIM else 'does not hold'}")


if __name__ == "__main__":
    main()
