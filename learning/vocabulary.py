"""How many rows a model's embedding has for a tokenizer, and how a trained model gets rows for new tokens."""

from collections.abc import Mapping

from torch import Tensor

from storage.chat_format import is_chat
from storage.tokenizer import Tokenizer

GPT2_TOKENS, GPT2_ROWS = 50257, 50304  # GPT-2's ids, and the next multiple of 64, which is fast
ROWS = ("transformer.wte.weight", "lm_head.weight")


def rows_for(tokenizer: Tokenizer) -> int:
    """Return the vocab_size of a new model: the number of ids, rounded up for GPT-2's, with chat tokens or not."""
    of_gpt2 = tokenizer.name == "gpt2" or (is_chat(tokenizer) and GPT2_TOKENS < tokenizer.n_vocab <= GPT2_ROWS)
    return GPT2_ROWS if of_gpt2 else tokenizer.n_vocab


def with_rows(weights: Mapping[str, Tensor], used: int, wanted: int) -> dict[str, Tensor]:
    """Return a state dict whose ids from `used` up to `wanted` have the mean of the rows before as their row.

    The mean is a token like any other: neither likely nor impossible. Rows that were there but unused are replaced.
    """
    found = dict(weights)
    for name in ROWS:
        old = found[name]
        rows = old.new_empty(max(wanted, len(old)), old.size(1))
        rows[: len(old)] = old
        rows[used:wanted] = old[:used].float().mean(0).to(old.dtype)
        found[name] = rows
    return found
