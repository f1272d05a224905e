"""Collect the Python sources of the running interpreter's standard library as documents.jsonl: no network needed.

    python data/stdlib/prepare.py [--limit_bytes 2000000]

One document per module, in the order of their paths, without the tests (which would be half of it) and without
installed packages.
"""

import argparse
import itertools
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from storage.download import run_script, write_documents  # noqa: E402

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo", "lib2to3"}


def modules(library: Path) -> Iterator[Path]:
    """Give the paths of all modules, in the same order on every machine."""
    for folder, below, files in os.walk(library):
        below[:] = sorted(name for name in below if name not in SKIPPED)
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".py"))


def documents(library: Path) -> Iterator[dict[str, str]]:
    """Give the modules' sources; files that cannot be read as UTF-8 are left out."""
    for path in modules(library):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and "\0" not in text:
            yield {"text": text, "path": path.relative_to(library).as_posix()}


def main() -> None:
    """Write documents.jsonl beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit_bytes", type=int, default=None, help="stop after about this much")
    limit = parser.parse_args().limit_bytes
    library = Path(sysconfig.get_paths()["stdlib"])
    target = HERE / "documents.jsonl"
    count = write_documents(target, lambda skip: itertools.islice(documents(library), skip, None), limit)
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"{count:,} modules of Python {version} in {target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(run_script(main))
