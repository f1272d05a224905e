"""The command-line client against a full fake of the server: every call, every kind of bad answer, every exit code."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import client.follow
from api_client import cli
from client.api import ApiClient, ApiError, clean, event_data
from client.follow import Watched, figures, picture, plot

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"dataset": "stdlib", "model_type": "nano", "output_dir": "out/mine"}
MODELS = {
    "pretrained_models": ["gpt2", "tiny-shakespeare"],
    "trained_models": [{"name": "mine", "path": "out/mine/ckpt.pt", "config": CONFIG, "iter_num": 20}],
}
STATUS = {"status": "online", "model_loaded": True, "device": "cpu", "timestamp": 1.7e9, "model": {"id": "mine"}}


def sse(*frames: str) -> tuple[int, str, bytes]:
    return 200, "text/event-stream", "".join(f"{frame}\n\n" for frame in frames).encode()


SAMPLES = [
    {"iter_num": 10, "prompt": "def ", "text": "x"},
    {"iter_num": 20, "prompt": "def ", "text": "f():\x1b[2J"},
]
WAITS = {"state": "queued", "queue_position": 1, "queue_reason": "max_jobs is 1; running now: other"}
SIZED = {"id": "mine", "kind": "trained", "loaded": True, "parameters": 1234567, "size_bytes": 2469134}
SIZED |= {"memory_bytes": 9876543}


class FakeServer(ThreadingHTTPServer):
    """The routes of the API with a small state; `answers` replaces the answer of a route."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, object] = {}
        self.requests: list[tuple[str, str, object]] = []
        self.keys: list[str | None] = []
        self.polls = 0
        self.job = {"name": "mine", "state": "running", "iter_num": 0, "max_iters": 40, "error": None}

    def reply(self, method: str, path: str, query: str, body: object) -> object:
        route = f"{method} {path}"
        if route in self.answers:
            answer = self.answers[route]
            return answer() if callable(answer) else answer
        routes = {
            "GET /api/status": lambda: STATUS,
            "GET /api/models": lambda: MODELS,
            "POST /api/load_model": lambda: {"message": "Model loaded successfully", "model": {"id": "mine"}},
            "POST /api/unload_model": lambda: {"message": "Model unloaded"},
            "POST /api/generate": lambda: self.generate(body),
            "POST /v1/chat/completions": lambda: self.chat(body),
            "POST /api/train": lambda: {
                "message": "Training started",
                "config": body,
                "config_path": "out/mine/train_config.json",
                "process_id": 7,
            },
            "GET /v1/models": lambda: {
                "data": [SIZED, SIZED | {"id": "bad", "parameters": None, "memory_bytes": None}]
            },
            "GET /api/jobs": lambda: {"jobs": [self.job]},
            "GET /api/jobs/mine": self.look,
            "GET /api/jobs/mine/metrics": lambda: {"metrics": self.rows(query)},
            "GET /api/jobs/mine/samples": lambda: {"samples": SAMPLES},
            "GET /api/jobs/mine/log": lambda: self.log(query),
            "POST /api/jobs/mine/stop": lambda: self.job | {"state": "stopped"},
            "POST /api/jobs/mine/resume": lambda: self.job | {"state": "queued"},
            "POST /api/jobs/mine/priority": lambda: self.job | WAITS,
            "DELETE /api/jobs/mine": lambda: self.job,
            "GET /api/datasets": lambda: {"datasets": [{"name": "stdlib", "bytes": 12, "tokens": {"gpt2": 5}}]},
            "DELETE /api/datasets/notes": lambda: {"message": "Dataset notes deleted"},
            "POST /api/datasets": lambda: {"name": "notes", "bytes": 3},
            "POST /api/export": lambda: {"message": "exported", "path": "out/mine/hf"},
        }
        return routes[route]() if route in routes else (404, "application/json", b'{"error": "there is no such job"}')

    def generate(self, body: dict) -> object:
        if not body.get("stream"):
            text = body["prompt"] + " there was"
            return {"generated_text": text, "finish_reason": "length", "usage": {"completion_tokens": 2}}
        pieces = [f'data: {{"text": "{piece}", "index": 0}}' for piece in (" there", " was")]
        end = 'data: {"generated_text": "Once there was", "finish_reason": "length", "usage": {"completion_tokens": 2}}'
        return sse(": ping", *pieces, end, "data: [DONE]")

    def chat(self, body: dict) -> object:
        text = f"message {len(body['messages'])}"
        if not body.get("stream"):
            return {"choices": [{"message": {"role": "assistant", "content": text}}]}
        deltas = [{"role": "assistant", "content": ""}, {"content": text[:4]}, {"content": text[4:]}, {}]
        frames = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
        return sse(*(f"data: {frame}" for frame in frames), "data: [DONE]")

    def look(self) -> dict:
        self.polls += 1
        self.job["iter_num"] = min(10 * self.polls, 40)
        if self.polls > 4:
            self.job["state"] = "succeeded"
        return self.job

    def rows(self, query: str) -> list[dict]:
        after = int(query.partition("after=")[2] or -1)
        seen = range(0, self.job["iter_num"] + 1, 10)
        return [
            {"iter_num": i, "loss": 4 - i / 20, "val_loss": 4.1 - i / 20 if i % 20 == 0 else None}
            for i in seen
            if i > after
        ]

    def log(self, query: str) -> object:
        if "follow=1" in query:
            return sse('data: {"text": "one\\n"}', 'data: {"text": "two\\n"}', 'data: {"job": {}}', "data: [DONE]")
        return {"log": "one\n"}


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the client has left
            self.close_connection = True

    def do_GET(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_json = "json" in (self.headers.get("Content-Type") or "")
        path, _, query = self.path.partition("?")
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.requests.append((self.command, self.path, json.loads(raw) if is_json else raw))
        answer = self.server.reply(self.command, path, query, self.server.requests[-1][2])
        if answer is None:
            self.connection.close()  # no answer at all
            return
        if isinstance(answer, dict):
            answer = (200, "application/json", json.dumps(answer).encode())
        status, kind, content = answer
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_DELETE = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("LM_SERVER_URL", fake.url)
    monkeypatch.delenv("LM_SERVER_API_KEY", raising=False)
    monkeypatch.setattr(client.follow, "POLL_SECONDS", 0.01)
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


def run(*words: str, stdin: bytes | str | None = None):
    return CliRunner().invoke(cli, words, input=stdin)


def body_of(server: FakeServer) -> dict:
    return server.requests[-1][2]


def changes(server: FakeServer) -> list[str]:
    """Return the requests that change something."""
    return [f"{method} {path}" for method, path, _ in server.requests if method != "GET"]


# ---- commands


def test_status_shows_the_fields_of_the_reply(server):
    done = run("status")
    assert done.exit_code == 0
    assert "device" in done.stdout and "model id" in done.stdout and "1.7e+09" not in done.stdout


@pytest.mark.parametrize("words", [("--json", "status"), ("status", "--json")])
def test_json_prints_the_reply_before_or_after_the_command(server, words):
    assert json.loads(run(*words).stdout) == STATUS


@pytest.mark.parametrize("before", [True, False])
def test_the_address_and_the_key_may_stand_before_or_after_the_command(server, monkeypatch, before):
    monkeypatch.setenv("LM_SERVER_URL", "http://127.0.0.1:1")
    options = ["--url", server.url, "--api-key", "secret"]
    assert run(*(options + ["status"] if before else ["status", *options])).exit_code == 0
    assert server.keys == ["Bearer secret"]


def test_the_environment_gives_the_key(server, monkeypatch):
    monkeypatch.setenv("LM_SERVER_API_KEY", "from-env")
    run("status")
    assert server.keys == ["Bearer from-env"]


def test_sizes_says_what_each_model_takes(server):
    lines = [line.split() for line in run("sizes").stdout.splitlines()]
    assert lines[0] == ["id", "kind", "loaded", "parameters", "disk", "memory"]
    assert lines[1] == ["mine", "trained", "yes", "1234567", "2.5", "MB", "9.9", "MB"]
    assert lines[2] == ["bad", "trained", "yes", "-", "2.5", "MB", "-"]
    assert json.loads(run("sizes", "--json").stdout)["data"][0]["parameters"] == 1234567


def test_list_shows_pretrained_names_and_trained_models(server):
    lines = run("list").stdout.splitlines()
    assert lines[0] == "pretrained: gpt2, tiny-shakespeare"
    assert lines[-1].split()[:5] == ["mine", "out/mine/ckpt.pt", "stdlib", "nano", "20"]


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["--model_path", "out/mine/ckpt.pt"], {"model_path": "out/mine/ckpt.pt"}),
        (["--model-type", "gpt2"], {"model_type": "gpt2"}),
    ],
)
def test_load_sends_the_one_choice_and_says_what_next(server, words, sent):
    done = run("load", *words)
    assert body_of(server) == sent
    assert "Model loaded successfully" in done.stdout and "generate --prompt" in done.stderr


