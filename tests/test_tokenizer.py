"""The tokenizers: equal to tiktoken and to Hugging Face's `tokenizers`, safe with hostile files, exact in streams."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import tokenizer as door
from storage.errors import NotFound, NotLoadable, Unreachable
from storage.runs import Workspace
from storage.tokenizer import StopFinder, UnknownCharacter, char_tokenizer, from_json, train_bpe

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler — naïve 🌍, 안녕 — we'll see in 2024!\n" * 4
TEXT += "The slings and arrows of outrageous fortune, or to take arms against a sea of troubles\n" * 4
HARD = [
    *("", " ", "\n\n  x", "  \n", "a" * 3000, "<|endoftext|>", "e\u0301", "👩‍👩‍👧", "\u00a0\u3000\t", "\r\n", "ﷺ"),
    *(
        "I'll we've 'S 's'",
        "x\x00y",
        "𝔘𝔫𝔦",
        "1234 5678",
        "##!!  !!",
        "日本語の文",
        "\u200b\ufeff",
        "a\u2028b\x85c\x1cd",
    ),
]
GPT2_FILES = Path(__file__).resolve().parent.parent.parent / "shared/data/gpt2_bpe"
quick = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def gpt2():
    if not GPT2_FILES.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return door.from_vocab_merges(GPT2_FILES / "encoder.json", GPT2_FILES / "vocab.bpe")


@pytest.fixture(scope="module")
def reference(gpt2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_FILES / "tiktoken_cache"))
        return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def trained():
    return train_bpe([TEXT], 330)


@pytest.fixture(scope="module")
def chars():
    return char_tokenizer(TEXT)


@pytest.fixture(params=["trained", "chars"])
def either(request):
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


@pytest.mark.parametrize("text", HARD)
def test_gpt2_equals_tiktoken_on_hard_text(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.encode_array(text).tolist() == reference.encode_ordinary(text)


@quick
@given(text=st.text(st.sampled_from("ab'sll re1 \n\t\r.é日🌍\u3000\x1c\x85") | st.characters(codec="utf-8")))
def test_gpt2_equals_tiktoken_on_any_text(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_is_recognised_wherever_it_comes_from(gpt2, tmp_path):
    gpt2.save(tmp_path / "tokenizer.json")
    again = door.load(tmp_path / "tokenizer.json")
    assert (again.kind, again.name, again.n_vocab, again.eot) == ("gpt2", "gpt2", 50257, 50256)
    assert again.fingerprint == gpt2.fingerprint
    assert again.to_json() == gpt2.to_json()


def test_gpt2_is_found_in_tiktokens_cache(monkeypatch, tmp_path, gpt2):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_FILES / "tiktoken_cache"))
    assert door.gpt2(Workspace(tmp_path)).fingerprint == gpt2.fingerprint


def test_gpt2_is_found_in_the_folder_of_pretrained_models(monkeypatch, tmp_path, gpt2):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "pretrained" / "gpt2-medium"
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_bytes((GPT2_FILES / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((GPT2_FILES / "vocab.bpe").read_bytes())
    assert door.gpt2(Workspace(tmp_path, tmp_path / "pretrained")).kind == "gpt2"


def test_another_tokenizer_in_a_folder_called_gpt2_is_not_taken_for_gpt2s(monkeypatch, tmp_path, trained):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / "models" / "gpt2").mkdir(parents=True)
    trained.save(tmp_path / "models" / "gpt2" / "tokenizer.json")
    with pytest.raises(Unreachable):
        door.gpt2(Workspace(tmp_path))


def test_without_gpt2_and_network_the_refusal_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(Unreachable, match=r"--pretrained_dir.* TIKTOKEN_CACHE_DIR"):
        door.gpt2(Workspace(tmp_path))


def test_a_host_that_never_answers_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(door, "FETCH_SECONDS", 0.2)
    silent = threading.Event()
    monkeypatch.setattr(door, "_download", lambda name, into: silent.wait(30))
    started = time.monotonic()
    with pytest.raises(Unreachable):
        door.gpt2(Workspace(tmp_path))
    assert time.monotonic() - started < 5
    silent.set()


def test_damaged_files_in_tiktokens_cache_are_not_used(monkeypatch, tmp_path, gpt2):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for path in (GPT2_FILES / "tiktoken_cache").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"the", b"teh"))
    with pytest.raises(Unreachable):
        door.gpt2()


# ---- both kinds


def test_text_comes_back_as_it_went_in(either):
    assert either.decode(either.encode(TEXT)) == TEXT
    assert either.encode_array(TEXT).tolist() == either.encode(TEXT)
    assert either.encode_batch([TEXT, "To be", ""]) == [either.encode(TEXT), either.encode("To be"), []]


def test_a_saved_tokenizer_is_the_same_one(either, tmp_path):
    either.save(tmp_path / "tokenizer.json")
    again = door.load(tmp_path / "tokenizer.json")
    assert again.to_json() == either.to_json()
    assert (again.fingerprint, again.name, again.n_vocab) == (either.fingerprint, either.name, either.n_vocab)


def test_tokenizers_and_transformers_load_it_with_the_same_ids(either, tmp_path):
    from transformers import PreTrainedTokenizerFast

    either.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = either.encode(TEXT)
    assert theirs.encode(TEXT).ids == ids == fast(TEXT)["input_ids"]
    assert theirs.decode(ids) == TEXT == fast.decode(ids)


def test_ids_beyond_the_vocabulary_have_the_replacement_character_as_text(either):
    assert either.decode([-1, either.n_vocab, 10**9]) == "\ufffd" * 3
    assert either.decode([0]) == either.token_bytes(0).decode("utf-8", "replace")


def test_the_longest_token_bounds_the_number_of_tokens(either):
    size = len(TEXT.encode())
    assert either.longest_token * len(either.encode(TEXT)) >= size
    assert max(len(either.token_bytes(i)) for i in range(either.n_vocab)) == either.longest_token


def test_different_vocabularies_have_different_fingerprints(trained, chars):
    found = {
        trained.fingerprint,
        chars.fingerprint,
        char_tokenizer("ab").fingerprint,
        train_bpe([TEXT], 300).fingerprint,
    }
    assert len(found) == 4
    assert train_bpe([TEXT], 330).fingerprint == trained.fingerprint


# ---- byte pairs


def test_training_gives_exactly_the_size_asked_for_with_end_of_text_last(trained):
    assert (trained.n_vocab, trained.eot, trained.name) == (330, 329, "bpe:330")
    assert trained.special_tokens == {"<|endoftext|>": 329}


def test_a_text_too_small_for_the_vocabulary_is_refused_with_its_size():
    with pytest.raises(ValueError, match="vocab_size is 5000; this text gives at most"):
        train_bpe([TEXT], 5000)
    assert 257 < train_bpe([TEXT], 5000, allow_fewer=True).n_vocab < 5000


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe([TEXT], 256)


@quick
@given(text=st.text(st.sampled_from("To be, naïve\n") | st.characters(codec="utf-8", exclude_characters="<")))
def test_a_trained_vocabulary_gives_the_ids_of_the_trainer(trained, text):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(trained.to_json()))
    assert trained.encode(text) == theirs.encode(text).ids


def test_end_of_text_is_plain_text_unless_asked_for(trained):
    plain = trained.encode("a<|endoftext|>b")
    assert trained.eot not in plain
    assert trained.decode(plain) == "a<|endoftext|>b"
    assert trained.encode_with_special("a<|endoftext|>b") == [*trained.encode("a"), trained.eot, *trained.encode("b")]


def test_lone_surrogates_become_replacement_characters(trained):
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"


def test_a_million_spaces_are_tokens_and_no_panic(trained):
    text = "a" + " " * 1_200_000 + "b\n"
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.encode_array(text).tolist() == ids


# ---- characters


def test_characters_are_numbered_by_code_point(chars):
    assert char_tokenizer("banana\n").encode("\nabn") == [0, 1, 2, 3]
    assert (chars.kind, chars.name, chars.eot, chars.special_tokens) == ("char", "char", None, {})


@pytest.mark.parametrize("encode", ["encode", "encode_array", "encode_with_special"])
@pytest.mark.parametrize("bad", ["é", "\u0000", "\ud800", "🌍"])
def test_an_unknown_character_is_named_with_its_place(encode, bad):
    with pytest.raises(UnknownCharacter, match=rf"U\+{ord(bad):04X}\) at offset 2 .* 3 characters"):
        getattr(char_tokenizer("abc"), encode)("ab" + bad + "c")


def test_a_character_vocabulary_may_have_special_tokens():
    content = char_tokenizer("ab<").to_json()
    content["added_tokens"] = [{"id": 3, "content": "<|endoftext|>", "special": True}]
    tokenizer = from_json(content)
    assert (tokenizer.eot, tokenizer.n_vocab) == (3, 4)
    assert tokenizer.encode_with_special("a<|endoftext|>b<") == [1, 3, 2, 0]
    assert from_json(tokenizer.to_json()).fingerprint == tokenizer.fingerprint


def test_no_text_gives_no_vocabulary():
    with pytest.raises(ValueError, match="at least 1 character"):
        char_tokenizer("")


# ---- streams


def stream(tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@quick
@given(ids=st.lists(st.integers(0, 335)))
def test_any_ids_in_a_stream_give_the_text_of_all_at_once(trained, ids):
    pieces = stream(trained, ids)
    assert "".join(pieces) == trained.decode(ids)


@quick
@given(text=st.text(st.characters(codec="utf-8")), cut=st.integers(0, 40))
def test_a_stream_shows_no_half_characters(trained, text, cut):
    pieces = stream(trained, trained.encode(text))
    assert text.startswith("".join(pieces[:cut]))
    assert pieces[-1] == ""


def test_a_character_cut_short_becomes_one_replacement_character(trained):
    ids = [trained.encode("🌍")[0]]
    assert stream(trained, ids) == ["", "\ufffd"]


def test_a_decoder_can_be_used_again_after_its_end(trained):
    decoder = trained.stream_decoder()
    decoder.push(trained.encode("🌍")[0])
    decoder.flush()
    assert decoder.push(trained.encode("a")[0]) == "a"


def test_all_tokens_of_gpt2_stream_as_they_decode(gpt2):
    ids = list(range(0, 50257, 7))
    assert "".join(stream(gpt2, ids)) == gpt2.decode(ids)


# ---- stop strings


def run_finder(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    finder, out = StopFinder(stops), ""
    for piece in pieces:
        text, found = finder.push(piece)
        out += text
        if found is not None:
            return out, found
    return out + finder.flush(), None


def naive(stops: list[str], text: str) -> tuple[str, str | None]:
    """Grow the text by a character at a time and look whether it ends with a stop string, the longest first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


