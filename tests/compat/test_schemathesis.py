"""schemathesis on our own /openapi.json: every route of the real server, with a fixed seed.

No answer may be a server's error, and none may differ from what the document promises: status, type, shape.
The server is one of its own, since this unloads models and deletes what it finds.
"""

import re
from pathlib import Path

import pytest
from clients import run
from test_server_process import Process

CONFIG = Path(__file__).parent / "schemathesis.toml"
CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance"


@pytest.fixture
def alone(models, tmp_path):
    """Serve the models from a folder that nothing else uses."""
    (tmp_path / "models").symlink_to(models / "models")
    process = Process(tmp_path, "--threads", "1", "--drain", "2", "--dtype", "fp32")
    yield process
    process.end()


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "length", [[], pytest.param(["--max-time", "120"], marks=pytest.mark.slow)], ids=["once", "long"]
)
def test_no_route_fails_or_says_what_is_not_documented(alone, tmp_path, length):
    how = ["--seed", "1", "--max-examples", "5", *length, "--checks", CHECKS, "--no-color", "--workers", "1"]
    command = ["-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{alone.url}/openapi.json", *how]
    said = run(command, tmp_path)
    tested = re.search(r"Tested: (\d+)", said)
    assert tested is not None and int(tested[1]) >= 46, said
    assert alone.ready()
