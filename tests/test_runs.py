"""Runs: where their files are, what a listing says of them, and that a listing opens no weights."""

import json
import os
import time

import pytest

from storage.errors import BadName, NotFound
from storage.runs import Workspace


@pytest.fixture
def workspace(tmp_path):
    (tmp_path / "out").mkdir()
    return Workspace(tmp_path)


def write(run, **files):
    """Write files of a run; "_" in a keyword stands for "." and dictionaries become JSON."""
    run.folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (run.folder / name.replace("__", ".")).write_bytes(data)
    return run


ENTRY = {"size": 3, "sha256": "0" * 64, "iter_num": 20, "best_val_loss": 1.5, "model_args": {"n_layer": 1}}


def test_a_run_knows_its_paths(workspace):
    run = workspace.run("a")
    assert run.relative == "out/a" and run.folder == workspace.out / "a" and not run.exists()
    assert run.manifest(run.checkpoint) == run.folder / "ckpt.pt.json"
    assert run.manifest(run.best) == run.folder / "best.pt.json"


@pytest.mark.parametrize("value", ["out/my_model", "my_model"])
def test_an_output_dir_has_two_spellings(workspace, value):
    assert workspace.run_from_output_dir(value).name == "my_model"


@pytest.mark.parametrize(
    "value",
    ["", "out", "out/", "out/a/", "out/a/b", "/out/a", "out/../a", "../out/a", "data/a", "out/out/a", "./out/a", 3,
     None, ["out/a"], "out/\ud800", "out/a\n", "out//a"],
    ids=ascii,
)  # fmt: skip
def test_any_other_output_dir_is_refused(workspace, value):
    with pytest.raises(BadName, match=r"^output_dir is .*; it must be out/<name>"):
        workspace.run_from_output_dir(value)


def test_runs_are_listed_by_name_without_links_files_and_odd_names(workspace):
    for name in ("b", "a", ".tmp", "a b"):
        (workspace.out / name).mkdir()
    (workspace.out / "file").write_bytes(b"")
    (workspace.out / "link").symlink_to("/etc")
    assert [run.name for run in workspace.runs()] == ["a", "b"]


def test_a_workspace_without_out_has_no_runs(tmp_path):
    assert Workspace(tmp_path).runs() == []


def test_a_run_exists_as_a_folder_and_not_as_a_link(workspace):
    (workspace.out / "link").symlink_to("/etc")
    (workspace.out / "a").mkdir()
    assert workspace.run("a").exists() and not workspace.run("link").exists()


# ---- describing


def test_a_run_is_described_from_manifest_and_config(workspace):
    run = write(workspace.run("a"), ckpt__pt=b"xyz", ckpt__pt__json=ENTRY, train_config__json={"dataset": "d"})
    described = run.describe()
    assert {key: described[key] for key in ("name", "path", "config", "iter_num", "best_val_loss", "damaged")} == {
        "name": "a", "path": "out/a/ckpt.pt", "config": {"dataset": "d"}, "iter_num": 20, "best_val_loss": 1.5,
        "damaged": None,
    }  # fmt: skip
    assert described["size_bytes"] == 3 and abs(described["modified"] - time.time()) < 60


def test_without_a_config_the_model_args_are_shown(workspace):
    run = write(workspace.run("a"), ckpt__pt=b"xyz", ckpt__pt__json=ENTRY)
    assert run.describe()["config"] == {"n_layer": 1}


def test_a_foreign_checkpoint_without_manifest_is_listed(workspace):
    described = write(workspace.run("a"), ckpt__pt=b"xyz").describe()
    assert described["path"] == "out/a/ckpt.pt" and described["config"] == {} and described["damaged"] is None
    assert described["iter_num"] is None


@pytest.mark.parametrize("name", ["best.pt", "ckpt.prev.pt", "model.safetensors", "model.safetensors.index.json"])
def test_a_run_with_other_weights_only_is_described_by_them(workspace, name):
    run = write(workspace.run("a"))
    (run.folder / name).write_bytes(b"xyz")
    assert run.describe()["path"] == f"out/a/{name}"


def test_an_exported_folder_shows_its_own_config(workspace):
    run = write(workspace.run("a"), model__safetensors=b"xyz", config__json={"n_layer": 2}, train_config__json={"x": 1})
    assert run.describe()["config"] == {"n_layer": 2}


