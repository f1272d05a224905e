"""The remembered listing: a run that has not changed is not read again, and one that has changed always is."""

import json
import os
import time
from pathlib import Path

import pytest

from storage.listing import RunListing
from storage.runs import Run, Workspace

ENTRY = {"size": 3, "sha256": "0" * 64, "iter_num": 20, "best_val_loss": 1.5}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "out").mkdir()
    return Workspace(tmp_path)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Let files have settled at once, and return the names of those that are opened from here on."""
    monkeypatch.setattr("storage.listing.SETTLED", -time.time_ns())
    names, original = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, *a, **k: names.append(os.path.basename(path)) or original(path, *a, **k)
    )
    return names


def write(run: Run, **files: bytes | dict) -> Run:
    run.folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (run.folder / name.replace("__", ".").replace("_N_", "-")).write_bytes(data)
    return run


def a_run(workspace: Workspace, name: str = "a") -> Run:
    config = {"dataset": "d", "keep_every": 1}
    kept = {"ckpt_N_10__pt": b"xyz", "ckpt_N_10__pt__json": ENTRY | {"iter_num": 10}}
    best = {"best__pt": b"xyz", "best__pt__json": ENTRY, "ckpt__prev__pt": b"xyz"}
    return write(workspace.run(name), ckpt__pt=b"xyz", ckpt__pt__json=ENTRY, train_config__json=config, **best, **kept)


def described(listing: RunListing, workspace: Workspace) -> list[dict]:
    """Return what the listing says, having checked that it is what the files say."""
    found = listing.trained_models()
    assert found == workspace.trained_models()
    return found


def test_a_run_that_has_not_changed_is_not_opened_again(workspace, opened):
    listing = RunListing(workspace)
    for name in ("a", "b"):
        a_run(workspace, name)
    write(workspace.run("exported"), model__safetensors=b"xyz", config__json={"n_layer": 2})
    write(workspace.run("empty"), train_config__json={})
    first = listing.trained_models()
    opened.clear()
    assert listing.trained_models() == first and [run["name"] for run in first] == ["a", "b", "exported"]
    assert opened == []


CHANGES = {
    "a new checkpoint": lambda run: write(run, ckpt__pt=b"wxyz", ckpt__pt__json=ENTRY | {"size": 4, "iter_num": 30}),
    "one cut short": lambda run: write(run, ckpt__pt=b"x"),
    "one cut short that is kept": lambda run: write(run, ckpt_N_10__pt=b"x"),
    "one more that is kept": lambda run: write(run, ckpt_N_30__pt=b"xyz", ckpt_N_30__pt__json=ENTRY | {"iter_num": 30}),
    "one that is kept no more": lambda run: (run.folder / "ckpt-10.pt").unlink(),
    "the manifest of one that is kept": lambda run: write(run, ckpt_N_10__pt__json=ENTRY | {"iter_num": 11}),
    "another config": lambda run: write(run, train_config__json={"dataset": "e", "keep_every": 1}),
    "a broken config": lambda run: write(run, train_config__json=b"{"),
    "no best": lambda run: run.best.unlink(),
    "no one before": lambda run: run.previous.unlink(),
    "a link in place of one": lambda run: (run.checkpoint.unlink(), run.checkpoint.symlink_to("/etc/passwd")),
    "a config of the same size and time": lambda run: same_size_and_time(run.config, b'"d"', b'"e"'),
}


def same_size_and_time(path: Path, old: bytes, new: bytes) -> None:
    """Change a file in place, and set its time back to what it was."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_whose_files_change_is_read_again_and_the_others_are_not(workspace, opened, change):
    listing = RunListing(workspace)
    run, _ = a_run(workspace), a_run(workspace, "b")
    before = described(listing, workspace)
    time.sleep(0.02)  # more than a tick of the file system's clock
    change(run)
    opened.clear()
    assert listing.trained_models() != before
    assert len(opened) <= 5, "those of one run"
    described(listing, workspace)


def test_runs_that_come_go_or_lose_their_weights_are_seen(workspace, opened):
    listing = RunListing(workspace)
    assert described(listing, workspace) == []
    run = write(workspace.run("a"), train_config__json={})
    assert described(listing, workspace) == []
    write(run, model__safetensors=b"xyz", config__json={"n_layer": 2})
    assert described(listing, workspace)[0]["config"] == {"n_layer": 2}
    write(run, config__json={"n_layer": 3})
    assert described(listing, workspace)[0]["config"] == {"n_layer": 3}
    write(run, ckpt__pt=b"xyz", ckpt__pt__json=ENTRY)
    assert described(listing, workspace)[0]["path"] == "out/a/ckpt.pt"
    run.folder.rename(workspace.out / "b")
    assert [found["name"] for found in described(listing, workspace)] == ["b"]


def test_thousands_of_runs_are_taken_into_memory_by_and_by(workspace, opened, monkeypatch):
    monkeypatch.setattr("storage.listing.AT_ONCE", 2)
    listing, read = RunListing(workspace), []
    for name in "abcde":
        a_run(workspace, name)
    for _ in range(4):
        opened.clear()
        assert len(listing.trained_models()) == 5
        read.append(opened.count("best.pt.json"))
    assert read == [5, 3, 1, 0]


def test_what_changed_a_moment_ago_is_read_again(workspace, opened, monkeypatch):
    monkeypatch.setattr("storage.listing.SETTLED", 3600 * 10**9)
    listing = RunListing(workspace)
    a_run(workspace)
    for _ in range(2):
        opened.clear()
        listing.trained_models()
        assert "ckpt.pt.json" in opened
