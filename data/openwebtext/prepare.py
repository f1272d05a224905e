"""Get OpenWebText (8 million web pages, 40 GB) from the Hugging Face hub as documents.jsonl.

    python data/openwebtext/prepare.py [--limit_bytes 1000000000]

The pages are streamed; a run that was stopped goes on where it was. It is the open remake of GPT-2's own training
data. The hub's main version is a script, which the package `datasets` no longer runs, so this takes the hub's
conversion to Parquet; where that holds only a part of the pages, the last line says so.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from storage.download import from_hub, run_script, write_documents  # noqa: E402
from storage.files import require_space  # noqa: E402

REPOSITORY, REVISION = "Skylion007/openwebtext", "refs/convert/parquet"
BYTES, DOCUMENTS = 42_000_000_000, 8_013_769


def main() -> None:
    """Write documents.jsonl beside this script unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit_bytes", type=int, default=None, help="stop after about this much")
    limit, target = parser.parse_args().limit_bytes, HERE / "documents.jsonl"
    if not target.exists():
        require_space(HERE, BYTES if limit is None else limit)
        count = write_documents(target, from_hub(REPOSITORY, split="train", revision=REVISION), limit)
        print(f"{count:,} of {DOCUMENTS:,} pages")
    print(f"{target} is there: {target.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    sys.exit(run_script(main))
