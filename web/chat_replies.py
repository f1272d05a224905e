"""Chat completions as OpenAI's clients expect them: the reply, its chunks, and log-probabilities.

A chunk has a delta: the first of a choice names the role, the last is empty and has the reason of the end. The token
that ends a turn is no part of what is said, so it has no log-probability here; it counts in the usage.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from inference.sequence import Token
from storage.tokenizer import Tokenizer
from web.batch import Batch
from web.chat_schemas import ChatBody
from web.completion import Completion, Piece
from web.openai_replies import finite, token_text

Json = dict[str, Any]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> Json:
    data = tokenizer.token_bytes(token_id)
    return {"token": token_text(tokenizer, token_id), "logprob": finite(logprob), "bytes": list(data)}


def _logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> Json:
    content = [
        _entry(tokenizer, token.token_id, token.logprob)
        | {"top_logprobs": [_entry(tokenizer, token_id, logprob) for token_id, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _said(completion: Completion, tokens: Sequence[Token]) -> Sequence[Token]:
    """Return the last tokens of a completion without the one that ended the turn."""
    return tokens[:-1] if isinstance(completion.stop_reason, int) else tokens


def _head(body: ChatBody, batch: Batch, request_id: str, kind: str) -> Json:
    return {
        "id": "chatcmpl-" + request_id.removeprefix("req-"),
        "object": kind,
        "created": int(time.time()),
        "model": body.model or batch.model.id,
        "system_fingerprint": batch.model.fingerprint,
    }


def _choice(body: ChatBody, batch: Batch, completion: Completion) -> Json:
    tokens = _said(completion, completion.tokens)
    return {
        "index": completion.index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": _logprobs(batch.model.tokenizer, tokens) if body.logprobs else None,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def reply(body: ChatBody, batch: Batch, request_id: str) -> Json:
    """Return the reply of a batch that has finished."""
    choices = [_choice(body, batch, completion) for completion in batch.completions]
    return _head(body, batch, request_id, "chat.completion") | {"choices": choices, "usage": batch.usage()}


class _Deltas:
    """Writes the chunks of one choice."""

    def __init__(self, body: ChatBody, batch: Batch, index: int):
        self._body, self._tokenizer, self._index = body, batch.model.tokenizer, index
        self._tokens: list[Token] = []  # not yet written

    def choice(self, delta: Json, tokens: Sequence[Token] = (), completion: Completion | None = None) -> Json:
        """Return a choice of a chunk; `completion` is given with the last."""
        logprobs = _logprobs(self._tokenizer, tokens) if self._body.logprobs and tokens else None
        choice: Json = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if completion is not None:
            choice |= {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
        return choice

    def write(self, piece: Piece) -> Iterator[Json]:
        """Give the choices that a piece brings."""
        self._tokens.extend(piece.tokens)
        tokens = _said(piece.completion, self._tokens) if piece.last else self._tokens
        if piece.text or (piece.last and tokens and self._body.logprobs):
            yield self.choice({"content": piece.text}, tokens)
            self._tokens = []
        if piece.last:
            yield self.choice({}, completion=piece.completion)


def chunks(body: ChatBody, batch: Batch, request_id: str) -> Iterator[Json | None]:
    """Give the chunks of a stream as the text comes."""
    head = _head(body, batch, request_id, "chat.completion.chunk")
    rest: Json = {"usage": None} if body.stream_options.include_usage else {}
    writers = [_Deltas(body, batch, completion.index) for completion in batch.completions]
    for writer in writers:
        yield head | {"choices": [writer.choice({"role": "assistant", "content": ""})]} | rest
    for piece in batch:
        if piece is None:
            yield None
            continue
        for choice in writers[piece.completion.index].write(piece):
            yield head | {"choices": [choice]} | rest
    if body.stream_options.include_usage:
        yield head | {"choices": [], "usage": batch.usage()}
