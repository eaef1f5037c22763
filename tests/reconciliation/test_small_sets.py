"""A small set is reconciled without tables, to exactly the result that the tables give."""

from __future__ import annotations

import contextlib
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.matching import Rules
from settler_streams.errors import InvalidRequestError, StateError
from settler_streams.ids import TenantId
from settler_streams.reconciliation import decisions, job, small_job, sources
from settler_streams.reconciliation.generator import RULES, generate
from settler_streams.reconciliation.result import Reconciliation
from settler_streams.reconciliation.sources import FileSource, InlineSource
from tests.reconciliation.both_paths import TABLES, assert_equal, parse_both, reconcile_both

TENANT = TenantId("0197e000-0000-7000-8000-00000000000a")

IDS = st.sampled_from(
    ["a", "b", "c", "d", "a ", "B", "ä", "e\u0301", "\U0001f4b6", "z" * 256, "z" * 257, "", None, "x\0"]
)
MAJORS = st.sampled_from(
    [
        "1",
        "1.00",
        "1.01",
        "1.5",
        "2.0",
        "-1.00",
        "0",
        "-0",
        "100",
        "0.001",
        "1.00001",
        "1.",
        ".5",
        "1e2",
        "oops",
        "",
        " 1",
    ]
)
BIG = st.sampled_from(
    [
        "46116860184273879.03",
        "46116860184273879.04",
        "92233720368547758.07",
        "92233720368547758.08",
        "-" + "0" * 25 + "7",
    ]
)
AMOUNTS = st.one_of(MAJORS, MAJORS, MAJORS, st.none(), BIG, st.integers(-3, 3), st.just(1.5), st.booleans())
MINORS = st.sampled_from([None, None, None, None, "100", "101", "-7", "+7", 100, 2**63 - 1, 2**63, "1.0"])
CURRENCIES = st.sampled_from(["EUR", "EUR", "EUR", "EUR", "JPY", "KWD", "CLF", "ZZZ", "eur", "EU", "", None])
DATES = st.sampled_from(
    ["2026-01-31"] * 4
    + [
        "2026-02-01",
        "2026-02-02",
        "2024-02-29",
        "2026-02-30",
        "0001-01-01",
        "0000-01-01",
        "9999-12-31",
        "20260131",
        "",
        None,
    ]
)
KEYS = st.sampled_from(["x", "x", "x", "y", "X", "", None, "k\0", "k" * 256, "k" * 257, 7])


@st.composite
def ugly_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    columns = {"id": IDS, "amount": AMOUNTS, "amount_minor": MINORS, "currency": CURRENCIES, "date": DATES}
    columns |= {"reference": KEYS, "row": KEYS}
    rows = draw(st.lists(st.fixed_dictionaries({}, optional=columns) | st.fixed_dictionaries(columns), max_size=12))
    # Distinct ids for most rows, or nearly every row would be a duplicate.
    return [fields | {"id": f"{place}"} if place % 3 else fields for place, fields in enumerate(rows)]


