"""/v1/embeddings: texts as vectors, from a model that completes text.

A vector is the mean of the model's final hidden states over the text's tokens, of length 1. The engine computes
them in steps of their own, so that running streams go on; one request has a few texts there at a time.
"""

import base64
import math
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from flask import g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from inference.backend import ServedModel
from inference.sequence import Finished, FinishReason, Generation, PromptTooLong, QueueFull
from web.batch import context_tokens, using
from web.client import Client
from web.completion import failure
from web.context import Context, context
from web.errors import Refused
from web.openai_routes import ERRORS, note_ignored, token_ids
from web.openai_schemas import Embeddings, EmbeddingsBody, OpenAIError
from web.security import requester

IDLE = 0.2  # seconds without an event after which to look whether anybody still waits
AHEAD = 32  # texts of one request that wait or run at once

routes = APIBlueprint("embeddings", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS)


def unit(values: Sequence[float]) -> list[float]:
    """Return a vector of length 1 in the same direction; one of zeros stays."""
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values] if length > 0 else list(values)


def _written(values: list[float], encoding: str) -> list[float] | str:
    return values if encoding == "float" else base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")


def _embedding(ctx: Context, generation: Generation, client: Client) -> list[float]:
    """Wait for a vector. Raises GenerationFailed, OutOfTime, EngineDown and ClientGone."""
    while True:
        event = generation.next(IDLE)
        client.check()
        ctx.require_engine()
        if isinstance(event, Finished):
            if event.reason is FinishReason.LENGTH:
                return generation.embedding
            raise failure(event.error)


def _vectors(
    ctx: Context, served: ServedModel, texts: Sequence[Sequence[int]], client: Client
) -> Iterator[list[float]]:
    """Give the vector of each text in order; a few are at work ahead."""
    waiting: deque[Generation] = deque()
    left = deque(enumerate(texts))
    try:
        while left or waiting:
            if left and len(waiting) < AHEAD:
                index, ids = left[0]
                name = g.request_id if index == 0 else f"{g.request_id}-{index}"
                try:
                    waiting.append(ctx.engine.embed(served, ids, name, requester()))
                    left.popleft()
                    continue
                except QueueFull:
                    if not waiting:  # our own will make room, those of others may not
                        raise
            yield _embedding(ctx, waiting[0], client)
            waiting.popleft()
    finally:
        for generation in waiting:
            generation.cancel()


def _token_ids(ctx: Context, served: ServedModel, body: EmbeddingsBody) -> list[list[int]]:
    try:
        return token_ids(body.input, served, context_tokens(ctx, served), "input")
    except PromptTooLong as error:
        raise Refused(400, str(error), "context_length_exceeded", "input") from None


@routes.post("/v1/embeddings", responses={200: Embeddings, 501: OpenAIError})
def embeddings(body: EmbeddingsBody) -> dict[str, Any]:
    """Turn texts into vectors."""
    note_ignored(EmbeddingsBody)
    ctx = context()
    if not ctx.settings.enable_embeddings_backend:
        raise Refused(501, "embeddings are turned off on this server", "not_implemented")
    with using(ctx, body.model) as served:
        texts = _token_ids(ctx, served, body)
        size = served.n_embd if body.dimensions is None else body.dimensions
        if size > served.n_embd:
            raise Refused(400, f"dimensions is {size}; {served.id} has {served.n_embd}", param="dimensions")
        ctx.streams.enter()
        try:
            vectors = [unit(unit(values)[:size]) for values in _vectors(ctx, served, texts, Client(request.environ))]
        finally:
            ctx.streams.leave()
    tokens = sum(map(len, texts))
    ctx.metrics.prompt_tokens.inc(tokens)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(values, body.encoding_format)}
        for index, values in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model or served.id, "usage": usage}
