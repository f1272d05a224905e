"""Datasets: text of any kind becomes the right tokens once, and what cannot be trained on is refused with a reason."""

import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import documents, token_files, uploads
from storage.datasets import Dataset, dataset, datasets
from storage.documents import pieces, scan, sources
from storage.errors import BadName, Exists, NoSpace, NotFound, NotLoadable, NotWritable, TooLarge
from storage.runs import Workspace
from storage.tokenizer import char_tokenizer, train_bpe
from storage.tokenizer_choice import check_spec, tokenizer_for
from storage.trash import move_to_trash
from storage.uploads import delete, upload

SENTENCES = "The quick brown fox jumps over the lazy dog, again and again.\nTo be or not to be — that's it!\n\n"
TEXT = SENTENCES * 60
BPE = train_bpe([SENTENCES * 4], 300)
LETTERS = char_tokenizer(SENTENCES)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "data").mkdir()
    return Workspace(tmp_path)


def make(workspace: Workspace, name: str, **files: str | bytes) -> Dataset:
    """Make data/<name>/ with these files (text_txt becomes text.txt) and return the dataset."""
    folder = workspace.data / name
    folder.mkdir()
    for file, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / ".".join(file.rsplit("_", 1))).write_bytes(data)
    return dataset(workspace, name)


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def meta_pkl(characters: str) -> bytes:
    stoi = {character: i for i, character in enumerate(characters)}
    return pickle.dumps({"vocab_size": len(stoi), "stoi": stoi, "itos": dict(enumerate(characters))})


def ids(*values: int) -> bytes:
    return np.array(values, dtype="<u2").tobytes()


def texts_of(splits) -> tuple[str, str]:
    return splits.tokenizer.decode(splits.train.tolist()), splits.tokenizer.decode(splits.val.tolist())


# ---- reading text


def read(folder: Path, **limits: int) -> list[str]:
    """Return the documents of a folder, their pieces joined."""
    found = [""]
    for piece in pieces(folder, sources(folder)):
        found[-1] += piece.text
        if piece.ends:
            found.append("")
    assert found.pop() == ""
    return found


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"hi\n", "hi\n"),
        (b"\r\r\n\n\r", "\r\n\n\r"),
        (b"\xef\xbb\xbfhi\n", "hi\n"),
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"a\rb", "a\rb"),
        ("é\u2028🌍".encode(), "é\u2028🌍"),
    ],
)
def test_text_is_utf8_without_bom_and_with_unix_line_ends(tmp_path, data, text):
    (tmp_path / "a.txt").write_bytes(data)
    assert read(tmp_path) == [text]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"abc\xff", "not UTF-8 text at byte 3"),
        (b"ab\xc3", "not UTF-8 text at byte 2"),
        ("hi".encode("utf-16"), "not UTF-8 text at byte 0"),
        (b"ab\0c", "NUL byte at byte 2"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"PK\x03\x04..", "a zip archive"),
    ],
)
def test_what_is_not_text_is_refused_with_the_place(tmp_path, data, reason):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(NotLoadable, match=reason):
        read(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_the_place_of_a_bad_byte_does_not_depend_on_how_the_file_is_read(tmp_path, monkeypatch, size):
    monkeypatch.setattr(documents, "READ_BYTES", size)
    (tmp_path / "a.txt").write_bytes("é🌍 日本".encode() + b"\xe6\x97x")
    with pytest.raises(NotLoadable, match="byte 13;"):
        read(tmp_path)


@settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab'sé日🌍.,1 \n\t\r\u3000\ufeff", max_size=60), size=st.integers(1, 9))
def test_the_tokens_of_the_pieces_are_the_tokens_of_the_whole(tmp_path, text, size):
    (tmp_path / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "READ_BYTES", size)
        found = [piece.text for piece in pieces(tmp_path, sources(tmp_path))]
    whole = text.removeprefix("\ufeff").replace("\r\n", "\n")
    assert "".join(found) == whole
    assert [i for piece in found for i in BPE.encode(piece)] == BPE.encode(whole)


def test_a_text_without_any_space_is_read_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "READ_BYTES", 100)
    monkeypatch.setattr(documents, "MAX_PIECE", 300)
    (tmp_path / "a.txt").write_text("x" * 5000)
    found = [piece.text for piece in pieces(tmp_path, sources(tmp_path))]
    assert "".join(found) == "x" * 5000
    assert max(map(len, found)) <= 400


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "none of"),
        (b'{"text": 1}', "none of"),
        (b'{"prompt": "a"}', "none of"),
        (b'{"messages": []}', "at least 1 message"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\].content is missing"),
        (b'{"text": "\xff"}', "not UTF-8 text at byte 26"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"1" * 5000 + b"}", "cannot be used"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n\n' + line + b"\n")
    with pytest.raises(NotLoadable, match=rf"a.jsonl line 3 .*{reason}"):
        read(tmp_path)


def test_lines_may_begin_with_a_bom_and_hold_halves_of_surrogate_pairs(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n{"text": "\\ud83c"}')
    assert read(tmp_path) == ["a\nb", "\ufffd"]


def test_the_longest_line_is_found_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "READ_BYTES", 7)
    (tmp_path / "a.txt").write_text("one\ntwo and three and four\nfive six\n")
    assert scan(pieces(tmp_path, sources(tmp_path))).longest_line == len("two and three and four")


def test_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 50)
    (tmp_path / "a.jsonl").write_text(jsonl(["short", "x" * 60]))
    with pytest.raises(NotLoadable, match="line 2 is longer"):
        read(tmp_path)


