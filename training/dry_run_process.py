"""dry_run.py as a process of the server: low in priority, limited in time, and answered with its last line."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from storage import registry
from storage.files import write_json
from storage.runs import Workspace
from training.config import TrainConfig
from training.local_backend import PROJECT, environment, fail_first_without_memory, yield_to_the_server

SECONDS = 600.0  # fetching and tokenizing a small dataset included
SCRIPT = PROJECT / "dry_run.py"


class DryRunFailed(Exception):
    """The training would fail; the message says why (HTTP 422)."""


def _environment(config: TrainConfig, workspace: Workspace) -> dict[str, str]:
    """Return the trial's environment; the hub's token is only in it where weights are to be fetched."""
    name = str(config.model_type if config.init_from == "pretrained" else config.init_from)
    downloads = name in registry.PRETRAINED and registry.local_folder(workspace, name) is None
    return environment(os.environ, downloads)


def _ending(code: int) -> str:
    """Say how a process ended that said nothing itself."""
    if code == -signal.SIGKILL:
        return "the dry run was killed, perhaps because memory ran out"
    return f"the dry run ended with code {code} and said nothing"


def try_out(
    workspace: Workspace,
    config: TrainConfig,
    seconds: float = SECONDS,
    script: Path = SCRIPT,
    memory: int | None = None,
) -> dict[str, Any]:
    """Return what dry_run.py finds out about a resolved config's training, in as many bytes of memory as a job has.

    Raises DryRunFailed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train_config.json"
        write_json(file, config.given())
        argv = [sys.executable, str(script), "--config", str(file), "--root", str(workspace.root)]
        if workspace.pretrained_dir is not None:
            argv += ["--pretrained_dir", str(workspace.pretrained_dir)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        env = _environment(config, workspace) | {"TMPDIR": folder}  # what a killed trial leaves goes with ours
        apart = {"start_new_session": True}  # else the server would be slowed down with it
        with subprocess.Popen(argv, cwd=PROJECT, env=env, **streams, **apart) as child:  # type: ignore[call-overload]
            fail_first_without_memory(child.pid, memory)
            yield_to_the_server(child.pid)
            try:
                printed = child.communicate(timeout=seconds)[0]
            except subprocess.TimeoutExpired:
                raise DryRunFailed(f"the dry run was not done after {seconds:g} s; prepare the dataset first") from None
            finally:
                child.kill()
    try:
        found = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        raise DryRunFailed(_ending(child.returncode)) from None
    if "error" in found:
        raise DryRunFailed(str(found["error"]))
    return dict(found)
