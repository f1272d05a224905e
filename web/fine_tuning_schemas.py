"""The bodies and replies of /v1/fine_tuning/jobs, as OpenAI's clients know them.

Besides OpenAI's fields a body may have those of /api/train (`EXTRAS`), `dataset` and `from_scratch`. What means
nothing here is ignored and named; a method that is not supervised is refused, because it would train otherwise.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from training.fine_tuning import HYPERPARAMETERS
from training.fine_tuning_plan import EXTRAS
from training.strict_model import shown
from web.openai_schemas import OpenAIBody
from web.schemas import Reply

MAX_EPOCHS, MAX_BATCH, MAX_MULTIPLIER = 50, 256, 1000
MAX_TAGS = 15
MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512


def _auto_or(kind: str, most: float) -> Any:
    least = {"minimum": 1} if kind == "integer" else {"exclusiveMinimum": 0}
    return WithJsonSchema({"anyOf": [{"type": "string", "enum": ["auto"]}, {"type": kind, "maximum": most} | least]})


class HyperparametersBody(OpenAIBody):
    """How long and in which steps to train."""

    n_epochs: Annotated[Any, _auto_or("integer", MAX_EPOCHS)] = "auto"
    batch_size: Annotated[Any, _auto_or("integer", MAX_BATCH)] = "auto"
    learning_rate_multiplier: Annotated[Any, _auto_or("number", MAX_MULTIPLIER)] = "auto"

    @field_validator("n_epochs", "batch_size")
    @classmethod
    def _auto_or_whole(cls, value: Any, info: Any) -> Any:
        most = MAX_EPOCHS if info.field_name == "n_epochs" else MAX_BATCH
        if value == "auto" or (type(value) is int and 1 <= value <= most):
            return value
        raise ValueError(f'{info.field_name} is {shown(value)}; it must be "auto" or a whole number from 1 to {most}')

    @field_validator("learning_rate_multiplier")
    @classmethod
    def _auto_or_number(cls, value: Any) -> Any:
        if value == "auto" or (type(value) in (int, float) and 0 < value <= MAX_MULTIPLIER):
            return value
        rule = f'it must be "auto" or a number above 0 and at most {MAX_MULTIPLIER}'
        raise ValueError(f"learning_rate_multiplier is {shown(value)}; {rule}")


class SupervisedBody(OpenAIBody):
    """Supervised training."""

    hyperparameters: HyperparametersBody = HyperparametersBody()


class MethodBody(OpenAIBody):
    """How to train."""

    type: str = Field("supervised", description='only "supervised"')
    supervised: SupervisedBody = SupervisedBody()

    @field_validator("type")
    @classmethod
    def _is_supervised(cls, value: str) -> str:
        if value != "supervised":
            raise ValueError(f'method.type is {shown(value)}; it must be "supervised"')
        return value


class WandbBody(OpenAIBody):
    """Where Weights & Biases shows a job."""

    project: str = Field(max_length=128, description="name of the project there")
    name: str | None = Field(None, max_length=128, description="the run's name there; default: the job's id")
    entity: str | None = Field(None, max_length=128, description="whose it is there, a user or a team")
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        [], max_length=MAX_TAGS, description="its tags there, without commas"
    )

    @field_validator("tags")
    @classmethod
    def _tags_have_no_commas(cls, value: list[str]) -> list[str]:
        for tag in value:
            if "," in tag:
                raise ValueError(f"tags has {shown(tag)}; a tag must have no comma")
        return value

    def fields(self) -> dict[str, Any]:
        """Return the fields of TrainConfig that this means; None for what is not given."""
        found = {f"wandb_{name}": value for name, value in self.model_dump(exclude={"tags"}).items()}
        return found | {"wandb": True, "wandb_tags": ",".join(self.tags) or None}


class IntegrationBody(OpenAIBody):
    """Who else is told of a job's metrics."""

    type: Literal["wandb"] = Field(description="Weights & Biases, whose package must be installed")
    wandb: WandbBody


class FineTuningBody(OpenAIBody):
    """A fine-tuning job, or a training from scratch; fields of /api/train are taken, too."""

    model: str = Field(
        min_length=1, max_length=300, description="a pretrained name, a run, ft:…, or a preset", examples=["nano"]
    )
    training_file: str | None = Field(None, max_length=200, description="id of a processed file")
    validation_file: str | None = Field(None, max_length=200, description="id of a processed file to validate on")
    suffix: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="a part of the new model's name, in which '-' stands for all but letters, digits, '.', '_', '-'",
    )
    seed: int | None = Field(None, ge=0, lt=2**31, description="seed of weights, data order and samples")
    method: MethodBody = MethodBody.model_validate({})
    hyperparameters: HyperparametersBody = Field(HyperparametersBody(), description="the older form of method's")
    metadata: dict[str, str] = Field({}, description="up to 16 texts to keep with the job")
    integrations: list[IntegrationBody] = Field([], max_length=1, description="who else is told of its metrics")
    dataset: str | None = Field(None, max_length=64, description="a dataset's name, instead of training_file")
    from_scratch: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "string"}]})] = Field(
        False, description="begin with new weights: true with a preset as model, or the preset's name"
    )

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) > MAX_METADATA or any(len(k) > MAX_KEY or len(v) > MAX_VALUE for k, v in value.items()):
            raise ValueError(f"metadata may have {MAX_METADATA} keys of {MAX_KEY} and values of {MAX_VALUE} characters")
        return value

    @field_validator("from_scratch")
    @classmethod
    def _from_scratch_is_known(cls, value: Any) -> bool | str:
        if isinstance(value, bool) or (isinstance(value, str) and value):
            return value
        raise ValueError(f"from_scratch is {shown(value)}; it must be true, false or a preset's name")

    @model_validator(mode="after")
    def _has_data(self) -> "FineTuningBody":
        if self.training_file is None and self.dataset is None:
            raise ValueError("training_file is required, the id of a file that was uploaded; or dataset, a name")
        if self.dataset is not None and self.training_file not in (None, "", self.dataset):
            raise ValueError("dataset and training_file are both given; give one of them")
        if self.dataset is not None and self.validation_file is not None:
            raise ValueError("validation_file goes with training_file, not with dataset")
        return self

    @classmethod
    def extras(cls, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a body that are TrainConfig's."""
        return {name: given for name, given in value.items() if name in EXTRAS and given is not None}

    def tracked(self) -> dict[str, Any]:
        """Return the fields of TrainConfig that the integrations mean."""
        return self.integrations[0].wandb.fields() if self.integrations else {}

    @classmethod
    def ignored(cls, value: Mapping[str, Any]) -> list[str]:
        """Return the names in a body that mean nothing here."""
        return [name for name in super().ignored(value) if name not in EXTRAS]

    def asked(self) -> dict[str, Any]:
        """Return the hyperparameters: method's, and where those are "auto" the older form's."""
        new, old = self.method.supervised.hyperparameters, self.hyperparameters
        return {n: getattr(old if getattr(new, n) == "auto" else new, n) for n in HYPERPARAMETERS}


class FineTuningJob(Reply):
    """A fine-tuning job."""

    id: str
    object: str
    created_at: int
    error: dict[str, Any] | None
    finished_at: int | None
    fine_tuned_model: str | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    seed: int


class FineTuningList(Reply):
    """A page of jobs, events or checkpoints."""

    object: str
    data: list[dict[str, Any]]
    has_more: bool
    first_id: str | None
    last_id: str | None