def test_all_text_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for name, text in (("b.txt", "B"), ("a.jsonl", jsonl(["1", "2"])), ("c.md", "no"), (".d.txt", "no"), ("e.txt", "")):
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == ["1", "2", "B"]
    assert scan(pieces(tmp_path, sources(tmp_path))).documents == 3


# ---- tokens


def test_a_single_text_is_split_as_nanogpt_splits_it(workspace, shared):
    text = (shared / "data/tinyshakespeare/input.txt").read_bytes()
    source = make(workspace, "sh", input_txt=text)
    splits = source.prepare(tokenizer_for("char", source, workspace))
    theirs = shared / "data/nanogpt/prepared_shakespeare_char"
    assert np.array_equal(splits.train, np.fromfile(theirs / "train.bin", dtype="<u2"))
    assert np.array_equal(splits.val, np.fromfile(theirs / "val.bin", dtype="<u2"))


def test_gpt2_tokens_of_shakespeare_are_as_many_as_nanogpts(workspace, shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "data/gpt2_bpe/tiktoken_cache"))
    source = make(workspace, "sh", input_txt=(shared / "data/tinyshakespeare/input.txt").read_bytes())
    splits = source.prepare(tokenizer_for("gpt2", source, workspace))
    assert (len(splits.train), len(splits.val)) == (301966, 36059)
    assert splits.bytes_per_token == pytest.approx(111540 / 36059, rel=1e-4)


@pytest.mark.parametrize("tokenizer", [BPE, LETTERS], ids=["bpe", "char"])
def test_the_splits_together_are_the_text(workspace, tokenizer):
    train, val = texts_of(make(workspace, "a", text_txt=TEXT).prepare(tokenizer))
    assert train == TEXT[: int(len(TEXT) * 0.9)]
    assert train + val == TEXT


def test_documents_end_with_end_of_text_and_are_split_whole(workspace):
    texts = [f"document number {i}, {SENTENCES}" for i in range(100)]
    splits = make(workspace, "a", d_jsonl=jsonl(texts)).prepare(BPE)
    train, val = (text.split("<|endoftext|>")[:-1] for text in texts_of(splits))
    assert sorted(train + val) == sorted(texts)
    assert len(val) == 10


def test_copies_of_a_document_are_on_the_same_side(workspace):
    texts = [f"document {i % 30}" for i in range(300)]
    splits = make(workspace, "a", d_jsonl=jsonl(texts)).prepare(BPE)
    train, val = (set(text.split("<|endoftext|>")) - {""} for text in texts_of(splits))
    assert not train & val
    assert (len(train), len(val)) == (27, 3)


@pytest.mark.parametrize("files", [{"zebra_jsonl": jsonl(["a train\n"] * 30)}, {"text_txt": "a train\n" * 30}])
def test_a_file_val_is_the_text_to_validate_on(workspace, files):
    train, val = texts_of(make(workspace, "d", val_jsonl=jsonl(["one\n", "two\n"]), **files).prepare(BPE))
    assert val.replace("<|endoftext|>", "") == "one\ntwo\n"
    assert train.replace("<|endoftext|>", "") == "a train\n" * 30


def test_a_file_val_alone_leaves_nothing_to_train_on(workspace):
    with pytest.raises(NotLoadable, match="leave train without a token"):
        make(workspace, "d", val_txt=TEXT).prepare(BPE)


def test_much_text_needs_a_hundredth_to_validate_on(workspace, monkeypatch):
    monkeypatch.setattr(token_files, "LARGE_BYTES", 100)
    splits = make(workspace, "a", d_jsonl=jsonl([f"document {i}" for i in range(200)])).prepare(BPE)
    assert texts_of(splits)[1].count("<|endoftext|>") == 2


def test_a_few_documents_are_cut_like_one_text(workspace):
    splits = make(workspace, "a", d_jsonl=jsonl(["a" * 50, "b" * 50])).prepare(char_tokenizer("ab\n"))
    assert texts_of(splits) == ("a" * 50 + "\n" + "b" * 40, "b" * 10 + "\n")


def test_characters_without_a_line_end_are_joined_without_one(workspace):
    splits = make(workspace, "a", d_jsonl=jsonl(["a" * 50, "b" * 50])).prepare(char_tokenizer("ab"))
    assert texts_of(splits) == ("a" * 50 + "b" * 40, "b" * 10)


