"""Make the bundled model again: train it, export it in half precision, and measure it on all of the validation text.

    python data/shakespeare/prepare.py            (once: gets the text; 10 % at its end is for validation)
    python models/tiny-shakespeare/make.py        (about an hour on two cores)
    python models/tiny-shakespeare/make.py --measure_only

The settings are the recipe. The loss is in nats per character, so that it compares with models of other
tokenizers: the sum over all tokens of the validation text in windows of the whole context that do not
overlap (as nanoGPT evaluates), divided by the number of its characters.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from storage import pretrained  # noqa: E402
from storage.checkpoints import load_model  # noqa: E402
from storage.datasets import dataset  # noqa: E402
from storage.registry import resolve  # noqa: E402
from storage.runs import Workspace  # noqa: E402

NAME = "tiny-shakespeare"
RECIPE = {
    "dataset": "shakespeare",
    "output_dir": f"out/{NAME}",
    "model_type": "mini",
    "tokenizer": "bpe:1024",
    "n_layer": 6,
    "n_head": 3,
    "n_embd": 192,
    "block_size": 256,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "dropout": 0.2,
    "weight_decay": 0.1,
    "max_iters": 3200,
    "warmup_iters": 60,
    "eval_interval": 200,
    "eval_iters": 12,
    "seed": 1337,
}


def train() -> None:
    """Run train.py with the recipe."""
    options = [word for name, value in RECIPE.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "train.py", *options], cwd=ROOT, check=True)


def export(workspace: Workspace) -> None:
    """Write the checkpoint with the best validation loss into this folder."""
    loaded = load_model(resolve(workspace, model_path=f"out/{NAME}/best.pt"), workspace)
    folder = workspace.models / NAME
    written = workspace.out / f"{NAME}-export"
    pretrained.export(loaded.model, loaded.tokenizer, written, torch.float16)
    for path in written.iterdir():  # beside this file and the README
        path.replace(folder / path.name)
    written.rmdir()


@torch.inference_mode()
def measure(workspace: Workspace) -> tuple[float, int]:
    """Return the validation loss in nats per character, and the number of characters."""
    loaded = load_model(resolve(workspace, model_type=NAME), workspace)
    text = dataset(workspace, "shakespeare").training_text()
    val = text[int(len(text) * 0.9) :]
    ids = torch.tensor(loaded.tokenizer.encode(val))
    size, total = loaded.model.config.block_size, 0.0
    for start in range(0, len(ids) - 1, size):
        window = ids[start : start + size + 1]
        total += loaded.model(window[None, :-1], window[None, 1:])[1].item() * (len(window) - 1)
    return total / len(val), len(val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure_only", action="store_true", help="only measure the model that is there")
    parser.add_argument("--export_only", action="store_true", help="export and measure the run that is there")
    args = parser.parse_args()
    workspace = Workspace(ROOT)
    if not (args.measure_only or args.export_only):
        train()
    if not args.measure_only:
        export(workspace)
    loss, characters = measure(workspace)
    print(f"validation loss {loss:.4f} nats per character, on {characters} characters")


if __name__ == "__main__":
    main()
