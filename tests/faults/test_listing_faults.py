"""An out/ with thousands of runs, some of them broken: all are listed at once, and no weights are opened."""

import json
import os
import time

import pytest
from fakes import FakeServer, byte_tokenizer

BROKEN = {
    "ckpt.pt": [b"", b"cut"],
    "ckpt.pt.json": [b"", b"{", b"[]", b'{"size": NaN}'],
    "train_config.json": [b"{", b"\xff", b"null"],
}


def make_run(folder, number: int) -> None:
    """Make a run as a trainer leaves it; every tenth has something broken in it."""
    folder.mkdir(parents=True)
    entry = {"size": 7, "sha256": "0" * 64, "iter_num": number, "best_val_loss": 1.5, "parameters": 10, "written": 1.0}
    config = {"dataset": "d", "output_dir": f"out/{folder.name}"} | {f"field{i}": i for i in range(30)}
    for name in ("ckpt.pt", "ckpt.prev.pt", "best.pt"):
        (folder / name).write_bytes(b"weights")
    for name in ("ckpt.pt.json", "best.pt.json"):
        (folder / name).write_text(json.dumps(entry | {"config": config, "earlier": [entry] * 4}, indent=2))
    (folder / "train_config.json").write_text(json.dumps(config, indent=2))
    if number % 10 == 0:
        name = list(BROKEN)[number // 10 % 3]
        (folder / name).write_bytes(BROKEN[name][number // 30 % len(BROKEN[name])])


@pytest.mark.fault("F25", "thousands of runs in out/, every tenth broken")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("runs", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_runs_are_listed_with_what_is_damaged_and_no_weights_are_opened(tmp_path, monkeypatch, runs, record_property):
    for i in range(runs):
        make_run(tmp_path / "out" / f"r{i:04}", i)
    server, opened, original = FakeServer(tmp_path, byte_tokenizer()), [], os.open
    seconds = []
    for _ in range(3):  # the first one reads what the others find in memory
        began = time.monotonic()
        reply = server.get("/api/models")
        seconds.append(time.monotonic() - began)
    found = reply.json["trained_models"]
    with monkeypatch.context() as watched:
        watched.setattr(os, "open", lambda path, *a, **k: opened.append(str(path)) or original(path, *a, **k))
        assert server.get("/api/models").status_code == 200
    assert len(found) == runs and len(opened) <= 3 * runs and not any(path.endswith(".pt") for path in opened)
    damaged = [run["name"] for run in found if run["damaged"]]
    assert damaged == [f"r{i:04}" for i in range(0, runs, 10)]
    assert all(len(run["checkpoints"]) == 3 for run in found)
    found = f"{runs} runs listed in {min(seconds):.2f} s, {len(damaged)} called damaged, no weights opened"
    record_property("found", found)
