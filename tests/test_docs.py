"""The README and the changelog name everything there is: routes, settings, commands, training fields, files."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

import api_client
import api_server
from storage.runs import Workspace
from training.config import PRESETS, TrainConfig
from web import health_routes, receiving, watchdog, worker
from web.settings import SETTINGS, Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
LINES = README.splitlines()
MADE = {".venv", "__pycache__", "out", "tokens"}  # folders that a checkout fills by itself
WHOLE = {"tests/", "models/tiny-shakespeare/"}  # folders with one line for all of their files


def section(heading: str) -> str:
    """Return the text of one section of the README."""
    return README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def routes() -> set[str]:
    """Return every route as `METHOD /path`; files of the web page count as one with their folder."""
    nothing = SimpleNamespace()
    app = api_server.create_app(Settings(), nothing, nothing, Workspace(ROOT))
    methods = [(rule.methods - {"HEAD", "OPTIONS"}, rule.rule) for rule in app.url_map.iter_rules()]
    return {f"{method} {re.sub('<[a-z]+:', '<', path)}" for names, path in methods for method in names}


def commands(group: click.Group, before: str = "") -> set[str]:
    """Return every command of the client, with its group's name before it."""
    found = set()
    for name, command in group.commands.items():
        found |= {before + name} | (commands(command, f"{name} ") if isinstance(command, click.Group) else set())
    return found


def tracked_files() -> list[str]:
    """Return the project's files: git's, or in a folder without git all but what a checkout makes by itself."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        listed = None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        return listed.stdout.split("\n")[:-1]
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not MADE & set(path.parts) and not path.parts[0].startswith("."))


def in_tree(path: str, tree: str) -> bool:
    """Say whether a file has a line in the tree, its own or that of one of the folders in WHOLE."""
    names = {path} | {folder for folder in WHOLE if path.startswith(folder)}
    return any(re.search(rf"(?m)^{re.escape(name)}  ", tree) for name in names)


@pytest.mark.parametrize("route", sorted(routes()))
def test_every_route_is_in_the_readme(route):
    assert f"`{route}`" in README


def test_the_readme_names_no_route_that_is_not_there():
    named = set(re.findall(r"`((?:GET|POST|DELETE|PUT|PATCH) /[^`\s]*)`", section("API")))
    assert named - routes() == set()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_is_in_the_readme_with_its_default(setting):
    (row,) = [line for line in LINES if line.startswith(f"| `--{setting.name}` |")]
    assert setting.shown_default in row and setting.also in row


@pytest.mark.parametrize("setting", [f for f in fields(Settings) if f.metadata["choices"]], ids=lambda f: f.name)
def test_every_choice_of_a_setting_is_in_the_readme_and_the_help(setting):
    (row,) = [line for line in LINES if line.startswith(f"| `--{setting.name}` |")]
    for choice in setting.metadata["choices"]:
        assert choice in row.split("|")[3] and choice in setting.metadata["help"]


@pytest.mark.parametrize("command", sorted(commands(api_client.cli)))
def test_every_command_of_the_client_is_in_the_readme(command):
    assert re.search(rf"`{command}[` ]", section("Client"))


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_training_field_is_in_the_readme_with_its_default(name):
    field = TrainConfig.model_fields[name]
    (row,) = [line for line in section("Training").splitlines() if line.startswith(f"| `{name}` |")]
    assert "required" in row if field.is_required() else field.default is None or str(field.default).lower() in row


def test_every_preset_is_in_the_readme_with_its_shape():
    for name, preset in PRESETS.items():
        (row,) = [line for line in section("Training").splitlines() if line.startswith(f"| `{name}` |")]
        assert [int(n) for n in re.findall(r"\d+", row.split("|")[2])][:3] == [
            preset[key] for key in ("n_layer", "n_head", "n_embd")
        ]


def test_every_file_has_a_line_in_the_tree():
    tree = section("Files")
    assert [path for path in tracked_files() if not in_tree(path, tree)] == []


def test_the_tree_names_no_file_that_is_not_there():
    names = re.findall(r"(?m)^([\w./-]+)  +\S", section("Files"))
    assert len(names) > 50
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_patience_that_the_readme_tells_is_the_servers():
    limits = section("Limits and security")
    for sentence in (
        f"must have come {receiving.DEADLINE:.0f} seconds after its first byte",
        f"a reader that stops reading is cut within {2 * worker.WRITE_SECONDS} seconds",
        f"does not move for {health_routes.STALLED:.0f} seconds turns `/health` to 503",
        f"after {watchdog.REFUSE:.0f}, what waits for it ends",
        f"after {watchdog.REPLACE:.0f} a new worker takes over",
    ):
        assert sentence in limits


def test_the_changelog_has_the_version_that_the_server_says():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{api_server.VERSION}]" in changelog
    assert f'version = "{api_server.VERSION}"' in (ROOT / "pyproject.toml").read_text("utf-8")
