"""What the tests with other people's clients share: a real server process on a folder with tiny models.

`random` is a model with random weights that never ends a text, so that a snippet's program always has something to
print; `zero` one whose weights are all zero: to it every token is equally likely, so that every score is known
beforehand. Both have a byte for a token.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from clients import BYTES
from live_server import Process
from openai_shapes import checked

if TYPE_CHECKING:
    from model import GPT

NPM_OPENAI = "openai@6"


def never_ends(model: "GPT") -> None:
    """Give the end of text, the last token, a logit 20 below the others': one channel says so whatever was read."""
    import torch

    norm, embedding = model.transformer.ln_f, model.transformer.wte.weight
    with torch.no_grad():
        norm.weight[0], norm.bias[0] = 0, 1
        embedding[:, 0] = 0
        embedding[-1, 0] = -20


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Return a project folder with the two models; `random` is there in the bundled one's place, too."""
    import torch

    from model import GPT, GPTConfig
    from storage import pretrained
    from storage.tokenizer import train_bpe

    folder, tokenizer = tmp_path_factory.mktemp("project"), train_bpe(["no merges"], BYTES)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=512, vocab_size=BYTES))
    never_ends(model)
    for name in ("tiny-shakespeare", "random"):
        pretrained.export(model, tokenizer, folder / "models" / name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    pretrained.export(model, tokenizer, folder / "models" / "zero")
    return folder


@pytest.fixture(scope="session")
def server(models) -> Iterator[Process]:
    """Serve them."""
    process = Process(models, "--threads", "1", "--drain", "2", "--dtype", "fp32", "--training_priority", "normal")
    yield process
    process.end()


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory) -> Path | None:
    """Return a folder of npm with the openai package, installed now, or None where that cannot be."""
    if shutil.which("npm") is None:
        return None
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", NPM_OPENAI]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120)
    return folder / "node_modules" if done.returncode == 0 else None


@pytest.fixture
def client(served):
    """Return a client of openai's whose replies are checked, for a test file's own `served`."""
    with checked(f"http://127.0.0.1:{served.server.port}", timeout=10) as made:
        yield made
