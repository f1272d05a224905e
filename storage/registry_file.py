"""The registry file: models that the server's owner adds by name, wherever they are.

    {"models": [
        {"name": "poet", "path": "/srv/models/poet/ckpt.pt", "dtype": "int8", "aliases": ["gpt-3.5-turbo"]},
        {"name": "small", "hf_repo": "openai-community/gpt2", "max_context_tokens": 512}
    ]}

JSON, or YAML with the same content. A relative path is one in the file's own folder. Everything is checked here but
the weights: unknown keys, names that are taken, paths where no model is. Nothing is fetched.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from storage.errors import NotFound, NotLoadable, StorageError
from storage.files import NAME, quoted, read_bytes, read_json
from storage.hub import is_repository
from storage.registry import BUNDLED, FOLDER_FILES, PRETRAINED, ModelReference

LIMIT = 2**20  # bytes
KEYS = ("name", "hf_repo", "path", "dtype", "device", "max_context_tokens", "aliases")
DTYPES = ("auto", "fp32", "bf16", "int8")
DEVICES = ("auto", "cpu", "cuda", "mps")
NAME_RULE = "it must be a name of letters, digits, '.', '_' and '-', or several with '/' between"
RESERVED = ("out", "models")


class RegistryError(StorageError):
    """A registry file that cannot be; the message names the entry, the field and what it must be."""


def _parse(path: Path) -> Any:
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path, LIMIT)
    import yaml  # type: ignore[import-untyped]  # slow to import, and few servers need it

    try:
        return yaml.safe_load(read_bytes(path, LIMIT))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        raise NotLoadable(f"{path.name} is not YAML{place}") from None


def _name(value: object, where: str) -> str:
    parts = value.split("/") if isinstance(value, str) else [""]
    if not all(NAME.fullmatch(part) for part in parts) or len(parts) > 4 or not isinstance(value, str):
        raise RegistryError(f"{where} is {quoted(value)}; {NAME_RULE}")
    if parts[0] in RESERVED or value in (*PRETRAINED, BUNDLED):
        raise RegistryError(f"{where} is {quoted(value)}, which already means another model")
    return value


def _one_of(entry: Mapping[str, Any], key: str, choices: tuple[str, ...], where: str) -> str | None:
    value = entry.get(key)
    if value is not None and value not in choices:
        raise RegistryError(f"{where}.{key} is {quoted(value)}; it must be one of {', '.join(choices)}")
    return value


def _path(value: object, where: str, folder: Path) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise RegistryError(f"{where}.path is {quoted(value)}; it must be a text that is not empty")
    path = folder / Path(value).expanduser()
    if path.is_file() and path.suffix == ".pt":
        return path
    if path.is_file() and path.name in FOLDER_FILES:
        return path.parent
    for found in (path / "ckpt.pt", path / "config.json"):
        if found.is_file():
            return found if found.suffix == ".pt" else path
    raise RegistryError(f"{where}.path is {quoted(value)}; there is no checkpoint (.pt) and no Hugging Face folder")


def _reference(entry: object, where: str, folder: Path) -> ModelReference:
    """Return the model of an entry, checked."""
    if not isinstance(entry, dict):
        raise RegistryError(f"{where} is {quoted(entry)}; it must be an object with name and path or hf_repo")
    unknown = next((key for key in entry if key not in KEYS), None)
    if unknown is not None:
        raise RegistryError(f"{where} has the unknown field {quoted(unknown)}; the fields are {', '.join(KEYS)}")
    if (entry.get("path") is None) == (entry.get("hf_repo") is None):
        raise RegistryError(f"{where} must have exactly one of path and hf_repo")
    repository, most = entry.get("hf_repo"), entry.get("max_context_tokens")
    if repository is not None and not (isinstance(repository, str) and is_repository(repository)):
        raise RegistryError(f"{where}.hf_repo is {quoted(repository)}; it must be owner/name")
    if most is not None and (type(most) is not int or most < 1):
        raise RegistryError(f"{where}.max_context_tokens is {quoted(most)}; it must be a whole number of at least 1")
    name = _name(entry.get("name"), f"{where}.name")
    return ModelReference(
        id=name,
        kind="registered",
        path=None if repository is not None else _path(entry["path"], where, folder),
        label=name,
        device=_one_of(entry, "device", DEVICES, where),
        dtype=_one_of(entry, "dtype", DTYPES, where),
        max_context_tokens=most,
        repository=repository,
    )


def _named(entries: list[Any], folder: Path) -> Iterator[tuple[str, ModelReference, str]]:
    """Give every name with its model, and where it is written."""
    for i, entry in enumerate(entries):
        where = f"models[{i}]"
        reference = _reference(entry, where, folder)
        yield reference.id, reference, f"{where}.name"
        aliases = entry.get("aliases")
        if aliases is not None and not isinstance(aliases, list):
            raise RegistryError(f"{where}.aliases is {quoted(aliases)}; it must be a list of names")
        for j, alias in enumerate(aliases or ()):
            yield _name(alias, f"{where}.aliases[{j}]"), reference, f"{where}.aliases[{j}]"


def read_registry(path: Path) -> tuple[tuple[str, ModelReference], ...]:
    """Return every name of a registry file with its model, in the file's order. Raises StorageError."""
    try:
        content = _parse(path)
    except NotFound:
        raise NotFound(f"the registry file {path} does not exist") from None
    entries = content.get("models") if isinstance(content, dict) and set(content) == {"models"} else None
    if not isinstance(entries, list):
        raise RegistryError(f'{path.name} must be {{"models": [...]}} and nothing else')
    found: dict[str, ModelReference] = {}
    for name, reference, where in _named(entries, path.absolute().parent):
        if name in found:
            raise RegistryError(f"{where} is {quoted(name)}, which is there twice")
        found[name] = reference
    return tuple(found.items())