STOP_CASES = [
    ([], ["a", "b"], "ab", None),
    (["\n"], ["a\nb"], "a", "\n"),
    (["END"], ["xE", "N", "D", "y"], "x", "END"),
    (["END"], ["xEN", "x"], "xENx", None),
    (["END"], ["EEN", "EEND"], "EENE", "END"),
    (["END"], ["EN"], "EN", None),
    (["aab"], ["a", "a", "a", "b"], "a", "aab"),
    (["abab"], ["ab", "aab", "ab"], "aba", "abab"),
    (["bc", "abcd"], ["abcd"], "a", "bc"),
    (["cd", "abcd"], ["x", "abcd"], "x", "abcd"),
    (["\n\n", "\nUser:"], ["hi\n", "Use", "r", ":"], "hi", "\nUser:"),
    (["🌍"], ["hello ", "🌍", "!"], "hello ", "🌍"),
    (["👩‍👧"], ["👩", "\u200d", "👩"], "👩\u200d👩", None),
    (["👩‍👧"], ["👩", "\u200d", "👧"], "", "👩‍👧"),
    (["e\u0301"], ["cafe", "\u0301", "s"], "caf", "e\u0301"),
    (["。"], ["日本", "語。", "x"], "日本語", "。"),
    (["本語"], ["日本", "語"], "日", "本語"),
]


