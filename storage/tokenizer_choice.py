"""Which tokenizer a training from scratch takes: the word auto, gpt2, char or bpe:N, made real for a dataset.

A vocabulary that has to be made is made of the dataset's own text, which is fetched first if it must be.
Fine-tuning has no choice, its model brings a tokenizer; so nothing here is about models.
"""

from storage import tokenizer as tokenizers
from storage.chat_format import with_chat_tokens
from storage.datasets import Dataset, ignore
from storage.errors import BadName
from storage.files import quoted
from storage.runs import Workspace
from storage.token_files import Progress
from storage.tokenizer import Tokenizer

AUTO_VOCAB, SAMPLE_BYTES = 1024, 8_000_000
MIN_BPE_VOCAB, MAX_BPE_VOCAB = 257, 65_536
MAX_CHARACTERS = 1024


def check_spec(spec: object) -> str:
    """Return a training's `tokenizer` if it is auto, gpt2, char or bpe:N; raises BadName."""
    if isinstance(spec, str):
        word, colon, size = spec.partition(":")
        if spec in ("auto", "gpt2", "char"):
            return spec
        digits = size.isascii() and size.isdigit() and len(size) <= len(str(MAX_BPE_VOCAB))
        if word == "bpe" and colon and digits and MIN_BPE_VOCAB <= int(size) <= MAX_BPE_VOCAB:
            return spec
    allowed = f"auto, gpt2, char or bpe:N with N from {MIN_BPE_VOCAB} to {MAX_BPE_VOCAB}"
    raise BadName(f"tokenizer is {quoted(spec)}; it must be {allowed}")


def _characters(source: Dataset, progress: Progress) -> Tokenizer:
    found: set[str] = set()
    for part in source.training_parts(progress=progress):  # the whole text may be larger than the memory
        found.update(part)
    if len(found) > MAX_CHARACTERS:
        raise source.refuse(f"has {len(found)} different characters, more than {MAX_CHARACTERS}: take bpe:N, not char")
    return tokenizers.char_tokenizer("".join(found))


def _byte_pairs(source: Dataset, vocab_size: int, allow_fewer: bool, progress: Progress) -> Tokenizer:
    text = source.training_text(SAMPLE_BYTES, progress)
    progress("training a tokenizer", 0, 0)
    try:
        return tokenizers.train_bpe([text], vocab_size, allow_fewer)
    except ValueError as e:
        raise source.refuse(f"is too small for the tokenizer bpe:{vocab_size}: {e}") from None


def tokenizer_for(spec: object, source: Dataset, workspace: Workspace, progress: Progress = ignore) -> Tokenizer:
    """Return the tokenizer that a training from scratch on `source` asks for.

    auto: that of nanoGPT's token files, else at most 1024 byte pairs. gpt2: GPT-2's. char: all characters of the
    text. bpe:N: N byte pairs trained on a sample of the text. For chats the tokens of the chat format are added.
    Raises BadName, or NotLoadable for an unfit text.
    """
    word = check_spec(spec)
    source.collect(progress)
    return fitting(_chosen(word, source, workspace, progress), source)


def fitting(tokenizer: Tokenizer, source: Dataset, progress: Progress = ignore) -> Tokenizer:
    """Return a tokenizer as a training on `source` needs it: with the tokens of the chat format if it has chats.

    The text is fetched first if it must be. Raises StorageError.
    """
    if not source.is_known():
        source.collect(progress)
    return with_chat_tokens(tokenizer) if source.format() == "chat" else tokenizer


def _chosen(word: str, source: Dataset, workspace: Workspace, progress: Progress) -> Tokenizer:
    if word == "gpt2":
        return tokenizers.gpt2(workspace)
    if word in ("auto", source.natural_kind()) and (natural := source.natural_tokenizer()) is not None:
        return natural
    if word == "char":
        return _characters(source, progress)
    size = AUTO_VOCAB if word == "auto" else int(word.removeprefix("bpe:"))
    return _byte_pairs(source, size, word == "auto", progress)
