"""StrictModel: a pydantic base for what users send, and the one sentence that says what is wrong with it.

Strict types (true is not 1, "20" is not 20), finite numbers, unknown fields refused with the nearest known
name or with all of them, and an explicit null means the default. It knows no HTTP, and of fields only OTHER_NAMES.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Self

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

SHOWN = 60  # characters of a wrong value that a message repeats
LISTED = 16  # names of fields that a message lists
OTHER_NAMES = {  # what other programs call a field
    "lr": "learning_rate",
    "epochs": "max_iters",
    "steps": "max_iters",
    "text": "prompt",
    "input": "prompt",
    "n": "num_samples",
}
TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 4,300 digits",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
BOUNDS = (("gt", "greater than {}"), ("ge", "at least {}"), ("lt", "less than {}"), ("le", "at most {}"))


class ConfigError(ValueError):
    """What the user asked for cannot be; the message says why in one sentence (HTTP 400)."""


class StrictModel(BaseModel):
    """A body that refuses what it does not know."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_fields_without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        for name in value:
            if name not in cls.model_fields:
                raise PydanticCustomError("unknown_field", "{sentence}", {"sentence": unknown_field(name, cls)})
        return {name: given for name, given in value.items() if given is not None}

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Return the checked object. Raises ConfigError with one sentence."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ConfigError(errors_to_sentence(error, cls)) from None


def errors_to_sentence(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Return what is wrong, as in "learning_rate is -1; it must be greater than 0 and at most 10".

    With `model`, the class that was validated, both bounds of a range are named; without it only the one
    that was crossed. Several errors are joined by "; ", the first three of them.
    """
    details = error.errors(include_url=False)
    sentences = [_sentence(detail, model) for detail in details[:3]]
    if len(details) > 3:
        sentences.append(f"and {len(details) - 3} more")
    return "; ".join(sentences)


def _sentence(detail: ErrorDetails, model: type[BaseModel] | None) -> str:
    kind, name = detail["type"], _path(detail["loc"])
    if kind == "unknown_field":
        return detail["msg"]
    if kind == "missing":
        return f"{name} is required"
    if kind == "extra_forbidden":
        return f"unknown field {name!r}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    return f"{name} is {shown(detail['input'])}; it must be {_rule(detail, model)}"


def _rule(detail: ErrorDetails, model: type[BaseModel] | None) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in TYPES:
        return TYPES[kind]
    if kind == "literal_error":
        return "one of " + str(context["expected"]).replace("'", "").replace(" or ", ", ")
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters long"
    if kind == "string_too_short":
        least = context["min_length"]
        return "a text that is not empty" if least == 1 else f"at least {least} characters long"
    if kind == "too_long":
        return f"at most {context['max_length']} items long"
    crossed = [phrase.format(_number(context[key])) for key, phrase in BOUNDS if key in context]
    whole = _range(detail["loc"], model)
    return whole or (crossed[0] if crossed else _plain(detail["msg"]))


def _range(loc: tuple[int | str, ...], model: type[BaseModel] | None) -> str:
    """Return "greater than 0 and at most 10" for a top-level field of `model` that has bounds, else ""."""
    if model is None or len(loc) != 1 or loc[0] not in model.model_fields:
        return ""
    found = []
    for bound in model.model_fields[str(loc[0])].metadata:
        for key, phrase in BOUNDS:
            if isinstance(bound, getattr(annotated_types, key.capitalize())):
                found.append(phrase.format(_number(getattr(bound, key))))
    return " and ".join(found)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def shown(value: object) -> str:
    """Return a wrong value as a message repeats it: JSON-like, cut to a length, safe to print."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str | int | float) else "a list" if isinstance(value, list) else "an object"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that `name` may stand for, if any: by OTHER_NAMES, else the one spelled most like it."""
    other = OTHER_NAMES.get(name)
    return other if other in known else next(iter(difflib.get_close_matches(name[:SHOWN], known, n=1)), None)


def unknown_field(name: object, model: type[BaseModel]) -> str:
    """Return the sentence that refuses a name which `model` does not have, with the nearest or what there is."""
    known = model.model_fields
    near = nearest(str(name), known)
    if near is not None:
        hint = f"did you mean {near!r}?"
    elif len(known) > LISTED:  # which only a training run has
        hint = "/docs and `train.py --help` list the fields"
    else:
        hint = f"there are: {', '.join(known)}" if known else "none may be given here"
    return f"unknown field {shown(name)}; {hint}"


def _path(loc: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    return path or "the body"


def _plain(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Value error, ")