@st.composite
def crowded_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Many rows that could match each other, so that the choice among them matters."""
    return [
        {
            "id": f"{place * 7 % 40:02}",
            "amount_minor": draw(st.integers(-3, 12)),
            "currency": draw(st.sampled_from(["EUR", "EUR", "JPY"])),
            "date": f"2026-01-{draw(st.integers(1, 9)):02}",
            "reference": draw(st.sampled_from(["x", "y"])),
            "row": "1",
        }
        for place in range(draw(st.integers(0, 40)))
    ]


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    keys = draw(st.sampled_from([(), ("reference",), ("row",), ("reference", "row")]))
    return Rules(
        keys=keys,
        amount_tolerance_minor=draw(st.sampled_from([0, 1, 2, 100, 10**15])),
        date_window_days=draw(st.sampled_from([0, 1, 3, 40, 3660])),
        currency_must_match=draw(st.booleans()) if keys else True,
        mode=draw(st.sampled_from(["one_to_one", "one_to_many"])),
        group_size_max=draw(st.integers(2, 5)),
    )


@settings(max_examples=150, deadline=None)
@given(ugly_rows(), ugly_rows(), rules(), st.integers(1, 5))
def test_ugly_sets_have_one_result(
    left: list[dict[str, Any]], right: list[dict[str, Any]], rules: Rules, rows_max: int
) -> None:
    with contextlib.suppress(InvalidRequestError):
        reconcile_both(left, right, rules, rows_max=rows_max)


@settings(max_examples=100, deadline=None)
@given(crowded_rows(), crowded_rows(), rules(), st.sampled_from([10, 100, 1_000, 10**7]), st.sampled_from([5, 50_000]))
def test_crowded_sets_have_one_result_under_any_step_limit(
    left: list[dict[str, Any]], right: list[dict[str, Any]], rules: Rules, job_max: int, component_min: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decisions, "STEPS_PER_JOB_MAX", job_max)
        patched.setattr(decisions, "STEPS_PER_COMPONENT_MIN", component_min)
        patched.setattr(decisions, "STEPS_PER_ROW_MAX", 1)
        reconcile_both(left, right, rules)


@settings(max_examples=150, deadline=None)
@given(ugly_rows())
def test_ugly_rows_are_read_alike(rows: list[dict[str, Any]]) -> None:
    keys = ("reference", "row")
    with contextlib.suppress(InvalidRequestError):
        parse_both(sources.read_source(InlineSource(rows), keys, tenant=TENANT, record_sets_dir=Path("/nowhere")), keys)


@pytest.mark.parametrize("seed", range(5))
def test_realistic_sets_have_one_result(seed: int) -> None:
    sets = generate(seed, 300)
    assert reconcile_both(sets.left, sets.right, RULES, rows_max=100).report.left.matched_rows > 200


@pytest.mark.parametrize("name", ["row", "n", "gid", "day", "detail", "reason", "kind", "currency_right", "r", "size"])
def test_a_key_may_have_the_name_of_a_column_of_ours(name: str) -> None:
    def row(identity: str, key: str, currency: str = "EUR") -> dict[str, Any]:
        return {"id": identity, "amount": "1.00", "currency": currency, "date": "2026-01-31", name: key}

    rules = Rules(keys=(name,), currency_must_match=False, mode="one_to_many")
    result = reconcile_both([row("a", "k"), row("b", "l"), row("c", "m")], [row("x", "k"), row("y", "l", "USD")], rules)
    assert result.report.matches == {"cross_currency": 1, "one_to_one": 1}


def test_a_year_that_no_calendar_has_is_an_invalid_row() -> None:
    row = {"id": "a", "amount": "1", "currency": "EUR", "date": "0000-02-01"}
    (chunk,) = reconcile_both([row], [], Rules()).unmatched_chunks()
    assert chunk.detail == ["date: not an ISO 8601 date"]


def run(left: int, right: int, folder: Path = Path("/nowhere")) -> Reconciliation:
    sets = generate(1, 10)
    rows = InlineSource(sets.left[:left]), InlineSource(sets.right[:right])
    return job.reconcile(*rows, RULES, tenant=TENANT, record_sets_dir=folder)


def test_a_set_is_small_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for left, right in product((4, 5, 6), repeat=2):
        monkeypatch.setattr(job, "SMALL_ROWS_MAX", 5)
        result = run(left, right)
        assert isinstance(result.match_rows, pl.DataFrame) == (max(left, right) > 5)
        monkeypatch.setattr(job, "SMALL_ROWS_MAX", TABLES)
        assert_equal(result, run(left, right), rows_max=2)


def test_a_small_job_of_inlined_rows_needs_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    # This is what makes it cheap: a table operation costs more than twenty rows do.
    monkeypatch.delattr(pl.DataFrame, "__init__")
    monkeypatch.delattr(pl.LazyFrame, "collect")
    result = run(10, 10)
    assert sum(len(chunk.match_no) for chunk in result.match_chunks()) == sum(result.report.matches.values()) > 0
    with pytest.raises((TypeError, AttributeError)):
        _ = result.matches


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_small_file_is_a_small_set(kind: Any, tmp_path: Path) -> None:
    (tmp_path / TENANT).mkdir()
    sets = generate(3, 10)
    sets.write(tmp_path / TENANT, kind)
    files = FileSource(f"left.{kind}", kind), FileSource(f"right.{kind}", kind)
    result = job.reconcile(*files, RULES, tenant=TENANT, record_sets_dir=tmp_path)
    assert not isinstance(result.match_rows, pl.DataFrame)
    assert_equal(result, reconcile_both(sets.left, sets.right, RULES), rows_max=4)


@pytest.mark.parametrize("broken", ["left used twice", "right used twice", "lost"])
def test_a_small_result_that_does_not_balance_is_refused(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = small_job.find_small_matches

    def find_wrongly(*args: Any) -> Any:
        pairing = find(*args)
        (left, right), *_, (last_left, last_right) = pairing.singles
        if broken == "left used twice":
            pairing.several.append((left, last_right))
        elif broken == "right used twice":
            pairing.singles[-1] = (last_left, right)
        else:
            pairing.singles.pop()
        return pairing

    monkeypatch.setattr(small_job, "find_small_matches", find_wrongly)
    with pytest.raises(StateError):
        run(10, 10)
