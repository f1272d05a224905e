"""transformers' `generate` with its KV cache as a contestant: `python -m bench.peer_transformers FOLDER --dtype bf16`.

Several requests are one static batch, which is its best case. Needs torch and transformers, nothing of ours.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from bench.contestant import serve


def prepare(args: argparse.Namespace) -> tuple[str, Callable[[list[list[int]], int], float]]:
    """Load the model; return versions and the work."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = transformers.GPT2LMHeadModel.from_pretrained(args.folder, dtype=kind).to(args.device).eval()
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    class Clock(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc, name-defined]
        """Note when the first new token comes; the prompt is put before it."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _value: object) -> None:
            if len(self.times) < 2:
                wait()
                self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def work(prompts: list[list[int]], new: int) -> float:
        ids, clock = torch.tensor(prompts, device=args.device), Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=clock,
            )
        wait()
        return clock.times[1] - start

    return f"transformers {transformers.__version__}, torch {torch.__version__}", work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    serve(lambda: prepare(args))


if __name__ == "__main__":
    main()
