"""The tokenizers: equal to tiktoken and to Hugging Face's `tokenizers`, safe with hostile files, exact in streams."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import tokenizer as door
from storage.tokenizer import char_tokenizer, train_bpe

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler — naïve 🌍, 안녕 — we'll see in 2024!\n" * 4
HARD = ["", " ", "\n\n  x", "a" * 5000, "<|endoftext|>", "e\u0301", "👩‍👩‍👧", "\u00a0\u3000\t", "\r\n", "ﷺ", "I'll", "x\x00y", "𝔘"]


@pytest.fixture(scope="module")
def gpt2_files():
    folder = Path(__file__).resolve().parent.parent.parent / "shared/data/gpt2_bpe"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_files):
    return door.from_vocab_merges(gpt2_files / "encoder.json", gpt2_files / "vocab.bpe")


@pytest.fixture(scope="module")
def trained():
    return train_bpe([TEXT], 400)


@pytest.fixture(scope="module")
def chars():
    return char_tokenizer(TEXT)


@pytest.fixture(params=["trained", "chars"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def vectors(path: Path) -> list[tuple[str, list[int]]]:
    """Return (text, ids) of the sections of a test-plan file that are for GPT-2's vocabulary."""
    sections = path.read_text(encoding="utf-8").split("EncodingName: ")
    parts = [s.split("\nSample: ")[1].split("\nEncoded: ") for s in sections if s.startswith("r50k_base")]
    return [(text, json.loads(ids)) for text, ids in parts]


# ---- GPT-2's own


def test_gpt2_gives_the_published_ids(gpt2, shared):
    cases = vectors(shared / "data/token_vectors/gpt-tokenizer_TestPlans.txt")
    assert len(cases) > 10
    for text, ids in cases:
        assert gpt2.encode(text) == ids
        assert gpt2.decode(ids) == text


def test_gpt2_is_recognised_wherever_it_comes_from(gpt2, tmp_path):
    gpt2.save(tmp_path / "tokenizer.json")
    again = door.load(tmp_path / "tokenizer.json")
    assert (again.kind, again.name, again.n_vocab, again.eot) == ("gpt2", "gpt2", 50257, 50256)
    assert again.fingerprint == gpt2.fingerprint
    assert again.to_json() == gpt2.to_json()


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_gpt2_equals_tiktoken_on_any_text(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.fixture(scope="module")
def reference(gpt2_files):
    import tiktoken

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_files / "tiktoken_cache"))
        return tiktoken.get_encoding("gpt2")
