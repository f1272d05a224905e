"""Every setting of the server: one table, read from flags and environment into one frozen object.

The fields of `Settings` are the table: name, type, default, help. A setting `max_jobs` is the flag
--max_jobs and the variable LM_SERVER_MAX_JOBS; a few have a well-known bare variable, too. A flag wins
over LM_SERVER_<NAME>, that over the bare name, that over the default. An empty variable is not set.
"""

# ruff: noqa: RUF009  (`setting` makes a field)

import difflib
import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

PREFIX = "LM_SERVER_"
PROJECT = Path(__file__).resolve().parent.parent
MIB = 2**20
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+", re.IGNORECASE)  # flask-cors would take others as patterns


class SettingsError(ValueError):
    """A setting that cannot be; the message names it, its value and what it must be."""


def setting(
    default: Any,
    help: str,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    also: str = "",
    secret: bool = False,
) -> Any:
    """Return a field with its help and bounds; `also` is a bare environment variable."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "also": also, "secret": secret}
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True)
class Settings:
    """The server's settings; frozen, made once at the start."""

    host: str = setting("127.0.0.1", "address to listen on; another than loopback needs API keys")
    port: int = setting(5000, "port to listen on; 0 takes a free one", 0, 65535)
    model_type: str | None = setting(
        None, 'pretrained name to serve; default: the bundled tiny-shakespeare; "none" starts without a model'
    )
    model_path: str | None = setting(None, "checkpoint or folder to serve, such as out/my_model/ckpt.pt")
    root: Path = setting(PROJECT, "folder that holds out/, data/ and models/")
    pretrained_dir: Path | None = setting(None, "folder with one Hugging Face folder per pretrained name")
    hf_token: str | None = setting(None, "token for the Hugging Face hub", also="HF_TOKEN", secret=True)
    model_registry_path: Path | None = setting(
        None, "JSON or YAML file that adds models by name", also="MODEL_REGISTRY_PATH"
    )
    model_allow_list: tuple[str, ...] = setting(
        (),
        "names of the only models that may be loaded, each with its checkpoints and aliases, `*` for any text; "
        "separated by commas",
        also="MODEL_ALLOW_LIST",
    )

    device: str = setting(
        "auto",
        "where models run: auto, cpu, cuda or mps",
        choices=("auto", "cpu", "cuda", "mps"),
        also="DEFAULT_DEVICE",
    )
    dtype: str = setting(
        "auto",
        "precision of the weights that serve: auto, fp32, bf16 or int8",
        choices=("auto", "fp32", "bf16", "int8"),
    )
    model_memory_bytes: int | None = setting(
        None,
        "most bytes of memory that models take together which requests name; default: half of the machine's",
        1,
        2**50,
    )
    threads: int | None = setting(None, "CPU threads that compute; default: chosen by torch", 1, 1024)
    slots: int = setting(16, "sequences that run at once", 1, 4096)
    cache_memory: int | None = setting(
        None, "MiB that keys and values of a model's sequences may take; default: every slot may be full", 1, 2**24
    )
    speculation: bool = setting(True, "draft tokens of greedy requests to the native runner, and check them: 1 or 0")
    prefill_tokens: int = setting(512, "most prompt tokens computed in one step", 1, 65536)
    max_context_tokens: int | None = setting(
        None, "longest prompt and reply together, if below the model's own", 1, 2**31 - 1, also="MAX_CONTEXT_TOKENS"
    )
    max_waiting: int = setting(256, "sequences that may wait; more get 429", 1, 65536)
    max_waiting_tokens: int = setting(1_000_000, "prompt tokens that may wait; more get 429", 1, 2**31 - 1)
    request_timeout: float = setting(600.0, "seconds after which a request is ended", 0.1, 1e6)
    max_streams: int = setting(256, "generation requests open at once; more get 429", 1, 4096)
    drain: float = setting(30.0, "seconds that running requests get to end when the server stops", 0, 3600)

    max_jobs: int = setting(1, "training jobs that run at once; others wait", 1, 64)
    training_priority: str = setting(
        "low",
        "CPU time of jobs where the server wants it, too: low (a tenth), idle (next to none) or normal (a fair share)",
        choices=("low", "idle", "normal"),
    )
    training_memory_bytes: int | None = setting(
        None,
        "most bytes of memory that a process of a training job takes before it fails; default: the machine's",
        512 * MIB,
        2**50,
    )
    max_body_bytes: int = setting(8 * MIB, "largest JSON body", 1024, 2**40)
    max_upload_bytes: int = setting(1024 * MIB, "largest dataset upload", 1024, 2**50)

    api_key: tuple[str, ...] = setting(
        (),
        "keys that clients must send, separated by commas; better by variable or file: flags are visible",
        secret=True,
    )
    api_key_file: Path | None = setting(None, "file with one API key per line")
    allowed_hosts: tuple[str, ...] = setting(
        (), "names that the Host header may have besides localhost, addresses and --host; separated by commas"
    )
    cors_allow_origins: tuple[str, ...] = setting(
        (), "web origins that may call the server, such as https://example.org", also="CORS_ALLOW_ORIGINS"
    )
    rate_limit: str | None = setting(None, 'requests allowed per key or address, such as "60 per minute"')
    enable_embeddings_backend: bool = setting(True, "serve /v1/embeddings: 1 or 0", also="ENABLE_EMBEDDINGS_BACKEND")
    log_format: str = setting("text", "form of log lines: text or json", choices=("text", "json"))
    log_level: str = setting(
        "info",
        "least level that is logged: debug, info, warning or error",
        choices=("debug", "info", "warning", "error"),
    )

    @property
    def keys(self) -> tuple[str, ...]:
        """Return all API keys, of the setting and of the file. Raises SettingsError."""
        if self.api_key_file is None:
            return self.api_key
        try:
            lines = self.api_key_file.read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            reason = (error.strerror or "").lower() if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SettingsError(f"api_key_file is {str(self.api_key_file)!r}, which cannot be read: {reason}") from None
        if not lines:
            raise SettingsError(f"api_key_file is {str(self.api_key_file)!r}; it holds no key")
        return (*self.api_key, *lines)

    @property
    def loopback(self) -> bool:
        """Say whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Setting:
    """One row of the table, for --help and the README."""

    name: str
    type: Any
    default: Any
    help: str
    also: str

    @property
    def flag(self) -> str:
        """Return the flag, as --max_jobs."""
        return f"--{self.name}"

    @property
    def variable(self) -> str:
        """Return the environment variable, as LM_SERVER_MAX_JOBS."""
        return PREFIX + self.name.upper()

    @property
    def shown_default(self) -> str:
        """Return the default as a person reads it; empty when there is none."""
        if self.name == "root":
            return "the project's folder"
        return "" if self.default is None or self.default == () else str(self.default).lower()


def _table() -> tuple[Setting, ...]:
    types = get_type_hints(Settings)
    rows = (Setting(f.name, types[f.name], f.default, f.metadata["help"], f.metadata["also"]) for f in fields(Settings))
    return tuple(rows)


SETTINGS = _table()


def _convert(kind: Any, text: str) -> Any:
    """Return `text` as the setting's type; raises ValueError with what it must be."""
    if kind in (int, int | None):
        return _number(int, text, "a whole number")
    if kind is float:
        return _number(float, text, "a number")
    if kind is bool:
        if text.lower() not in ("0", "1", "true", "false"):
            raise ValueError("1 or 0")
        return text.lower() in ("1", "true")
    if kind in (Path, Path | None):
        return Path(text).expanduser()
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _number(kind: type, text: str, noun: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(noun) from None


def _checked(name: str, value: Any, metadata: Mapping[str, Any]) -> Any:
    """Return a converted value; raises ValueError with what it must be."""
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices and value not in choices:
        raise ValueError("one of " + ", ".join(choices))
    if isinstance(value, int | float) and not isinstance(value, bool) and not low <= value <= high:
        raise ValueError(f"between {low:,} and {high:,}")
    return value


def _given(row: Setting, flags: Mapping[str, str | None], environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return where a setting is given, by name, and as what; an empty variable is none."""
    flag = flags.get(row.name)
    if flag is not None:
        return row.name, flag
    return next(((name, environ[name]) for name in (row.variable, row.also) if environ.get(name)), None)


def read(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
    """Return the settings that flags (by name, as text) and environment give. Raises SettingsError."""
    values: dict[str, Any] = {}
    metadata = {f.name: f.metadata for f in fields(Settings)}
    for row in SETTINGS:
        given = _given(row, flags, environ)
        if given is None:
            continue
        name, text = given
        try:
            values[row.name] = _checked(row.name, _convert(row.type, text), metadata[row.name])
        except ValueError as error:
            shown = "***" if metadata[row.name]["secret"] else repr(text[:80])
            raise SettingsError(f"{name} is {shown}; it must be {error}") from None
    settings = Settings(**values)
    _check_together(settings)
    return settings


def misspelt(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence on each variable that is no setting but nearly one; others belong to somebody else."""
    known, found = [row.variable.removeprefix(PREFIX) for row in SETTINGS], []
    for name in sorted(environ):
        rest = name.removeprefix(PREFIX)
        near = [] if rest in (name, *known) else difflib.get_close_matches(rest, known, n=2)
        if near:
            meant = " or ".join(PREFIX + word for word in near)
            found.append(f"{name} is no setting and is ignored; did you mean {meant}?")
    return found


def _check_rate_limit(rate_limit: str | None) -> None:
    if rate_limit is None:
        return
    import limits  # slow to import, and seldom needed

    try:
        limits.parse_many(rate_limit)
    except ValueError:
        raise SettingsError(f"rate_limit is {rate_limit!r}; it must be like '60 per minute'") from None


def _check_together(settings: Settings) -> None:
    """Check what concerns several settings, or what the server cannot do yet."""
    if settings.model_type is not None and settings.model_path is not None:
        raise SettingsError("give one of model_type and model_path, not both")
    keys = settings.keys  # read now, so that a file that cannot be is refused here
    if not settings.loopback and not keys:
        raise SettingsError(
            f"host is {settings.host!r}; an address that others can reach needs api_key or api_key_file"
        )
    for origin in settings.cors_allow_origins:
        if not ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"cors_allow_origins is {origin!r}; each must be like https://example.org, without a path"
            )
    _check_rate_limit(settings.rate_limit)
    if not settings.root.is_dir():
        raise SettingsError(f"root is {str(settings.root)!r}; it must be a folder")
    if settings.pretrained_dir is not None and not settings.pretrained_dir.is_dir():
        raise SettingsError(f"pretrained_dir is {str(settings.pretrained_dir)!r}; it must be a folder")
