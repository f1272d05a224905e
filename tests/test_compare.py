"""Comparing jobs on the command line: the plot, the tables, the settings that differ, and the picture as a file."""

import json

import pytest
from click.testing import CliRunner

from api_client import cli
from client.api import ApiClient, ApiError
from client.compare import WIDTH, differences, plot, tokens_differ, val_losses
from client.follow import HEIGHT

SVG, PNG = b"<svg/>", b"\x89PNG"


def job(name, losses, **config):
    """Return a job as the server describes it, with its rows of metrics."""
    rows = [
        {"iter_num": 10 * k, "loss": loss, "val_loss": loss, "tokens_per_second": 100.0}
        for k, loss in enumerate(losses)
    ]
    described = {
        "name": name,
        "state": "succeeded",
        "iter_num": 10 * len(losses) - 10,
        "config": {"output_dir": name} | config,
    }
    return described, rows


FOUND = {
    "fast": job("fast", [5.0, 2.0, 1.5], optimizer="muon", seed=1),
    "slow": job("slow", [5.0, 4.0, 3.0], optimizer="adamw", seed=1),
    "new": job("new", [], optimizer="adamw", seed=1),
}


class Jobs(ApiClient):
    """A server's jobs without the server."""

    def job(self, name):
        if name not in FOUND:
            raise ApiError(f"there is no job {name}")
        return FOUND[name][0]

    def metrics(self, name, after=None):
        return FOUND[name][1]

    def picture(self, name, others=(), kind="svg"):
        self.job(name)
        return {"svg": SVG, "png": PNG}[kind] + " ".join(others).encode()


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr("client.commands.ApiClient", Jobs)
    return lambda *words: CliRunner().invoke(cli, ["jobs", *words])


def test_jobs_are_compared_in_a_plot_and_two_tables(run):
    out = run("compare", "fast", "out/slow").stdout
    assert out.startswith("validation loss, nats per token\n   4.000")
    rows = [line.split() for line in out.splitlines()]
    assert ["a", "fast", "succeeded", "20", "-", "1.5", "1.5", "20", "-", "100"] in rows
    assert ["optimizer", "muon", "adamw"] in rows and not any(row[:1] in (["seed"], ["output_dir"]) for row in rows)


def test_the_comparison_comes_as_json(run):
    found = json.loads(run("compare", "slow", "fast", "--json").stdout)
    assert [each["best_val_loss"] for each in found["jobs"]] == [3.0, 1.5]
    assert found["settings"] == [{"setting": "optimizer", "a": "adamw", "b": "muon"}]


def test_jobs_without_evaluations_and_with_the_same_settings_say_so(run, monkeypatch):
    monkeypatch.setitem(FOUND, "newer", job("newer", [], optimizer="adamw", seed=1))
    done = run("compare", "new", "newer")
    assert done.exit_code == 0 and "evaluated yet" in done.stderr and "settings are the same" in done.stderr


@pytest.mark.parametrize("names", [["fast"], ["fast", "fast"], ["fast", "../x"], list("abcdefg"), []])
def test_what_cannot_be_compared_is_wrong_usage(run, names):
    assert run("compare", *names).exit_code == 2


def test_an_unknown_job_is_an_error(run):
    done = run("compare", "fast", "nobody")
    assert done.exit_code == 1 and "no job nobody" in done.stderr


def test_the_plot_has_its_size_and_each_curve_its_letter():
    lines = plot([[(0, 4.0), (100, 2.0)], [(0, 4.0), (50, 3.9)]])
    assert len(lines) == HEIGHT + 1 and max(map(len, lines)) <= 9 + WIDTH
    assert lines[0].startswith("   4.000 *") and lines[-2].endswith("a") and lines[-2].startswith("   2.000")
    assert "a" not in lines[0][20:] and "b" in lines[0]


@pytest.mark.parametrize(
    "curve", [[(0, 2.0)], [(10, 2.0)], [(10, 2.0), (20, 2.0)], [(1, 5.0), (2, 1.0), (100_000, 1.0)]]
)
def test_short_and_flat_curves_are_drawn(curve):
    assert any("a" in line[9:] for line in plot([curve, []])[:-1])


def test_the_untrained_loss_does_not_flatten_the_curve():
    rows = [{"iter_num": 0, "val_loss": 10.0}, {"iter_num": 5, "val_loss": 2.0}, {"iter_num": 6, "loss": 1.0}]
    assert val_losses(rows) == [(5, 2.0)] and val_losses(rows[:1]) == [(0, 10.0)]


def test_runs_with_other_tokens_are_told_apart():
    one, other = ([{"val_loss": 2.0, "val_bits_per_byte": bits}] for bits in (1.0, 2.0))
    assert tokens_differ([one, other]) and not tokens_differ([one, one]) and not tokens_differ([[], []])


def test_a_setting_that_one_job_lacks_differs():
    assert differences([{"window": 8, "seed": 1}, {"seed": 1}]) == [{"setting": "window", "a": 8, "b": None}]


def test_the_picture_is_saved_under_the_name_of_the_job_or_another(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "fast.svg" in run("plot", "fast").stdout and (tmp_path / "fast.svg").read_bytes() == SVG
    run("plot", "fast", "--compare", "slow", "--compare", "out/new", "--output", "both.svg")
    assert (tmp_path / "both.svg").read_bytes() == SVG + b"slow new"
    run("plot", "fast", "--output", "fast.PNG")
    assert (tmp_path / "fast.PNG").read_bytes() == PNG


def test_a_picture_that_cannot_be_written_or_is_not_there_is_an_error(run, tmp_path):
    done = run("plot", "fast", "--output", str(tmp_path / "no" / "x.svg"))
    assert done.exit_code == 1 and "could not be written" in done.stderr
    assert (
        run("plot", "nobody", "--output", str(tmp_path / "x.svg")).exit_code == 1 and not (tmp_path / "x.svg").exists()
    )
