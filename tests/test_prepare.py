"""The scripts data/<name>/prepare.py and what they stand on: text arrives whole and checked, or not at all."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from storage.download import download, from_hub, run_script, write_documents
from storage.errors import NotLoadable, Unreachable

ROOT = Path(__file__).resolve().parent.parent
CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def quiet(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


class Files(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT at any path, from where a Range header says, as the server's attributes tell it to."""

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and self.server.resumes else 0
        body = self.server.content[start:]
        self.send_response(self.server.status or (206 if start else 200))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that has had enough
            self.wfile.write(body[: self.server.breaks_after.pop(0) if self.server.breaks_after else None])

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as found:
        found.content, found.resumes, found.breaks_after, found.ranges, found.status = CONTENT, True, [], [], None
        found.url = f"http://127.0.0.1:{found.server_port}/input.txt"
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def fetch(server, path: Path) -> None:
    download(server.url, path, len(CONTENT), SHA256, quiet)


# ---- one file


def test_a_file_arrives_whole(server, tmp_path):
    fetch(server, tmp_path / "new" / "input.txt")
    assert (tmp_path / "new" / "input.txt").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "new") == ["input.txt"]


def test_a_file_that_is_there_is_not_fetched_again(server, tmp_path):
    fetch(server, tmp_path / "input.txt")
    fetch(server, tmp_path / "input.txt")
    assert server.ranges == [None]