def test_a_run_without_weights_is_not_among_the_models(workspace):
    run = write(workspace.run("a"), train_config__json={})
    with pytest.raises(NotFound, match="out/a has no checkpoint"):
        run.describe()
    assert workspace.trained_models() == []


def test_a_truncated_checkpoint_is_called_damaged(workspace):
    run = write(workspace.run("a"), ckpt__pt=b"x", ckpt__pt__json=ENTRY)
    assert run.describe()["damaged"] == "ckpt.pt has 1 bytes, and 3 were written"


def test_the_file_in_place_may_still_be_the_one_before(workspace):
    manifest = {**ENTRY, "size": 5, "iter_num": 30, "earlier": [{**ENTRY, "iter_num": 20}]}
    described = write(workspace.run("a"), ckpt__pt=b"xyz", ckpt__pt__json=manifest).describe()
    assert described["damaged"] is None and described["iter_num"] == 20


@pytest.mark.parametrize("name", ["train_config.json", "ckpt.pt.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b'{"a": NaN}', b"[" * 10**5], ids=lambda b: ascii(b[:9])
)
def test_broken_json_is_called_damaged_by_name(workspace, name, content):
    run = write(workspace.run("a"), ckpt__pt=b"xyz")
    (run.folder / name).write_bytes(content)
    assert run.describe()["damaged"].startswith(name)


@pytest.mark.parametrize("name", ["train_config.json", "ckpt.pt.json"])
def test_links_pipes_and_folders_in_place_of_json_are_called_damaged(workspace, name):
    run = write(workspace.run("a"), ckpt__pt=b"xyz")
    path = run.folder / name
    for make in (lambda: path.symlink_to("/etc/passwd"), lambda: os.mkfifo(path), path.mkdir):
        make()
        assert name in run.describe()["damaged"]
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_manifest_of_odd_shape_breaks_nothing(workspace):
    for manifest in (
        {"size": "3"},
        {"size": 3, "earlier": 7},
        {"size": 1, "earlier": [None, 3, {}, []]},
        {"iter_num": []},
    ):
        run = write(workspace.run("a"), ckpt__pt=b"xyz", ckpt__pt__json=manifest)
        json.dumps(run.describe())


def test_a_checkpoint_that_is_a_link_is_no_checkpoint(workspace):
    run = write(workspace.run("a"))
    run.checkpoint.symlink_to("/etc/passwd")
    assert workspace.trained_models() == []


@pytest.mark.fault("F25", "500 runs, every open recorded")
def test_listing_opens_no_weights_and_is_fast(workspace, monkeypatch):
    best = {"best__pt": b"xyz", "best__pt__json": ENTRY, "ckpt__prev__pt": b"xyz"}
    for i in range(500):
        run = workspace.run(f"r{i}")
        write(run, ckpt__pt=b"xyz", ckpt__pt__json=ENTRY, train_config__json={"dataset": "d"}, **best)
    opened, original = [], os.open
    monkeypatch.setattr(os, "listdir", pytest.fail)  # takes as long as all the rest
    monkeypatch.setattr(
        os, "open", lambda path, *args, **kwargs: opened.append(str(path)) or original(path, *args, **kwargs)
    )
    started = time.process_time()
    assert len(workspace.trained_models()) == 500
    assert time.process_time() - started < 0.5  # ten times what it takes
    assert len(opened) == 1500 and not any(path.endswith(".pt") for path in opened)


def test_every_checkpoint_of_a_run_is_described(workspace):
    files = dict.fromkeys(("ckpt__pt", "best__pt", "ckpt__prev__pt", "ckpt-10__pt", "ckpt-2000__pt"), b"xyz")
    manifests = {f"{name}__json": ENTRY for name in ("ckpt__pt", "best__pt", "ckpt-10__pt", "ckpt-2000__pt")}
    run = write(workspace.run("a"), **files, **manifests, train_config__json={"dataset": "d", "keep_every": 1})
    (run.folder / "ckpt-10.pt").write_bytes(b"x")
    (run.folder / "ckpt-3.pt").symlink_to("/etc/passwd")
    found = run.describe()["checkpoints"]
    names = ["ckpt.pt", "best.pt", "ckpt.prev.pt", "ckpt-2000.pt", "ckpt-10.pt"]
    assert [file["path"] for file in found] == [f"out/a/{name}" for name in names]
    assert found[0] == {"path": "out/a/ckpt.pt", "iter_num": 20, "size_bytes": 3, "damaged": None}
    assert found[4]["damaged"] == "ckpt-10.pt has 1 bytes, and 3 were written"
