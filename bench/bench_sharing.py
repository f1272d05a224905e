"""Sharing the cores: how fast one request decodes beside a running training job, and without it.

    .venv/bin/python -m bench.bench_sharing [--models bundled,gpt2] [--dtype bf16] [--rounds 5] [--threads 2]

The engine is the server's, without HTTP; the job is `train.py` with the nano preset, started as the server starts
it, once with each `--training_priority`. In each round they are frozen (SIGSTOP) or let go (SIGCONT) in turn, one
at a time, while the same request decodes.
"""

import argparse
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.bench_generate import ours
from bench.contestant import ROOT, Contestant
from bench.measure import Figure, machine, ratio, rounds
from bench.reference_model import WORK, model_folder, prompts
from storage.files import write_json
from storage.runs import Workspace
from training import metrics
from training.config import TrainConfig, resolve
from training.local_backend import LocalBackend
from training.process import signal_session

SETTLE = 0.3  # seconds after which a process that was let go is at work again
ALONE, PRIORITIES = "no job", ("low", "idle", "normal")


class Job:
    """A training job that can be frozen and let go."""

    def __init__(self, workspace: Workspace, priority: str):
        self.run, self.backend = workspace.run(priority), LocalBackend(workspace, priority=priority)
        self.run.folder.mkdir(parents=True)
        fields = {"dataset": "text", "output_dir": self.run.relative, "model_type": "nano", "max_iters": 10**9}
        fields |= {"eval_interval": 10**9, "log_interval": 10, "sample_tokens": 0}
        write_json(self.run.config, resolve(TrainConfig.parse(fields)).given())
        self.identity = self.backend.start(self.run, resume=False, downloads=False)
        while self.iterations() < 20:
            if not self.backend.alive(self.identity):
                raise RuntimeError(self.run.log.read_text()[-2000:])
            time.sleep(0.1)
        self.freeze()

    def iterations(self) -> int:
        """Return how far it has come."""
        return int(metrics.last(self.run.metrics).get("iter_num", 0))

    def freeze(self) -> None:
        """Hold it where it is."""
        signal_session(self.identity, signal.SIGSTOP)

    def let_go(self) -> None:
        """Let it go on."""
        signal_session(self.identity, signal.SIGCONT)
        time.sleep(SETTLE)

    def end(self) -> None:
        """End it."""
        self.backend.kill(self.identity)


def beside(job: Job | None, engine: Contestant, new: int, speeds: list[float]) -> Callable[[], float]:
    """Return a sample: tokens per second of one request while the job runs; `speeds` gets the job's."""

    def sample() -> float:
        if job is None:
            return engine.run(prompts(1, 16, 500, seed=1), new).decode
        job.let_go()
        before, start = job.iterations(), time.monotonic()
        decode = engine.run(prompts(1, 16, 500, seed=1), new).decode
        speeds.append((job.iterations() - before) / (time.monotonic() - start))
        job.freeze()
        return decode

    return sample


def report(title: str, figures: dict[str, Figure], speeds: dict[str, list[float]], others: float) -> None:
    print(f"**{title}**, tokens/s of one request\n\n| | tokens/s | of the speed alone | the job's iterations/s |")
    print("|---|---|---|---|")
    for name, figure in figures.items():
        job = Figure(speeds[name]).text(1) if speeds[name] else ""
        print(
            f"| {name if name == ALONE else f'a job of {name} priority'} | {figure.text()} "
            f"| {ratio(figure, figures[ALONE])} | {job} |"
        )
    print(f"\n({others:.2f} cores were used by others, the jobs among them)\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bundled,gpt2")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(machine() + "\n")
    with tempfile.TemporaryDirectory() as root:
        workspace = Workspace(Path(root))
        text = workspace.data / "text" / "text.txt"
        text.parent.mkdir(parents=True)
        text.write_text("".join(path.read_text() for path in sorted(ROOT.glob("*/*.py"))))
        jobs: dict[str, Job] = {}
        try:
            for priority in PRIORITIES:
                jobs[priority] = Job(workspace, priority)
            for name in args.models.split(","):
                folder = ROOT / "models" / "tiny-shakespeare" if name == "bundled" else model_folder(WORK)
                engine, new = ours(folder, args.dtype, args.threads), 224 if name == "bundled" else 128
                speeds: dict[str, list[float]] = {ALONE: [], **{priority: [] for priority in PRIORITIES}}
                samples = {each: beside(jobs.get(each), engine, new, speeds[each]) for each in speeds}
                try:
                    engine.run(prompts(1, 16, 500, seed=0), new)
                    figures, others = rounds(samples, args.rounds)
                    report(f"{name}, {args.dtype}", figures, speeds, others)
                finally:
                    engine.close()
        finally:
            for job in jobs.values():
                job.end()


if __name__ == "__main__":
    main()
