"""Try a training: prepare its data, run three real iterations, and print what it would be as one line of JSON.

    python dry_run.py --dataset stdlib --model_type nano --max_iters 500       (the flags are those of train.py)

It takes the model, the optimizer and the batches of train.py itself. What it writes of a run goes into a temporary
folder; only the dataset's tokens stay, which the training will use. The server runs it for "dry_run": true.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as error:  # a Python without the project's packages
    sys.exit(f"{error.name} is not installed for this Python; after `make setup` use .venv/bin/python dry_run.py")

from learning.launcher import cause, ended, run_together, threads_each
from learning.machine import Machine
from learning.start import prepare
from learning.team import Team, leave
from storage.datasets import dataset
from storage.runs import Run, Workspace
from train import Trainer
from training.command_line import parse
from training.config import ConfigError, TrainConfig
from training.hardware import require_devices
from training.outcome import explain
from training.preflight import report
from training.rank import Rank
from training.starting_point import settled
from training.stop_signal import StopSignal

ITERATIONS = 3  # the first one warms up


def measure(config: TrainConfig, workspace: Workspace, run: Run, team: Team) -> dict[str, Any]:
    """Return what is known of a resolved config's training after three iterations of it."""
    machine = Machine.of(config)
    model, splits, _ = prepare(config, workspace, run, team)
    trainer = Trainer(config, machine, team, model, splits, StopSignal())
    updates = []
    for _ in range(ITERATIONS):
        began = time.perf_counter()
        updates.append(trainer.update() | {"seconds": time.perf_counter() - began})
    memory = machine.memory_bytes()
    if machine.device.type == "cpu":  # which all processes share
        memory = int(team.sum(memory))
    found = report(config, splits, trainer.batches.window, model.config.vocab_size, updates, memory)
    return {"format": dataset(workspace, config.dataset).format(), **found}


def launched(argv: list[str], processes: int) -> int:
    """Try a training of several processes in as many; the first of them prints."""
    failures = run_together(Path(__file__).resolve(), argv, processes, threads_each(processes))
    if failures and (failures.get(0) is None or failures[0] < 0):
        print(json.dumps({"error": ended(*cause(failures), processes)}))
    return 0 if not failures else max(failures.get(0, 1), 1)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; print {"error": …} and return another code than 0 for what would fail."""
    code, config, place, argv = 0, None, Rank.of(os.environ), sys.argv[1:] if argv is None else argv
    place.bind()
    try:
        config, workspace = parse(argv, Path(__file__).resolve().parent, "dry_run.py")
        config = settled(config, workspace)
        if config.init_from == "resume":
            raise ConfigError("init_from is resume; a dry run is for a training that has not begun")
        name = workspace.run_from_output_dir(config.output_dir).name
        if config.nproc_per_node > 1 and place.world == 1:
            require_devices(config.device, config.nproc_per_node, torch.cuda.device_count())
            return launched(argv, config.nproc_per_node)
        with tempfile.TemporaryDirectory() as own:
            found = measure(config, workspace, Run(name, place.folder or Path(own)), Team(place))
    except Exception as error:
        code, sentence = explain(error, config, 0)
        found = {"error": sentence}
    leave()  # the others may end from here on
    if place.number == 0:
        print(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(main())