def test_after_a_model_that_chats_is_loaded_chat_is_next(server):
    server.answers["POST /api/load_model"] = {"message": "loaded", "model": {"id": "mine", "chat": True}}
    said = run("load", "--model_path", "out/mine/ckpt.pt").stderr
    assert "python api_client.py chat" in said and "generate" not in said


@pytest.mark.parametrize("words", [[], ["--model_type", "a", "--model_path", "b"]])
def test_load_wants_exactly_one_choice(server, words):
    done = run("load", *words)
    assert done.exit_code == 2 and "exactly one" in done.stderr and not server.requests


def test_unload_prints_the_message(server):
    assert "Model unloaded" in run("unload").stdout


def test_generate_streams_the_prompt_and_the_text_and_nothing_else_to_stdout(server):
    done = run("generate", "--prompt", "Once")
    assert done.stdout == "Once there was\n"
    assert "2 tokens" in done.stderr and body_of(server) == {"prompt": "Once", "stream": True}


def test_generate_sends_every_option_under_its_name(server):
    options = {"temperature": 0.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 0}
    options |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "num_samples": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run("generate", "--prompt", "x", "--max_tokens", "7", "--stop", "a", "--stop", "b", "--no_stream", *words)
    assert body_of(server) == {"prompt": "x", "max_new_tokens": 7, "stop": ["a", "b"], **options}