def test_a_broken_transfer_goes_on_where_it_broke(server, tmp_path):
    server.breaks_after = [300_000, 100_000]
    fetch(server, tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=400000-"]


def test_a_second_run_goes_on_where_the_first_stopped(server, tmp_path):
    (tmp_path / ".input.txt.part").write_bytes(CONTENT[:1000])
    fetch(server, tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_server_that_cannot_resume_sends_all_again(server, tmp_path):
    server.resumes = False
    (tmp_path / ".input.txt.part").write_bytes(b"x" * 1000)
    fetch(server, tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == CONTENT


def test_a_server_that_keeps_breaking_off_is_given_up_and_what_came_is_kept(server, tmp_path):
    server.breaks_after = [1000, 1000, 1000]
    with pytest.raises(Unreachable, match=r"3000 of 1024000 bytes are here: .* run it again"):
        fetch(server, tmp_path / "input.txt")
    assert os.listdir(tmp_path) == [".input.txt.part"]


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"more"], ids=["changed", "longer"])
def test_another_file_than_the_known_one_is_not_kept(server, tmp_path, content):
    server.content = content
    with pytest.raises(NotLoadable, match="another file"):
        fetch(server, tmp_path / "input.txt")
    assert os.listdir(tmp_path) == []


def test_a_damaged_start_is_not_continued_for_ever(server, tmp_path):
    (tmp_path / ".input.txt.part").write_bytes(b"x" * 1000)
    with pytest.raises(NotLoadable):
        fetch(server, tmp_path / "input.txt")
    fetch(server, tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == CONTENT


def test_a_missing_file_is_reported_with_the_status(server, tmp_path):
    server.status = 404
    with pytest.raises(Unreachable, match="it answered 404"):
        fetch(server, tmp_path / "input.txt")


def test_a_host_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(Unreachable, match="0 of 10 bytes are here"):
        download("http://127.0.0.1:1/x", tmp_path / "x", 10, SHA256, quiet)


# ---- many documents


def records_from(skip: int):
    return ({"text": f"document {i}"} for i in range(skip, 100))


def read_lines(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def test_documents_become_lines(tmp_path):
    assert write_documents(tmp_path / "d.jsonl", records_from, None, quiet) == 100
    assert read_lines(tmp_path / "d.jsonl") == [f"document {i}" for i in range(100)]
    assert os.listdir(tmp_path) == ["d.jsonl"]


def test_a_stopped_run_goes_on_after_the_last_whole_line(tmp_path):
    def breaking(skip: int):
        for i, record in enumerate(records_from(skip)):
            if i == 30:
                raise Unreachable("gone")
            yield record

    with pytest.raises(Unreachable):
        write_documents(tmp_path / "d.jsonl", breaking, None, quiet)
    with (tmp_path / ".d.jsonl.part").open("ab") as f:
        f.write(b'{"text": "half')
    assert write_documents(tmp_path / "d.jsonl", records_from, None, quiet) == 100
    assert read_lines(tmp_path / "d.jsonl") == [f"document {i}" for i in range(100)]


def test_a_limit_ends_the_file_after_the_record_that_reaches_it(tmp_path):
    count = write_documents(tmp_path / "d.jsonl", records_from, 100, quiet)
    assert count == len(read_lines(tmp_path / "d.jsonl")) == 5


def test_no_documents_are_no_file(tmp_path):
    with pytest.raises(NotLoadable, match="no documents"):
        write_documents(tmp_path / "d.jsonl", lambda skip: iter(()), None, quiet)
    assert not (tmp_path / "d.jsonl").exists()


def test_two_processes_do_not_write_one_file(tmp_path):
    def inside(skip: int):
        with pytest.raises(NotLoadable, match="another process"):
            write_documents(tmp_path / "d.jsonl", records_from, None, quiet)
        yield from records_from(skip)

    assert write_documents(tmp_path / "d.jsonl", inside, None, quiet) == 100


# ---- the hub


HUB = """
import itertools, os

class Stream:
    def skip(self, n):
        return itertools.islice(self.records(), n, None)

    def records(self):
        for i in range(100):
            if i == int(os.environ.get("HUB_BREAKS_AT", 100)):
                raise RuntimeError("first line" + chr(10) + "second line")
            yield {"text": f"document {i}", "url": "https://example.org"}

def load_dataset(repository, split, streaming, name=None, revision="main"):
    assert streaming and split == "train"
    return Stream()
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a small `datasets` package in the place of the real one, whose import alone takes seconds."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "datasets.py").write_text(HUB)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    yield tmp_path / "fake"
    sys.modules.pop("datasets", None)


def test_a_stream_of_the_hub_gives_its_texts_without_the_first_ones(hub):
    assert next(from_hub("someone/something", split="train")(98)) == {"text": "document 98"}


def test_a_hub_that_breaks_off_is_one_sentence(hub, monkeypatch):
    monkeypatch.setenv("HUB_BREAKS_AT", "1")
    with pytest.raises(Unreachable, match=r"^someone/something cannot be read .*: first line$"):
        list(from_hub("someone/something", split="train")(0))


# ---- scripts


def test_a_failing_script_says_why_in_one_line_and_returns_1(capsys):
    def fail() -> None:
        raise Unreachable("no network")

    assert run_script(fail) == 1
    assert capsys.readouterr().err == "error: no network\n"


def test_a_stopped_script_says_that_it_can_go_on(capsys):
    def stop() -> None:
        raise KeyboardInterrupt

    assert run_script(stop) == 130
    assert "run it again" in capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    """Return a folder data/ with copies of the scripts, so that they write there."""
    for script in sorted((ROOT / "data").glob("*/prepare.py")):
        (tmp_path / "data" / script.parent.name).mkdir(parents=True)
        shutil.copy(script, tmp_path / "data" / script.parent.name)
    return tmp_path / "data"


def run(data: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(data / name / "prepare.py"), *arguments]
    env = {**os.environ, "PYTHONPATH": f"{data.parent / 'fake'}:{ROOT}"}
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=50, check=False)


def test_every_script_explains_itself(data):
    for script in data.glob("*/prepare.py"):
        assert f"python data/{script.parent.name}/prepare.py" in script.read_text(encoding="utf-8")


def test_stdlib_collects_modules_in_the_same_order_each_time(data):
    done = run(data, "stdlib", "--limit_bytes", "200000")
    assert done.returncode == 0, done.stderr
    first = (data / "stdlib/documents.jsonl").read_bytes()
    assert run(data, "stdlib", "--limit_bytes", "200000").returncode == 0
    assert (data / "stdlib/documents.jsonl").read_bytes() == first
    paths = [json.loads(line)["path"] for line in first.splitlines()]
    assert 200_000 <= len(first) < 600_000
    assert "__future__.py" in paths and not any("test/" in path for path in paths)


def test_a_script_runs_by_itself_from_any_folder(tmp_path):
    argv = [sys.executable, str(ROOT / "data/stdlib/prepare.py"), "--help"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=True)
    assert "--limit_bytes" in done.stdout


def test_shakespeare_char_makes_the_files_of_nanogpt(data, shared):
    shutil.copy(shared / "data/tinyshakespeare/input.txt", data / "shakespeare")
    done = run(data, "shakespeare_char")
    assert done.returncode == 0, done.stderr
    theirs = shared / "data/nanogpt/prepared_shakespeare_char"
    for name in ("train.bin", "val.bin"):
        assert (data / "shakespeare_char" / name).read_bytes() == (theirs / name).read_bytes()
    stoi = json.loads((data / "shakespeare_char/meta.json").read_text())["stoi"]
    assert np.fromfile(theirs / "train.bin", dtype="<u2")[0] == stoi["F"]


@pytest.mark.parametrize("name", ["tinystories", "openwebtext", "fineweb-edu"])
def test_a_streamed_dataset_goes_on_after_a_break(hub, data, name, monkeypatch):
    monkeypatch.setenv("HUB_BREAKS_AT", "60")
    done = run(data, name, "--limit_bytes", "10000")
    assert (done.returncode, done.stderr.splitlines()[-1][:7]) == (1, "error: ")
    assert "Traceback" not in done.stderr
    assert not (data / name / "documents.jsonl").exists()
    monkeypatch.delenv("HUB_BREAKS_AT")
    assert "going on after 60 documents" in run(data, name, "--limit_bytes", "10000").stdout
    assert read_lines(data / name / "documents.jsonl") == [f"document {i}" for i in range(100)]
    assert run(data, name).returncode == 0


# ---- the real library, on local files of the same shape

ON_THE_HUB = {  # dataset -> its files on the hub, and what a record has there beside its text
    "tinystories": (
        ["roneneldan/TinyStories/data/train-00000-of-00002.parquet"]
        + ["roneneldan/TinyStories/data/train-00001-of-00002.parquet"]
        + ["roneneldan/TinyStories/data/validation-00000-of-00001.parquet"],
        {},
    ),
    "openwebtext": (
        [f"Skylion007/openwebtext/plain_text/partial-train/000{i}.parquet" for i in range(2)],
        {},
    ),
    "fineweb-edu": (
        [f"HuggingFaceFW/fineweb-edu/sample/10BT/00{i}_00000.parquet" for i in range(2)]
        + ["HuggingFaceFW/fineweb-edu/data/CC-MAIN-2024-10/train-00000-of-00014.parquet"],
        {"id": "<urn:uuid:0>", "url": "https://example.org", "score": 3.2, "int_score": 3, "token_count": 9},
    ),
}
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""
ALL = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, script
"""


def write_hub(root: Path) -> None:
    """Write files as the hub has them; each file's texts carry its name."""
    import pyarrow
    import pyarrow.parquet

    for files, more in ON_THE_HUB.values():
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            rows = [{"text": f"{file} {i}\r\n“quoted”", **more} for i in range(3)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / file)
    (root / "HuggingFaceFW/fineweb-edu/README.md").write_text(CARD)


def test_the_real_library_streams_files_of_the_hubs_shape(data, tmp_path):
    write_hub(tmp_path / "hub")
    argv = [sys.executable, "-c", ALL, *(str(data / name / "prepare.py") for name in ON_THE_HUB)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, cwd=tmp_path / "hub", env=env, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    for name, (files, _) in ON_THE_HUB.items():
        wanted = [file for file in files if "validation" not in file and "CC-MAIN" not in file]
        assert [text.split()[0] for text in read_lines(data / name / "documents.jsonl")] == [
            file for file in wanted for _ in range(3)
        ]
