"""Servers as contestants, ours and llama-server, and the one client that asks them all.

Each server has a process of its own; all get the same bytes of `/v1/completions` from the same thread of the same
process, which reads all replies, so that the client's own work stays small beside the servers', with which it
shares the machine. It measures time and checks that all tokens came, not which ones.
"""

import http.client
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import peer_llama
from bench.contestant import ROOT, Absent, end

START = 120.0  # seconds that a server gets until it is healthy


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ours(folder: Path, root: Path, dtype: str, threads: int, slots: int, port: int) -> list[str]:
    """Return the command of our server with a model folder; `root` is its own folder."""
    command = [sys.executable, str(ROOT / "api_server.py"), "--port", str(port), "--root", str(root)]
    command += ["--model_type", folder.name, "--pretrained_dir", str(folder.parent), "--dtype", dtype]
    command += ["--speculation", "0"]  # random weights write in loops: drafts would be right too often
    return [*command, "--threads", str(threads), "--slots", str(slots), "--prefill_tokens", "2048"]


def llama_server(model: Path, llama_dir: Path | None, context: int, threads: int, slots: int, port: int) -> list[str]:
    """Return llama-server's command with a GGUF file; `context` is in tokens per slot. Raises Absent."""
    command = [str(peer_llama.program("llama-server", llama_dir)), "-m", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "-t", str(threads), "-np", str(slots), "-c", str(context * slots)]
    return [*command, "-b", "2048", "-ub", "512", "--cache-ram", "0"]  # no copies of what no prompt begins with


class Server:
    """A server in a process of its own. Raises Absent when it ends before it is healthy."""

    def __init__(self, name: str, command: Sequence[str], port: int):
        self.name, self.port = name, port
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill and block it
        self._child = subprocess.Popen(command, cwd=ROOT, stdout=self._said, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + START
        while not self._healthy():
            if self._child.poll() is not None or time.monotonic() > until:
                self._said.seek(0)
                said = self._said.read().strip().splitlines()[-1:]
                raise Absent(f"{self.name} did not start: {said[0] if said else 'it said nothing'}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    @property
    def pid(self) -> int:
        """Return the number of its process."""
        return self._child.pid

    def run(self, prompts: list[list[int]], new: int, stream: bool) -> float:
        """Continue all prompts at once by `new` tokens each; return the seconds until the last reply has ended."""
        return ask_all(self.port, [request(prompt, new, stream) for prompt in prompts], new)

    def close(self) -> None:
        """End it."""
        self._child.terminate()
        end(self._child, 60)
        self._said.close()


def request(prompt: list[int], new: int, stream: bool) -> bytes:
    """Return the bytes of a request whose connection the server closes after the reply."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def ask_all(port: int, requests: list[bytes], new: int) -> float:
    """Send all requests at once and return the seconds until the last reply has ended.

    Raises RuntimeError when a reply does not report `new` tokens.
    """
    selector, said = selectors.DefaultSelector(), {}
    begun = time.perf_counter()
    for data in requests:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(data)
        selector.register(connection, selectors.EVENT_READ)
        said[connection] = bytearray()
    left = len(said)
    while left:
        for key, _ in selector.select():
            connection = key.fileobj  # type: ignore[assignment]
            data = connection.recv(65536)
            said[connection] += data
            if not data:
                selector.unregister(connection)
                left -= 1
    seconds = time.perf_counter() - begun
    selector.close()
    for connection in said:
        connection.close()
    for reply in said.values():
        if f'"completion_tokens":{new}'.encode() not in bytes(reply).replace(b" ", b""):
            raise RuntimeError(f"not {new} tokens: {bytes(reply[-300:])!r}")
    return seconds
