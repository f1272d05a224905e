"""Our engine as a contestant: `python -m bench.ours FOLDER --dtype bf16 [--runner torch] [--device cpu]`.

Requests go through the engine as the server sends them, without HTTP. Lines of JSON in and out, as
bench/contestant.py says.
"""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.contestant import serve
from inference.backend import ServedModel
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

if TYPE_CHECKING:
    from inference.loading import Builder


def torch_runner(model: GPT | StoredModel, options: RunnerOptions) -> tuple[Any, str]:
    """Build the torch runner also where the native one would serve."""
    dtype = "fp32" if options.dtype == "auto" else options.dtype
    device = "cpu" if options.device == "auto" else options.device
    whole = model if isinstance(model, GPT) else model.load()
    return TorchRunner(whole, options.slots, device, dtype, recorder(device)), "asked for by the benchmark"


def engine_of(
    folder: Path,
    dtype: str,
    threads: int,
    *,
    device: str = "cpu",
    slots: int = 16,
    prefill_tokens: int = 2048,
    build: "Builder" = build_runner,
) -> tuple[Engine, ServedModel]:
    """Return an engine without speculation that has loaded the folder's model, and the model as it serves.

    Random weights write in loops: drafts would be right far more often than in real text.
    """
    torch.set_num_threads(threads)
    engine = Engine(
        Workspace(folder.parent),
        device=device,
        dtype=dtype,
        slots=slots,
        threads=threads,
        prefill_tokens=prefill_tokens,
        speculation=False,
        loader=open_model,
        build=build,
    )
    return engine, engine.load(ModelReference("random", "folder", folder, "random"))


def prepare(args: argparse.Namespace) -> tuple[str, Callable[[list[list[int]], int], float]]:
    """Load the model into an engine; return versions and the work."""
    engine, served = engine_of(
        args.folder,
        args.dtype,
        args.threads,
        device=args.device,
        slots=args.slots,
        prefill_tokens=args.prefill_tokens,
        build=torch_runner if args.runner == "torch" else build_runner,
    )

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