@pytest.mark.parametrize(("stops", "pieces", "text", "found"), STOP_CASES)
def test_text_ends_before_the_stop_string(stops, pieces, text, found):
    assert run_finder(stops, pieces) == (text, found)
    assert run_finder(stops, list("".join(pieces))) == (text, found)
    assert naive(stops, "".join(pieces)) == (text, found)


@quick
@given(
    stops=st.lists(st.text("ab🌍", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("ab🌍", max_size=5), max_size=8),
)
def test_stop_strings_are_found_however_the_text_is_cut(stops, pieces):
    assert run_finder(stops, pieces) == naive(stops, "".join(pieces))


def test_only_what_may_become_a_stop_string_is_held_back():
    finder = StopFinder(["\n\nUser"])
    assert finder.push("Hello\n") == ("Hello", None)
    assert finder.push("world") == ("\nworld", None)
    assert finder.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="at least 1 character"):
        StopFinder(["a", ""])


@pytest.mark.parametrize("stop", ["tis nobler", "🌍, 안", "2024!\nTo"])
def test_a_stop_string_across_tokens_is_found(trained, stop):
    finder, decoder, out, found = StopFinder([stop]), trained.stream_decoder(), "", None
    for token_id in trained.encode(TEXT):
        text, found = finder.push(decoder.push(token_id))
        out += text
        if found:
            break
    assert (out, found) == (TEXT[: TEXT.index(stop)], stop)


# ---- files that are not ours


