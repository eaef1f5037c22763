"""A long run of the benchmark, small, on services of its own, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from settler_streams.cli.main import settler

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]

LONG_EVENTS = 20_000


def test_a_long_run_decides_on_everything_and_samples_its_memory(tmp_path: Path) -> None:
    """The file and the standard output say the same."""
    ran = CliRunner().invoke(
        settler,
        ["bench", str(tmp_path / "bench.json"), "--json", "--events", str(LONG_EVENTS), "--state-dir", str(tmp_path)],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0
    document = json.loads(ran.stdout)
    assert document == json.loads((tmp_path / "bench.json").read_text())
    assert set(document) == {"peak_rss_mib", "long_run", "machine"}
    long = document["long_run"]
    assert long["events"] == LONG_EVENTS
    assert long["admitted"] > LONG_EVENTS / 2
    assert long["rss_mib_samples"][-1][0] == LONG_EVENTS
    assert 10 < min(mib for _, mib in long["rss_mib_samples"]) <= document["peak_rss_mib"]
