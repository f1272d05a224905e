"""Get a part of FineWeb-Edu (web pages chosen for their educational value) from the Hugging Face hub.

    python data/fineweb-edu/prepare.py [--limit_bytes 1000000000]

The pages are streamed from the hub's sample of 10 billion tokens; a run that was stopped goes on where it was.
They become documents.jsonl, 1 GB unless told otherwise: enough for the small presets.
Penedo et al. 2024, arXiv 2406.17557.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from storage.download import from_hub, run_script, write_documents  # noqa: E402
from storage.files import require_space  # noqa: E402

REPOSITORY, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"
BYTES = 1_000_000_000


def main() -> None:
    """Write documents.jsonl beside this script unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit_bytes", type=int, default=BYTES, help="stop after about this much")
    limit, target = parser.parse_args().limit_bytes, HERE / "documents.jsonl"
    if not target.exists():
        require_space(HERE, limit)
        count = write_documents(target, from_hub(REPOSITORY, name=SAMPLE, split="train"), limit)
        print(f"{count:,} pages")
    print(f"{target} is there: {target.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    sys.exit(run_script(main))