def test_dashes_are_underscores(server):
    run("generate", "--prompt", "x", "--max-tokens=7", "--top-k", "3", "--no-stream")
    assert body_of(server) == {"prompt": "x", "max_new_tokens": 7, "top_k": 3}


def test_generate_reads_standard_input_as_it_is(server):
    run("generate", "--prompt", "-", stdin="Zwölf\n")
    assert body_of(server)["prompt"] == "Zwölf\n"


def test_generate_refuses_standard_input_that_is_no_text(server):
    done = run("generate", "--prompt", "-", stdin=b"ab\xff")
    assert done.exit_code == 2 and "byte 2" in done.stderr


def test_generate_prints_every_sample(server):
    server.answers["POST /api/generate"] = {
        "samples": [{"generated_text": text} for text in ("one", "two")],
        "usage": {},
    }
    assert run("generate", "--prompt", "x", "--num_samples", "2").stdout == "one\ntwo\n"
    assert "stream" not in body_of(server)


def test_generate_json_prints_one_reply(server):
    assert json.loads(run("generate", "--prompt", "Once", "--json").stdout)["generated_text"] == "Once there was"


def test_a_number_that_json_lacks_is_refused_before_it_is_sent(server):
    done = run("generate", "--prompt", "x", "--temperature", "nan")
    assert done.exit_code == 2 and "--temperature is nan" in done.stderr and not server.requests


def test_train_sends_options_and_settings_and_says_what_next(server):
    done = run(
        "train", "--dataset", "d", "--output_dir", "out/mine", "--max_iters", "9", "--set", "bias=false", "--set", "a=b"
    )
    assert body_of(server) == {"dataset": "d", "output_dir": "out/mine", "max_iters": 9, "bias": False, "a": "b"}
    assert "Training started: job mine" in done.stdout
    assert "jobs follow mine" in done.stderr and "load --model_path out/mine/ckpt.pt" in done.stderr


def test_train_and_show_say_why_a_job_waits(server):
    reply = {"message": "Training queued", "config_path": "out/mine/train_config.json", "process_id": None}
    server.answers["POST /api/train"] = reply | {"job": server.job | WAITS}
    done = run("train", "--dataset", "d", "--output_dir", "out/mine")
    assert "Training queued: job mine" in done.stdout and f"({WAITS['queue_reason']})" in done.stderr
    server.job |= WAITS
    assert WAITS["queue_reason"] in run("jobs", "show", "mine").stdout


def test_train_asks_for_adapters_and_for_checkpoints_that_stay(server):
    run("train", "--dataset", "d", "--output_dir", "out/mine", "--lora_rank", "8", "--keep-every", "2")
    assert body_of(server) == {"dataset": "d", "output_dir": "out/mine", "lora_rank": 8, "keep_every": 2}


def test_train_says_how_often_processes_start_again_and_zero_is_a_number(server):
    run("train", "--dataset", "d", "--output_dir", "out/mine", "--nproc_per_node", "2", "--max_restarts", "0")
    assert body_of(server) == {"dataset": "d", "output_dir": "out/mine", "nproc_per_node": 2, "max_restarts": 0}
    done = run("train", "--dataset", "d", "--output_dir", "out/mine", "--max_restarts", "often")
    assert done.exit_code == 2 and "--max_restarts" in done.stderr and len(server.requests) == 1


@pytest.mark.parametrize(
    ("setting", "complaint"), [("bias", "key=value"), ("=3", "key=value"), ("max_iters=3", "twice")]
)
def test_train_refuses_settings_that_are_not_settings(server, setting, complaint):
    done = run("train", "--dataset", "d", "--output_dir", "out/mine", "--max_iters", "9", "--set", setting)
    assert done.exit_code == 2 and complaint in done.stderr and not server.requests


