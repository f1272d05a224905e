"""Our engine as a contestant: `python -m bench.ours FOLDER --dtype bf16 [--runner torch] [--device cpu]`.

Requests go through the engine as the server sends them, without HTTP. Lines of JSON in and out, as
bench/contestant.py says.
"""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.contestant import serve
from inference.build import RunnerOptions, build_runner
from inference.decode_graphs import recorder
from inference.engine import Engine
from inference.sequence import SamplingParams
from inference.torch_runner import TorchRunner
from model import GPT
from storage.checkpoints import open_model
from storage.pretrained import StoredModel
from storage.registry import ModelReference
from storage.runs import Workspace


def torch_runner(model: GPT | StoredModel, options: RunnerOptions) -> tuple[Any, str]:
    """Build the torch runner also where the native one would serve."""
    dtype = "fp32" if options.dtype == "auto" else options.dtype
    device = "cpu" if options.device == "auto" else options.device
    whole = model if isinstance(model, GPT) else model.load()
    return TorchRunner(whole, options.slots, device, dtype, recorder(device)), "asked for by the benchmark"


def prepare(args: argparse.Namespace) -> tuple[str, Callable[[list[list[int]], int], float]]:
    """Load the model into an engine; return versions and the work."""
    torch.set_num_threads(args.threads)
    engine = Engine(
        Workspace(args.folder.parent),
        device=args.device,
        dtype=args.dtype,
        slots=args.slots,
        threads=args.threads,
        prefill_tokens=args.prefill_tokens,
        speculation=False,  # random weights write in loops: drafts would be right far more often than in real text
        loader=open_model,
        build=torch_runner if args.runner == "torch" else build_runner,
    )
    served = engine.load(ModelReference("random", "folder", args.folder, "random"))

    def work(prompts: list[list[int]], new: int) -> float:
        params = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        handles = [engine.submit(served, ids, params) for ids in prompts]
        counts = [sum(1 for _ in handle) for handle in handles]
        if counts != [new] * len(prompts):
            raise RuntimeError(f"{counts} tokens came where {new} each were asked for")
        return max(engine.request(handle.id)["first_token_seconds"] for handle in handles)  # type: ignore[index]

    return (
        f"{served.runner} runner, {served.dtype}, Python {platform.python_version()}, torch {torch.__version__}",
        work,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--runner", choices=("auto", "torch"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prefill_tokens", type=int, default=2048)
    args = parser.parse_args()
    serve(lambda: prepare(args))


if __name__ == "__main__":
    main()
