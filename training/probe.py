"""The prompt of a run's text samples, as token ids, and the id that ends an answer to it.

It is `sample_prompt`, asked as a user where the model is one for chats; without one it is the beginning of the
validation text, or what comes before the first thing to learn in it.
"""

import numpy as np

from storage.chat_format import Message, end_of_turn, is_chat, render
from storage.datasets import Splits
from storage.token_files import LEARNED

PROMPT_TOKENS = 16


def _of_validation(splits: Splits) -> list[int]:
    """Return the beginning of the validation text, up to what is learned where that is marked."""
    end = PROMPT_TOKENS if splits.val_mask is None else int(np.argmax(splits.val_mask & LEARNED)) or PROMPT_TOKENS
    return [int(i) for i in splits.val[:end]]


def probe(splits: Splits, prompt: str | None, context: int) -> tuple[list[int], int | None]:
    """Return the prompt's ids, cut to leave room for an answer in the context, and the id that ends the answer.

    Raises UnknownCharacter.
    """
    text, chat = splits.tokenizer, is_chat(splits.tokenizer)
    if not prompt:
        ids = _of_validation(splits)
    else:
        ids = render(text, [Message("user", prompt)]) if chat else text.encode(prompt)
    return ids[: context - 1], end_of_turn(text) if chat else text.eot
