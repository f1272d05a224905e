"""/v1/models, /v1/completions, /completions, /tokenize, /detokenize, /tokenizer_info: OpenAI's inference API.

Chat and embeddings have files of their own.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel

from inference.backend import ServedModel
from storage.chat_format import TEMPLATE, is_chat
from storage.errors import NotFound
from web import openai_replies, sse
from web.batch import Batch, context_tokens, encode, loaded_model, too_long, using
from web.client import Client
from web.context import Context, context
from web.errors import Refused
from web.openai_schemas import (
    DEFAULT_MAX_TOKENS,
    MAX_IDS,
    CompletionBody,
    CompletionReply,
    DetokenizeBody,
    ModelDeleted,
    ModelList,
    ModelObject,
    OpenAIBody,
    OpenAIError,
    TokenizeBody,
)
from web.schemas import BEFORE_ROUTES

REFUSALS = (400, 401, 403, 404, 413, 415, 429, 503, 504)
ERRORS: dict[str | int | HTTPStatus, Any] = dict.fromkeys((*BEFORE_ROUTES, *REFUSALS), OpenAIError)

routes = APIBlueprint("openai", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS)


class ModelPath(BaseModel):
    """A model's id in the path; it may have slashes."""

    model_id: str


def note_ignored(body: type[OpenAIBody]) -> None:
    """Have the reply name the fields of the request that mean nothing here."""
    g.ignored_params = body.ignored(request.get_json())


@routes.get("/v1/models", responses={200: ModelList})
def models() -> dict[str, Any]:
    """List the models that a request may name, loaded or not, and what they take."""
    return {"object": "list", "data": context().catalogue.entries()}


@routes.get("/v1/models/<path:model_id>", responses={200: ModelObject})
def model(path: ModelPath) -> dict[str, Any]:
    """Describe a model."""
    return context().catalogue.entry(path.model_id)


@routes.delete("/v1/models/<path:model_id>", responses={200: ModelDeleted})
def delete_model(path: ModelPath) -> dict[str, Any]:
    """Move a trained run to the trash, with all its checkpoints."""
    ctx, name = context(), path.model_id
    reference = ctx.catalogue.reference(name)
    if reference is None or reference.kind != "trained" or "/" in reference.id:
        message = f"{name[:100]} is not a run that was trained here; only such models can be deleted"
        raise Refused(400, message, param="model")
    if ctx.loader.serves(reference.id):
        message = f"{name[:100]} is the current model; POST /api/load_model another one first"
        raise Refused(400, message, param="model")
    try:
        ctx.jobs.delete(reference.id)
    except NotFound:
        raise Refused(400, f"{reference.id} was not trained by a job of this server; delete its folder") from None
    ctx.engine.forget(reference.id)
    return {"id": name, "object": "model", "deleted": True}


def token_ids(
    texts: Sequence[str | list[int]], served: ServedModel, limit: int, param: str = "prompt"
) -> list[list[int]]:
    """Return the token ids of texts, each at most `limit`. Raises Refused and PromptTooLong."""
    vocab_size, found = min(served.vocab_size, served.tokenizer.n_vocab), []
    for text in texts:
        ids = encode(text, served.tokenizer, limit, param) if isinstance(text, str) else text
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
            message = f"{param} has token id {wrong}, which is out of vocabulary: ids are 0 to {vocab_size - 1}"
            raise Refused(400, message, param=param)
        if len(ids) > limit:
            raise too_long(limit, f"the {param} has {len(ids)} tokens")
        found.append(ids)
    return found


def require_room(ctx: Context, wanted: int, param: str) -> None:
    """Raise Refused for more completions than may ever wait at once."""
    most = ctx.settings.max_waiting
    if wanted > most:
        raise Refused(400, f"{param} asks for {wanted} completions; a request may have at most {most}", param=param)


def _prompt_ids(ctx: Context, served: ServedModel, body: CompletionBody) -> list[list[int]]:
    """Return the token ids of all prompts. Raises Refused and PromptTooLong."""
    require_room(ctx, len(body.prompt) * body.candidates, "prompt")
    return token_ids(body.prompt, served, context_tokens(ctx, served))


def max_tokens(asked: int | None, default: int, longest: int, limit: int) -> int:
    """Return how many tokens to generate. Raises PromptTooLong when the context has no room for what was asked."""
    if asked is None and longest < limit:
        return min(default, limit - longest)
    asked = min(default, limit) if asked is None else asked
    if longest + asked > limit:
        total = longest + asked
        raise too_long(limit, f"you requested {total} tokens ({longest} in the prompt, {asked} for the completion)")
    return asked


@routes.post("/v1/completions", responses={200: CompletionReply})
def completions(body: CompletionBody) -> Response | dict[str, Any]:
    """Complete a text."""
    return _complete(body)


@routes.post("/completions", responses={200: CompletionReply})
def tutorial_completions(body: CompletionBody) -> Response | dict[str, Any]:
    """Complete a text: the same as /v1/completions."""
    return _complete(body)


def _complete(body: CompletionBody) -> Response | dict[str, Any]:
    note_ignored(CompletionBody)
    ctx = context()
    with using(ctx, body.model) as served:
        prompts = _prompt_ids(ctx, served, body)
        most = max_tokens(body.max_tokens, DEFAULT_MAX_TOKENS, max(map(len, prompts)), context_tokens(ctx, served))
        try:
            params = body.params(most)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        client = Client(request.environ)
        batch = Batch(ctx, served, prompts, params, client, g.request_id, body.candidates, body.stop)
    if body.stream:
        return sse.generation(ctx, openai_replies.chunks(body, batch, g.request_id), batch.close, openai=True)
    return openai_replies.reply(body, batch.finish(), g.request_id)


@routes.post("/tokenize")
def tokenize(body: TokenizeBody) -> dict[str, Any]:
    """Turn text into token ids; the end-of-text token's name is one id."""
    ctx = context()
    text = body.prompt if body.prompt is not None else body.content
    if text is None:
        raise Refused(400, "prompt is required", param="prompt")
    with using(ctx, body.model) as served:
        tokenizer, limit = served.tokenizer, context_tokens(ctx, served)
    try:
        tokens = tokenizer.encode_with_special(text)
    except ValueError as error:
        raise Refused(400, f"prompt: {error}", param="prompt") from None
    return {"tokens": tokens, "count": len(tokens), "max_model_len": limit}


@routes.post("/detokenize")
def detokenize(body: DetokenizeBody) -> dict[str, Any]:
    """Turn token ids into text."""
    with using(context(), body.model) as served:
        (tokens,) = token_ids([body.tokens], served, MAX_IDS, "tokens")
        text = served.tokenizer.decode(tokens)
    return {"prompt": text, "content": text}


@routes.get("/tokenizer_info")
def tokenizer_info() -> dict[str, Any]:
    """Tell the tokenizer's special tokens."""
    tokenizer = loaded_model(context()).tokenizer
    eos = None if tokenizer.eot is None else tokenizer.decode([tokenizer.eot])
    template = TEMPLATE if is_chat(tokenizer) else None
    info = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab}
    return {"eos_token": eos, "bos_token": eos, "pad_token": eos, "chat_template": template} | info
