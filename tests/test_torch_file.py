"""What a torch.save file holds, read without unpickling: every other kind of file and every attack refused."""

import contextlib
import io
import os
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from storage.errors import NotFound, NotLoadable, StorageError
from storage.files import open_descriptor
from storage.torch_file import crc_damage, read_torch_file
from storage.torch_pickle import TensorInfo

CANARY = Path("/tmp/reliability_canary")


def described(path):
    with open(open_descriptor(path), "rb") as f:
        return read_torch_file(f, "out/m")


def refusal(path):
    """Return why a file is refused, after checking that it is one sentence without paths of the machine."""
    with pytest.raises(NotLoadable) as caught:
        described(path)
    text = str(caught.value)
    assert text.startswith("out/m ") and len(text) < 300 and "\n" not in text and str(path.parent) not in text
    return text


def state():
    return {"model": {"w": torch.ones(3, 4), "b": torch.zeros(4)}, "iter_num": 7, "betas": (0.9, 0.95), "name": "é"}


def saved(path, state):
    torch.save(state, path)
    return path


def archive(path, pickle, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr("archive/data.pkl", b"\x80\x02" + pickle + b".")
        for name, content in records:
            z.writestr(name, content)
    return path


def test_tensors_come_back_as_descriptions_and_plain_values_as_they_are(tmp_path):
    path = saved(tmp_path / "f.pt", state())
    found, data = described(path), path.read_bytes()
    w, b = found["model"]["w"], found["model"]["b"]
    assert w == TensorInfo("F32", (3, 4), w.start, dense=True) and b == TensorInfo("F32", (4,), b.start, dense=True)
    assert data[w.start : w.start + 48] == b"\0\0\x80\x3f" * 12 and data[b.start : b.start + 16] == b"\0" * 16
    assert (found["iter_num"], found["betas"], found["name"]) == (7, (0.9, 0.95), "é")


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 3).state_dict(), torch.nn.Parameter(torch.ones(2)), torch.Size([1, 2]), torch.device("cpu"),
        torch.get_rng_state(), random.Random(1).getstate(), torch.tensor(1.5), torch.ones(0, 3), 2**200, -1, None, {},
        torch.ones(2, dtype=torch.bool), torch.ones(4, 4)[1:, :2], [[[]]], {3: {"a": [1.5, True]}}, "x" * 100_000,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_whatever_a_trainer_may_save_is_read(tmp_path, value):
    assert "v" in described(saved(tmp_path / "f.pt", {"v": value}))


def test_an_optimizer_state_is_read(tmp_path):
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = described(saved(tmp_path / "f.pt", optimizer.state_dict()))
    assert found["state"][0]["exp_avg"].shape == (3, 2) and found["param_groups"][0]["params"] == [0, 1]


def test_two_names_of_one_tensor_have_one_place_and_a_view_is_no_dense_block(tmp_path):
    w = torch.ones(3, 4)
    found = described(saved(tmp_path / "f.pt", {"a": w, "b": w, "t": w.t(), "row": w[1]}))
    assert found["a"] == found["b"] and not found["t"].dense and found["row"].start == found["a"].start + 16


def test_a_changed_record_is_found_by_its_checksum(tmp_path):
    path = saved(tmp_path / "f.pt", {"w": torch.full((99,), 1.5)})
    with open(path, "rb") as f:
        assert crc_damage(f, "f") is None
    path.write_bytes(path.read_bytes().replace(b"\0\0\xc0\x3f" * 50, b"\0\0\xc0\x3f" * 49 + b"\0\0\xc1\x3f", 1))
    with open(path, "rb") as f:
        assert "the checksum of its record" in crc_damage(f, "f")


@pytest.mark.parametrize("value", [torch.ones(1).numpy()[0], Path("x"), {(1, 2): 3}, {"a", "b"}, b"bytes", 1j])
def test_objects_that_are_no_plain_values_are_refused(tmp_path, value):
    refusal(saved(tmp_path / "f.pt", {"v": value}))


# ---- files that are no checkpoint at all


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"hello\n", "is a text file"),
        (b"\0" * 5000, "begins with zeros"),
        (b"\x80\x02}q\x00.", "is a bare pickle"),
        (b"cbuiltins\nopen\n(S'/tmp/reliability_canary'\nS'w'\ntR.", "is a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer"),
        (b"\x7fELF" + bytes(range(200)), "is not a PyTorch checkpoint"),
        (b"PK\x03\x04" + b"x" * 500, "is cut short or damaged"),
        (b"PK\x05\x06" + b"\0" * 18, "is not a PyTorch checkpoint"),
    ],
)
def test_each_kind_of_wrong_file_has_its_own_sentence(tmp_path, content, why):
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert why in refusal(tmp_path / "ckpt.pt")


def test_links_folders_and_pipes_are_refused_without_waiting(tmp_path):
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc/passwd")):
        path = tmp_path / "ckpt.pt"
        make(path)
        with pytest.raises(NotLoadable, match="is a "):
            described(path)
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(NotFound):
        described(tmp_path / "ckpt.pt")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = saved(tmp_path / "ckpt.pt", state()).read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        (tmp_path / "ckpt.pt").write_bytes(whole[:length])
        refusal(tmp_path / "ckpt.pt")


def test_whatever_bytes_are_changed_the_answer_is_a_description_or_a_refusal(tmp_path):
    path, rng = saved(tmp_path / "ckpt.pt", state()), random.Random(0)
    whole = path.read_bytes()
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(StorageError):
            described(path)


