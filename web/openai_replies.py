"""Text completions as OpenAI's clients expect them: the reply, its chunks, and log-probabilities.

A reply and a stream say the same: same id, same text, same entries, choices counted prompt by prompt.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from inference.sequence import Token
from storage.tokenizer import Tokenizer
from web.batch import Batch
from web.completion import Completion, Piece
from web.openai_schemas import CompletionBody

LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have

Json = dict[str, Any]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text, bytes that are no text as "bytes:\\xe2\\x80", so that no two tokens look alike."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float | None) -> float | None:
    """Return a log-probability that JSON has."""
    return logprob if logprob is None or math.isfinite(logprob) else LEAST_LOGPROB


class Logprobs:
    """The log-probabilities of one choice, as they are asked for: each token once, with its place in the text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder()
        self._offset = 0

    def entries(self, tokens: Sequence[Token]) -> Json:
        """Return the entries of the next tokens; one without a log-probability gets null."""
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            found["tokens"].append(token_text(self._tokenizer, token.token_id))
            found["token_logprobs"].append(finite(token.logprob))
            found["top_logprobs"].append(self._top(token))
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push(token.token_id))
        return found

    def _top(self, token: Token) -> Json | None:
        if token.logprob is None:
            return None
        pairs = [*token.top, (token.token_id, token.logprob)]  # the chosen one is there, with the identical number
        return {token_text(self._tokenizer, token_id): finite(logprob) for token_id, logprob in pairs}


class ChoiceWriter:
    """Writes one choice, in one piece or in many: echo first, then text, then the reason of the end."""

    def __init__(self, body: CompletionBody, batch: Batch, completion: Completion, index: int):
        self._body, self._completion, self._index = body, completion, index
        self._prompt_ids = batch.prompts[completion.index // batch.n]
        self._tokenizer = batch.model.tokenizer
        self._logprobs = None if body.logprobs is None else Logprobs(self._tokenizer)
        self._tokens: list[Token] = []  # not yet written
        self._begun = False

    def _echo(self) -> str:
        """Return the prompt's text, once, and have its tokens written with it."""
        if self._begun or not self._body.echo:
            return ""
        self._begun = True
        scored = self._completion.generation.prompt_logprobs
        self._tokens = [Token(self._prompt_ids[0]), *scored, *self._tokens]
        prompt = self._body.prompt[self._completion.index // self._body.candidates]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def write(self, text: str, tokens: Sequence[Token], last: bool) -> Json | None:
        """Return the choice with this text, or None when there is nothing to tell yet."""
        self._tokens.extend(tokens)
        if not (text or last or (self._logprobs is not None and tokens)):
            return None
        text = self._echo() + text
        entries = None if self._logprobs is None else self._logprobs.entries(self._tokens)
        choice: Json = {"index": self._index, "text": text, "logprobs": entries, "finish_reason": None}
        if self._body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        if last:
            choice["finish_reason"] = self._completion.finish_reason
            choice["stop_reason"] = self._completion.stop_reason
        self._tokens = []
        return choice


def _head(body: CompletionBody, batch: Batch, request_id: str) -> Json:
    return {
        "id": "cmpl-" + request_id.removeprefix("req-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model or batch.model.id,  # the name that was asked for: one model has several
        "system_fingerprint": batch.model.fingerprint,
    }


def _chosen(body: CompletionBody, batch: Batch) -> Iterator[Completion]:
    """Give the n choices of each prompt: the most probable per token when more were generated."""

    def mean_logprob(completion: Completion) -> float:
        values = [token.logprob for token in completion.tokens if token.logprob is not None]
        return sum(values) / len(values) if values else -math.inf

    for start in range(0, len(batch.completions), body.candidates):
        candidates = batch.completions[start : start + body.candidates]
        if body.candidates > body.n:
            candidates = sorted(candidates, key=mean_logprob, reverse=True)[: body.n]
        yield from candidates


def reply(body: CompletionBody, batch: Batch, request_id: str) -> Json:
    """Return the reply of a batch that has finished."""
    choices = [
        ChoiceWriter(body, batch, completion, index).write(completion.text, completion.tokens, last=True)
        for index, completion in enumerate(_chosen(body, batch))
    ]
    return _head(body, batch, request_id) | {"choices": choices, "usage": batch.usage()}


def chunks(body: CompletionBody, batch: Batch, request_id: str) -> Iterator[Json | None]:
    """Give the chunks of a stream as the text comes."""
    head = _head(body, batch, request_id)
    rest: Json = {"usage": None} if body.stream_options.include_usage else {}
    writers = {id(c): ChoiceWriter(body, batch, c, c.index) for c in batch.completions}
    for piece in batch:
        choice = None if piece is None else _write(writers[id(piece.completion)], piece)
        yield None if choice is None else head | {"choices": [choice]} | rest
    if body.stream_options.include_usage:
        yield head | {"choices": [], "usage": batch.usage()}


def _write(writer: ChoiceWriter, piece: Piece) -> Json | None:
    return writer.write(piece.text, piece.tokens, piece.last)
