"""The trash: what is deleted can be taken back for a month, and nothing else is ever removed."""

import os
import time
from pathlib import Path

import pytest

from storage.errors import NotWritable
from storage.trash import STAMP, empty_trash, move_to_trash


def test_folders_of_one_name_and_second_are_all_kept(tmp_path):
    kept = []
    for content in "abc":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").write_text(content)
        kept.append(move_to_trash(tmp_path / "run"))
    assert [(path / "file").read_text() for path in kept] == ["a", "b", "c"] and len(set(kept)) == 3
    assert os.listdir(tmp_path) == [".trash"]


def make_link(trash):
    trash.symlink_to(trash.parent.parent)


def make_dangling_link(trash):
    trash.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_link, make_dangling_link, os.mkfifo, Path.touch])
def test_what_is_no_folder_is_no_trash(tmp_path, make):
    run = tmp_path / "out" / "run"
    run.mkdir(parents=True)
    make(run.parent / ".trash")
    with pytest.raises(NotWritable, match=r"out/\.trash is not a folder"):
        move_to_trash(run)
    assert run.is_dir()


def test_only_what_has_lain_in_the_trash_for_long_is_removed(tmp_path):
    (tmp_path / "new").mkdir()
    new = move_to_trash(tmp_path / "new")
    old = time.strftime(STAMP, time.localtime(time.time() - 31 * 86400))
    names = [f"run.{old}", f"a.b.{old}.2", f"{old}", "mine", f"link.{old}"]
    for name in names[:-1]:
        (new.parent / name).mkdir()
    (new.parent / names[-1]).symlink_to(tmp_path)
    empty_trash(tmp_path)
    assert sorted(os.listdir(new.parent)) == sorted([new.name, old, "mine", f"link.{old}"]) and tmp_path.exists()


def test_without_a_trash_there_is_nothing_to_empty(tmp_path):
    empty_trash(tmp_path)
    assert os.listdir(tmp_path) == []
