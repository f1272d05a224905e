"""The demo: its commands are ones that the client has, and it says why it failed and stops what it started."""

import signal
import subprocess
import sys

import pytest

import demo
from api_client import cli


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setenv("LM_SERVER_URL", "http://127.0.0.1:1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_every_step_is_a_command_of_the_client(monkeypatch):
    steps = []
    monkeypatch.setattr(demo, "step", lambda text, *words: steps.append(words))
    monkeypatch.setattr(demo, "ask", lambda *words: {"state": "stopped"})
    demo.show_loop()
    assert [words[0] for words in steps] == ["status", "jobs", "train", "load", "generate"]
    for name, *words in steps:
        cli.commands[name].make_context(name, words, parent=cli.make_context("client", [name]))


def test_a_server_that_does_not_start_is_shown_with_its_last_lines(folder, capsys):
    (folder / "api_server.py").write_text("import sys; sys.exit('the port is taken')")
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert "the server ended with exit code 1" in error and "the port is taken" in error


def test_a_step_that_fails_stops_the_server(folder, capfd):
    (folder / "api_server.py").write_text("import time; time.sleep(60)")
    (folder / "api_client.py").write_text(
        "import sys; status = 'status' in sys.argv\nprint('{\"model_loaded\": true}') if status else sys.exit(1)\n"
    )
    assert demo.main() == 1
    shown = capfd.readouterr()
    assert "`api_client.py train` ended with exit code 1" in shown.err and "Stop the server." in shown.out


def test_the_server_is_stopped_also_when_nobody_sees_it_said(folder, monkeypatch):
    (folder / "api_server.py").write_text("import time; time.sleep(60)")
    (folder / "api_client.py").write_text("""print('{"model_loaded": true, "state": "stopped"}')""")
    stopped, stop_server = [], demo.stop_server

    def gone(text):
        if text == "Stop the server.":
            raise BrokenPipeError

    monkeypatch.setattr(demo, "explain", gone)
    monkeypatch.setattr(demo, "stop_server", lambda server: (stop_server(server), stopped.append(server.poll())))
    with pytest.raises(BrokenPipeError):
        demo.main()
    assert stopped == [-signal.SIGTERM]


@pytest.mark.parametrize("words", [["--help"], ["--port", "1"]])
def test_the_demo_says_what_it_is_and_takes_nothing(words, capsys):
    with pytest.raises(SystemExit):
        demo.main(words)
    said = capsys.readouterr()
    assert "The whole loop" in said.out or "unrecognized arguments: --port 1" in said.err


def test_a_server_that_ignores_the_request_to_end_is_killed(monkeypatch):
    monkeypatch.setattr(demo, "STOP_SECONDS", 0.1)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with server:
        server.stdout.readline()
        demo.stop_server(server)
    assert server.returncode == -signal.SIGKILL
