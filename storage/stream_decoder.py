"""From token ids to text as they come: whole characters only, and never part of a stop string.

A token is bytes, and a character may span tokens: `StreamDecoder` holds back what is not yet a character.
`StopFinder` stands behind it and holds back what may yet become a stop string. The concatenation of what
both emit depends on the tokens alone, not on how they were grouped. Neither knows how text becomes tokens.
"""

import codecs
from collections.abc import Callable, Sequence


class StreamDecoder:
    """Turns token ids into text one by one; the pieces joined are the text of all ids decoded at once.

    Bytes that are no UTF-8 become U+FFFD, and so does a character that the last token leaves unfinished.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes; often one piece, sometimes none."""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Return U+FFFD if the last character is unfinished, else nothing; then begin anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _first_match(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Return (start, stop string) of the match that is complete first; of two that end together the longer."""
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, _, stop = min(found)
    return end - len(stop), stop


def _possible_start(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins, but not all of `stop`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at != -1:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0


class StopFinder:
    """Lets text through up to the first stop string, and no character that may belong to one.

    The match that is complete first wins, as soon as it is complete; of two that end at the same character
    the longer one. So the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise ValueError("stop holds an empty string; a stop string has at least 1 character")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that can go out, and the stop string if one was found: the text ends before it."""
        text, self._held = self._held + text, ""
        found = _first_match(text, self._stops)
        if found is not None:
            return text[: found[0]], found[1]
        hold = max((_possible_start(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def flush(self) -> str:
        """Return what was held back, at the end of a text in which no stop string came."""
        rest, self._held = self._held, ""
        return rest
