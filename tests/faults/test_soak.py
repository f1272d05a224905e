"""Thousands of requests, good, wrong and left in the middle: nothing is lost, and nothing is left behind."""

from pathlib import Path
from typing import Any

import pytest
from live_server import make_root

from bench.soak import WARM_UP, Goal, Watched, soak

EXACT = {"nothing lost", "nothing left", "same worker", "descriptors"}  # whatever else the machine does
ALL = EXACT | {"memory", "threads", "latency"}


@pytest.mark.fault("F16", "16 clients: of their requests 70 % good, 10 % left in the middle, 20 % wrong")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("requests", "must_hold"), [(300, EXACT), pytest.param(10_000, ALL, marks=pytest.mark.slow)])
def test_requests_of_every_kind_leave_nothing_behind(
    tmp_path: Path, requests: int, must_hold: set[str], record_property: Any
) -> None:
    (tmp_path / "served").mkdir()
    model = make_root(tmp_path) / "models" / "tiny-shakespeare"
    server = Watched(tmp_path / "served", model, "--threads", "1")
    try:
        holds = soak(server, 16, Goal(requests=requests), warm_up=min(WARM_UP, requests // 4))
    finally:
        server.close()
    kept = ", ".join(name for name, kept in holds.items() if kept)
    record_property("found", f"{requests} requests; what holds: {kept}")
    assert holds.keys() == ALL and all(holds[name] for name in must_hold)
