"""The bodies and replies of the native API, as pydantic classes; the OpenAPI document comes from these.

Bodies are strict: a wrong type, an unknown field or a value out of its bounds is refused, and null means
the default. Defaults and bounds of sampling are those of SamplingParams. Replies list the keys that clients
may rely on; more may come. Training's body is TrainConfig itself.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from flask_openapi3.models.file import FileStorage
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from inference.sequence import SamplingParams
from training.config import TrainConfig
from training.strict_model import StrictModel, shown

MAX_SAMPLES = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
PRIORITY = "among the jobs that wait: higher goes first, and among equals who came first"

StopStrings = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
            ]
        }
    ),
]


def stop_strings(value: Any) -> tuple[str, ...]:
    """Return a body's stop strings; raises ValueError."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"stop is {shown(value)}; it must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop has {len(stops)} texts; it may have at most {MAX_STOPS}")
    if not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"stop has a text that is empty or longer than {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


class SamplingFields(StrictModel):
    """How to choose tokens: what the native and the OpenAI bodies share."""

    top_p: float = Field(
        SamplingParams.top_p, ge=0, le=1, description="keep the most probable up to this sum; 1 is off"
    )
    min_p: float = Field(
        SamplingParams.min_p, ge=0, le=1, description="drop tokens below this part of the highest probability"
    )
    repetition_penalty: float = Field(
        SamplingParams.repetition_penalty,
        ge=0.01,
        le=100,
        description="above 1: tokens that were there become less probable",
    )
    presence_penalty: float = Field(
        SamplingParams.presence_penalty, ge=-100, le=100, description="subtracted once from logits of generated tokens"
    )
    frequency_penalty: float = Field(
        SamplingParams.frequency_penalty, ge=-100, le=100, description="subtracted for each time a token was generated"
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same seed gives the same text")
    stop: StopStrings = Field((), description="texts at which the reply ends; they are not part of it")
    stream: bool = Field(False, description="answer with server-sent events")

    @field_validator("stop")
    @classmethod
    def _stop_is_texts(cls, value: Any) -> tuple[str, ...]:
        return stop_strings(list(value) if isinstance(value, tuple) else value)


class GenerateBody(SamplingFields):
    """What to generate."""

    prompt: str = Field(description="the text to continue", examples=["Once upon a time"])
    max_new_tokens: int = Field(SamplingParams.max_new_tokens, ge=0, lt=2**31, description="most tokens to generate")
    temperature: float = Field(SamplingParams.temperature, ge=0, le=1e6, description="0 is greedy")
    top_k: int = Field(
        SamplingParams.top_k, ge=0, lt=2**31, description="choose among so many tokens; 0 or null is off"
    )
    num_samples: int = Field(1, ge=1, le=MAX_SAMPLES, description="how many continuations")

    @model_validator(mode="before")
    @classmethod
    def _null_switches_top_k_off(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "top_k" in value and value["top_k"] is None:
            return {**value, "top_k": 0}
        return value

    def params(self, max_new_tokens: int) -> SamplingParams:
        """Return how the engine is to choose tokens, of which the context has room for `max_new_tokens`."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )


class LoadBody(StrictModel):
    """Which model to serve: exactly one of the two."""

    model_path: str | None = Field(None, max_length=300, description="such as out/my_model/ckpt.pt")
    model_type: str | None = Field(None, max_length=100, description="a pretrained name, such as gpt2-medium")

    @model_validator(mode="after")
    def _exactly_one(self) -> "LoadBody":
        if (self.model_path is None) == (self.model_type is None):
            found = "neither is" if self.model_path is None else "both are"
            raise ValueError(f"give exactly one of model_path and model_type; {found} given")
        return self

    def choice(self) -> dict[str, str]:
        """Return the one that was given, by its name."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class NoFields(StrictModel):
    """A body that says nothing: empty, or {}."""

    model_config = ConfigDict(openapi_extra={"required": False})  # type: ignore[typeddict-unknown-key]


class ResumeBody(StrictModel):
    """How to go on with a job."""

    model_config = ConfigDict(openapi_extra={"required": False})  # type: ignore[typeddict-unknown-key]

    max_iters: int | None = Field(None, ge=1, le=1_000_000_000, description="a new last iteration")
    iter_num: int | None = Field(
        None, ge=0, le=1_000_000_000, description="go back to the checkpoint that `keep_every` kept of this iteration"
    )


class PriorityBody(StrictModel):
    """Where a waiting job stands in the queue."""

    priority: int = Field(ge=-100, le=100, description=PRIORITY)


class TrainBody(TrainConfig):
    """A training run, or only a trial of it."""

    dry_run: bool = Field(
        False, description="start nothing; try three iterations and answer with tokens, epochs, time, memory, warnings"
    )

    priority: int = Field(0, ge=-100, le=100, description=PRIORITY)

    def config(self) -> TrainConfig:
        """Return the training run alone."""
        return TrainConfig.parse(self.model_dump(exclude={"dry_run", "priority"}, exclude_none=True))


class ExportBody(StrictModel):
    """What to export."""

    model: str = Field(max_length=300, description="a run, or a checkpoint: my_run, out/my_run/best.pt")
    format: str = Field("hf", description='only "hf": a Hugging Face folder')

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        if value != "hf":
            raise ValueError(f'format is {shown(value)}; it must be "hf"')
        return value


class FileForm(BaseModel):
    """A form with a file of text."""

    file: FileStorage = Field(description=".txt, or .jsonl with text, prompt and completion, or messages")

    @field_validator("file", mode="before")
    @classmethod
    def _file_is_a_file(cls, value: Any) -> Any:
        if isinstance(value, str):  # a part without a file name is a field of text
            raise ValueError("file is a text; it must be a part with a filename")
        return value


class UploadForm(FileForm):
    """A dataset file, its name and its encoding."""

    name: Annotated[Any, WithJsonSchema({"type": "string"})] = Field(
        None, description="name of the dataset; default: the file's name without its ending"
    )
    encoding: Annotated[Any, WithJsonSchema({"type": "string"})] = Field(
        None, description="encoding of the file, such as latin-1; default: utf-8"
    )


class NamePath(BaseModel):
    """A name in the path."""

    name: str


class RequestPath(BaseModel):
    """A request's id in the path."""

    request_id: str


class MetricsQuery(BaseModel):
    """Which rows."""

    after: int | None = Field(None, description="only rows of later iterations")
    limit: int | None = Field(None, ge=1, description="at most this many, the newest")


class PlotQuery(BaseModel):
    """What to draw."""

    compare: str = Field("", max_length=400, description="names of other jobs to draw beside it, separated by commas")


class LogQuery(BaseModel):
    """How to read a log."""

    follow: bool = Field(False, description="answer with server-sent events while the job runs")


class Reply(BaseModel):
    """A reply: the keys shown are always there, others may be."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Error(BaseModel):
    """What is wrong."""

    error: str


# Answers that any route may have before it is reached
BEFORE_ROUTES = (414, 431)


class Status(Reply):
    """The server's state."""

    status: str
    model_loaded: bool
    device: str
    timestamp: float
    model: dict[str, Any] | None
    queue: dict[str, Any]
    jobs: dict[str, int]


class Models(Reply):
    """The models that can be loaded."""

    pretrained_models: list[str]
    trained_models: list[dict[str, Any]]


class Message(Reply):
    """That it was done."""

    message: str


class Generated(Reply):
    """A continued text."""

    prompt: str
    generated_text: str
    parameters: dict[str, Any]
    finish_reason: str
    usage: dict[str, Any]


class Training(Reply):
    """A training job that was started or queued."""

    message: str
    config: dict[str, Any]
    config_path: str | None
    process_id: int | None


class Job(Reply):
    """A training job."""

    name: str
    state: str


class Jobs(Reply):
    """All training jobs."""

    jobs: list[Job]


class Rows(Reply):
    """Rows of a job's metrics."""

    metrics: list[dict[str, Any]]


class Log(Reply):
    """The end of a job's log."""

    log: str


class Dataset(Reply):
    """A dataset."""

    name: str


class UploadReport(Reply):
    """What an upload holds; `gpt2_tokens` is told from the first megabyte, null without GPT-2's tokenizer."""

    documents: int
    characters: int
    bytes: int
    longest_line: int
    gpt2_tokens: int | None


class UploadedDataset(Dataset):
    """A dataset that was uploaded just now."""

    report: UploadReport


class Datasets(Reply):
    """All datasets."""

    datasets: list[Dataset]
