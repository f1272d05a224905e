"""Get TinyStories (2.1 million short stories, 2 GB) from the Hugging Face hub as documents.jsonl.

    python data/tinystories/prepare.py [--limit_bytes 100000000]

The stories are streamed; a run that was stopped goes on where it was. Eldan and Li 2023, arXiv 2305.07759.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from storage.download import from_hub, run_script, write_documents  # noqa: E402
from storage.files import require_space  # noqa: E402

REPOSITORY = "roneneldan/TinyStories"
BYTES = 2_100_000_000


def main() -> None:
    """Write documents.jsonl beside this script unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit_bytes", type=int, default=None, help="stop after about this much")
    limit, target = parser.parse_args().limit_bytes, HERE / "documents.jsonl"
    if not target.exists():
        require_space(HERE, BYTES if limit is None else limit)
        count = write_documents(target, from_hub(REPOSITORY, split="train"), limit)
        print(f"{count:,} stories")
    print(f"{target} is complete: {target.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    sys.exit(run_script(main))
