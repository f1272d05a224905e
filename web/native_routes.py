"""/api/status, /api/models, /api/load_model, /api/unload_model, /api/generate: the native API around one model.

A route parses, calls, answers. Everything a body can get wrong is refused before the engine hears of it.
"""

import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from inference.backend import ServedModel
from storage.chat_format import is_chat
from storage.registry import pretrained_names
from web import sse
from web.batch import Batch, context_tokens, encode, loaded_model, too_long
from web.client import Client
from web.context import context
from web.loading import on_allow_list
from web.schemas import BEFORE_ROUTES, Error, GenerateBody, Generated, LoadBody, Message, Models, NoFields, Status

REFUSALS = (400, 401, 403, 413, 415, 429, 503, 504)
ERRORS: dict[str | int | HTTPStatus, Any] = dict.fromkeys((*BEFORE_ROUTES, *REFUSALS), Error)

routes = APIBlueprint("native", __name__, abp_tags=[Tag(name="native")], abp_responses=ERRORS)


def describe(model: ServedModel | None) -> dict[str, Any] | None:
    """Return what replies say of a loaded model."""
    if model is None:
        return None
    return {
        "id": model.id,
        "kind": model.reference.kind,
        "label": model.reference.label,
        "tokenizer": model.tokenizer.name,
        "chat": is_chat(model.tokenizer),
        "block_size": model.block_size,
        "vocab_size": model.vocab_size,
        "parameters": model.parameters,
        "runner": model.runner,
        "runner_reason": model.runner_reason,
        "device": model.device,
        "dtype": model.dtype,
        "fingerprint": model.fingerprint,
        "loaded_at": model.loaded_at,
        "load_seconds": model.load_seconds,
    }


@routes.get("/api/status", responses={200: Status})
def status() -> dict[str, Any]:
    """Tell the server's state, its model, its queue and its jobs."""
    ctx = context()
    model = ctx.engine.served()
    return {
        "status": "online",
        "model_loaded": model is not None,
        "device": ctx.settings.device if model is None else model.device,
        "timestamp": time.time(),
        "model": describe(model),
        "queue": ctx.engine.info(),
        "jobs": ctx.jobs.counts(),
    }


@routes.get("/api/models", responses={200: Models})
def models() -> dict[str, Any]:
    """List the models that can be loaded."""
    ctx = context()
    names = [name for name in pretrained_names(ctx.workspace) if on_allow_list(ctx.settings, (name,))]
    return {"pretrained_models": names, "trained_models": ctx.loader.trained()}


@routes.post("/api/load_model", responses={200: Message, 404: Error, 409: Error, 422: Error})
def load_model(body: LoadBody) -> dict[str, Any]:
    """Load a model and serve it in place of the current one, whose running requests end undisturbed."""
    model = context().loader.load(body.choice())
    return {"message": "Model loaded successfully", "model": describe(model)}


@routes.post("/api/unload_model", responses={200: Message, 409: Error})
def unload_model(body: NoFields) -> dict[str, Any]:
    """Stop serving the model and give its memory back."""
    context().loader.unload()
    return {"message": "Model unloaded"}


def _reply(body: GenerateBody, batch: Batch) -> dict[str, Any]:
    given = body.model_dump(exclude={"prompt", "stream"}) | {"seed": batch.seed, "stop": list(body.stop)}
    parameters = {name: given[name] for name in ("max_new_tokens", "temperature", "top_k")} | given
    texts = [body.prompt + completion.text for completion in batch.completions]
    reply: dict[str, Any] = {
        "prompt": body.prompt,
        "generated_text": texts[0],
        "parameters": parameters,
        "finish_reason": batch.completions[0].finish_reason,
        "usage": batch.usage(),
        "model": batch.model.id,
    }
    if body.num_samples > 1:
        reply["samples"] = [
            {"generated_text": text, "finish_reason": completion.finish_reason}
            for text, completion in zip(texts, batch.completions, strict=True)
        ]
    return reply


def _events(body: GenerateBody, batch: Batch) -> Iterator[dict[str, Any] | None]:
    """Give a frame for each piece of text, and at the end the reply that a plain request would get."""
    for piece in batch:
        if piece is None:
            yield None
        elif piece.text:
            yield {"text": piece.text, "index": piece.completion.index}
    yield _reply(body, batch)


@routes.post(
    "/api/generate",
    responses={
        200: {
            "description": "the continued text, or with `stream` events whose last one is this reply",
            "content": {
                "application/json": {"schema": Generated.model_json_schema()},
                "text/event-stream": {},
            },
        },
        409: Error,
    },
)
def generate(body: GenerateBody) -> Response | dict[str, Any]:
    """Continue a text."""
    ctx = context()
    model = loaded_model(ctx)
    limit = context_tokens(ctx, model)
    prompt_ids = encode(body.prompt, model.tokenizer, limit)
    if len(prompt_ids) > limit:
        raise too_long(limit, f"the prompt has {len(prompt_ids)} tokens")
    params = body.params(min(body.max_new_tokens, limit - len(prompt_ids)))
    batch = Batch(ctx, model, [prompt_ids], params, Client(request.environ), g.request_id, body.num_samples, body.stop)
    if body.stream:
        return sse.generation(ctx, _events(body, batch), batch.close)
    return _reply(body, batch.finish())
