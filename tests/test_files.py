"""Names that clients give, files opened without following anything, and files that are whole or not there."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from storage import files
from storage.errors import BadName, NoSpace, NotFound, NotLoadable

BAD_NAMES = [
    "", ".", "..", ".hidden", "-x", "_x", "a/b", "a\\b", "../x", "/etc", "~", "a b", "a\n", "a\0", "x" * 65,
    "\uff0e\uff0e", "é", "\ud800", "%2e%2e", "a:b", "*", 7, None, True, ["a"], b"a",
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_NAMES, ids=ascii)
def test_a_bad_name_is_refused_naming_kind_and_rule(value):
    with pytest.raises(BadName) as caught:
        files.check_name("dataset", value)
    assert str(caught.value).startswith("dataset is ") and "letters, digits" in str(caught.value)
    str(caught.value).encode("ascii")  # nothing that a log or a terminal stumbles over


@pytest.mark.parametrize("value", ["a", "A9", "my_model-1.2", "x" * 64, "0", "a..b"])
def test_a_good_name_is_returned(value):
    assert files.check_name("run", value) == value


@pytest.mark.parametrize("value", ["x" * 10**6, 10**1000, float("nan"), [[0] * 10**6] * 99, {"a": 1}, None, "\ud800"])
def test_a_quoted_value_is_short_and_ascii(value):
    assert len(files.quoted(value)) <= 80
    files.quoted(value).encode("ascii")


def test_quoting_a_structure_that_shares_its_parts_does_not_write_it_out():
    value = ()
    for _ in range(200):
        value = (value, value)
    assert files.quoted(value) == "a tuple"


# ---- opening


def read(root, *parts):
    with open(files.open_regular(root, parts), "rb") as f:
        return f.read()


def test_a_regular_file_is_opened_by_its_names(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_bytes(b"here")
    assert read(tmp_path, "a", "b", "c.txt") == b"here"


def test_the_root_itself_may_be_a_link_because_it_is_ours(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_bytes(b"x")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert read(tmp_path / "out", "f") == b"x"


@pytest.mark.parametrize("parts", [("..", "f"), ("a", "..", "f"), ("/etc", "passwd"), ("\ud800",), ("a/b",), ("",)])
def test_a_part_that_is_no_name_is_refused_before_anything_is_opened(tmp_path, parts):
    with pytest.raises(BadName):
        files.open_regular(tmp_path, parts)


@pytest.mark.parametrize("target", ["/etc/passwd", "/no/such/file"])
def test_a_link_is_refused_with_the_same_words_whether_its_target_exists_or_not(tmp_path, target):
    (tmp_path / "f").symlink_to(target)
    with pytest.raises(NotLoadable, match=r"^f is a link; links are not followed$"):
        files.open_regular(tmp_path, ["f"])
    with pytest.raises(NotLoadable, match="is a link"):
        files.look_up(tmp_path, ["f"])


@pytest.mark.parametrize("target", ["/etc", "/no/such/folder"])
def test_a_linked_folder_is_not_walked_through(tmp_path, target):
    (tmp_path / "d").symlink_to(target)
    with pytest.raises(NotLoadable, match=r"^d is a link; links are not followed$"):
        files.open_regular(tmp_path, ["d", "passwd"])


def test_missing_files_and_folders_are_not_found(tmp_path):
    for root, parts in ((tmp_path, ["f"]), (tmp_path, ["d", "f"]), (tmp_path / "none", ["f"])):
        with pytest.raises(NotFound, match="does not exist"):
            files.open_regular(root, parts)


def test_folders_pipes_sockets_and_devices_are_refused_at_once(tmp_path):
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("d", "fifo", "socket"):
            with pytest.raises(NotLoadable):
                files.open_regular(tmp_path, [name])
    with pytest.raises(NotLoadable, match="pipe or a device"):
        files.open_descriptor("/dev/zero")


def test_a_disk_that_fails_while_a_file_is_read_is_told_by_what_the_file_is_called():
    with (
        pytest.raises(NotLoadable, match="mem cannot be read: Input/output error"),
        files.opened(Path("/proc/self/mem")) as f,
    ):
        f.read(1)
    with pytest.raises(NotLoadable, match="out/m cannot be read"), files.opened(Path("/proc/self/mem"), "out/m") as f:
        f.read(1)
    with pytest.raises(NotLoadable, match="mem cannot be read"), files.opened_below(Path("/proc/self"), ["mem"]) as f:
        f.read(1)


def test_what_fails_where_pieces_are_written_is_no_failure_of_reading(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 3_000_000)
    with pytest.raises(NotLoadable, match="Input/output error"):
        next(files.read_pieces(Path("/proc/self/mem")))
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        full.writelines(files.read_pieces(tmp_path / "a"))


def test_a_file_is_appended_to_and_nothing_else_in_its_place(tmp_path):
    for data in (b"a", b"b"):
        with open(files.open_to_append(tmp_path / "new"), "ab") as f:
            f.write(data)
    assert (tmp_path / "new").read_bytes() == b"ab"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "read")
    reader = os.open(tmp_path / "read", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("folder", "link", "fifo", "read"):
        with pytest.raises(OSError):
            files.open_to_append(tmp_path / name)
    os.close(reader)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(NotLoadable, match="a is a file, not a folder"):
        files.open_regular(tmp_path, ["a", "f"])


def test_no_descriptor_is_left_open_by_refusals(tmp_path):
    (tmp_path / "f").symlink_to("/etc/passwd")
    (tmp_path / "d").mkdir()
    before = len(os.listdir("/dev/fd"))
    for parts in (["f"], ["d"], ["d", "x"], ["x", "y"]):
        with pytest.raises((NotLoadable, NotFound)):
            files.open_regular(tmp_path, parts)
    assert len(os.listdir("/dev/fd")) == before


# ---- JSON


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[" * 100_000, b"NaN", b'{"a":Infinity}', b"\xff\xfe", b"9" * 5000, b"{}x", b'"\xed\xa0\x80"'],
    ids=lambda data: ascii(data[:12]),
)
def test_what_is_not_strict_json_is_refused_naming_the_file(tmp_path, data):
    (tmp_path / "f.json").write_bytes(data)
    with pytest.raises(NotLoadable, match=r"^f\.json is "):
        files.read_json(tmp_path / "f.json")


def test_json_larger_than_its_limit_is_not_read(tmp_path):
    (tmp_path / "f.json").write_bytes(b" " * 100 + b"1")
    assert files.read_json(tmp_path / "f.json", limit_bytes=101) == 1
    with pytest.raises(NotLoadable, match="larger than 100 bytes"):
        files.read_json(tmp_path / "f.json", limit_bytes=100)


def test_json_comes_back_as_it_was_written_lone_surrogates_included(tmp_path):
    value = {"text": "é\ud800", "n": [1, 2.5, None, True]}
    files.write_json(tmp_path / "f.json", value)
    assert files.read_json(tmp_path / "f.json") == value


def test_nan_is_not_written_and_the_old_file_stays(tmp_path):
    files.write_json(tmp_path / "f.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "f.json", float("nan"))
    assert files.read_json(tmp_path / "f.json") == 1


# ---- writing


@pytest.fixture
def calls(monkeypatch):
    """Record the order of the system calls that make a write durable; each is still made."""
    recorded = []

    def recording(name, call, describe):
        def wrapper(*args, **kwargs):
            recorded.append((name, describe(*args)))
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, wrapper)

    recording("fsync", os.fsync, lambda fd: "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
    recording("replace", os.replace, lambda old, new: os.path.basename(new))
    return recorded


def test_the_order_is_write_sync_verify_rename_sync_of_the_folder(tmp_path, calls):
    path = tmp_path / "f"
    files.replace_file(path, lambda f: f.write(b"new"), lambda t: calls.append(("verify", t.read_bytes())))
    assert calls == [("fsync", "file"), ("verify", b"new"), ("replace", "f"), ("fsync", "folder")]
    assert path.read_bytes() == b"new"


def test_the_temporary_file_is_in_the_same_folder_and_no_client_can_name_it(tmp_path):
    seen = []
    files.replace_file(tmp_path / "f", lambda f: seen.append(f.name), lambda t: seen.append(t))
    assert seen[1].parent == tmp_path and files.TEMPORARY.fullmatch(seen[1].name)
    assert not files.NAME.fullmatch(seen[1].name)


def failing(number):
    def write(f):
        f.write(b"half")
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, OSError)])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, number, error):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(error):
        files.replace_file(tmp_path / "f", failing(number))
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_a_failed_fsync_is_a_failed_write_and_is_not_tried_again(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"old")
    tried = []

    def fail(fd):
        tried.append(fd)
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="injected"):
        files.replace_file(tmp_path / "f", lambda f: f.write(b"new"))
    assert len(tried) == 1 and os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_a_disk_that_fails_while_it_is_read_is_told_of_the_file(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "injected")

    (tmp_path / "f.json").write_text("{}")
    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(NotLoadable, match=r"f\.json cannot be read: Input/output error"):
        files.read_json(tmp_path / "f.json")
    with pytest.raises(NotLoadable, match=r"f\.json cannot be read"), files.opened(tmp_path / "f.json"):
        fail()


def test_the_write_after_a_failed_one_succeeds(tmp_path):
    with pytest.raises(NoSpace, match="f could not be written"):
        files.replace_file(tmp_path / "f", failing(errno.ENOSPC))
    files.replace_file(tmp_path / "f", lambda f: f.write(b"new"))
    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize("error", [NotLoadable("refused"), KeyboardInterrupt()])
def test_a_file_that_does_not_verify_never_takes_its_place(tmp_path, error):
    def refuse(_):
        raise error

    with pytest.raises(type(error)):
        files.replace_file(tmp_path / "f", lambda f: f.write(b"new"), refuse)
    assert os.listdir(tmp_path) == []


def test_what_interrupted_writes_left_is_swept_and_nothing_else(tmp_path):
    files.temporary_beside(tmp_path / "ckpt.pt").write_bytes(b"half")
    left = files.temporary_beside(tmp_path / "export")
    left.mkdir()
    (left / "config.json").write_bytes(b"{}")
    for kept in ("ckpt.pt", ".keep", "x.tmp"):
        (tmp_path / kept).write_bytes(b"")
    files.sweep_temporary(tmp_path)
    files.sweep_temporary(tmp_path / "missing")
    assert sorted(os.listdir(tmp_path)) == [".keep", "ckpt.pt", "x.tmp"]


def test_sweeping_removes_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "f").write_bytes(b"")
    files.temporary_beside(tmp_path / "x").symlink_to(tmp_path / "precious")
    files.sweep_temporary(tmp_path)
    assert os.listdir(tmp_path) == ["precious"] and os.listdir(tmp_path / "precious") == ["f"]


def test_space_is_measured_on_the_disk_of_a_path_that_need_not_exist(tmp_path):
    assert files.free_bytes(tmp_path / "a" / "b") > 0
    files.require_space(tmp_path / "a", 1)
    with pytest.raises(NoSpace, match="MB are needed and the disk has"):
        files.require_space(tmp_path, 2**62)
