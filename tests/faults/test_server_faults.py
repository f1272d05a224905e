"""A server that is killed, on a full or read-only disk, under a clock that jumps: no work is lost or done twice."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from live_server import ROOT, Process, Streams, alive, make_root, raw, until
from test_train import TEXT

from storage.checkpoint_files import damage

SHAPE = {"dataset": "text", "tokenizer": "char", "n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 32}
SHAPE |= {"batch_size": 4, "eval_iters": 1, "sample_tokens": 0, "threads": 1, "dtype": "fp32"}
ENDLESS = SHAPE | {"max_iters": 1_000_000, "eval_interval": 50, "log_interval": 10}

TRAINING = 120.0  # seconds; trainers yield to all else on a busy machine


@pytest.fixture
def root(tmp_path) -> Path:
    make_root(tmp_path)
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "a.txt").write_text(TEXT)
    return tmp_path


@contextlib.contextmanager
def serving(root: Path, *flags: str, **how) -> Iterator[Process]:
    """Have a server inside; what it trains then is ended with it."""
    process = Process(root, "--threads", "1", "--slots", "4", *flags, **how)
    try:
        yield process
    finally:
        with contextlib.suppress(requests.RequestException):
            for job in process.get("/api/jobs").json()["jobs"]:
                if job["process_id"] is not None:
                    os.kill(job["process_id"], signal.SIGKILL)
        process.end()


def train(server: Process, name: str, **fields) -> requests.Response:
    return server.post("/api/train", {"output_dir": f"out/{name}"} | ENDLESS | fields)


def job(server: Process, name: str) -> dict:
    return server.get(f"/api/jobs/{name}").json()


def kill_all(server: Process) -> None:
    """Kill worker and master at once."""
    worker = server.worker()
    server.child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    server.child.wait()
    until(lambda: not alive(worker))


def trainers(root: Path) -> list[int]:
    """Return the processes that train in a root."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and f"--root\0{root}".encode() in (entry / "cmdline").read_bytes():
                command = (entry / "cmdline").read_bytes()
                found += [int(entry.name)] if b"train.py\0" in command and alive(int(entry.name)) else []
    return found


# ---- killed


@pytest.mark.fault("F7", "SIGKILL of worker and master with two jobs running, one of which ends before the next server")
@pytest.mark.timeout(500)
def test_jobs_outlive_a_killed_server_and_are_found_again_once(root, record_property):
    with serving(root, "--max_jobs", "2") as first:
        train(first, "goes_on")
        train(first, "ends", max_iters=50)
        pids = {name: until(lambda name=name: job(first, name)["process_id"]) for name in ("goes_on", "ends")}
        os.kill(pids["ends"], signal.SIGSTOP)  # so that it does not end too early
        before = until(lambda: job(first, "goes_on")["iter_num"], TRAINING)
        assert job(first, "ends")["state"] == "running"
        kill_all(first)
    os.kill(pids["ends"], signal.SIGCONT)
    until((root / "out" / "ends" / "result.json").exists, TRAINING)
    until(lambda: not alive(pids["ends"]))
    with serving(root, "--max_jobs", "2") as second:
        began = time.monotonic()
        found = job(second, "goes_on")
        seconds = time.monotonic() - began
        assert found["state"] == "running" and found["process_id"] == pids["goes_on"] and found["iter_num"] >= before
        until(lambda: job(second, "goes_on")["iter_num"] > found["iter_num"], TRAINING)
        ended = job(second, "ends")
        assert (ended["state"], ended["iter_num"], ended["exit_code"]) == ("succeeded", 50, 0)
        assert trainers(root) == [pids["goes_on"]], "nothing runs twice"
        record_property("found", f"0 lost, 0 doubled: one adopted with its pid ({seconds:.2f} s), one ended as it did")


def half_an_upload(server: Process) -> socket.socket:
    """Begin to send a dataset, and send half of it."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="half.txt"\r\n\r\n'
    line = f"POST /api/datasets HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Length: 3000000\r\n"
    line += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    return raw(server, line.encode() + head + b"half a text\n" * 100_000)


@pytest.mark.fault("F22", "SIGKILL of worker and master at a random moment of a load, an upload and a deletion")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_server_killed_while_it_loads_stores_and_deletes_leaves_nothing_half_done(root, kills, record_property):
    moments, gone = random.Random(1), 0
    for i in range(kills):
        run = root / "out" / f"run{i}"
        shutil.copytree(root / "out" / "trained", run)
        (run / "train_config.json").write_text(json.dumps({"dataset": "text", "output_dir": f"out/run{i}"}))
        with serving(root) as server:
            asked = [
                threading.Thread(target=quietly, args=(server.post, "/api/load_model", {"model_path": "models/other"})),
                threading.Thread(target=quietly, args=(requests.delete, f"{server.url}/api/jobs/{run.name}")),
            ]
            with half_an_upload(server):
                for thread in asked:
                    thread.start()
                time.sleep(moments.uniform(0, 0.1))
                kill_all(server)
            for thread in asked:
                thread.join()
        kept = list((root / "out" / ".trash").glob(f"{run.name}.*")) if not run.exists() else [run]
        assert len(kept) == 1 and sorted(os.listdir(kept[0])) == ["ckpt.pt", "tokenizer.json", "train_config.json"]
        gone += not run.exists()
    with serving(root) as server:
        assert server.get("/api/status").json()["model"]["id"] == "tiny-shakespeare"
        assert server.post("/api/generate", {"prompt": "Once", "max_new_tokens": 2}).status_code == 200
        assert [found["name"] for found in server.get("/api/datasets").json()["datasets"]] == ["text"]
        left = [path for folder in ("data", "out") for path in (root / folder).rglob(".*.tmp")]
        assert left == []
    record_property("found", f"{kills} kills: no half upload, nothing left; {gone} runs in the trash, whole")


def quietly(ask, *what) -> None:
    with contextlib.suppress(requests.RequestException):
        ask(*what)


# ---- disks


def mounting(command: str) -> list[str]:
    """Return words before a command that give it mounts of its own, made by `command`; skip where none can be had."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs a mount namespace of its own: Linux, unshare and root")
    return [unshare, "-m", "/bin/sh", "-c", f'PATH=/bin:/usr/bin:/sbin && {command} && exec "$@"', "sh"]


