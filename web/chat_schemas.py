"""The body and reply of /v1/chat/completions."""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from inference.sequence import SamplingParams
from storage.chat_format import Message, parse_messages
from web.openai_schemas import MAX_TOP_LOGPROBS, GenerationBody
from web.schemas import Reply

MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"type": "string"},
    },
    "required": ["role", "content"],
}
MessagesField = Annotated[Any, WithJsonSchema({"type": "array", "items": MESSAGE, "minItems": 1})]


class ChatBody(GenerationBody):
    """A conversation whose next message is wanted."""

    messages: MessagesField = Field(
        description="the conversation so far", examples=[[{"role": "user", "content": "Hello!"}]]
    )
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="most new tokens; default: what the context has room for"
    )
    logprobs: bool = Field(False, description="add the log-probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="and those of so many tokens at each place; needs logprobs"
    )

    @field_validator("messages")
    @classmethod
    def _messages_are_messages(cls, value: Any) -> list[Message]:
        return parse_messages(value)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}; it needs logprobs, which is false")
        return self

    @property
    def most(self) -> int | None:
        """Return the most new tokens that are asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def params(self, max_tokens: int) -> SamplingParams:
        """Return how the engine is to choose tokens. Raises ValueError."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens, logprobs=logprobs)


class ChatReply(Reply):
    """A chat completion."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
