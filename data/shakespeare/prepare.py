"""Get tiny Shakespeare (1.1 MB, 40,000 lines of the plays) as input.txt beside this script.

    python data/shakespeare/prepare.py

The text is tokenized later, for the model that trains on it. Without network: put input.txt here yourself.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from storage.download import download, run_script  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1115394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main() -> None:
    """Fetch the text unless it is there."""
    download(URL, HERE / "input.txt", SIZE, SHA256)
    print(f"{HERE / 'input.txt'} is complete")


if __name__ == "__main__":
    sys.exit(run_script(main))
