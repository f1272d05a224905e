"""What every test shares: the project on the path, one torch thread, and the shared data where there is some."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small; threads only make them wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the report of a fault test know what it injects."""
    for mark in item.iter_markers("fault"):
        item.user_properties.append(("fault", mark.args))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of `make faults`: which fault, what was injected, what was found, and the verdict."""
    if "fault" not in config.option.markexpr:
        return
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            about = dict(getattr(report, "user_properties", ()))
            if "fault" in about:
                sentence = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
                why = str(report.longrepr[2]) if outcome == "skipped" and isinstance(report.longrepr, tuple) else ""
                rows.append((*about["fault"], about.get("found", why or sentence), outcome))
    terminalreporter.section("faults")
    terminalreporter.write_line("| fault | injected | found | verdict |\n|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (int(row[0][1:]), row)):
        terminalreporter.write_line(f"| {' | '.join(row)} |")


@pytest.fixture
def shared() -> Path:
    """Return the folder of shared test data, or skip: only a development checkout has it."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder
