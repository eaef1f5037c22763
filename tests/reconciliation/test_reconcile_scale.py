"""A large reconciliation, and one made to be slow, stay within their bounds of time and memory."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from settler_streams.core.matching import Rules
from settler_streams.ids import TenantId
from settler_streams.reconciliation import decisions
from settler_streams.reconciliation.job import reconcile
from settler_streams.reconciliation.measure import Measurement
from settler_streams.reconciliation.result import Reconciliation
from settler_streams.reconciliation.sources import FileSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TENANT = TenantId("0197e000-0000-7000-8000-00000000000a")
ROWS = 30_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_hundred_thousand_rows_fit_into_a_gibibyte_and_find_the_truth(kind: str) -> None:
    command = [sys.executable, "-m", "settler_streams.reconciliation.measure", "--json", "--format", kind]
    finished = subprocess.run(command, check=True, capture_output=True, timeout=100)
    measured = msgspec.json.decode(finished.stdout, type=Measurement)
    assert measured.rows == 100_000
    assert measured.peak_rss_mib <= 1024
    assert measured.precision > 0.995
    assert measured.recall > 0.97


def run(
    folder: Path,
    left: list[tuple[int, str]],
    right: list[tuple[int, str]],
    cancelled: Callable[[], bool] = lambda: False,
    **rules: Any,
) -> Reconciliation:
    """Rows of one key and currency, given as amount and date."""
    (folder / TENANT).mkdir()
    for side, rows in (("left", left), ("right", right)):
        lines = [f"{side}{n:06},{amount},EUR,{date},k" for n, (amount, date) in enumerate(rows)]
        text = "\n".join(["id,amount_minor,currency,date,reference", *lines])
        (folder / TENANT / f"{side}.csv").write_text(text)
    sources = FileSource("left.csv", "csv"), FileSource("right.csv", "csv")
    wanted = Rules(keys=("reference",), **rules)
    return reconcile(*sources, wanted, tenant=TENANT, record_sets_dir=folder, cancelled=cancelled)


def test_rows_that_are_all_equal_pair_up(tmp_path: Path) -> None:
    result = run(tmp_path, [(100, "2026-01-01")] * ROWS, [(100, "2026-01-01")] * ROWS, mode="one_to_many")
    assert result.report.matches == {"one_to_one": ROWS}


def test_rows_that_are_all_near_pair_up(tmp_path: Path) -> None:
    left, right = [(100, "2026-01-01")] * ROWS, [(104, "2026-01-03")] * ROWS
    result = run(tmp_path, left, right, amount_tolerance_minor=5, date_window_days=3)
    assert result.report.matches == {"one_to_one": ROWS}


def test_rows_that_all_miss_the_window_are_explained(tmp_path: Path) -> None:
    left, right = [(100, "2010-01-01")] * ROWS, [(100, "2026-01-01")] * ROWS
    asked: list[None] = []
    result = run(tmp_path, left, right, lambda: bool(asked.append(None)), date_window_days=3660)
    assert len(asked) < 30, "a pass for each stage, and none for each day of the window"
    assert result.report.left.reasons == result.report.right.reasons == {"outside_date_window": ROWS}


def test_a_subset_sum_over_everything_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "STEPS_PER_JOB_MAX", 1_000_000)
    left = [(2 * n + 100_001, "2026-01-01") for n in range(ROWS)]
    right = [(2 * n + 2, "2026-01-01") for n in range(ROWS)]
    result = run(tmp_path, left, right, mode="one_to_many")
    assert result.report.left.reasons["search_limit"] > ROWS // 2
    assert result.report.left.rows == ROWS
