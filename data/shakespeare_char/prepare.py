"""Make nanoGPT's shakespeare_char: tiny Shakespeare as characters, in train.bin, val.bin, meta.json and meta.pkl.

    python data/shakespeare_char/prepare.py

The text is the one of ../shakespeare, which is fetched if it is not there. The first nine tenths are train, and
the files are byte for byte those that nanoGPT's own script makes (meta.pkl: the same content).
"""

import pickle
import runpy
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from storage.download import run_script  # noqa: E402
from storage.files import replace_file, write_all, write_json  # noqa: E402
from storage.tokenizer import char_tokenizer  # noqa: E402

SHAKESPEARE = HERE.parent / "shakespeare"


def main() -> None:
    """Write the four files; val.bin comes last, so that a stopped run is seen as unfinished."""
    runpy.run_path(str(SHAKESPEARE / "prepare.py"))["main"]()
    text = (SHAKESPEARE / "input.txt").read_text(encoding="utf-8")
    tokenizer = char_tokenizer(text)
    stoi = {tokenizer.decode([i]): i for i in range(tokenizer.n_vocab)}
    write_json(HERE / "meta.json", {"vocab_size": len(stoi), "stoi": stoi})
    meta = {"vocab_size": len(stoi), "itos": {i: character for character, i in stoi.items()}, "stoi": stoi}
    replace_file(HERE / "meta.pkl", partial(write_all, data=pickle.dumps(meta)))  # for nanoGPT; nothing here reads it
    ids = tokenizer.encode_array(text).astype("<u2")
    cut = int(len(ids) * 0.9)
    replace_file(HERE / "train.bin", partial(write_all, data=ids[:cut].tobytes()))
    replace_file(HERE / "val.bin", partial(write_all, data=ids[cut:].tobytes()))
    print(f"{len(stoi)} characters, {cut:,} tokens in train.bin, {len(ids) - cut:,} in val.bin")


if __name__ == "__main__":
    sys.exit(run_script(main))
