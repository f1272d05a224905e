"""The HTTP benchmark: its client against a fake server, servers that do not start, and its tables; nothing is timed."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from bench.bench_http import ENGINE, KINDS, OURS, report, title
from bench.contestant import Absent
from bench.http_servers import Server, ask_all, free_port, llama_server, request
from bench.measure import Figure

LLAMA = "llama-server Q8_0"


class Completions(BaseHTTPRequestHandler):
    """Answers as `/v1/completions` does, in the end with the number of tokens asked for."""

    seen: ClassVar[list[dict[str, object]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"usage": {"completion_tokens": body["max_tokens"]}}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Completions.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_all_prompts_are_asked_once_each_with_what_was_said(port: int) -> None:
    prompts = [[1, 2], [3, 4], [5, 6]]
    assert ask_all(port, [request(p, 7, stream=True) for p in prompts], 7) > 0
    assert sorted(str(body["prompt"]) for body in Completions.seen) == [str(p) for p in prompts]
    assert all(body["stream"] and body["ignore_eos"] and body["temperature"] == 0 for body in Completions.seen)


def test_a_reply_with_too_few_tokens_is_an_error(port: int) -> None:
    with pytest.raises(RuntimeError, match="not 8 tokens"):
        ask_all(port, [request([1], 7, stream=False)], 8)


def test_a_server_that_ends_at_once_is_absent_and_says_why() -> None:
    with pytest.raises(Absent, match="broken did not start: no weights"):
        Server("broken", [sys.executable, "-c", "raise SystemExit('no weights')"], free_port())


def test_llama_server_is_absent_where_it_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="llama-server is not in"):
        llama_server(tmp_path / "none.gguf", tmp_path, 256, 2, 16, 1)


def told(ours: float, llama: float, engine: float, ms: float) -> str:
    """Return the report of one round with 16 clients in int8."""
    samples = {OURS: ours, LLAMA: llama, ENGINE: engine}
    figures = {title(16, kind): {name: Figure([value]) for name, value in samples.items()} for kind in KINDS}
    return report(figures, {kind: Figure([ms]) for kind in KINDS}, "int8", 16, LLAMA)


def test_the_report_says_which_aims_hold() -> None:
    text = told(900, 200, 1000, 1.5)
    assert "4.50 (4.50-4.50) x, aim 3.5: holds" in text and "0.90 (0.90-0.90) x, aim 0.85: holds" in text
    assert "1.50 (1.50-1.50) ms a request streamed; aim at most 2: holds" in text and "does not hold" not in text


def test_the_report_says_which_aims_do_not_hold() -> None:
    assert told(600, 200, 1000, 2.5).count("does not hold") == 6
