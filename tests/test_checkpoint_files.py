"""Checkpoint files: which a run has, which are kept and brought back, and that a listing opens no weights."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from storage import checkpoint_files
from storage.checkpoint_files import bring_back, damage, entries, keep, listed, sha256_of
from storage.errors import NoSpace, NotFound, NotLoadable, StorageError
from storage.files import read_pieces, write_json
from storage.runs import Workspace


@pytest.fixture
def run(tmp_path):
    made = Workspace(tmp_path).run("a")
    made.folder.mkdir(parents=True)
    return made


@pytest.fixture(params=[True, False], ids=["links", "no-links"])
def links(request, monkeypatch):
    """Run a test also on a file system without hard links."""
    if not request.param:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))


def failing(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, "no")

    return fail


def save(run, iter_num: int, name: str = "ckpt.pt") -> None:
    """Put a checkpoint in place as save_checkpoint does, with text for weights."""
    path = run.folder / name
    new = run.folder / "new"
    new.write_text(f"weights of {iter_num}")
    entry = {"size": new.stat().st_size, "sha256": sha256_of(new), "iter_num": iter_num, "best_val_loss": 1.5}
    checkpoint_files.keep_previous(path)
    checkpoint_files.write_manifest(path, entry | {"model_args": {"n_layer": 1}})
    new.replace(path)


def files(run) -> dict[str, int | None]:
    return {file.name: file.iter_num for file in listed(str(run.folder))}


def test_a_kept_checkpoint_outlives_those_after_it(run, links):
    for step in (10, 20, 30, 40):
        save(run, step)
        if step in (10, 20):
            keep(run.checkpoint, step)
    save(run, 30, "best.pt")
    found = {"ckpt.pt": 40, "best.pt": 30, "ckpt.prev.pt": 30, "ckpt-20.pt": 20, "ckpt-10.pt": 10}
    assert files(run) == found and list(files(run)) == list(found)
    assert run.kept() == [run.folder / "ckpt-20.pt", run.folder / "ckpt-10.pt"]
    assert all(damage(run.folder / name) is None for name in found)
    assert (run.folder / "ckpt-10.pt").read_text() == "weights of 10"


def test_a_kept_checkpoint_is_brought_back_and_the_latest_becomes_the_one_before(run, links):
    for step in (10, 20, 30):
        save(run, step)
        if step == 10:
            keep(run.checkpoint, step)
    for _ in range(2):  # the second time it is there already
        bring_back(run.folder, 10)
        assert files(run) == {"ckpt.pt": 10, "ckpt.prev.pt": 30, "ckpt-10.pt": 10}
    assert run.checkpoint.read_text() == "weights of 10" and run.previous.read_text() == "weights of 30"
    assert all(damage(path) is None for path in (run.checkpoint, run.previous))
    save(run, 11)
    assert (
        files(run) == {"ckpt.pt": 11, "ckpt.prev.pt": 10, "ckpt-10.pt": 10}
        and damage(run.folder / "ckpt-10.pt") is None
    )


def test_what_is_not_kept_or_not_whole_is_not_brought_back(run):
    save(run, 10)
    keep(run.checkpoint, 10)
    save(run, 20)
    with pytest.raises(NotFound, match="no checkpoint of iteration 15 is kept; kept are those of: 10"):
        bring_back(run.folder, 15)
    kept = run.folder / "ckpt-10.pt"
    kept.unlink()
    kept.write_text("weights of 1O")
    with pytest.raises(NotLoadable, match=r"ckpt-10\.pt is damaged"):
        bring_back(run.folder, 10)
    run.manifest(kept).unlink()
    with pytest.raises(NotLoadable):
        bring_back(run.folder, 10)
    kept.unlink()
    kept.symlink_to("/etc/passwd")
    with pytest.raises(NotFound):
        bring_back(run.folder, 10)
    assert files(run) == {"ckpt.pt": 20, "ckpt.prev.pt": 10}, "nothing was changed"


@pytest.mark.parametrize("name", ["ckpt-10.pt", "ckpt.pt"])
def test_of_files_that_a_disk_cannot_read_a_kept_one_is_refused_and_the_latest_is_replaced(run, name, monkeypatch):
    save(run, 10)
    keep(run.checkpoint, 10)
    save(run, 20)
    digest, bad = hashlib.file_digest, (run.folder / name).stat().st_ino

    def read(f, kind):
        return failing(errno.EIO)() if os.fstat(f.fileno()).st_ino == bad else digest(f, kind)

    monkeypatch.setattr(hashlib, "file_digest", read)
    assert damage(run.folder / name) == f"{name} cannot be read: Input/output error"
    if name == "ckpt.pt":
        bring_back(run.folder, 10)
        assert files(run) == {"ckpt.pt": 10, "ckpt.prev.pt": 20, "ckpt-10.pt": 10}
    else:
        with pytest.raises(NotLoadable, match=r"ckpt-10\.pt cannot be read: Input/output error"):
            bring_back(run.folder, 10)


def test_a_kept_file_that_a_crash_left_behind_its_manifest_is_brought_back_by_what_it_is(run):
    save(run, 10)
    keep(run.checkpoint, 10)
    manifest = run.manifest(run.folder / "ckpt-10.pt")
    before = json.loads(manifest.read_text())
    write_json(manifest, before | {"sha256": "0" * 64, "earlier": [before]})
    save(run, 20)
    bring_back(run.folder, 10)
    assert damage(run.checkpoint) is None and entries(run.checkpoint)[0]["sha256"] == before["sha256"]


def test_a_disk_that_fails_while_one_is_kept_leaves_the_latest(run, monkeypatch):
    save(run, 10)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(StorageError):
            keep(run.checkpoint, 10)
    assert files(run) == {"ckpt.pt": 10} and damage(run.checkpoint) is None


@pytest.mark.parametrize(("number", "error", "words"), [
    (errno.EIO, NotLoadable, r"ckpt\.pt cannot be read: Input/output error"),
    (errno.ENOSPC, NoSpace, r"ckpt-10\.pt could not be written"),
])  # fmt: skip
def test_a_copy_says_whether_reading_or_writing_failed(run, monkeypatch, number, error, words):
    save(run, 10)
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    if number == errno.EIO:
        monkeypatch.setattr(checkpoint_files, "read_pieces", lambda path: read_pieces(Path("/proc/self/mem")))
        words = words.replace(r"ckpt\.pt", "mem")
    else:
        monkeypatch.setattr(os, "fsync", failing(number))
        monkeypatch.setattr(checkpoint_files, "write_manifest", lambda *args: None)
    with pytest.raises(error, match=words):
        keep(run.checkpoint, 10)
    assert files(run) == {"ckpt.pt": 10} and damage(run.checkpoint) is None


@pytest.mark.parametrize("name", ["ckpt-.pt", "ckpt-01.pt", "ckpt--1.pt", "ckpt-1.pt.json", "ckpt-123456789012.pt"])
def test_other_names_are_no_kept_checkpoints(run, name):
    (run.folder / name).write_text("x")
    assert run.kept() == [] and files(run) == {}


def test_each_checkpoint_is_called_damaged_by_its_size(run):
    save(run, 10)
    keep(run.checkpoint, 10)
    save(run, 200, "best.pt")
    save(run, 20)
    for path in (run.best, run.folder / "ckpt-10.pt"):
        path.write_text("short")
    found = {file.name: file.damaged for file in listed(str(run.folder))}
    assert found.pop("best.pt") == "best.pt has 5 bytes, and 14 were written"
    assert found.pop("ckpt-10.pt") == "ckpt-10.pt has 5 bytes, and 13 were written"
    assert found["ckpt.pt"] is None
