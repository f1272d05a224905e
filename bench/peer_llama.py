"""llama.cpp as a contestant, by its own llama-batched-bench, and the files and programs it needs.

The programs are taken from a folder that the user names, or from PATH. llama-batched-bench makes up its
token ids, so of the prompts only number and length matter; each call loads the model anew and warms up before
what is timed.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.contestant import ROOT, Absent, Result

ATTEMPTS = 4  # it prints by a thread that its end sometimes outruns: then lines are missing
KINDS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}


def program(name: str, folder: Path | None) -> Path:
    """Return the path of one of llama.cpp's programs. Raises Absent."""
    found = shutil.which(name, path=None if folder is None else str(folder))
    if found is None:
        raise Absent(f"{name} is not in {folder or 'PATH'}")
    return Path(found)


def version(folder: Path | None) -> str:
    """Return llama.cpp's version in words."""
    done = subprocess.run([program("llama-batched-bench", folder), "--version"], capture_output=True, text=True)
    line = next((x for x in (done.stdout + done.stderr).splitlines() if x.startswith("version")), "version unknown")
    return f"llama.cpp {line}"


def gguf_file(folder: Path, work: Path, dtype: str, python: str) -> Path:
    """Return the GGUF file of a model folder, made now if need be. Raises Absent."""
    out = work / f"{folder.name}-{KINDS[dtype]}.gguf"
    if not out.exists():
        command = [python, "-m", "bench.write_gguf", str(folder), str(out), "--dtype", KINDS[dtype]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise Absent(f"no GGUF file: {done.stderr.strip().splitlines()[-1]}")
    return out


def measured(command: list[str]) -> tuple[list[dict[str, Any]], float]:
    """Run llama-batched-bench; return the rows it printed and its peak memory in MB. Raises RuntimeError."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
        out.seek(0)
        return [json.loads(line) for line in out if line.startswith("{")], usage.ru_maxrss / 1e3


class Llama:
    """llama-batched-bench on one GGUF file."""

    def __init__(self, name: str, bench: Path, model: Path, threads: int):
        self.name, self._bench, self._model, self._threads = name, bench, model, threads

    def run(self, prompts: list[list[int]], new: int) -> Result:
        """Measure a work of this shape; see `Contestant.run`."""
        count, length = len(prompts), len(prompts[0])
        command = [str(self._bench), "-m", str(self._model), "-t", str(self._threads), "--output-format", "jsonl"]
        command += ["-npp", str(length), "-npl", str(count), "-ntg", f"2,{new}"]  # two tokens first, to warm up
        command += ["-c", str(max(count * (length + new), 512)), "-b", "2048", "-ub", "512"]
        for _ in range(ATTEMPTS):
            rows, peak_mb = measured(command)
            if found := [row for row in rows if row["tg"] == new]:
                break
        else:
            raise RuntimeError(f"{' '.join(command)} printed no figures, {ATTEMPTS} times")
        last = found[-1]
        decode = last["t_tg"] * (new - 1) / new  # the prompt's pass gives the first token
        return Result(last["t_pp"], last["t_pp"] + decode, count * new, count, peak_mb)

    def close(self) -> None:
        """Do nothing: no process outlives a work."""
