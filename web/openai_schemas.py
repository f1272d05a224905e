"""The bodies of OpenAI's protocol. Known fields are checked strictly; unknown ones are ignored and named.

Clients of this protocol send null for "not given" and fields of other servers, so null is always the
default and what is not known is left out, and listed in the reply's X-Ignored-Params. What would change
the text and cannot be honoured (a grammar, a suffix) is refused: to ignore it would be a lie.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from inference.sequence import SamplingParams
from training.strict_model import StrictModel, shown
from web.schemas import Reply, SamplingFields

DEFAULT_MAX_TOKENS = 16
MAX_BEST_OF = 20
MAX_CHOICES = 128
MAX_LOGPROBS = 5  # of a text completion; a chat's top_logprobs may be MAX_TOP_LOGPROBS
MAX_TOP_LOGPROBS = 20
MAX_BIAS = 100
MAX_PENALTY = 2
MAX_INPUTS = 2048  # of an embeddings request
MAX_IDS = 2**20  # of a token id list; far above any context
UNSUPPORTED = (
    *("suffix", "grammar", "json_schema", "structured_outputs", "logits_processors", "use_beam_search"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "tools", "functions"),
)

PromptField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    "minItems": 1,
                },
            ]
        }
    ),
]


class OpenAIBody(StrictModel):
    """A body that leaves out what it does not know, and nulls."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields_without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: given for name, given in value.items() if given is not None and name in cls.model_fields}

    @classmethod
    def ignored(cls, value: Mapping[str, Any]) -> list[str]:
        """Return the names in a body that mean nothing here."""
        return sorted(name for name in value if name not in cls.model_fields)


class StreamOptions(OpenAIBody):
    """What a stream adds."""

    include_usage: bool = Field(False, description="end with a chunk that has the usage")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_IDS and set(map(type, value)) == {int}


def prompts(value: Any, name: str = "prompt") -> list[str | list[int]]:
    """Return the texts of a body's field as a list of texts or of id lists; raises ValueError."""
    if isinstance(value, str):
        return [value]
    if _is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(v, str) for v in value) or all(map(_is_ids, value))):
        return value
    what = "an empty list" if value == [] else shown(value)
    raise ValueError(f"{name} is {what}; it must be a text, a list of texts, or token ids, or a list of lists of them")


def _ids_of(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal()) or len(key) > 9:
            raise ValueError(f"logit_bias has the key {shown(key)}; keys must be token ids")
        if not -MAX_BIAS <= value <= MAX_BIAS:
            raise ValueError(
                f"logit_bias of token {key} is {value}; it must be at least -{MAX_BIAS} and at most {MAX_BIAS}"
            )
    return tuple((int(key), value) for key, value in bias.items())


