"""tokenizer.json read with suspicion: either it is one of our two kinds of tokenizer, or it is refused.

The format can describe far more than GPT-2 needs: regular expressions, normalizers, merges in any order. All
of that would be run on users' text, so nothing of a file is run: byte-level BPE is rebuilt from its vocabulary
and merges with GPT-2's own pattern, characters from their vocabulary, and everything else raises NotLoadable.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from storage.errors import NotLoadable
from storage.files import quoted
from storage.vocabularies import BytePairTokenizer, CharTokenizer, Tokenizer, byte_alphabet

MAX_VOCAB = 1_000_000
BYTE_LEVEL = ("ByteLevel", {"add_prefix_space": False, "use_regex": True})
SPLIT_CHARACTERS = ("Split", {"pattern": {"String": ""}, "behavior": "Isolated", "invert": False})


def refuse(why: str) -> NotLoadable:
    """Return the refusal of a tokenizer, for the caller to raise."""
    return NotLoadable(f"the tokenizer cannot be used: {why}")


def _shown(value: object) -> str:
    """Return a value for a message; a nested one, which may be deep, only by its kind."""
    return quoted(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(f"{name} is not an object")
    return value


def check_ids(vocab: object) -> dict[str, int]:
    """Return a vocabulary of token -> id if its size is bounded and its ids are different integers."""
    checked = _mapping(vocab, "its vocabulary")
    if not 1 <= len(checked) <= MAX_VOCAB:
        raise refuse(f"its vocabulary has {len(checked)} entries; it may have 1 to {MAX_VOCAB}")
    for token, token_id in checked.items():
        if not isinstance(token, str) or type(token_id) is not int or not 0 <= token_id < 2 * MAX_VOCAB:
            raise refuse(f"its vocabulary gives {quoted(token)} the id {_shown(token_id)}")
    if len(set(checked.values())) != len(checked):
        raise refuse("two entries of its vocabulary have the same id")
    return checked


def _check_special(token: object) -> tuple[str, int]:
    entry = _mapping(token, "an entry of added_tokens")
    name, token_id = entry.get("content"), entry.get("id")
    if not isinstance(name, str) or not name or type(token_id) is not int or not 0 <= token_id < 2 * MAX_VOCAB:
        raise refuse(f"added_tokens gives {_shown(name)} the id {_shown(token_id)}")
    if entry.get("special") is not True:
        raise refuse(f"the added token {quoted(name)} is not a special one, and would change how text is split")
    return name, token_id


def check_specials(added_tokens: object, vocab: dict[str, int]) -> dict[str, int]:
    """Return the special tokens, taking those that are in `vocab` too out of it."""
    if not isinstance(added_tokens, list) or len(added_tokens) > MAX_VOCAB:
        raise refuse("added_tokens is not a list of bounded size")
    specials = dict(map(_check_special, added_tokens))
    if len(specials) != len(added_tokens):
        raise refuse("added_tokens names one token twice")
    for name, token_id in specials.items():
        if vocab.pop(name, token_id) != token_id:
            raise refuse(f"{quoted(name)} has one id in the vocabulary and another in added_tokens")
    return specials


def check_dense(ids: Mapping[str, int], specials: Mapping[str, int]) -> None:
    """Raise NotLoadable unless the ids of both together are 0, 1, 2, ... without a hole, and the text is text."""
    used = {*ids.values(), *specials.values()}
    if len(used) != len(ids) + len(specials) or max(used) != len(used) - 1:
        raise refuse(f"its {len(ids) + len(specials)} ids are not 0 to {len(ids) + len(specials) - 1}")
    try:
        "".join(specials).encode()
    except UnicodeEncodeError:
        raise refuse("the name of a special token is not text") from None


# ---- byte-level BPE


def _pair(merge: object) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
        raise refuse(f"the merge {_shown(merge)} is not two tokens")
    return parts[0], parts[1]


def _check_merges(vocab: Mapping[str, int], merges: Sequence[object]) -> list[str]:
    """Return the merges as strings, if running BPE by id (as tiktoken does) and by merge is the same.

    It is when each token longer than a byte is made by one merge, of tokens made before, and ids rise with it.
    """
    pairs, last = [], -1
    for left, right in map(_pair, merges):
        token_id = vocab.get(left + right)
        if token_id is None or left not in vocab or right not in vocab:
            raise refuse(f"the merge {quoted(left + ' ' + right)} has a token that is not in the vocabulary")
        if token_id <= last:
            raise refuse(f"the ids of its merges do not rise at {quoted(left + ' ' + right)}")
        if any(len(part) > 1 and vocab[part] >= token_id for part in (left, right)):
            raise refuse(f"the merge {quoted(left + ' ' + right)} comes before a token that it needs")
        pairs.append(f"{left} {right}")
        last = token_id
    if len(pairs) != len(vocab) - 256:
        raise refuse(
            f"{len(vocab)} tokens need {len(vocab) - 256} merges beside the 256 bytes, and it has {len(pairs)}"
        )
    return pairs


def byte_pair(vocab: object, merges: object, added_tokens: object) -> BytePairTokenizer:
    """Return the byte-level BPE of a vocabulary, its merges in order, and a list of added tokens."""
    ids = dict(check_ids(vocab))
    specials = check_specials(added_tokens, ids)
    check_dense(ids, specials)
    if not isinstance(merges, list) or len(merges) > MAX_VOCAB:
        raise refuse("its merges are not a list of bounded size")
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    if any(character not in ids for character in byte_of):
        raise refuse("its vocabulary lacks some of the 256 bytes")
    checked = _check_merges(ids, merges)
    try:
        ranks = {bytes(byte_of[character] for character in token): i for token, i in ids.items()}
    except KeyError:
        raise refuse("its vocabulary has an entry that is not written in bytes") from None
    return BytePairTokenizer(ranks, checked, specials)


def _expect(top: Mapping[str, Any], step: str, accepted: tuple[str, Mapping[str, Any]], required: bool = True) -> None:
    """Raise NotLoadable unless top[step] has the accepted type and values; keys left out have the usual values."""
    found, (kind, values) = top.get(step), accepted
    if found is None and not required:
        return
    if not isinstance(found, dict) or found.get("type") != kind:
        shown = found.get("type") if isinstance(found, dict) else found
        raise refuse(f"{step} is {_shown(shown)}, and only {kind} is known here")
    for key, value in values.items():
        if found.get(key, True if key == "use_regex" else None) != value:
            raise refuse(f"{step} has {key} {_shown(found.get(key))}, and only {_shown(value)} is known here")


def _byte_pair_from_json(top: Mapping[str, Any], model: Mapping[str, Any]) -> Tokenizer:
    _expect(top, "pre_tokenizer", BYTE_LEVEL)
    _expect(top, "decoder", ("ByteLevel", {}))
    after = top.get("post_processor")
    if isinstance(after, dict) and after.get("type") == "TemplateProcessing":
        if after.get("special_tokens"):
            raise refuse("post_processor adds tokens to every text")
    else:
        _expect(top, "post_processor", ("ByteLevel", {}), required=False)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise refuse(f"the model has {key} {_shown(model[key])}, which is not GPT-2's way")
    return byte_pair(model.get("vocab"), model.get("merges"), top.get("added_tokens", []))


# ---- characters


def characters(vocab: object, added_tokens: object = ()) -> CharTokenizer:
    """Return the character tokenizer of a vocabulary of single characters."""
    ids = dict(check_ids(vocab))
    specials = check_specials(list(added_tokens) if isinstance(added_tokens, tuple) else added_tokens, ids)
    check_dense(ids, specials)
    for token in ids:
        if len(token) != 1 or 0xD800 <= ord(token) <= 0xDFFF:
            raise refuse(f"{quoted(token)} is not a single character")
    return CharTokenizer(ids, specials)


def _characters_from_json(top: Mapping[str, Any], model: Mapping[str, Any]) -> Tokenizer:
    _expect(top, "pre_tokenizer", SPLIT_CHARACTERS)
    _expect(top, "decoder", ("Fuse", {}))
    if top.get("post_processor") is not None:
        raise refuse("post_processor is not null")
    if model.get("unk_token") in _mapping(model.get("vocab"), "its vocabulary"):
        raise refuse("it has a token for unknown characters, and here they are refused")
    return characters(model.get("vocab"), top.get("added_tokens", []))


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Tokenizer]] = {
    "BPE": _byte_pair_from_json,
    "WordLevel": _characters_from_json,
}


def from_json(content: object) -> Tokenizer:
    """Return the tokenizer that a tokenizer.json's content describes; runs nothing of it.

    Raises NotLoadable for all but byte-level BPE with GPT-2's pattern and characters as CharTokenizer writes them.
    """
    top = _mapping(content, "tokenizer.json")
    model = _mapping(top.get("model"), "its model")
    kind = model.get("type", "BPE" if "merges" in model else None)  # GPT-2's own file leaves the type out
    if not isinstance(kind, str) or kind not in _READERS:
        raise refuse(
            f"its model is {_shown(kind)}, and only BPE (byte-level) and WordLevel (characters) are known here"
        )
    if top.get("normalizer") is not None:
        raise refuse("it has a normalizer, which GPT-2's has not")
    return _READERS[kind](top, model)