def test_threads_do_not_change_the_order(workspace, monkeypatch):
    monkeypatch.setattr(token_files, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr(documents, "READ_BYTES", 64)
    monkeypatch.setattr(token_files, "usable_cores", lambda: 8)
    splits = make(workspace, "a", text_txt=TEXT).prepare(BPE)
    assert "".join(texts_of(splits)) == TEXT


def test_bytes_per_token_counts_the_text_of_val_without_end_of_text(workspace):
    splits = make(workspace, "a", d_jsonl=jsonl([f"é{i}" for i in range(40)])).prepare(BPE)
    text = splits.tokenizer.decode(splits.val.tolist()).replace("<|endoftext|>", "")
    assert splits.bytes_per_token == pytest.approx(len(text.encode()) / len(splits.val))


def test_ids_beyond_65535_are_stored_in_four_bytes():
    assert (token_files.token_type(65536).itemsize, token_files.token_type(65537).itemsize) == (2, 4)


def test_a_large_vocabulary_comes_back_from_four_bytes(workspace):
    vocabulary = char_tokenizer(
        TEXT + "".join(map(chr, itertools.chain(range(0x400, 0xD000), range(0x10000, 0x1A000))))
    )
    splits = make(workspace, "a", text_txt=TEXT + chr(0x19FFF) * 1000).prepare(vocabulary)
    assert splits.val.dtype.itemsize == 4
    assert splits.val.max() == vocabulary.n_vocab - 1 > 65536


# ---- the cache


class Recorder:
    """Remembers what was reported."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.seen.append((what, done, total))


def test_progress_reaches_the_whole(workspace):
    progress = Recorder()
    make(workspace, "a", text_txt=TEXT).prepare(BPE, progress)
    assert progress.seen[-1] == ("tokenizing", len(TEXT), len(TEXT))


def test_the_second_time_nothing_is_tokenized(workspace):
    source, progress = make(workspace, "a", text_txt=TEXT), Recorder()
    first = source.prepare(BPE)
    again = source.prepare(BPE, progress)
    assert progress.seen == []
    assert np.array_equal(first.train, again.train) and first.bytes_per_token == again.bytes_per_token


def test_a_changed_text_is_tokenized_again(workspace):
    source = make(workspace, "a", text_txt=TEXT)
    old = source.prepare(BPE)
    (source.folder / "text.txt").write_text(TEXT.replace("fox", "cat"))
    assert "cat" in texts_of(source.prepare(BPE))[0]
    assert "fox" in texts_of(old)[0]  # the map of a run that is still training


def test_each_tokenizer_has_its_own_tokens(workspace):
    source = make(workspace, "a", text_txt=TEXT)
    counts = {t.name: len(s.train) + len(s.val) for t in (BPE, LETTERS) for s in [source.prepare(t)]}
    assert source.describe()["tokens"] == counts
    assert counts["char"] == len(TEXT)


def test_tokens_remain_usable_when_the_text_is_removed(workspace):
    source = make(workspace, "a", text_txt=TEXT)
    source.prepare(BPE)
    (source.folder / "text.txt").unlink()
    assert "".join(texts_of(source.prepare(BPE))) == TEXT
    source.check("bpe:300")


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "meta.json"])
def test_damaged_tokens_are_made_again(workspace, file):
    source = make(workspace, "a", text_txt=TEXT)
    source.prepare(BPE)
    path = source.folder / "tokens" / BPE.fingerprint / file
    path.write_bytes(path.read_bytes()[:-2])
    assert "".join(texts_of(source.prepare(BPE))) == TEXT


def test_a_failed_tokenization_leaves_nothing_and_keeps_the_old_tokens(workspace):
    source = make(workspace, "a", text_txt=TEXT)
    source.prepare(LETTERS)
    (source.folder / "text.txt").write_text(TEXT + "日")
    with pytest.raises(NotLoadable, match=r"U\+65E5"):
        source.prepare(LETTERS)
    assert os.listdir(source.folder / "tokens") == [LETTERS.fingerprint]


def test_what_a_killed_tokenization_left_is_swept(workspace):
    source = make(workspace, "a", text_txt=TEXT)
    left = source.folder / "tokens" / f".{BPE.fingerprint}.{'0' * 16}.tmp"
    left.mkdir(parents=True)
    source.prepare(BPE)
    assert not left.exists()


class Killed(BaseException):
    """The end of a process, at any place."""


def killed_at(batch: int, monkeypatch):
    """Let the process end when it encodes this batch for the first time."""
    encode, seen = token_files._Encoder.__call__, itertools.count()

    def encoding(self, *args):
        if next(seen) == batch:
            raise Killed
        return encode(self, *args)

    monkeypatch.setattr(token_files._Encoder, "__call__", encoding)


def token_bytes(source: Dataset, tokenizer) -> dict[str, bytes]:
    folder = source.folder / "tokens" / tokenizer.fingerprint
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


KINDS = {"text": {"text_txt": TEXT * 3}, "documents": {"a_jsonl": jsonl([f"{i} {SENTENCES}" for i in range(200)])}}
KINDS["masked"] = {
    "a_jsonl": "".join(json.dumps({"prompt": f"{i}?", "completion": SENTENCES}) + "\n" for i in range(200))
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_tokenization_goes_on_where_it_was_and_makes_the_same_files(workspace, monkeypatch, kind):
    monkeypatch.setattr(token_files, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(token_files, "SAVED_SECONDS", 0.0)
    monkeypatch.setattr(token_files, "usable_cores", lambda: 1)
    monkeypatch.setattr(documents, "READ_BYTES", 700)
    whole, source, report = make(workspace, "whole", **KINDS[kind]), make(workspace, "a", **KINDS[kind]), Recorder()
    stamp = (whole.folder / next(iter(KINDS[kind])).replace("_", ".")).stat().st_mtime_ns
    os.utime(source.folder / next(iter(KINDS[kind])).replace("_", "."), ns=(stamp, stamp))
    whole.prepare(BPE)
    for batch in (11, 8, 2):  # of the ones that are left
        with monkeypatch.context() as patch:
            killed_at(batch, patch)
            with pytest.raises(Killed):
                source.prepare(BPE)
    (left,) = (source.folder / "tokens").iterdir()
    (left / "train.bin").write_bytes((left / "train.bin").read_bytes() + b"half a batch")
    source.prepare(BPE, report)
    assert token_bytes(source, BPE) == token_bytes(whole, BPE) and len(os.listdir(source.folder / "tokens")) == 1
    stages = [what for what, _, _ in report.seen]
    assert "reading the text" not in stages and stages.count("finding the place where it stopped") >= 9


def test_a_killed_tokenization_of_another_text_or_with_damaged_files_begins_anew(workspace, monkeypatch):
    monkeypatch.setattr(token_files, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(token_files, "SAVED_SECONDS", 0.0)
    monkeypatch.setattr(documents, "READ_BYTES", 300)
    source = make(workspace, "a", text_txt=TEXT)
    for spoil in (
        lambda left: (source.folder / "text.txt").write_text(TEXT + "and more"),
        lambda left: (left / "progress.json").write_text("{"),
        lambda left: (left / "val.bin").unlink(),
        lambda left: (left / "documents.bin").write_bytes(b"x"),
    ):
        with monkeypatch.context() as patch:
            killed_at(7, patch)
            with pytest.raises(Killed):
                source.prepare(BPE)
        (left,) = source.folder.glob("tokens/.unfinished-*")
        spoil(left)
        splits = source.prepare(BPE)
        assert BPE.decode([*splits.train, *splits.val]) == (source.folder / "text.txt").read_text()
        shutil.rmtree(source.folder / "tokens")


def test_unfinished_tokens_of_another_tokenizer_stay_until_the_text_changes(workspace, monkeypatch):
    source = make(workspace, "a", text_txt=TEXT)
    with monkeypatch.context() as patch:
        killed_at(0, patch)
        with pytest.raises(Killed):
            source.prepare(BPE)
    source.prepare(LETTERS)
    assert len(list(source.folder.glob("tokens/.unfinished-*"))) == 1 and source.describe()["error"] is None
    (source.folder / "text.txt").write_text(TEXT + SENTENCES)
    source.prepare(LETTERS)
    assert list(source.folder.glob("tokens/.unfinished-*")) == []


PREPARE = """
import sys
from pathlib import Path
from storage import documents, token_files, tokenizer
from storage.datasets import dataset
from storage.runs import Workspace
documents.READ_BYTES, token_files.BATCH_CHARACTERS, token_files.SAVED_SECONDS = 2**14, 2**14, 0.0
root = Path(sys.argv[1])
dataset(Workspace(root), "a").prepare(tokenizer.load(root / "tokenizer.json"))
"""


def batches_done(source: Dataset) -> int:
    for path in source.folder.glob("tokens/.unfinished-*/progress.json"):
        with contextlib.suppress(FileNotFoundError):
            return json.loads(path.read_text())["batches"]
    return 0


def test_a_process_killed_while_it_tokenizes_has_not_worked_in_vain(workspace):
    source, root = make(workspace, "a", text_txt="".join(f"{i} {SENTENCES}" for i in range(40_000))), workspace.root
    BPE.save(root / "tokenizer.json")
    argv, reached = [sys.executable, "-c", PREPARE, str(root)], 0
    for _ in range(3):
        child = subprocess.Popen(argv, cwd=Path(documents.__file__).parents[1])
        while child.poll() is None and batches_done(source) < reached + 8:
            time.sleep(0.005)
        child.kill()
        assert child.wait() == -signal.SIGKILL and batches_done(source) > reached
        reached = batches_done(source)
    subprocess.run(argv, cwd=Path(documents.__file__).parents[1], check=True)
    splits = source.prepare(BPE)
    assert BPE.decode([*splits.train, *splits.val]) == (source.folder / "text.txt").read_text()


def test_two_preparations_at_once_do_the_work_once(workspace):
    source, reports = make(workspace, "a", text_txt=TEXT * 20), [Recorder(), Recorder()]
    threads = [threading.Thread(target=source.prepare, args=(BPE, report)) for report in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokenized = ["tokenizing" in {what for what, _, _ in report.seen} for report in reports]
    assert sorted(tokenized) == [False, True]


def test_a_full_disk_is_refused_before_and_said_during_the_work(workspace, monkeypatch):
    source = make(workspace, "a", text_txt=TEXT)
    monkeypatch.setattr("storage.files.free_bytes", lambda path: 10)
    with pytest.raises(NoSpace, match="disk has"):
        source.prepare(BPE)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("storage.files.free_bytes", lambda path: 10**12)
    monkeypatch.setattr("storage.token_cache.write_tokens", full)
    with pytest.raises(NoSpace, match="disk is full"):
        source.prepare(BPE)
    assert os.listdir(source.folder / "tokens") == []


def test_a_text_too_short_for_two_splits_is_refused(workspace):
    with pytest.raises(NotLoadable, match="1 characters leave train without a token"):
        make(workspace, "a", text_txt="x").prepare(char_tokenizer("x"))


@pytest.mark.parametrize(("count", "words"), [(1, "has one example"), (40, "has 40 examples, all the same")])
def test_examples_that_are_all_the_same_are_refused_before_a_job_and_in_it(workspace, count, words):
    source = make(workspace, "a", a_jsonl='{"prompt": "Who are you?", "completion": "A small model."}\n' * count)
    for refuse in (lambda: source.check("char"), lambda: source.prepare(BPE)):
        with pytest.raises(NotLoadable, match=f"dataset a {words}: it takes at least two different ones"):
            refuse()
    (source.folder / "val.jsonl").write_text('{"prompt": "Who is it?", "completion": "A small model."}\n')
    source.check("char")


def test_splits_shorter_than_a_block_are_refused_with_their_lengths(workspace):
    splits = make(workspace, "a", text_txt="x" * 100).prepare(char_tokenizer("x"))
    splits.require_length(9)
    with pytest.raises(NotLoadable, match="val has 10 tokens; block_size 64 needs at least 65"):
        splits.require_length(64)


# ---- nanoGPT's files

ABC = ids(*[0, 1, 2] * 100)
GOOD = {"train_bin": ABC, "val_bin": ABC, "meta_pkl": meta_pkl("abc")}


def test_a_folder_prepared_by_nanogpt_works_as_it_is(workspace, shared):
    shutil.copytree(shared / "data/nanogpt/prepared_shakespeare_char", workspace.data / "ng")
    source = dataset(workspace, "ng")
    source.check("char", 256)
    splits = source.prepare(tokenizer_for("auto", source, workspace))
    assert (len(splits.train), len(splits.val), splits.bytes_per_token) == (1003854, 111540, 1.0)
    assert splits.tokenizer.decode(splits.train[:13].tolist()) == "First Citizen"
    assert sorted(os.listdir(source.folder)) == ["LICENSE", "meta.pkl", "train.bin", "val.bin"]


def test_token_files_without_meta_are_gpt2s(workspace, shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "data/gpt2_bpe/tiktoken_cache"))
    source = make(workspace, "owt", train_bin=ids(15496, 995, 50256), val_bin=ids(15496, 50256))
    source.check("gpt2")
    splits = source.prepare(source.natural_tokenizer())
    assert texts_of(splits) == ("Hello world<|endoftext|>", "Hello<|endoftext|>")
    assert splits.bytes_per_token == 2.5
    assert source.describe()["tokens"] == {"gpt2": 5}


def test_raw_text_has_no_tokenizer_of_its_own(workspace):
    assert make(workspace, "a", text_txt=TEXT).natural_tokenizer() is None


@pytest.mark.parametrize("name", ["gpt2", "bpe:1024"])
def test_a_model_with_another_tokenizer_than_the_token_files_is_refused(workspace, name):
    source = make(workspace, "a", **GOOD)
    with pytest.raises(NotLoadable, match=rf"holds only tokens of 3 characters and no text.* tokenizer is {name}"):
        source.check(name)
    with pytest.raises(NotLoadable, match="holds only tokens of 3 characters"):
        source.prepare(BPE)


def test_a_character_model_on_gpt2_tokens_is_refused(workspace):
    source = make(workspace, "a", train_bin=ABC, val_bin=ABC)
    with pytest.raises(NotLoadable, match="holds only GPT-2's tokens"):
        source.check("char")
    with pytest.raises(NotLoadable, match="holds only GPT-2's tokens"):
        source.prepare(LETTERS)


def test_other_characters_than_those_of_the_token_files_are_refused(workspace):
    with pytest.raises(NotLoadable, match="tokens of 3 characters"):
        make(workspace, "a", **GOOD).prepare(char_tokenizer("abcd"))


def test_a_folder_with_token_files_and_text_serves_every_model(workspace):
    source = make(workspace, "a", **GOOD, input_txt=TEXT)
    source.check("bpe:300")
    assert "".join(texts_of(source.prepare(BPE))) == TEXT
    assert len(source.prepare(source.natural_tokenizer()).train) == 300


ODD = [
    ({"train_bin": ABC + b"x"}, "601 bytes, not a multiple of 2"),
    ({"train_bin": b""}, "train.bin is empty"),
    ({"val_bin": b""}, "val.bin is empty"),
    ({"train_bin": ids(*[65535] * 5000)}, "train.bin has the id 65535 at position 0; the vocabulary has 3"),
    ({"val_bin": ids(0, 1, 2, 3)}, "val.bin has the id 3 at position 3; the vocabulary has 3"),
    ({"meta_pkl": b"cbuiltins\nopen\n(S'canary'\nS'w'\ntR."}, "more than plain data"),
    ({"meta_pkl": pickle.dumps({"vocab_size": 10**12})}, "no character vocabulary"),
    ({"meta_json": b"{"}, "not valid JSON"),
]


@pytest.mark.parametrize(("files", "reason"), ODD, ids=[reason for _, reason in ODD])
def test_odd_token_files_are_refused_before_a_job_is_made(workspace, files, reason, monkeypatch):
    monkeypatch.chdir(workspace.root)
    source = make(workspace, "a", **(GOOD | files))
    with pytest.raises(NotLoadable, match=reason):
        source.check("char")
    with pytest.raises(NotLoadable, match=reason):
        source.prepare(char_tokenizer("abc"))
    assert source.describe()["name"] == "a"
    assert not (workspace.root / "canary").exists()


@pytest.mark.parametrize("missing", ["train_bin", "val_bin"])
def test_one_token_file_alone_is_refused(workspace, missing):
    source = make(workspace, "a", **{k: v for k, v in GOOD.items() if k != missing})
    for attempt in (lambda: source.check("char"), lambda: source.prepare(char_tokenizer("abc"))):
        with pytest.raises(NotFound, match=missing.replace("_", ".")):
            attempt()


def test_token_files_shorter_than_a_block_are_refused_by_check(workspace):
    with pytest.raises(NotLoadable, match=r"has 300 tokens in train\.bin; block_size 512 needs 513"):
        make(workspace, "a", **GOOD).check("char", 512)


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "meta.pkl", "text.txt"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_links_pipes_and_folders_in_the_place_of_files_are_refused_at_once(workspace, file, kind):
    source, started = make(workspace, "a", **GOOD), time.monotonic()
    path = source.folder / file
    path.unlink(missing_ok=True)
    makers = {"link": lambda: path.symlink_to("/etc/passwd"), "fifo": lambda: os.mkfifo(path), "folder": path.mkdir}
    makers[kind]()
    with pytest.raises(NotLoadable):
        source.check("char")
    assert isinstance(source.describe()["error"], str)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("where", ["", "tokens"])
def test_a_dataset_whose_folders_cannot_be_read_is_listed_with_the_reason(workspace, monkeypatch, where):
    for name in ("bad", "good"):
        make(workspace, name, text_txt=TEXT).prepare(BPE)
    listdir, denied = os.listdir, str(workspace.data / "bad" / where)

    def read(path):
        if str(path) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", read)
    bad, good = (each.describe() for each in datasets(workspace))
    assert bad["error"].endswith("cannot be read: Permission denied") and good["error"] is None


def test_a_file_in_the_place_of_the_tokens_is_told(workspace):
    source = make(workspace, "a", text_txt=TEXT, tokens=b"")
    assert source.describe()["error"] == "a/tokens cannot be read: Not a directory"


def test_a_linked_folder_is_no_dataset(workspace):
    (workspace.data / "etc").symlink_to("/etc")
    with pytest.raises(NotLoadable, match="link"):
        dataset(workspace, "etc")
    assert datasets(workspace) == []


def test_a_linked_folder_of_tokens_is_not_followed(workspace):
    source = make(workspace, "a", text_txt=TEXT)
    (source.folder / "tokens").symlink_to("/tmp")
    with pytest.raises((NotLoadable, OSError)):
        source.prepare(BPE)


# ---- names and listing


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "a\0b", "`id`", "a\nb", "-x", "x" * 65, 3, None, True, ["a"]]
)
def test_a_name_no_client_may_give_is_refused(workspace, name):
    with pytest.raises(BadName, match="dataset is"):
        dataset(workspace, name)


def test_an_unknown_dataset_is_refused_with_those_that_exist(workspace):
    make(workspace, "mine", text_txt=TEXT)
    with pytest.raises(NotFound, match='no dataset "other"; there are: mine'):
        dataset(workspace, "other")


def test_where_there_is_no_dataset_the_refusal_says_how_to_upload_one(workspace):
    with pytest.raises(NotFound, match=r'no dataset "other", nor any other; upload one: .*api_client\.py upload FILE'):
        dataset(workspace, "other")


def test_the_old_spelling_of_shakespeare_works(workspace):
    make(workspace, "shakespeare", text_txt=TEXT)
    assert dataset(workspace, "shakesphere").name == "shakespeare"


def test_a_file_is_no_dataset(workspace):
    (workspace.data / "a").write_text("x")
    with pytest.raises(NotLoadable, match="not a folder"):
        dataset(workspace, "a")


def test_without_a_data_folder_there_are_no_datasets(tmp_path):
    assert datasets(Workspace(tmp_path)) == []
    with pytest.raises(NotFound):
        dataset(Workspace(tmp_path), "a")


def test_the_list_tells_what_each_dataset_is(workspace):
    make(workspace, "text", text_txt=TEXT)
    make(workspace, "lines", d_jsonl=jsonl(["a", "b", "c"]))
    make(workspace, "nano", **GOOD)
    make(workspace, "script", prepare_py="")
    (workspace.data / ".hidden").mkdir()
    found = {d.name: d.describe() for d in datasets(workspace)}
    assert {name: d["source"] for name, d in found.items()} == {
        "lines": "text",
        "nano": "nanoGPT",
        "script": "script",
        "text": "text",
    }
    assert [(d["documents"], d["prepared"]) for d in found.values()] == [
        (3, False),
        (None, True),
        (None, False),
        (1, False),
    ]
    assert (found["text"]["bytes"], found["nano"]["bytes"]) == (len(TEXT.encode()), 1200)
    assert all(d["error"] is None for d in found.values())


def test_large_files_are_not_read_for_the_list(workspace, monkeypatch):
    monkeypatch.setattr(documents, "COUNTED_BYTES", 10)
    assert make(workspace, "a", d_jsonl=jsonl(["a"] * 9)).describe()["documents"] is None


def test_a_folder_with_nothing_to_train_on_is_refused(workspace):
    source = make(workspace, "a", notes_md="hi")
    for attempt in (lambda: source.check("auto"), lambda: source.prepare(BPE)):
        with pytest.raises(NotFound, match=r"no .txt or .jsonl file, no train.bin and no prepare.py"):
            attempt()


def test_text_smaller_than_a_block_is_refused_by_check(workspace):
    source = make(workspace, "a", text_txt="hello")
    source.check("gpt2")
    with pytest.raises(NotLoadable, match="5 bytes of text, too little for a window of 64 tokens; lower"):
        source.check("gpt2", 64)


# ---- prepare.py

SCRIPT = """
import sys
from pathlib import Path
from storage.files import NAME
folder = Path(__file__).parent
(folder / "runs").open("a").write("x")
print("getting it")
"""


def test_a_dataset_without_text_is_made_by_its_script_first(workspace, capfd):
    source = make(workspace, "a", prepare_py=SCRIPT + f"(folder / 'input.txt').write_text({TEXT!r}, encoding='utf-8')")
    source.check("bpe:300", 64)
    assert "".join(texts_of(source.prepare(BPE))) == TEXT
    source.prepare(LETTERS)
    assert (source.folder / "runs").read_text() == "x"
    assert "getting it" in capfd.readouterr().out


def test_a_failing_script_fails_the_preparation(workspace):
    source = make(workspace, "a", prepare_py=SCRIPT + "sys.exit('no network')")
    with pytest.raises(NotLoadable, match=r"dataset a could not be fetched: its prepare.py ended with code 1"):
        source.prepare(BPE)


def test_a_script_that_makes_nothing_is_noticed(workspace):
    with pytest.raises(NotLoadable, match=r"neither text nor tokens after its prepare\.py"):
        make(workspace, "a", prepare_py=SCRIPT).prepare(BPE)


def test_a_script_that_was_stopped_between_two_files_runs_again(workspace):
    finish = f"(folder / 'val.bin').write_bytes({ABC!r})"
    source = make(workspace, "a", prepare_py=SCRIPT + finish, train_bin=ABC, meta_pkl=meta_pkl("abc"))
    assert len(source.prepare(char_tokenizer("abc")).val) == 300


def test_a_linked_script_is_not_run(workspace):
    source = make(workspace, "a")
    (source.folder / "prepare.py").symlink_to(Path(__file__))
    with pytest.raises(NotFound):
        source.prepare(BPE)


# ---- which tokenizer


@pytest.mark.parametrize("spec", ["auto", "gpt2", "char", "bpe:257", "bpe:1024", "bpe:65536"])
def test_words_for_a_tokenizer(spec):
    assert check_spec(spec) == spec


@pytest.mark.parametrize(
    "spec", ["", "bpe", "bpe:", "bpe:256", "bpe:65537", "bpe:-1", "bpe:1e3", "bpe:²", "1024", None, 3]
)
def test_other_words_for_a_tokenizer_are_refused(spec):
    with pytest.raises(BadName, match="it must be auto, gpt2, char or bpe:N with N from 257 to 65536"):
        check_spec(spec)


def test_auto_is_byte_pairs_for_text_and_the_own_tokenizer_for_token_files(workspace):
    text = make(workspace, "text", text_txt=TEXT)
    assert 257 < tokenizer_for("auto", text, workspace).n_vocab < 1024  # the text has no more pairs
    nano = make(workspace, "nano", **GOOD)
    assert tokenizer_for("auto", nano, workspace).n_vocab == 3
    assert tokenizer_for("char", nano, workspace).n_vocab == 3


def test_byte_pairs_have_the_size_asked_for_or_are_refused(workspace):
    source = make(workspace, "a", text_txt=TEXT)
    assert tokenizer_for("bpe:290", source, workspace).n_vocab == 290
    with pytest.raises(NotLoadable, match="dataset a is too small for the tokenizer bpe:5000"):
        tokenizer_for("bpe:5000", source, workspace)


def test_characters_are_all_those_of_the_text_but_not_thousands(workspace):
    source = make(workspace, "a", text_txt=TEXT)
    assert tokenizer_for("char", source, workspace).fingerprint == char_tokenizer(TEXT).fingerprint
    many = make(workspace, "b", text_txt="".join(map(chr, range(0x4E00, 0x5300))))
    with pytest.raises(NotLoadable, match=r"has 1280 different characters, more than 1024: take bpe:N"):
        tokenizer_for("char", many, workspace)


def test_no_vocabulary_can_be_made_of_token_files(workspace):
    with pytest.raises(NotLoadable, match="no text to make a vocabulary of"):
        tokenizer_for("bpe:300", make(workspace, "a", **GOOD), workspace)


def test_a_sample_of_the_text_comes_from_all_over_it(workspace):
    source = make(workspace, "a", d_jsonl=jsonl([f"document {i:04}" for i in range(1000)]))
    sample = source.training_text(3000)
    assert 1000 < len(sample) < 6000
    assert "document 0000\n" in sample and "document 09" in sample
    assert len(source.training_text().splitlines()) == 1000


# ---- uploads


def send(workspace: Workspace, name: object, filename: object, data: bytes, limit: int = 10**6) -> Dataset:
    return upload(workspace, name, filename, io.BytesIO(data), limit)[0]


def test_an_uploaded_text_becomes_a_dataset(workspace):
    source = send(workspace, "mine", "book.TXT", TEXT.encode())
    assert os.listdir(source.folder) == ["text.txt"]
    assert "".join(texts_of(source.prepare(BPE))) == TEXT


def test_uploaded_lines_become_documents(workspace, shared):
    data = (shared / "data/finetune_jsonl/toy_chat_fine_tuning.jsonl").read_bytes()
    found = send(workspace, None, "chat.jsonl", data).describe()
    assert (found["name"], found["documents"]) == ("chat", len(data.strip().splitlines()))


@pytest.mark.parametrize("name", ["../x", "", ".", "a/b", 7, "x\n"])
def test_an_upload_needs_a_proper_name(workspace, name):
    with pytest.raises(BadName):
        send(workspace, name, "a.txt", b"hello")
    assert os.listdir(workspace.data) == []


@pytest.mark.parametrize(
    "filename", ["../../tmp/x.txt", "/etc/x.txt", "C:\\x.txt", ".bashrc.txt", ".txt", "a\0.txt", "a\r\n.jsonl"]
)
def test_the_file_name_is_never_a_path(workspace, filename):
    with pytest.raises(BadName):
        send(workspace, None, filename, b'{"text": "hello"}')
    send(workspace, "fine", filename, b'{"text": "hello"}')
    assert os.listdir(workspace.data) == ["fine"]


@pytest.mark.parametrize("filename", ["a.zip", "a.tar.gz", "a.txt.gz", "a", "", "a.py", "a.json", None, 3])
def test_other_kinds_of_files_are_refused(workspace, filename):
    with pytest.raises(BadName, match=r"must be a \.txt or \.jsonl file, and archives are not unpacked"):
        send(workspace, "mine", filename, b"hello")


@pytest.mark.parametrize(
    ("filename", "data", "reason"),
    [
        ("a.txt", b"\x1f\x8b\x08\0\0", "gzip archive"),
        ("a.jsonl", b"PK\x03\x04xx", "zip archive"),
        ("a.txt", b"a\0b", "NUL byte"),
        ("a.txt", b"a\xffb", "^file is not UTF-8 text at byte 1; if it has another encoding, upload it"),
        ("a.txt", b"", "no text"),
        ("a.jsonl", b"\n\n", "no text"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "^file line 2 cannot be used: it is not JSON"),
        ("a.jsonl", b'{"a":\nnot json\n', "line 1 cannot be used"),
    ],
)
def test_an_upload_without_usable_text_is_refused_and_not_kept(workspace, filename, data, reason):
    with pytest.raises(NotLoadable, match=reason):
        send(workspace, "mine", filename, data)
    assert os.listdir(workspace.data) == []


def test_an_upload_over_the_limit_is_refused_while_it_comes(workspace):
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return b"a" * size

    with pytest.raises(TooLarge, match="more than 5000000 bytes"):
        upload(workspace, "mine", "a.txt", Endless(), 5_000_000)
    assert os.listdir(workspace.data) == []


def test_a_connection_that_breaks_leaves_nothing(workspace):
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        upload(workspace, "mine", "a.txt", Broken(), 100)
    assert os.listdir(workspace.data) == []


@pytest.mark.parametrize("name", ["mine", "shakespeare", "shakesphere"])
def test_an_upload_never_replaces_a_dataset(workspace, name):
    make(workspace, "mine", text_txt=TEXT)
    make(workspace, "shakespeare", prepare_py="")
    with pytest.raises(Exists, match=r"there is a dataset .* already"):
        send(workspace, name, "a.txt", b"hello")
    assert (workspace.data / "mine/text.txt").read_text(encoding="utf-8") == TEXT


def test_of_two_uploads_at_once_one_wins(workspace):
    inner = []

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if not inner:
                inner.append(send(workspace, "mine", "b.txt", b"the quick one"))
            return super().read(size)

    with pytest.raises(Exists):
        upload(workspace, "mine", "a.txt", Slow(b"the slow one"), 100)
    assert (workspace.data / "mine/text.txt").read_bytes() == b"the quick one"
    assert os.listdir(workspace.data) == ["mine"]


def test_a_deleted_dataset_is_in_the_trash_and_no_longer_listed(workspace):
    make(workspace, "mine", text_txt=TEXT).prepare(BPE)
    delete(workspace, "mine")
    assert os.listdir(workspace.data) == [".trash"] and datasets(workspace) == []
    (kept,) = (workspace.data / ".trash").iterdir()
    assert (kept / "text.txt").exists()
    with pytest.raises(NotFound):
        delete(workspace, "mine")


def test_of_two_deletions_at_once_the_slower_one_finds_nothing(workspace, monkeypatch):
    make(workspace, "mine", text_txt=TEXT)

    def beaten(folder):
        monkeypatch.undo()
        delete(workspace, "mine")
        return move_to_trash(folder)

    monkeypatch.setattr(uploads, "move_to_trash", beaten)
    with pytest.raises(NotFound, match="the dataset mine has just been deleted"):
        delete(workspace, "mine")


def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")


def test_on_a_read_only_disk_a_dataset_is_not_deleted(workspace, monkeypatch):
    make(workspace, "mine", text_txt=TEXT)
    monkeypatch.setattr(os, "rename", read_only)
    with pytest.raises(NotWritable, match="the disk is read-only: data/mine could not be written"):
        delete(workspace, "mine")
    assert [found.name for found in datasets(workspace)] == ["mine"]


def test_of_a_dataset_with_a_script_only_what_it_can_make_is_deleted(workspace):
    source = make(workspace, "a", prepare_py="", README_md="hi", text_txt=TEXT, train_bin=ABC)
    source.prepare(BPE)
    (source.folder / "link").symlink_to(workspace.root)
    delete(workspace, "a")
    assert sorted(os.listdir(source.folder)) == ["README.md", "prepare.py"]
    assert workspace.root.exists()


def test_importing_datasets_is_cheap():
    heavy = "{'torch', 'datasets', 'tokenizers'}"
    code = f"import sys, storage.uploads, storage.tokenizer_choice; print(*({heavy} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
