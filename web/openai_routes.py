"""/v1/models, /v1/completions, /completions, /tokenize, /detokenize, /tokenizer_info: OpenAI's inference API.

What is not here yet (chat, embeddings) says so in OpenAI's words: 501, and what to use.
"""

from http import HTTPStatus
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel

from inference.backend import ServedModel
from web import openai_replies, sse, tuned_models
from web.batch import Batch, context_tokens, encode, loaded_model, too_long
from web.client import Client
from web.context import Context, context
from web.errors import Refused
from web.openai_schemas import (
    DEFAULT_MAX_TOKENS,
    CompletionBody,
    CompletionReply,
    DetokenizeBody,
    ModelList,
    ModelObject,
    OpenAIBody,
    OpenAIError,
    TokenizeBody,
)

ERRORS: dict[str | int | HTTPStatus, Any] = dict.fromkeys((400, 401, 403, 404, 415, 429, 503, 504), OpenAIError)

routes = APIBlueprint("openai", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS)


class ModelPath(BaseModel):
    """A model's id in the path; it may have slashes."""

    model_id: str


def _model_object(model: ServedModel, limit: int) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.loaded_at),
        "owned_by": "local",
        "max_model_len": limit,
        "parameters": model.parameters,
        "dtype": model.dtype,
    }


def _named(ctx: Context, name: str | None) -> ServedModel:
    """Return the loaded model if it is the one that `name` means; load one named ft:…. Raises Refused (404)."""
    if name is not None and name.startswith(tuned_models.PREFIX):
        return tuned_models.named(ctx, name)
    served = loaded_model(ctx)
    if name is None or name in (served.id, served.reference.label):
        return served
    message = f"the model {name[:100]!r} is not loaded; {served.id} is, and POST /api/load_model loads another"
    raise Refused(404, message, "model_not_found", "model")


def _note_ignored(body: type[OpenAIBody]) -> None:
    g.ignored_params = body.ignored(request.get_json())


@routes.get("/v1/models", responses={200: ModelList})
def models() -> dict[str, Any]:
    """List the models that answer: the loaded one, and what fine-tuning jobs made."""
    ctx = context()
    served = ctx.engine.served()
    data = [] if served is None else [_model_object(served, context_tokens(ctx, served))]
    return {"object": "list", "data": data + tuned_models.listed(ctx)}


@routes.get("/v1/models/<path:model_id>", responses={200: ModelObject})
def model(path: ModelPath) -> dict[str, Any]:
    """Describe a model."""
    ctx = context()
    if path.model_id.startswith(tuned_models.PREFIX):
        return tuned_models.described(ctx, path.model_id)
    served = _named(ctx, path.model_id)
    return _model_object(served, context_tokens(ctx, served))


def _prompt_ids(ctx: Context, served: ServedModel, body: CompletionBody) -> list[list[int]]:
    """Return the token ids of all prompts. Raises Refused and PromptTooLong."""
    most, wanted = ctx.settings.max_waiting, len(body.prompt) * body.candidates
    if wanted > most:
        raise Refused(400, f"prompt asks for {wanted} completions; a request may have at most {most}", param="prompt")
    limit, vocab_size = context_tokens(ctx, served), min(served.vocab_size, served.tokenizer.n_vocab)
    found = []
    for prompt in body.prompt:
        ids = encode(prompt, served.tokenizer, limit) if isinstance(prompt, str) else prompt
        wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            message = f"prompt has token id {wrong}, which is out of vocabulary: ids are 0 to {vocab_size - 1}"
            raise Refused(400, message, param="prompt")
        found.append(ids)
    return found


def _max_tokens(body: CompletionBody, longest: int, limit: int) -> int:
    """Return how many tokens to generate. Raises PromptTooLong when the context has no room for what was asked."""
    asked = body.max_tokens
    if asked is None and longest < limit:
        return min(DEFAULT_MAX_TOKENS, limit - longest)
    asked = DEFAULT_MAX_TOKENS if asked is None else asked
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
    _note_ignored(CompletionBody)
    ctx = context()
    served = _named(ctx, body.model)
    prompts = _prompt_ids(ctx, served, body)
    max_tokens = _max_tokens(body, max(map(len, prompts)), context_tokens(ctx, served))
    try:
        params = body.params(max_tokens)
    except ValueError as error:
        raise Refused(400, str(error)) from None
    client = Client(request.environ)
    batch = Batch(ctx, served, prompts, params, client, g.request_id, body.candidates, body.stop)
    if body.stream:
        return sse.response(openai_replies.chunks(body, batch, g.request_id), batch.close, openai=True)
    return openai_replies.reply(body, batch.finish(), g.request_id)


@routes.post("/tokenize")
def tokenize(body: TokenizeBody) -> dict[str, Any]:
    """Turn text into token ids; the end-of-text token's name is one id."""
    ctx = context()
    served = loaded_model(ctx)
    text = body.prompt if body.prompt is not None else body.content
    if text is None:
        raise Refused(400, "prompt is required", param="prompt")
    try:
        tokens = served.tokenizer.encode_with_special(text)
    except ValueError as error:
        raise Refused(400, f"prompt: {error}", param="prompt") from None
    return {"tokens": tokens, "count": len(tokens), "max_model_len": context_tokens(ctx, served)}


@routes.post("/detokenize")
def detokenize(body: DetokenizeBody) -> dict[str, Any]:
    """Turn token ids into text."""
    text = loaded_model(context()).tokenizer.decode(body.tokens)
    return {"prompt": text, "content": text}


@routes.get("/tokenizer_info")
def tokenizer_info() -> dict[str, Any]:
    """Tell the tokenizer's special tokens."""
    tokenizer = loaded_model(context()).tokenizer
    eos = None if tokenizer.eot is None else tokenizer.decode([tokenizer.eot])
    info = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab}
    return {"eos_token": eos, "bos_token": eos, "pad_token": eos, "chat_template": None} | info


@routes.post("/v1/chat/completions", responses={501: OpenAIError})
def chat_completions() -> Response:
    """Not available: the models here continue text; use /v1/completions."""
    raise Refused(501, "the models here complete text and do not chat; use /v1/completions", "not_implemented")


@routes.post("/v1/embeddings", responses={501: OpenAIError})
def embeddings() -> Response:
    """Not available yet."""
    raise Refused(501, "embeddings are not available yet", "not_implemented")