class GenerationBody(OpenAIBody, SamplingFields):
    """What a text completion and a chat completion share."""

    model: str | None = Field(None, description="an id of /v1/models; default: the current model")
    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy")
    top_k: int = Field(0, ge=-1, lt=2**31, description="choose among this many tokens; 0 and -1 are off")
    presence_penalty: float = Field(
        0.0, ge=-MAX_PENALTY, le=MAX_PENALTY, description="subtracted once from logits of generated tokens"
    )
    frequency_penalty: float = Field(
        0.0, ge=-MAX_PENALTY, le=MAX_PENALTY, description="subtracted for each time a token was generated"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="choices for each prompt")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="the same seed gives the same text")
    logit_bias: dict[str, float] = Field({}, description="token id to what is added to its logit, -100 to 100")
    stream_options: StreamOptions = StreamOptions.model_validate({})
    user: Any = Field(None, description="not used")
    ignore_eos: bool = Field(False, description="neither end of text nor a chat model's end of turn ends the reply")
    min_tokens: int = Field(0, ge=0, lt=2**31, description="no end before this many tokens")
    stop_token_ids: list[int] = Field([], max_length=64, description="token ids that end the text")

    @model_validator(mode="before")
    @classmethod
    def _nothing_that_cannot_be_honoured(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for name in UNSUPPORTED:
                if value.get(name) not in (None, "", [], {}):
                    raise ValueError(f"{name} is not supported here")
            if value.get("response_format") not in (None, {"type": "text"}):
                raise ValueError("response_format is not supported here; a completion is text")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _bias_is_of_ids(cls, value: dict[str, float]) -> dict[str, float]:
        _ids_of(value)
        return value

    def sampling(self, max_tokens: int, **more: Any) -> SamplingParams:
        """Return how the engine is to choose tokens. Raises ValueError."""
        given: dict[str, Any] = {
            "top_k": max(self.top_k, 0),
            "logit_bias": _ids_of(self.logit_bias),
            "stop_token_ids": frozenset(self.stop_token_ids),
            "min_tokens": min(self.min_tokens, max_tokens),
            "seed": None if self.seed is None else self.seed % 2**63,
        }
        same = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        given |= {name: getattr(self, name) for name in (*same, "ignore_eos")}
        return SamplingParams(**(given | {"max_new_tokens": max_tokens} | more))


class CompletionBody(GenerationBody):
    """A text completion."""

    prompt: PromptField = Field(description="what to continue", examples=["Once upon a time"])
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description=f"most new tokens; default {DEFAULT_MAX_TOKENS}")
    best_of: int | None = Field(None, ge=1, le=MAX_BEST_OF, description="generate so many, return the n best")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="log-probabilities of so many tokens at each place"
    )
    echo: bool = Field(False, description="begin with the prompt")
    return_token_ids: bool = Field(False, description="add the generated token ids to each choice")

    @field_validator("prompt")
    @classmethod
    def _prompt_is_prompts(cls, value: Any) -> list[str | list[int]]:
        return prompts(value)

    @model_validator(mode="after")
    def _best_of_fits(self) -> "CompletionBody":
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}; it must be at least n, which is {self.n}")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError("best_of cannot be streamed: which is best is known at the end")
        return self

    @property
    def candidates(self) -> int:
        """Return how many completions are generated for each prompt."""
        return self.n if self.best_of is None else self.best_of

    def params(self, max_tokens: int) -> SamplingParams:
        """Return how the engine is to choose tokens. Raises ValueError."""
        ranks = self.candidates > self.n and self.logprobs is None
        scores = self.echo and self.logprobs is not None
        return self.sampling(max_tokens, logprobs=0 if ranks else self.logprobs, prompt_logprobs=scores)


class TokenizeBody(OpenAIBody):
    """A text to tokenize."""

    model: str | None = Field(None, description="an id of /v1/models; default: the current model")
    prompt: str | None = Field(None, description="the text")
    content: str | None = Field(None, description="the text, as llama.cpp's clients call it")
    add_special_tokens: bool = Field(False, description="not used: GPT-2 adds none")


class DetokenizeBody(OpenAIBody):
    """Token ids to turn into text."""

    model: str | None = Field(None, description="an id of /v1/models; default: the current model")
    tokens: list[int] = Field(max_length=MAX_IDS, description="token ids")


class EmbeddingsBody(OpenAIBody):
    """Texts to embed."""

    model: str | None = Field(None, description="an id of /v1/models; default: the current model")
    input: PromptField = Field(description="what to embed", examples=["Once upon a time"])
    encoding_format: Literal["float", "base64"] = Field("float", description="numbers, or little-endian float32")
    dimensions: int | None = Field(None, ge=1, lt=2**31, description="the first so many numbers, normalised again")
    user: Any = Field(None, description="not used")

    @field_validator("input")
    @classmethod
    def _input_is_texts(cls, value: Any) -> list[str | list[int]]:
        found = prompts(value, "input")
        if len(found) > MAX_INPUTS:
            raise ValueError(f"input has {len(found)} texts; at most {MAX_INPUTS} are embedded at once")
        if "" in found:
            raise ValueError("input has an empty text")
        return found


class ErrorObject(Reply):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Reply):
    """An error as OpenAI's clients read it."""

    error: ErrorObject


class Choice(Reply):
    """One completion."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class CompletionReply(Reply):
    """A text completion."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, Any]


class Embeddings(Reply):
    """Embeddings, in the order of the input."""

    object: str
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


class ModelObject(Reply):
    """A model."""

    id: str
    object: str
    created: int
    owned_by: str
    kind: str
    loaded: bool
    chat: bool | None
    max_model_len: int | None
    parameters: int | None
    size_bytes: int | None
    memory_bytes: int | None


class ModelDeleted(Reply):
    """A model that is in the trash."""

    id: str
    object: str
    deleted: bool


class ModelList(Reply):
    """The models that a request may name."""

    object: str
    data: list[ModelObject]
