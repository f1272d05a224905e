"""Try a training: prepare its data, run three real iterations, and print what it would be as one line of JSON.

    python dry_run.py --dataset stdlib --model_type nano --max_iters 500       (the flags are those of train.py)

It takes the model, the optimizer and the batches of train.py itself. What it writes of a run goes into a temporary
folder; only the dataset's tokens stay, which the training will use. The server runs it for "dry_run": true.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from learning.machine import Machine
from learning.start import start
from learning.team import Team
from storage.datasets import dataset
from storage.registry import pretrained_names
from storage.runs import Run, Workspace
from train import Trainer
from training.command_line import parse
from training.config import ConfigError, TrainConfig, resolve
from training.outcome import explain
from training.preflight import report
from training.progress import PreparationLine
from training.starting_point import check_fit
from training.stop_signal import StopSignal

ITERATIONS = 3  # the first one warms up


def measure(config: TrainConfig, workspace: Workspace, run: Run) -> dict[str, Any]:
    """Return what is known of a resolved config's training after three iterations of it."""
    machine, team = Machine.of(config), Team()
    model, text, _ = start(config, workspace, run, first=True)
    data = dataset(workspace, config.dataset)
    splits = data.prepare(text, PreparationLine())
    check_fit(config, splits, model.config, team.world)
    trainer = Trainer(config, machine, team, model, splits, StopSignal())
    updates = []
    for _ in range(ITERATIONS):
        began = time.perf_counter()
        updates.append(trainer.update() | {"seconds": time.perf_counter() - began})
    found = report(config, splits, trainer.window, model.config.vocab_size, updates, machine.memory_bytes())
    return {"format": data.format(), **found}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; print {"error": …} and return another code than 0 for what would fail."""
    config = None
    try:
        config, workspace = parse(sys.argv[1:] if argv is None else argv, Path(__file__).resolve().parent)
        config = resolve(config, pretrained_names(workspace))
        if config.init_from == "resume":
            raise ConfigError("init_from is resume; a dry run is for a training that has not begun")
        with tempfile.TemporaryDirectory() as folder:
            found = measure(config, workspace, Run(workspace.run_from_output_dir(config.output_dir).name, Path(folder)))
    except Exception as error:
        code, sentence = explain(error, config, 0)
        print(json.dumps({"error": sentence}))
        return code
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