def test_every_training_option_is_a_field_of_the_configuration():
    from client.options import TRAINING
    from training.config import TrainConfig

    assert set(TRAINING) <= set(TrainConfig.model_fields)


def test_a_dry_run_prints_what_would_be_and_its_warnings(server):
    found = {"train_tokens": 9, "epochs": 400.0, "warnings": ["400 epochs over 50kB: it will memorise"]}
    server.answers["POST /api/train"] = {"message": "nothing was started", "dry_run": found}
    done = run("train", "--dataset", "stdlib", "--output_dir", "out/mine", "--dry_run", "--follow")
    assert done.exit_code == 0 and body_of(server)["dry_run"] is True
    assert "warning: 400 epochs" in done.stdout and "epochs        400" in done.stdout
    assert (
        json.loads(run("--json", "train", "--dataset", "x", "--output_dir", "out/x", "--dry_run").stdout)["dry_run"]
        == found
    )


@pytest.mark.parametrize("words", [("jobs",), ("jobs", "list")])
def test_jobs_are_listed(server, words):
    heading, line = run(*words).stdout.splitlines()
    assert heading.split()[:2] == ["name", "state"] and line.split()[:2] == ["mine", "running"]


@pytest.mark.parametrize("words", [("--json", "jobs"), ("jobs", "--json"), ("jobs", "list", "--json")])
def test_jobs_are_listed_as_json(server, words):
    assert json.loads(run(*words).stdout)["jobs"][0]["name"] == "mine"


@pytest.mark.parametrize("name", ["mine", "out/mine", "out/mine/"])
def test_a_job_is_named_by_its_name_or_its_folder(server, name):
    assert run("jobs", "show", name).exit_code == 0
    assert server.requests[-1][1] == "/api/jobs/mine"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "out/", ""])
def test_what_is_no_name_is_refused(server, name):
    done = run("jobs", "show", name)
    assert done.exit_code == 2 and "is not a name" in done.stderr and not server.requests


def test_a_job_name_is_quoted_in_the_path(server):
    run("jobs", "show", "a?b#c")
    assert server.requests[-1][1] == "/api/jobs/a%3Fb%23c"


def test_stop_resume_and_delete_call_the_server(server):
    run("jobs", "stop", "mine")
    run("jobs", "resume", "mine", "--max_iters", "80")
    run("jobs", "delete", "mine", "--yes")
    assert server.requests == [
        ("POST", "/api/jobs/mine/stop", b""),
        ("POST", "/api/jobs/mine/resume", {"max_iters": 80}),
        ("DELETE", "/api/jobs/mine", b""),
    ]


def test_a_waiting_job_is_moved_in_the_queue(server):
    said = run("jobs", "priority", "mine", "5").stdout
    assert said == f"mine queued  place 1 in the queue ({WAITS['queue_reason']})\n"
    run("jobs", "priority", "mine", "-5", "--json")
    run("jobs", "priority", "mine", "--", "-6")
    assert [body for _, _, body in server.requests] == [{"priority": 5}, {"priority": -5}, {"priority": -6}]
    assert run("jobs", "priority", "mine", "5", "--jsn").exit_code == 2
    run("train", "--dataset", "x", "--output_dir", "out/x", "--priority", "3")
    assert server.requests[-1][2]["priority"] == 3


def test_delete_asks_first_and_no_is_no(server):
    done = run("jobs", "delete", "mine", stdin="n\n")
    assert done.exit_code == 1 and changes(server) == []


def test_delete_asks_nothing_about_a_job_that_is_not_there(server):
    done = run("jobs", "delete", "nobody", stdin="y\n")
    assert done.exit_code == 1 and done.output == "Error: there is no such job\n" and changes(server) == []


def test_log_prints_the_tail_or_follows(server):
    assert run("jobs", "log", "mine").stdout == "one\n"
    assert run("jobs", "log", "mine", "--follow").stdout == "one\ntwo\n"


@pytest.mark.parametrize("words", [("datasets",), ("datasets", "list")])
def test_datasets_are_listed(server, words):
    assert run(*words).stdout.splitlines()[-1].split()[:3] == ["stdlib", "12", "-"]


def test_a_dataset_is_deleted_when_the_user_says_yes(server):
    assert run("datasets", "delete", "notes", stdin="n\n").exit_code == 1 and not server.requests
    assert "Dataset notes deleted" in run("datasets", "delete", "notes", stdin="y\n").stdout