@pytest.mark.slow
@pytest.mark.fault("F6", "out/ on a disk of 80 MB, filled but for 256 kB while a job trains, freed later")
@pytest.mark.timeout(500)
def test_a_job_survives_a_full_disk_and_saves_again_when_it_is_freed(root, record_property):
    with serving(root, before=mounting(f"mount -t tmpfs -o size=80m tmpfs {root}/out")) as server:
        out = Path(f"/proc/{server.child.pid}/root{root}/out")
        assert train(server, "a").status_code == 200
        until(lambda: job(server, "a").get("has_checkpoint"), TRAINING)
        with contextlib.suppress(OSError), open(out / "filler", "wb", buffering=0) as f:
            while True:
                f.write(bytes(2**16))
        os.truncate(out / "filler", (out / "filler").stat().st_size - 256_000)
        said = until(lambda: job(server, "a")["checkpoint_error"], TRAINING)
        assert "disk is full" in said and damage(out / "a" / "ckpt.pt") is None
        refused = train(server, "b")
        assert refused.status_code == 409 and "MB are needed" in refused.json()["error"]
        assert server.post("/api/generate", {"prompt": "Once", "max_new_tokens": 2}).status_code == 200
        before = json.loads((out / "a" / "ckpt.pt.json").read_text())["iter_num"]
        os.unlink(out / "filler")
        until(lambda: json.loads((out / "a" / "ckpt.pt.json").read_text())["iter_num"] > before, TRAINING)
        until(lambda: job(server, "a")["checkpoint_error"] is None)
        assert job(server, "a")["state"] == "running"
        record_property("found", "checkpoint whole, checkpoint_error said, a new job 409, served, saved again after")


@pytest.mark.fault("F26", "out/ is mounted read-only")
def test_a_server_whose_out_is_read_only_refuses_to_start_and_says_why(root, record_property):
    before = mounting(f"mount --bind {root}/out {root}/out && mount -o remount,bind,ro {root}/out")
    command = [*before, sys.executable, "api_server.py", "--port", "0", "--root", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 2 and "Read-only file system" in done.stderr + done.stdout
    record_property("found", "exit code 2: " + (done.stderr + done.stdout).strip().splitlines()[-1][-90:])


# ---- clocks


@pytest.mark.slow
@pytest.mark.fault("F21", "the clock goes a day forward, then two back, while a job trains and a stream runs")
@pytest.mark.timeout(500)
def test_a_clock_that_jumps_ends_nothing(root, record_property):
    script = Path(__file__).with_name("shifted_clock.py")
    with serving(root, script=script) as server:
        train(server, "a", log_interval=1)
        pid = until(lambda: job(server, "a")["process_id"])
        until(lambda: job(server, "a")["iter_num"], TRAINING)
        streams = Streams(server, 1, tokens=1500)
        for shift in (86400, -86400):
            (root / "shift.new").write_text(str(shift))
            (root / "shift.new").rename(root / "shift")
            reached = job(server, "a")["iter_num"]
            found = until(lambda reached=reached: (j := job(server, "a"))["iter_num"] > reached + 20 and j, TRAINING)
            assert (found["state"], found["process_id"]) == ("running", pid) and found["eta_seconds"] >= 0
            assert server.get("/health").status_code == 200
        until(streams.ended, 120)
        assert streams.lines[0][-1] == "[DONE]"
        kill_all(server)
    with serving(root, script=script) as again:
        assert job(again, "a")["process_id"] == pid
        again.post("/api/jobs/a/stop", {})
        assert until(lambda: (j := job(again, "a"))["state"] == "stopped" and j)["error"] is None
        rows = again.get("/api/jobs/a/metrics").json()["metrics"]
    assert all(row["elapsed_seconds"] >= 0 and row.get("tokens_per_second", 1) > 0 for row in rows)
    record_property("found", "no timeout, no negative duration; the stream ended by itself, the job was adopted again")
