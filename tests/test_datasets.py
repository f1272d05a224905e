"""Datasets: text of any kind becomes the right tokens once, and what cannot be trained on is refused with a reason."""

from pathlib import Path

import numpy as np
import pytest

from storage.datasets import dataset
from storage.runs import Workspace
from storage.tokenizer_choice import tokenizer_for


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "data").mkdir()
    return Workspace(tmp_path)


def make(workspace: Workspace, name: str, **files: str | bytes):
    """Make data/<name>/ with these files (text_txt becomes text.txt) and return the dataset."""
    folder = workspace.data / name
    folder.mkdir()
    for file, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / ".".join(file.rsplit("_", 1))).write_bytes(data)
    return dataset(workspace, name)


def test_a_single_text_is_split_as_nanogpt_splits_it(workspace, shared):
    text = (shared / "data/tinyshakespeare/input.txt").read_bytes()
    source = make(workspace, "sh", input_txt=text)
    splits = source.prepare(tokenizer_for("char", source, workspace))
    theirs = np.fromfile(shared / "data/nanogpt/prepared_shakespeare_char/train.bin", dtype="<u2")
    assert (len(splits.train), len(splits.val)) == (1003854, 111540)
    assert np.array_equal(splits.train, theirs)
