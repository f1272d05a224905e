"""The command line of train.py: every field of TrainConfig as a flag, with its help, and nothing else.

    train.py --dataset stdlib --model_type nano --max_iters 500
    train.py --config out/my_run/train_config.json
    train.py --output_dir out/my_run --init_from resume --max_iters 1000

Flags override the file; with "resume" the file is the run's own. Values are read by the field's type and
then checked by TrainConfig, like any other.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from storage.errors import StorageError
from storage.files import read_json
from storage.runs import Workspace
from training.config import ConfigError, TrainConfig, choices
from training.strict_model import nearest


def _help(name: str) -> str:
    field = TrainConfig.model_fields[name]
    default = "" if field.default in (None, ...) or field.is_required() else f" (default: {str(field.default).lower()})"
    return f"{field.description}{default}".replace("%", "%%")


def _parser(root: Path, program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        usage=f"{program} --dataset NAME [--FIELD VALUE ...]; all fields: {program} --help",
        description="Train or fine-tune a GPT. What is left out comes from the preset that model_type names.",
        epilog="Under torchrun each process takes its share of the batch: torchrun --nproc_per_node 2 train.py …",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="JSON file with these fields; flags override it")
    parser.add_argument("--root", metavar="DIR", default=root, type=Path, help="folder that holds data/ and out/")
    parser.add_argument(
        "--pretrained_dir", metavar="DIR", type=Path, help="folder of Hugging Face models, one per name"
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in TrainConfig.model_fields.items():
        title = str((field.json_schema_extra or {}).get("group"))  # type: ignore[union-attr]
        group = groups.setdefault(title, parser.add_argument_group(title))
        kinds = choices(field.annotation)
        metavar = "|".join(kinds) if isinstance(kinds[0], str) else {bool: "true|false"}.get(kinds[0], name.upper())
        bare: dict[str, Any] = {"nargs": "?", "const": "true"} if kinds[0] is bool else {}
        group.add_argument(f"--{name}", metavar=metavar, help=_help(name), default=argparse.SUPPRESS, **bare)
    return parser


def _value(name: str, text: str) -> Any:
    """Return a flag's text as the field's type; text that is not one is left for TrainConfig to refuse."""
    kind = choices(TrainConfig.model_fields[name].annotation)[0]
    if kind is not str and text.lower() in ("none", "null"):
        return None
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _with_underscores(part: str) -> str:
    """Return --max_iters for --max-iters; values are left as they are."""
    name, equals, value = part.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if part.startswith("--") else part


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = read_json(file)
    except StorageError as error:
        raise ConfigError(f"the config file cannot be used: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"the config file {file.name} holds no JSON object")
    return fields


def _not_known(part: str) -> ConfigError:
    """Return the refusal of what is no flag, with the flag that it may stand for."""
    near = nearest(part.partition("=")[0].removeprefix("--"), TrainConfig.model_fields)
    return ConfigError(f"unknown argument {part[:60]!r}; " + (f"did you mean --{near}?" if near else "see --help"))


def parse(argv: list[str], root: Path, program: str = "train.py") -> tuple[TrainConfig, Workspace]:
    """Return config and workspace, in `root` unless told otherwise; `program` is who asks. Raises ConfigError.

    argparse itself ends the process for --help and for a flag without its value.
    """
    found, unknown = _parser(root, program).parse_known_args([_with_underscores(part) for part in argv])
    if unknown:
        raise _not_known(unknown[0])
    given = vars(found)
    file, folder, pretrained_dir = given.pop("config"), given.pop("root"), given.pop("pretrained_dir")
    flags = {name: _value(name, text) for name, text in given.items()}
    if file is None and flags.get("init_from") == "resume":
        file = Workspace(folder).run_from_output_dir(flags.get("output_dir")).config
    fields = {} if file is None else _read(file)
    fields |= flags
    if fields.get("output_dir") is None:
        if fields.get("dataset") is None:
            raise ConfigError("dataset is required")
        model = fields.get("model_type") or fields.get("init_from") or "nano"
        fields["output_dir"] = f"out/{fields['dataset']}-{model}"
    return TrainConfig.parse(fields), Workspace(folder.resolve(), pretrained_dir)


def to_argv(config: TrainConfig) -> list[str]:
    """Return the flags that give this config, for a person to copy."""
    return [part for name, value in config.given().items() for part in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
