"""One line of a .jsonl file: which format it has, and the pieces of text that it holds.

    {"text": …}                      all of it is learned
    {"prompt": …, "completion": …}   the completion is learned, the prompt is what it follows
    {"messages": [{"role", "content"}, …]}   a conversation: what the assistant says is learned (chat_format.py)

A file has one format. Where lines come from is in documents.py, how pieces become tokens in token_files.py.
"""

import json
from typing import Any, NamedTuple

from storage.chat_format import parse_messages

FORMATS = ("text", "prompt_completion", "chat")  # in this order: a dataset's is the last one that a file of it has


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    begins: bool  # a document begins with it
    ends: bool  # a document ends with it
    learned: bool = True  # whether a model learns to say it, or only reads it
    role: str | None = None  # who says it, if it is a message


def _format(fields: dict[str, Any]) -> str:
    if isinstance(fields.get("text"), str):
        return "text"
    if isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        return "prompt_completion"
    if "messages" in fields:
        return "chat"
    raise ValueError('it has none of "text", "prompt" with "completion", and "messages"')


def _prompt_and_completion(prompt: str, completion: str) -> list[Piece]:
    answer = Piece(completion, begins=not prompt, ends=True)
    return [answer] if not prompt else [Piece(prompt, True, False, learned=False), answer]


def _conversation(value: object) -> list[Piece]:
    messages = parse_messages(value)
    if not any(message.learned for message in messages):
        raise ValueError("none of its messages is one of the assistant to learn from")
    last = len(messages) - 1
    return [Piece(m.content, i == 0, i == last, m.learned, m.role) for i, m in enumerate(messages)]


def _clean(text: str) -> str:
    """Return the text with LF for CR LF, and U+FFFD for halves of surrogate pairs, which UTF-8 cannot name."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\r\n", "\n")


def parse_record(record: object) -> tuple[str, list[Piece]]:
    """Return format and pieces of the document in a line's JSON. Raises ValueError saying what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    kind = _format(record)
    if kind == "text":
        found = [Piece(record["text"], True, True)]
    elif kind == "prompt_completion":
        found = _prompt_and_completion(record["prompt"], record["completion"])
    else:
        found = _conversation(record["messages"])
    return kind, [piece._replace(text=_clean(piece.text)) for piece in found]


def parse_line(line: bytes) -> tuple[str, list[Piece]]:
    """Return format and pieces of the document in a line. Raises ValueError; UnicodeDecodeError if it is not UTF-8."""
    try:
        record = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except json.JSONDecodeError as e:
        raise ValueError(f"it is not JSON ({e.msg} at character {e.pos})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return parse_record(record)


class LineReader:
    """Reads the lines of one file, which all have the format of its first."""

    def __init__(self) -> None:
        self.format: str | None = None

    def pieces(self, line: bytes) -> list[Piece]:
        """Return the document in a line. Raises ValueError; UnicodeDecodeError if it is not UTF-8."""
        kind, found = parse_line(line)
        if self.format is not None and kind != self.format:
            raise ValueError(f"it has the format {kind} and the lines before it {self.format}; a file has one format")
        self.format = kind
        return found
