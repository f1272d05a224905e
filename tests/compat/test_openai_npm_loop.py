"""OpenAI's package for JavaScript drives the whole loop in one script, where node and the package are to be had."""

import shutil
from pathlib import Path

import pytest
from clients import output

PARTS = ["upload", "train", "serve", "tune and chat", "pause and refuse", "delete"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_script_drives_the_whole_loop(server, node_modules, tmp_path):
    if node_modules is None:
        pytest.skip("no npm, or the openai package cannot be installed")
    (tmp_path / "node_modules").symlink_to(node_modules)
    shutil.copy(Path(__file__).parent / "loop.mjs", tmp_path)
    assert output(["node", "loop.mjs", f"{server.url}/v1"], tmp_path).splitlines() == PARTS
