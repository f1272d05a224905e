"""The README's section "Use it with", as it stands there: every snippet runs against the real server and must succeed.

Only the address is another. Snippets of a language that this machine lacks are skipped.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from clients import TASKS, output
from live_server import ROOT

SECTION = re.search(r"^## Use it with\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
SNIPPETS = re.findall(r"^\*\*(.+?)\*\*.*?^```(\w+)\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
PROGRAMS = {"python": ["python", "-"], "sh": ["bash", "-e", "-o", "pipefail", "-s"], "js": ["node", "snippet.mjs"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with what the snippets find there: a harness task and a file to train on."""
    folder = tmp_path_factory.mktemp("snippets")
    shutil.copy(TASKS / "rolling.yaml", folder / "my_task.yaml")
    text = (folder / "my_task.yaml").read_text().replace("task: rolling", "task: my_task")
    (folder / "my_task.yaml").write_text(text)
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": f"Once, {i} times."}) + "\n" for i in range(60)))
    (folder / "rolling.jsonl").write_text(json.dumps({"text": "A text."}) + "\n")
    return folder


def test_there_are_snippets_for_the_usual_clients():
    usual = {"OpenAI, Python", "The whole loop with it", "OpenAI, JavaScript", "curl", "LangChain", "lm-eval"}
    assert usual <= {name for name, _, _ in SNIPPETS}


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("name", "language", "code"), SNIPPETS, ids=[name for name, _, _ in SNIPPETS])
def test_the_snippet_runs(name, language, code, server, folder, node_modules):
    if language == "js" and node_modules is None:
        pytest.skip("no npm, or the openai package cannot be installed")
    if language == "js":
        (folder / "node_modules").symlink_to(node_modules)
    code = code.replace("http://127.0.0.1:5000", server.url)
    (folder / "snippet.mjs").write_text(code)
    assert output(PROGRAMS[language], folder, code).strip(), f"{name} printed nothing"