@pytest.mark.parametrize("name", [None, "other"])
def test_upload_sends_name_and_file_as_a_form(server, tmp_path, name):
    (tmp_path / 'no"tes.txt').write_bytes(b"abc\r\n\x00")
    done = run("upload", str(tmp_path / 'no"tes.txt'), *(["--name", name] if name else []))
    form = body_of(server)
    assert f'name="name"\r\n\r\n{name or chr(110) + "o" + chr(34) + "tes"}\r\n'.encode() in form
    assert b'filename="no%22tes.txt"' in form and b"\r\n\r\nabc\r\n\x00\r\n--" in form
    assert done.exit_code == 0 and "train --dataset" in done.stderr


def test_upload_says_which_encoding_the_file_has(server, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    run("upload", str(tmp_path / "a.txt"), "--encoding", "latin-1")
    assert b'name="encoding"\r\n\r\nlatin-1\r\n' in body_of(server)


@pytest.mark.parametrize("file", ["missing.txt", "."])
def test_upload_wants_a_file_that_is_there(server, file):
    assert run("upload", file).exit_code == 2 and not server.requests


def test_export_asks_for_the_hugging_face_layout(server):
    done = run("export", "out/mine")
    assert body_of(server) == {"model": "mine", "format": "hf"} and "out/mine/hf" in done.stdout


def test_empty_lists_say_so(server):
    server.answers["GET /api/jobs"] = {"jobs": []}
    done = run("jobs")
    assert done.stdout == "" and "no jobs yet" in done.stderr


@pytest.mark.parametrize(
    "words", [("statsu",), ("jobs", "shwo", "x"), ("generate", "--promt", "x"), ("train",), ("status", "x")]
)
def test_mistypes_are_usage_errors(server, words):
    assert run(*words).exit_code == 2 and not server.requests


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (("load", "tiny-shakespeare"), "load (--model_type NAME | --model_path PATH) [OPTIONS]"),
        (("generate", "text"), "generate --prompt TEXT [OPTIONS]"),
        (("train", "stdlib"), "train --dataset NAME --output_dir out/NAME [OPTIONS]"),
        (("jobs", "my_model"), "jobs [OPTIONS] [show NAME | stop NAME | ...]"),
    ],
)
def test_a_word_in_the_wrong_place_is_answered_with_the_right_form_in_one_line(server, words, form):
    done = run(*words)
    assert done.exit_code == 2 and re.search(rf"^Usage: \S+ {re.escape(form)}$", done.stderr, re.MULTILINE)


# ---- bad answers