def changed(tokenizer, **changes):
    """Return a tokenizer.json with some values changed; model__x is the model's x."""
    content = tokenizer.to_json()
    for key, value in changes.items():
        inner = content["model"] if key.startswith("model__") else content
        inner[key.removeprefix("model__")] = value
    return content


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
REDOS = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
REFUSED = [
    {"model": None},
    {"model": []},
    {"model__type": "Unigram"},
    {"model__type": ["BPE"]},
    {"model__type": "WordLevel"},
    {"normalizer": REDOS},
    {"normalizer": {"type": "NFC"}},
    {"pre_tokenizer": None},
    {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    {"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}},
    {"pre_tokenizer": {"type": "ByteLevel"}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}},
    {"post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}},
    {"decoder": None},
    {"decoder": {"type": "WordPiece"}},
    {"model__dropout": 0.1},
    {"model__end_of_word_suffix": "</w>"},
    {"model__continuing_subword_prefix": "##"},
    {"model__vocab": None},
    {"model__vocab": {}},
    {"model__vocab": {"a": 0}},
    {"model__vocab": {"a": True}},
    {"model__vocab": {"a": -1}},
    {"model__vocab": {"a": 1.0}},
    {"model__vocab": {"a": [[[[]]]]}},
    {"model__vocab": {"a": 10**12}},
    {"model__merges": None},
    {"model__merges": []},
    {"model__merges": ["a"]},
    {"model__merges": ["a b c"]},
    {"model__merges": [["a"]]},
    {"model__merges": [[1, 2]]},
    {"model__merges": [["zzzz", "zzzz"]]},
    {"added_tokens": None},
    {"added_tokens": ["x"]},
    {"added_tokens": [{"id": 329, "content": ""}]},
    {"added_tokens": [{"id": 329, "content": "<|endoftext|>", "special": False}]},
    {"added_tokens": [{"id": 400, "content": "<|endoftext|>", "special": True}]},
    {"added_tokens": [{"id": 331, "content": "<pad>", "special": True}]},
    {"added_tokens": [{"id": 0, "content": "<pad>", "special": True}]},
    {"added_tokens": [{"id": 330, "content": "<p>", "special": True}, {"id": 331, "content": "<p>", "special": True}]},
    {"added_tokens": [{"id": 329, "content": "\ud800", "special": True}]},
]


@pytest.mark.parametrize("changes", REFUSED, ids=lambda c: json.dumps(c)[:60])
def test_a_tokenizer_of_another_shape_is_refused_in_one_sentence(trained, changes):
    content, started = changed(trained, **changes), time.process_time()
    with pytest.raises(NotLoadable, match=r"^the tokenizer cannot be used: [^\n]*$"):
        from_json(content)
    assert time.process_time() - started < 0.5


def test_merges_out_of_order_are_refused(trained):
    merges = trained.to_json()["model"]["merges"]
    with pytest.raises(NotLoadable, match="do not rise"):
        from_json(changed(trained, model__merges=[merges[1], merges[0], *merges[2:]]))


def test_a_vocabulary_with_a_hole_or_two_equal_ids_is_refused(trained):
    vocab = trained.to_json()["model"]["vocab"]
    for wrong in (999, 5):
        with pytest.raises(NotLoadable, match=r"\bids?\b"):
            from_json(changed(trained, model__vocab=vocab | {"Ġ": wrong}))


def test_an_oversized_vocabulary_is_refused(trained, monkeypatch):
    monkeypatch.setattr("storage.tokenizer_json.MAX_VOCAB", 300)
    with pytest.raises(NotLoadable, match="has 330 entries; it may have 1 to 300"):
        from_json(trained.to_json())


@pytest.mark.parametrize("token", ["ab", "", "\ud800"])
def test_a_character_vocabulary_of_other_than_characters_is_refused(chars, token):
    with pytest.raises(NotLoadable):
        from_json(changed(chars, model__vocab=chars.to_json()["model"]["vocab"] | {token: chars.n_vocab}))


def test_characters_with_a_token_for_unknown_ones_are_refused(chars):
    with pytest.raises(NotLoadable, match="unknown"):
        from_json(changed(chars, model__unk_token="a"))


@pytest.mark.parametrize("content", [None, 1, "x", [], {}, {"model": {"type": "BPE"}}])
def test_what_is_no_tokenizer_json_is_refused(content):
    with pytest.raises(NotLoadable):
        from_json(content)


@pytest.mark.parametrize("data", [b"", b"{", b'{"decoder":[}}}', b"\xff\xfe{}", b"[" * 100_000, b"NaN", b"1" * 5000])
def test_a_damaged_tokenizer_file_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(NotLoadable):
        door.load(tmp_path / "tokenizer.json")


def test_a_missing_a_linked_and_a_too_large_file_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(NotFound):
        door.load(path)
    path.symlink_to("/etc/passwd")
    with pytest.raises(NotLoadable, match="link"):
        door.load(path)
    monkeypatch.setattr(door, "MAX_FILE_BYTES", 10)
    (tmp_path / "large.json").write_bytes(b"{" + b" " * 20 + b"}")
    with pytest.raises(NotLoadable, match="larger than 10 bytes"):
        door.load(tmp_path / "large.json")


def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(NotLoadable):
        door.load(tmp_path / "tokenizer.json")


def test_special_tokens_anywhere_among_the_ids_are_kept(trained):
    content = trained.to_json()
    content["model"]["vocab"] = {token: i + 1 for token, i in content["model"]["vocab"].items()} | {"<|endoftext|>": 0}
    content["added_tokens"] = [
        {"id": 0, "content": "<|endoftext|>", "special": True},
        {"id": 330, "content": "<pad>", "special": True},
    ]
    tokenizer = from_json(content)
    assert (tokenizer.eot, tokenizer.n_vocab, tokenizer.special_tokens["<pad>"]) == (0, 331, 330)
    assert tokenizer.encode("<pad> To be") == [i + 1 for i in trained.encode("<pad> To be")]


def test_gpt2s_own_tokenizer_json_without_types_is_read(trained):
    content = trained.to_json()
    del content["model"]["type"], content["pre_tokenizer"]["use_regex"]
    content["model"] |= {"merges": [m.split(" ") for m in content["model"]["merges"]], "end_of_word_suffix": ""}
    assert from_json(content).fingerprint == trained.fingerprint


def test_a_folder_may_have_either_kind_of_files_or_none(tmp_path, trained):
    assert door.from_folder(tmp_path) is None
    model = trained.to_json()["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\r\n".join(model["merges"]) + "\n", encoding="utf-8")
    assert door.from_folder(tmp_path).fingerprint == trained.fingerprint
    trained.save(tmp_path / "tokenizer.json")
    assert door.from_folder(tmp_path).fingerprint == trained.fingerprint


# ---- nanoGPT's meta.pkl

STOI = {"a": 0, "b": 1}
META = {"vocab_size": 2, "stoi": STOI, "itos": {0: "a", 1: "b"}}


class Evil:
    """What a hostile pickle holds: a call of a function."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_nanogpts_meta_is_read(tmp_path, shared):
    meta = door.from_meta(shared / "data/nanogpt/prepared_shakespeare_char")
    assert (meta.n_vocab, meta.encode("\n !"), meta.decode([20, 43])) == (65, [0, 1, 2], "He")


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_is_read(tmp_path, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(META, protocol))
    assert door.from_meta(tmp_path).encode("ba") == [1, 0]


BAD_META = [
    *(b"", b"x", pickle.dumps(META)[:-5], pickle.dumps(None), pickle.dumps({"vocab_size": 10**12})),
    *(pickle.dumps(META | {"itos": {0: "a", 1: "c"}}), pickle.dumps(META | {"vocab_size": 3})),
    *(pickle.dumps(META | {"stoi": {"a": 0, "b": 5}}), pickle.dumps(META | {"stoi": {"a": 0, "bc": 1}})),
    *(
        pickle.dumps(META | {"stoi": {"a": 0, "b": "1"}}),
        pickle.dumps(META | {"stoi": {}}),
        pickle.dumps(META | {"stoi": 7}),
    ),
    *(pickle.dumps({**META, "x": Evil()}), pickle.dumps({**META, "x": Evil()}, 0), b"\x80\x02}r\xff\xff\xff\x7f."),
    *(b"cos\nmkdir\n(S'canary'\ntR.", b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", b"(" * 10_000 + b"t" * 10_000 + b"."),
]


@pytest.mark.parametrize("data", BAD_META, ids=lambda d: repr(d[:24]))
def test_a_hostile_or_damaged_meta_is_refused_and_nothing_runs(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(NotLoadable):
        door.from_meta_pkl(tmp_path / "meta.pkl")
    assert not (tmp_path / "canary").exists()


def test_meta_json_is_preferred(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(b"never looked at")
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 2, "stoi": STOI}))
    assert door.from_meta(tmp_path).n_vocab == 2


def test_without_meta_there_is_no_character_vocabulary(tmp_path):
    assert door.from_meta(tmp_path) is None


def test_importing_the_tokenizer_is_cheap():
    heavy = "{'torch', 'tokenizers', 'huggingface_hub', 'requests'}"
    code = f"import sys, storage.tokenizer; print(*({heavy} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
