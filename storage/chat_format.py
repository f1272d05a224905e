"""The chat format: a conversation as token ids, and the special tokens that a chat model's tokenizer has for it.

    <|system|>Be brief.<|end|><|user|>Hi!<|end|><|assistant|>Hello.<|end|>

Each message is the token of its role, its content as plain text, and <|end|>; a reply is asked for by a last
<|assistant|>, and the model ends it with <|end|>. A content that spells such a token stays text: it never becomes
the token. Any tokenizer becomes a chat tokenizer by `with_chat_tokens`; the tokens travel in tokenizer.json. Which
messages a model learns to say (the assistant's, unless their weight is 0) is decided here, too. No files here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.files import quoted
from storage.vocabularies import Tokenizer

ROLES = ("system", "user", "assistant")
OTHER_NAMES = {"developer": "system"}  # of roles
END = "<|end|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ROLES}
TOKENS = (*ROLE_TOKENS.values(), END)
# The same for Hugging Face's libraries, as tokenizer_config.json has it; it is never run here.
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Message(NamedTuple):
    """One message of a conversation, checked."""

    role: str
    content: str
    learned: bool = False  # whether a model that trains on the conversation learns to say it


# ---- what a client or a file gives


def _content(value: object, where: str) -> str:
    """Return a content that is text, or a list of parts {"type": "text", "text": …}."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where}.content is {'missing' if value is None else 'not text'}; it must be text")
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'{where}.content[{i}] must be {{"type": "text", "text": …}}: only text is known here')
    return "".join(part["text"] for part in value)


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object with role and content")
    role, weight = value.get("role"), value.get("weight")
    role = OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{where}.role is {quoted(role)}; it must be system, developer, user or assistant")
    if weight is not None and (type(weight) is not int or weight not in (0, 1)):
        raise ValueError(f"{where}.weight is {quoted(weight)}; it must be 0 or 1")
    if weight == 1 and role != "assistant":
        raise ValueError(f"{where}.weight is 1, and only the assistant's messages are learned")
    return Message(role, _content(value.get("content"), where), role == "assistant" and weight != 0)


def parse_messages(value: object) -> list[Message]:
    """Return a conversation from its JSON; raises ValueError naming the message and field that is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError("messages is not a list with at least 1 message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


# ---- tokens


def is_chat(tokenizer: Tokenizer) -> bool:
    """Say whether a tokenizer has all tokens of the format: whether its model was made for chat."""
    return all(token in tokenizer.special_tokens for token in TOKENS)


def with_chat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with the tokens of the format behind its own ids; itself if it has them."""
    return tokenizer if is_chat(tokenizer) else tokenizer.with_special(TOKENS)


def end_of_turn(tokenizer: Tokenizer) -> int:
    """Return the id with which a chat model ends what it says."""
    return tokenizer.special_tokens[END]


def ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids with which a model ends what it writes: end of text, and of a chat model the end of its turn."""
    of_text = () if tokenizer.eot is None else (tokenizer.eot,)
    return frozenset((*of_text, end_of_turn(tokenizer)) if is_chat(tokenizer) else of_text)


def framed(
    tokenizer: Tokenizer, role: str, content: npt.NDArray[Any], learned: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return the ids of a message with those of its content, and which of them are learned.

    Who speaks is given, not learned; that a message ends is learned with it.
    """
    begin, end = tokenizer.special_tokens[ROLE_TOKENS[role]], end_of_turn(tokenizer)
    mask = np.full(len(content) + 2, learned)
    mask[0] = False
    return np.concatenate(([begin], content, [end])).astype(content.dtype), mask


def render(tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True) -> list[int]:
    """Return the ids of a conversation; with `reply` the assistant is to speak next.

    The tokenizer must be one of `is_chat`. Raises UnknownCharacter.
    """
    ids: list[int] = []
    for message in messages:
        ids += tokenizer.special_tokens[ROLE_TOKENS[message.role]], *tokenizer.encode(message.content)
        ids.append(end_of_turn(tokenizer))
    return [*ids, tokenizer.special_tokens[ROLE_TOKENS["assistant"]]] if reply else ids