HTML = (502, "text/html", b"<html>\nBad Gateway</html>")
BAD = {
    "HTML 502": (HTML, "answers 502"),
    "HTML 200": ((200, "text/html", b"<html>hello"), "not a JSON object"),
    "a list": ((200, "application/json", b"[1]"), "not a JSON object"),
    "deep JSON": ((200, "application/json", b"[" * 100_000), "not a JSON object"),
    "redirect": ((302, "text/html", b""), "answers 302"),
    "error without text": ((500, "application/json", b"{}"), "answers 500"),
    "a wrong shape": ({"jobs": [3]}, "another shape"),
    "no answer": (None, "broke off"),
    "a refusal": ((400, "application/json", b'{"error": "top_k is -1"}'), "top_k is -1"),
    "no key": ((401, "application/json", b'{"error": "no key"}'), "--api_key"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_one_clear_line(server, case):
    server.answers["GET /api/jobs"], complaint = BAD[case]
    done = run("jobs")
    assert done.exit_code == 1 and done.stdout == ""
    assert complaint in done.stderr and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


STREAMS = {
    "cut": (sse('data: {"text": "a"}'), "the stream was cut"),
    "cut inside a frame": ((200, "text/event-stream", b'data: {"text": "a"}\n\ndata: {"te'), "the stream was cut"),
    "error frame": (sse('data: {"text": "a"}', 'data: {"error": "the engine stopped"}'), "the engine stopped"),
    "no JSON": (sse("data: oops"), "not a JSON object"),
    "refused": ((400, "application/json", b'{"error": "prompt is too long"}'), "prompt is too long"),
    "plain reply": ({"generated_text": "a"}, "the stream was cut"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_that_goes_wrong_ends_with_exit_code_1(server, case):
    server.answers["POST /api/generate"], complaint = STREAMS[case]
    done = run("generate", "--prompt", "x")
    assert done.exit_code == 1 and complaint in done.stderr and "finish_reason" not in done.stderr


def test_control_characters_of_the_server_never_reach_the_terminal(server):
    server.answers["GET /api/jobs"] = {"jobs": [{"name": "\x1b[2J\x9b\u202e", "state": "a\nb\r"}]}
    server.answers["POST /api/generate"] = (400, "application/json", b'{"error": "\\u001b]0;x\\u0007"}')
    seen = run("jobs").stdout + run("generate", "--prompt", "x").stderr
    assert re.search(r"[\x1b\x9b\x07\r\u202e]", seen) is None and r"\x1b[2J\x9b\u202e" in seen


def test_clean_keeps_text_lines_and_tabs():
    assert clean("ä\n\t😀") == "ä\n\t😀"


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a:b", "http://a b", "http://[::1", "http://u:p@h", ""])
def test_an_address_that_is_none_is_a_usage_error(url):
    with pytest.raises(click.UsageError):
        ApiClient(url)


def test_an_address_needs_no_scheme():
    assert ApiClient("localhost:5000/").url == "http://localhost:5000"
    assert ApiClient("https://[::1]:5000").url == "https://[::1]:5000"


def test_a_key_with_a_line_end_is_a_usage_error():
    with pytest.raises(click.UsageError):
        ApiClient(api_key="a\nb")


def test_events_are_parsed_across_blocks_with_comments_and_joined_lines():
    text = ": hello\nevent: x\nid: 1\ndata: a\r\ndata:b\n\n\ndata: ü\u2028\n\ndata: cut".encode()
    assert list(event_data(text[i : i + 1] for i in range(len(text)))) == ["a\nb", "ü\u2028"]


# ---- conversations


def test_one_message_is_answered_as_it_comes(server):
    done = run("chat", "--message", "hello", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9")
    assert done.exit_code == 0 and done.stdout == "message 2\n"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert body_of(server) == {"messages": messages, "temperature": 0, "max_tokens": 9, "stream": True}


def test_a_conversation_is_sent_as_a_whole_until_the_input_ends(server):
    done = run("chat", stdin="hello\n\nand then?\n")
    assert done.exit_code == 0 and done.stdout == "message 1\nmessage 3\n"
    said = [(message["role"], message["content"]) for message in body_of(server)["messages"]]
    assert said == [("user", "hello"), ("assistant", "message 1"), ("user", "and then?")]


def test_chat_as_json_prints_the_replies(server):
    assert json.loads(run("chat", "--message", "hello", "--json").stdout)["choices"][0]["message"]["content"]


def test_a_message_that_is_refused_begins_a_new_conversation(server):
    refusal = (400, "application/json", json.dumps({"error": {"message": "the context is full"}}).encode())
    answers = iter([lambda: server.chat(server.requests[-1][2]), lambda: refusal])
    again = lambda: server.chat(server.requests[-1][2])  # noqa: E731
    server.answers["POST /v1/chat/completions"] = lambda: next(answers, again)()
    done = run("chat", "--system", "Be brief.", stdin="one\ntwo\nthree\n")
    assert done.exit_code == 0 and done.stdout == "message 2\nmessage 2\n"
    assert "the context is full" in done.stderr and "new conversation" in done.stderr


def test_a_first_message_that_is_refused_is_an_error(server):
    body = json.dumps({"error": {"message": "mine completes text"}}).encode()
    server.answers["POST /v1/chat/completions"] = (501, "application/json", body)
    done = run("chat", stdin="one\ntwo\n")
    assert done.exit_code == 1 and len(server.requests) == 1
    assert done.stderr == "Error: mine completes text (here with `generate`)\n"


# ---- following a job


def test_follow_prints_a_line_for_each_evaluation_and_what_next(server):
    done = run("jobs", "follow", "mine")
    assert done.exit_code == 0
    assert [line.split("iteration ")[1].split()[0] for line in done.stdout.splitlines()] == ["0", "20", "40"]
    assert "val 3.1000" in done.stdout and "load --model_path out/mine/ckpt.pt" in done.stderr


def test_train_follow_watches_the_new_job(server):
    done = run("train", "--dataset", "d", "--output_dir", "out/mine", "--follow")
    assert done.exit_code == 0 and "iteration 40 of 40" in done.stdout


def test_follow_as_json_prints_rows_and_the_job(server):
    rows = [json.loads(line) for line in run("jobs", "follow", "mine", "--json").stdout.splitlines()]
    assert [row["iter_num"] for row in rows[:-1]] == [0, 10, 20, 30, 40] and rows[-1]["state"] == "succeeded"


@pytest.mark.parametrize("state", ["failed", "stopped", "lost"])
def test_follow_of_a_job_that_did_not_succeed_gives_its_reason(server, state):
    server.job |= {"state": state, "error": "out of memory"}
    done = run("jobs", "follow", "mine")
    assert done.exit_code == 1 and f"job mine {state}: out of memory" in done.stderr
    assert "jobs log mine" in done.stderr and "jobs resume mine" not in done.stderr  # there is nothing to go on from


@pytest.mark.parametrize("state", ["failed", "lost"])
def test_follow_says_how_a_job_with_a_checkpoint_goes_on(server, state):
    server.job |= {"state": state, "error": "killed", "has_checkpoint": True}
    assert "jobs resume mine" in run("jobs", "follow", "mine").stderr


def test_follow_finds_a_server_again_that_was_away(server):
    replies = iter([server.look, server.look, lambda: HTML, lambda: None, lambda: HTML])
    server.answers["GET /api/jobs/mine"] = lambda: next(replies, server.look)()
    done = run("jobs", "follow", "mine")
    assert done.exit_code == 0
    assert done.stderr.count("server away") == 1 and "the server is back" in done.stderr


def test_follow_of_an_unknown_job_is_an_error_at_once(server):
    done = run("jobs", "follow", "nobody")
    assert done.exit_code == 1 and "there is no such job" in done.stderr


def test_ctrl_c_ends_the_view_and_leaves_the_job(server, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    done = run("jobs", "follow", "mine")
    assert done.exit_code == 130 and "goes on" in done.stderr and "jobs follow mine" in done.stderr
    assert all(method == "GET" for method, _, _ in server.requests)


def test_ctrl_c_stops_every_command_with_the_shells_exit_code(server, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("abc")

    def interrupt(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ApiClient, "send", interrupt)
    for words in (
        ["upload", str(tmp_path / "notes.txt")],
        ["load", "--model_type", "gpt2"],
        ["generate", "--prompt", "a"],
    ):
        done = run(*words)
        assert done.exit_code == 130 and "stopped" in done.stderr


def test_the_live_view_shows_bar_losses_plot_and_sample(server, capsys, monkeypatch):
    server.job["sample"] = {"iter_num": 10, "prompt": "def ", "text": "f():\n\x1b[2J"}
    job = client.follow.draw(ApiClient(server.url), "mine")
    shown = capsys.readouterr().out
    assert job["state"] == "succeeded" and "iteration 40 of 40" in shown
    assert "o" in shown and "4.100" in shown and "def f():" in shown and "\x1b[2J" not in shown


def test_trackers_are_flags_and_are_not_sent_unless_given(server):
    for flags, sent in (((), {}), (("--tensorboard", "--wandb"), {"tensorboard": True, "wandb": True})):
        run("train", "--dataset", "stdlib", "--output_dir", "out/mine", *flags)
        body = server.requests[-1][2]
        assert {name: body[name] for name in ("tensorboard", "wandb") if name in body} == sent


def test_the_samples_of_a_job_are_shown_with_their_iterations(server):
    done = run("jobs", "samples", "mine", "--last", "1")
    assert done.stdout == "--- iteration 20\ndef f():\\x1b[2J\n"
    assert run("jobs", "samples", "mine").stdout.startswith("--- iteration 10\ndef x\n--- iteration 20\n")
    assert json.loads(run("jobs", "samples", "mine", "--json").stdout) == {"samples": SAMPLES}
    assert run("jobs", "samples", "mine", "--last", "0").exit_code == 2


def test_the_live_view_says_when_the_server_is_away():
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as shown:
        console.print(picture(Watched({"name": "mine", "state": "running"}, away=True)))
    assert "server away, the job goes on" in shown.get()


def test_until_there_are_losses_the_view_shows_the_last_line_of_the_log():
    watched = Watched({"name": "mine", "state": "running"}, last_words="reading\ntokenizing 40%")
    assert "tokenizing 40%" in picture(watched).plain and "reading" not in picture(watched).plain


def test_a_job_that_is_being_stopped_says_so(server):
    server.answers["POST /api/jobs/mine/stop"] = server.job | {"stopping": True}
    assert run("jobs", "stop", "mine").stdout == "mine stopping  iteration 0 of 40\n"
    assert "jobs resume mine" in run("jobs", "stop", "mine").stderr
    server.answers["POST /api/jobs/mine/stop"] = server.job | {"state": "succeeded"}
    assert "resume" not in run("jobs", "stop", "mine").stderr, "it has reached its end"


def test_speed_is_told_beside_its_share_of_what_the_device_can_do():
    job = {"state": "running", "loss": 1.5, "tokens_per_second": 9000.0, "mfu": 0.314, "eta_seconds": 70}
    assert figures(job) == "loss 1.5000  9,000 tokens/s  31% of peak  0:01:10 left"


def test_a_few_losses_are_a_line_and_not_only_dots():
    drawn = "".join(plot([(0, 4.0), (100, 2.0)], [])[:10])
    assert sum("\u2801" <= character <= "\u28ff" for character in drawn) >= 60


def test_the_plot_falls_with_the_loss_and_has_its_size():
    lines = plot([(i, 5 - i / 50) for i in range(100)], [(0, 5.0), (99, 3.02)])
    assert len(lines) == 11 and all(len(line) == 69 for line in lines)
    assert lines[0].startswith("   5.000 o") and lines[9].endswith("o") and lines[10].endswith("99")
    assert plot([], []) == [] and len(plot([(0, 1.0)], [])) == 11


def test_a_picture_is_of_a_kind_that_its_name_says(server):
    result = run("jobs", "plot", "mine", "--output", "losses.gif")
    assert result.exit_code == 2 and "must end in .svg or .png" in result.stderr and server.requests == []


# ---- as a process


def start(*words: str, url: str, **how: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LM_SERVER_URL": url}
    command = [sys.executable, "api_client.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, **how)


def test_a_server_that_is_not_there_is_exit_code_3_and_one_line_that_says_what_to_do():
    done = start("status", url="http://127.0.0.1:1")
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "python api_server.py" in done.stderr and "make run" in done.stderr


def test_https_where_http_is_spoken_is_told_from_a_server_that_is_not_there(server):
    done = start("status", url=server.url.replace("http://", "https://"))
    assert done.returncode == 3 and "no https with https://127.0.0.1:" in done.stderr
    assert "it speaks http://" in done.stderr and "make run" not in done.stderr


def test_the_address_that_openais_clients_take_is_one_too_long(server):
    done = start("status", url=f"{server.url}/v1")
    assert done.returncode == 1 and done.stderr.endswith("(give --url without /v1)\n")
    assert "--url" not in start("jobs", "show", "nobody", url=server.url).stderr


@pytest.mark.parametrize("module", ["click", "statistics"])  # the first and one of the last that are imported
def test_ctrl_c_while_the_client_is_still_imported_ends_it_without_a_traceback(tmp_path, monkeypatch, module):
    allowed = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whatever is inherited
    (tmp_path / f"{module}.py").write_text(f"{allowed}signal.raise_signal(signal.SIGINT)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = start("status", url="http://127.0.0.1:1")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_the_commands_are_defined_ends_it_without_a_traceback():
    stop = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)"
    code = "import click, runpy, signal; click.option = lambda *words, **more: exec(STOP); "
    code += "runpy.run_path('api_client.py', run_name='__main__')"
    command = [sys.executable, "-c", code.replace("STOP", repr(stop)), "status"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


INTERRUPTIBLE = "import signal, api_client, click; signal.signal(signal.SIGINT, signal.default_int_handler); "


@pytest.mark.parametrize("what", ["jobs", "datasets"])
def test_ctrl_c_at_a_question_is_the_shells_exit_code_and_changes_nothing(server, what):
    asked = "lambda words: (click.echo(words, err=True), signal.raise_signal(signal.SIGINT))"
    code = f"{INTERRUPTIBLE}click.termui.visible_prompt_func = {asked}; api_client.main()"
    command = [sys.executable, "-c", code, what, "delete", "mine", "--url", server.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 130 and done.stderr.endswith("[y/N]: \nstopped\n")
    assert changes(server) == []


def test_ctrl_c_while_click_parses_is_the_shells_exit_code():
    parsing = "click.Command.parse_args = lambda *words: signal.raise_signal(signal.SIGINT); api_client.main()"
    command = [sys.executable, "-c", INTERRUPTIBLE + parsing, "status", "--url", "http://127.0.0.1:1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped\n")


@pytest.mark.parametrize("answer", ["", "n\n"], ids=["Ctrl-D", "no"])
def test_no_answer_and_no_keep_clicks_exit_code(server, answer):
    command = [sys.executable, "api_client.py", "jobs", "delete", "mine", "--url", server.url]
    done = subprocess.run(command, cwd=ROOT, input=answer, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and done.stderr.endswith("Aborted!\n") and changes(server) == []


def test_help_needs_neither_requests_nor_rich():
    code = "import sys, api_client; print({'torch', 'flask', 'requests', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "set()\n"


def test_a_terminal_without_the_characters_still_shows_the_rest(server):
    server.answers["POST /api/generate"] = sse('data: {"text": " \\ud83d\\ude00 \\ud800!"}', "data: [DONE]")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "api_client.py", "generate", "--prompt", "x"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.startswith("x ") and done.stdout.endswith(" ?!\n")


def test_the_class_can_be_used_without_the_commands(server):
    api = ApiClient(server.url)
    assert api.job("mine")["max_iters"] == 40
    assert (
        "".join(event.get("text", "") for event in api.generate_stream({"prompt": "a", "stream": True})) == " there was"
    )
    with pytest.raises(ApiError, match="no such job"):
        api.job("nobody")
