"""Text over generations: stops, ends, halves of characters, and several at once."""

import queue

import pytest
from fakes import byte_tokenizer

from inference.sequence import (
    EngineDown,
    Failure,
    Finished,
    FinishReason,
    Generation,
    OutOfTime,
    SamplingParams,
    Sequence,
    Token,
)
from web.completion import MOST, Completion, GenerationFailed, merged, settle


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def completion(tokenizer, text: str, reason: FinishReason = FinishReason.LENGTH, stops=(), after=(), index: int = 0):
    """Return a completion whose generation says `text`, then the token ids `after`, and ends."""
    sequence = Sequence([1], SamplingParams())
    for token_id in [*tokenizer.encode(text), *after]:
        sequence.events.put(Token(token_id))
    sequence.events.put(Finished(reason, "it failed" if reason is FinishReason.ERROR else None))
    return Completion(Generation(sequence), tokenizer, stops, frozenset({tokenizer.eot}), index)


def finished(tokenizer, *args, **kwargs) -> Completion:
    found = completion(tokenizer, *args, **kwargs)
    for _ in merged([found]):
        pass
    return found


TEXTS = ["plain", "naïve café", "日本語テキスト", "👩‍👩‍👧 family", "e\u0301 combining", "a\u0000b", "\n\n", "🇩🇪🇫🇷"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_the_text(tokenizer, text):
    pieces = [piece.text for piece in merged([completion(tokenizer, text)]) if piece is not None]
    assert "".join(pieces) == text and "\ufffd" not in text
    for piece in pieces:
        assert piece.encode().decode() == piece and "\ufffd" not in piece


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stop"),
    [
        ("tell me a story", ["me"], "tell ", "me"),
        ("tell me a story", ["story", "me a"], "tell ", "me a"),
        ("tell me", ["me!"], "tell me", None),
        ("aaab", ["aab"], "a", "aab"),
        ("日本語", ["本"], "日", "本"),
        ("x👩‍👩‍👧y", ["👩‍👩"], "x", "👩‍👩"),
        ("stop", ["stop"], "", "stop"),
    ],
)
def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(tokenizer, text, stops, expected, stop):
    found = finished(tokenizer, text, stops=stops)
    assert (found.text, found.stop_reason) == (expected, stop)
    assert found.finish_reason == ("stop" if stop else "length")


def test_the_token_that_ends_the_text_is_counted_and_not_said(tokenizer):
    found = finished(tokenizer, "the end", FinishReason.STOP, after=[tokenizer.eot])
    assert found.text == "the end" and found.finish_reason == "stop" and found.stop_reason == tokenizer.eot
    assert found.tokens[-1].token_id == tokenizer.eot


def test_half_a_character_at_the_end_becomes_a_replacement_character(tokenizer):
    ids = tokenizer.encode("🙂")
    assert finished(tokenizer, "hm ", after=ids[:2]).text == "hm \ufffd"


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer):
    pieces = list(merged([completion(tokenizer, "one sto", stops=["stop"])]))
    assert "".join(piece.text for piece in pieces) == "one sto" and pieces[-1].last


def test_tokens_that_are_there_come_together_but_not_too_many(tokenizer):
    pieces = list(merged([completion(tokenizer, "0 1 2 3 4 5 6 7 8 9")]))
    assert [len(piece.tokens) for piece in pieces[:2]] == [MOST, MOST]


def test_what_came_before_a_failure_is_told_first(tokenizer):
    failing = merged([completion(tokenizer, "abc", FinishReason.ERROR)])
    assert next(failing).text == "abc"
    with pytest.raises(GenerationFailed):
        next(failing)


def test_settling_gives_the_same_text_as_the_pieces(tokenizer):
    made = [completion(tokenizer, text, stops=["stop"]) for text in ("one two three four stop five", "", "six sto")]
    assert all(moment is None for moment in settle(made, 0.01))
    assert [c.text for c in made] == ["one two three four ", "", "six sto"]
    assert [c.finish_reason for c in made] == ["stop", "length", "length"]


def test_settling_fails_like_the_pieces(tokenizer):
    with pytest.raises(GenerationFailed):
        list(settle([completion(tokenizer, "abc", FinishReason.ERROR)], 0.01))


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.CANCELLED])
def test_an_end_that_is_no_end_of_text_is_a_failure(tokenizer, reason):
    with pytest.raises(GenerationFailed):
        finished(tokenizer, "abc", reason)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Failure.OUT_OF_TIME, OutOfTime),
        (Failure.SHUTTING_DOWN, EngineDown),
        (Failure.ENGINE, EngineDown),
        (Failure.STEP, GenerationFailed),
        (Failure.NOT_A_NUMBER, GenerationFailed),
    ],
)
def test_an_error_says_whose_it_is(tokenizer, error, kind):
    sequence = Sequence([1], SamplingParams())
    sequence.events.put(Finished(FinishReason.ERROR, error))
    with pytest.raises(kind, match=str(error)):
        list(merged([Completion(Generation(sequence), tokenizer, (), frozenset())]))


def test_several_completions_are_merged_and_each_ends_once(tokenizer):
    live = [completion(tokenizer, text, index=k) for k, text in enumerate(["short", "a much longer text", ""])]
    pieces = [piece for piece in merged(live) if piece is not None]
    assert [c.text for c in live] == ["short", "a much longer text", ""]
    assert sorted(piece.completion.index for piece in pieces if piece.last) == [0, 1, 2]


def test_a_moment_without_a_piece_is_told_and_not_waited_for(tokenizer):
    sequence = Sequence([1], SamplingParams(), events=queue.SimpleQueue())
    quiet = merged([Completion(Generation(sequence), tokenizer, (), frozenset())])
    assert next(quiet) is None and next(quiet) is None
    sequence.events.put(Finished(FinishReason.LENGTH))
    assert [piece.last for piece in quiet if piece is not None] == [True]
