"""How the tests run other people's programs: processes of their own, without network, at home in a test's folder."""

import os
import subprocess
import sys
from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
BYTES = 257  # the vocabulary of the models: 256 bytes and the end of text


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a process with `folder` as its home, this Python, and nothing of a hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LM_SERVER_", "HF_", "OPENAI_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PATH": path}


def output(command: list[str], folder: Path, given: str | None = None) -> str:
    """Return what a command prints that must succeed; `given` is its standard input."""
    done = subprocess.run(
        command,
        input=given,
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


def run(code: list[str], folder: Path) -> str:
    """Return what a Python command prints that must succeed."""
    return output([sys.executable, *code], folder)
