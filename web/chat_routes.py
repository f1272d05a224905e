"""/v1/chat/completions: the next message of a conversation, from models that were trained on conversations.

Whether a model was is told by its tokenizer, which then has the special tokens of storage/chat_format.py.
"""

from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from inference.backend import ServedModel
from inference.sequence import PromptTooLong, SamplingParams
from storage.chat_format import is_chat, render
from web import chat_replies, sse
from web.batch import LONGEST_TOKEN, Batch, context_tokens, too_long, using
from web.chat_schemas import ChatBody, ChatReply
from web.client import Client
from web.context import context
from web.errors import Refused
from web.openai_routes import ERRORS, max_tokens, note_ignored, require_room
from web.openai_schemas import OpenAIError

routes = APIBlueprint("chat", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS)


def _prompt_ids(body: ChatBody, served: ServedModel, limit: int) -> list[int]:
    """Return the token ids of a conversation. Raises Refused and PromptTooLong."""
    characters = sum(len(message.content) for message in body.messages)
    if characters > limit * LONGEST_TOKEN:
        raise too_long(limit, f"the messages have {characters} characters")
    try:
        return render(served.tokenizer, body.messages)
    except ValueError as error:  # a character that a character vocabulary does not have
        raise Refused(400, f"messages: {error}", param="messages") from None


def _request(body: ChatBody, served: ServedModel, limit: int) -> tuple[list[int], SamplingParams]:
    """Return the prompt and how to choose tokens. Raises Refused."""
    if not is_chat(served.tokenizer):
        message = f"{served.id[:100]} completes text and was not trained to chat; use /v1/completions"
        raise Refused(501, message, "not_implemented", "model")
    try:
        prompt = _prompt_ids(body, served, limit)
        return prompt, body.params(max_tokens(body.most, limit, len(prompt), limit))
    except PromptTooLong as error:
        raise Refused(400, str(error), "context_length_exceeded", "messages") from None
    except ValueError as error:
        raise Refused(400, str(error)) from None


@routes.post("/v1/chat/completions", responses={200: ChatReply, 501: OpenAIError})
def chat_completions(body: ChatBody) -> Response | dict[str, Any]:
    """Say the assistant's next message; models that were not trained to chat answer 501."""
    note_ignored(ChatBody)
    ctx = context()
    require_room(ctx, body.n, "n")
    with using(ctx, body.model) as served:
        prompt, params = _request(body, served, context_tokens(ctx, served))
        batch = Batch(ctx, served, [prompt], params, Client(request.environ), g.request_id, body.n, body.stop)
    if body.stream:
        return sse.generation(ctx, chat_replies.chunks(body, batch, g.request_id), batch.close, openai=True)
    return chat_replies.reply(body, batch.finish(), g.request_id)