# ---- archives and pickles made to harm


def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path):
    path = archive(tmp_path / "ckpt.pt", b"}", [("archive/data/0", b"\0" * 2**20)], zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted record" in refusal(path)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([("other/x", b"")], "not in the folder of the first"),
        ([("archive/data/0", b""), ("ARCHIVE/data/0", b"")], "not in the folder"),
        ([("archive/data/a", b""), ("archive/data/A", b"")], "two records of one name"),
        ([("archive/constants.pkl", b"")], "TorchScript"),
        ([("archive/byteorder", b"big")], "byte order"),
        ([("archive/byteorder", b"b" * 99)], "byteorder of more than 16 bytes"),
    ],
)
def test_an_odd_archive_is_refused(tmp_path, records, why):
    assert why in refusal(archive(tmp_path / "ckpt.pt", b"}", records))


def test_an_archive_without_a_pickle_or_with_bytes_before_it_is_refused(tmp_path):
    path, data = tmp_path / "ckpt.pt", io.BytesIO()
    with zipfile.ZipFile(data, "w") as z:
        z.writestr("archive/x", b"")
    path.write_bytes(data.getvalue())
    assert "it has no data.pkl" in refusal(path)
    path.write_bytes(b"PK\x03\x04" + data.getvalue())
    assert "do not begin at its start" in refusal(path)


def test_records_that_overlap_are_refused(tmp_path):
    path = archive(tmp_path / "ckpt.pt", b"}", [("archive/data/0", b"a" * 100), ("archive/data/1", b"b" * 100)])
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = data[data.index(b"PK\x01\x02") + 42 :][
        :4
    ]  # the last record begins where the first does
    path.write_bytes(data)
    assert "overlap" in refusal(path) or "not where the directory says" in refusal(path)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(numel=b"K\x04", offset=b"K\x00", shape=b"K\x04\x85", stride=b"K\x01\x85", storage=b"ctorch\nFloatStorage\n"):
    """Return the pickle of a tensor in the record "0"."""
    identity = b"(" + text("storage") + storage + text("0") + text("cpu") + numel + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + identity + offset + shape + stride + b"\x89ccollections\nOrderedDict\n)RtR"


HUGE = b"\x8a\x06" + (2**40).to_bytes(6, "little")


@pytest.mark.parametrize(
    ("pickle", "why"),
    [
        (tensor(numel=HUGE), "claims 1099511627776 elements of F32 in a record of 16 bytes"),
        (tensor(numel=b"K\x05"), "claims 5 elements"),
        (tensor(shape=HUGE + b"\x85"), "a tensor of 1099511627776 elements in a record that holds 4"),
        (tensor(shape=HUGE + b"\x85", stride=b"K\x00\x85"), "in a record that holds 4"),
        (tensor(offset=b"K\x01"), "in a record that holds 4"),
        (tensor(stride=b"K\x02\x85"), "in a record that holds 4"),
        (tensor(offset=b"J\xff\xff\xff\xff"), "size -1"),
        (tensor(shape=b"J\xfc\xff\xff\xff\x85"), "size -4"),
        (tensor(shape=b"\x88\x85"), "size True"),
        (tensor(shape=b"K\x02K\x02\x86"), "2 dimensions with 1 strides"),
        (tensor(numel=b"N"), "size None"),
        (tensor(storage=b"ctorch\nSize\n"), "does not hold"),
        (tensor(storage=b"cos\nsystem\n"), '"os.system"'),
        (b"cbuiltins\nopen\n" + text("/tmp/reliability_canary") + text("w") + b"\x86R", '"builtins.open"'),
        (b"cbuiltins\ngetattr\n.", '"builtins.getattr"'),
        (b"ctorch.hub\nload\n", '"torch.hub.load"'),
        (b"ctorch\nFloatStorage\n)R", "damaged data.pkl"),
        (b"ccollections\nOrderedDict\n" + b"]\x85R", "OrderedDict in a form"),
        (b"]}b", "sets the state of an object"),
        (b"NNR", "damaged data.pkl"),
        (b"NQ", "refers to something that is no tensor"),
        (b"0", "operation POP"),
        (b"\x8c\x01a", "operation SHORT_BINUNICODE"),
        (b"S'a'\n", "operation STRING"),
        (b"\x93", "operation STACK_GLOBAL"),
        (b"\x80\x04", "protocol 4; torch.save writes protocol 2"),
        (b"h\x05", "damaged data.pkl"),
        (b"t", "damaged data.pkl"),
        (b"K\x01(\x85", "damaged data.pkl"),
        (b"}NK\x01s", "a key of the type NoneType"),
        (b"X\xff\xff\xff\x7fa", "damaged data.pkl"),
        (b"}" * 1_000_001, "more than 1000000 operations"),
    ],
    ids=lambda value: ascii(value[:24]) if isinstance(value, bytes) else "",
)
def test_a_pickle_made_to_harm_is_refused(tmp_path, pickle, why):
    assert why in refusal(archive(tmp_path / "ckpt.pt", pickle, [("archive/data/0", b"\0" * 16)]))
    assert not CANARY.exists()


def test_keys_that_take_for_ever_to_hash_are_refused_at_once(tmp_path):
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(100))
    assert "a key of the type tuple" in refusal(archive(tmp_path / "ckpt.pt", b"})" + doubled + b"K\x01s"))
