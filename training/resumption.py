"""What a run needs to go on exactly where it stopped, and what makes it go on only nearly so."""

from typing import Any

from training.config import ConfigError


def require_resumable(state: dict[str, Any], name: str) -> None:
    """Raise ConfigError for a checkpoint that holds weights, but not all that decides the next iteration."""
    missing = [key for key in ("optimizer", "data_state") if not state.get(key)]
    if missing:
        instead = "start a new run with init_from instead"
        raise ConfigError(f"{name} cannot be resumed, it has no {', '.join(missing)}; {instead}")


def warn_of_differences(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what differs from the machine that wrote a checkpoint: the last bits of the results will, too."""
    changed = [f"{key} was {before.get(key)} and is {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        print(f"resuming, but not to the last bit: {', '.join(changed)}")
