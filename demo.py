"""The whole loop in one command: start a server, train a small model, load it, generate with it, stop the server.

    make demo        or        python demo.py

Each step is one line of explanation and one real command of the client, which a user can type just the same. It
takes a free port of this machine, leaves the trained model in out/demo (and replaces it the next time), and always
stops what it started: also after Ctrl-C or a failure. Nothing here is needed by the server.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent
RUN = "demo"
ITERATIONS = 300  # about a minute on two cores
START_SECONDS = 60.0  # until the server must have its model
STOP_SECONDS = 40.0  # until a job or the server must have ended
LOG_LINES = 20  # of the server's output, shown after a failure


class DemoFailed(Exception):
    """A step went wrong; the message says which."""


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def client(*words: str) -> list[str]:
    """Return the client's command line."""
    return [sys.executable, "api_client.py", *words]


def explain(text: str) -> None:
    """Print a step's line of explanation."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{text}{plain}", flush=True)


def step(text: str, *words: str) -> None:
    """Explain a step, show its command and run it on this terminal. Raises DemoFailed."""
    explain(text)
    print(f"$ python api_client.py {shlex.join(words)}", flush=True)
    code = subprocess.run(client(*words), cwd=ROOT).returncode
    if code != 0:
        raise DemoFailed(f"`api_client.py {words[0]}` ended with exit code {code}")


def ask(*words: str) -> dict[str, Any] | None:
    """Run a command of the client out of sight and return the reply, or None when it failed."""
    done = subprocess.run(client(*words, "--json"), cwd=ROOT, capture_output=True, text=True)
    reply: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
    return reply


def wait_until_up(server: subprocess.Popen[bytes]) -> None:
    """Wait until the server has loaded its model. Raises DemoFailed when it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not (ask("status") or {}).get("model_loaded"):
        if server.poll() is not None:
            raise DemoFailed(f"the server ended with exit code {server.returncode}")
        if time.monotonic() > deadline:
            raise DemoFailed(f"the server had no model ready within {START_SECONDS:.0f} s")
        time.sleep(0.2)


def stop_job() -> None:
    """Stop the demo's training job if it runs, and wait for its end: jobs outlive their server."""
    deadline = time.monotonic() + STOP_SECONDS
    job = ask("jobs", "show", RUN)
    if job is None or job["state"] not in ("queued", "running"):
        return
    ask("jobs", "stop", RUN)
    while job is not None and job["state"] in ("queued", "running") and time.monotonic() < deadline:
        time.sleep(0.3)
        job = ask("jobs", "show", RUN)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End the server as an operator would, and for certain."""
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextmanager
def running_server(port: int, log: IO[bytes]) -> Iterator[None]:
    """Run the server, in a session of its own so that Ctrl-C here leaves it to us to stop it in order."""
    words = ["api_server.py", "--port", str(port)]
    explain("Start a server with the bundled model.")
    print(f"$ python {shlex.join(words)} &\n$ export LM_SERVER_URL=http://127.0.0.1:{port}", flush=True)
    command = [sys.executable, *words]
    server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_up(server)
        yield
    finally:
        if server.poll() is None:
            try:
                stop_job()
                explain("Stop the server.")
            finally:  # also where there is no terminal any more to say so on
                stop_server(server)


def replace_old_run() -> None:
    """Delete what an earlier demo left in out/demo."""
    if ask("jobs", "show", RUN) is not None:
        stop_job()
        step(f"Delete the run of an earlier demo, out/{RUN}.", "jobs", "delete", RUN, "--yes")


def show_loop() -> None:
    """Go once through the loop: look, train, load, generate."""
    step("Ask the server how it is.", "status")
    replace_old_run()
    what = ("--dataset", "stdlib", "--model_type", "nano", "--max_iters", str(ITERATIONS), "--eval_interval", "100")
    step(
        "Train a small model from scratch on the Python sources of this machine. The job runs on the server; we watch.",
        *("train", "--output_dir", f"out/{RUN}", *what, "--follow"),
    )
    step("Serve what has just been trained.", "load", "--model_path", f"out/{RUN}/ckpt.pt")
    prompt = ("--prompt", "def __init__(self", "--max_tokens", "120", "--temperature", "0.7")
    step("Generate with it. A minute of training teaches the look of Python, not its sense.", "generate", *prompt)


def end_on_signal(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] = ()) -> int:
    """Run the demo and return its exit code."""
    argparse.ArgumentParser("demo.py", description=f"{__doc__}".partition("\n")[0]).parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_on_signal)
    port, began = free_port(), time.monotonic()
    os.environ["LM_SERVER_URL"] = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        try:
            with running_server(port, log):
                show_loop()
        except DemoFailed as error:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
            print(f"\nThe demo failed: {error}. The server's last lines:", *lines, sep="\n    ", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted; the server and the job have been stopped.", file=sys.stderr)
            return 130
    print(
        f"\nDone in {time.monotonic() - began:.0f} s. The model is in out/{RUN}; `make run` starts a server to use it."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
