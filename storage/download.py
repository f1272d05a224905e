"""Getting text from elsewhere, for the scripts data/<name>/prepare.py: a file by its address, or many documents.

What arrives goes into a file with another name until it is complete and checked, and a second run goes on where
the first one stopped. The addresses stand in the scripts; none ever comes from a request. How the scripts report
progress and failure is here too, so that each of them is only what is particular to it.
"""

import fcntl
import hashlib
import http.client
import itertools
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import NotLoadable, StorageError, Unreachable
from storage.files import require_space, sync_folder

READ_BYTES = 2**18
TIMEOUT_SECONDS = 20.0  # without a byte
ATTEMPTS = 3
STOPPED = 130  # exit code after Ctrl-C

Report = Callable[[str, int, int | None], None]  # what arrives, bytes of it that are here, of how many


class ProgressLine:
    """Prints how far something is: one line that is overwritten on a terminal, now and then a line in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._next = 0.0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Print if the last time is long enough ago, or if this is the end."""
        now = time.monotonic()
        if now < self._next and done != total:
            return
        self._next = now + (0.2 if self._terminal else 5.0)
        of = "" if total is None else f" of {total / 1e6:,.1f}"
        end = "\r" if self._terminal and done != total else "\n"
        print(f"{what}: {done / 1e6:,.1f}{of} MB", end=end, flush=True)


def run_script(main: Callable[[], None]) -> int:
    """Run a script's main; return its exit code after saying in one line on stderr what went wrong, if anything."""
    try:
        main()
    except (StorageError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run it again to go on", file=sys.stderr)
        return STOPPED
    return 0


# ---- one file


def _partial(path: Path) -> Path:
    """Return where a file grows until it is complete; no dataset lists this name."""
    return path.with_name(f".{path.name}.part")


def _lock(f: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NotLoadable(f"another process is getting {path.name} at this moment") from None


def _receive(url: str, f: BinaryIO, size: int, report: Report) -> None:
    """Append what is missing of `size` bytes to `f`; raises OSError or HTTPException when the transfer breaks."""
    have = f.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
        if have and reply.status != 206:  # the server sends all of it again
            f.truncate(0)
            have = f.seek(0)
        while have <= size and (data := reply.read(READ_BYTES)):  # one read too many shows a file that is too long
            f.write(data)
            have += len(data)
            report(url.rsplit("/", 1)[-1], have, size)


def _complete(url: str, f: BinaryIO, size: int, report: Report) -> None:
    """Receive all of the file, going on after broken transfers; raises Unreachable when that leads nowhere."""
    reason = "it sent too little"
    for _ in range(ATTEMPTS):
        try:
            if f.seek(0, os.SEEK_END) < size:
                _receive(url, f, size, report)
        except urllib.error.HTTPError as e:
            reason = f"it answered {e.code}"
        except (OSError, http.client.HTTPException) as e:
            reason = str(getattr(e, "reason", None) or e or type(e).__name__)
        if f.seek(0, os.SEEK_END) >= size:
            return
    have = f.seek(0, os.SEEK_END)
    raise Unreachable(f"{url} could not be fetched, {have} of {size} bytes are here: {reason}; run it again to go on")


def _digest(f: BufferedReader | BufferedRandom) -> str:
    f.seek(0)
    return hashlib.file_digest(f, "sha256").hexdigest()


def has_digest(path: Path, sha256: str) -> bool:
    """Say whether a file is there with this content."""
    if not path.is_file():
        return False
    with path.open("rb") as f:
        return _digest(f) == sha256


def download(url: str, path: Path, size: int, sha256: str, report: Report | None = None) -> None:
    """Fetch a file of known size and content to `path`, unless it is there already.

    Raises Unreachable when the address does not give it all, NotLoadable when it gives something else.
    """
    if has_digest(path, sha256):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, size)
    with _partial(path).open("a+b") as f:
        _lock(f, path)
        _complete(url, f, size, report or ProgressLine())
        if f.seek(0, os.SEEK_END) != size or _digest(f) != sha256:
            _partial(path).unlink()
            raise NotLoadable(f"{url} gave another file than the one that is known; nothing was kept")
        os.fsync(f.fileno())
        os.replace(_partial(path), path)
    sync_folder(path.parent)


# ---- many documents


def _keep_whole_lines(f: BinaryIO) -> int:
    """Cut off a last line without its end, as a stopped run leaves it; return the number of lines."""
    f.seek(0)
    lines, end = 0, 0
    for line in f:
        if line.endswith(b"\n"):
            lines, end = lines + 1, end + len(line)
    f.truncate(end)
    f.seek(end)
    return lines


def _write_lines(f: BinaryIO, records: Iterable[Mapping[str, Any]], limit_bytes: int | None, report: Report) -> None:
    for record in records:
        if limit_bytes is not None and f.tell() >= limit_bytes:
            break
        f.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        report("documents", f.tell(), limit_bytes)


def write_documents(
    path: Path,
    records_from: Callable[[int], Iterator[Mapping[str, Any]]],
    limit_bytes: int | None = None,
    report: Report | None = None,
) -> int:
    """Write records, such as {"text": …}, as lines of a .jsonl file; return how many there are.

    `records_from(n)` gives them without the first n: those that an earlier, stopped run has written. With a limit
    the file ends after the record that reaches it. Raises NotLoadable for none, and what `records_from` raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path).open("a+b") as f:
        _lock(f, path)
        done = _keep_whole_lines(f)
        if done:
            print(f"going on after {done:,} documents", flush=True)
        _write_lines(f, records_from(done), limit_bytes, report or ProgressLine())
        f.flush()
        count = _keep_whole_lines(f)
        if count == 0:
            raise NotLoadable(f"there are no documents for {path.name}")
        os.fsync(f.fileno())
        os.replace(_partial(path), path)
    sync_folder(path.parent)
    return count


def from_hub(repository: str, **where: str) -> Callable[[int], Iterator[Mapping[str, Any]]]:
    """Return a source for write_documents: the texts of a dataset on the Hugging Face hub, as a stream.

    `where` goes to datasets.load_dataset: split, revision, ... Only the column "text" is taken.
    """

    def records_from(skip: int) -> Iterator[Mapping[str, Any]]:
        import datasets  # takes a second, and only two of the scripts need it

        try:
            stream = datasets.load_dataset(repository, streaming=True, **where)
            for record in stream.skip(skip):
                yield {"text": record["text"]}
        except Exception as e:  # the hub's, the network's and the library's own kinds have no common base
            raise Unreachable(f"{repository} cannot be read from the Hugging Face hub: {_first_line(e)}") from e

    return records_from


def _first_line(error: Exception) -> str:
    lines = itertools.chain(str(error).splitlines(), [type(error).__name__])
    return next(line for line in lines if line.strip())[:300]
