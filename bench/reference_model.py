"""The reference work: GPT-2 124M with random weights as a Hugging Face folder, and prompts of random tokens.

Every contestant reads this one folder. Its tokenizer has a made-up character for each id, so that servers can
put the tokens into words without GPT-2's vocabulary, which not every machine has.
"""

import random
from pathlib import Path

import torch

from inference.native.packing import KINDS, screen_bytes
from model import GPT, GPTConfig
from storage.pretrained import export
from storage.vocabularies import CharTokenizer

WORK = Path(__file__).parent / "build"  # git ignores it
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 512}
FIRST_CHARACTER = 0x20000  # a range without surrogates and white space


BYTES = {"fp32": 4, "bf16": 1.5, "int8": 1}  # of a weight as the native step keeps it


def random_model(small: bool = False) -> GPT:
    """Return GPT-2 124M, or a small model, with the same random weights each time."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**(SMALL if small else {}), activation="gelu_new")).eval()  # type: ignore[arg-type]


def model_folder(work: Path, small: bool = False) -> Path:
    """Return the folder of the model, written now if need be: `gpt2`, or a small one to try a benchmark itself."""
    folder = work / ("small" if small else "full") / "gpt2"
    if not (folder / "config.json").exists():
        model = random_model(small)
        characters = {chr(FIRST_CHARACTER + i): i for i in range(model.config.vocab_size)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(model, CharTokenizer(characters), folder)
    return folder


def decode_bytes(config: GPTConfig, dtype: str) -> float:
    """Return the bytes of weights that a greedy decode step reads: of all but the position table."""
    with torch.device("meta"):
        weights = GPT(config).num_params(embeddings=False)
    head = screen_bytes(config, KINDS[dtype][0])  # of weights that are read in 8 bits, all but a few
    return (weights - config.vocab_size * config.n_embd) * BYTES[dtype] + head if head else weights * BYTES[dtype]


def prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return `count` prompts of random tokens; no two runs share one, so that no prefix cache helps."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
