"""The whole job: files in, balanced result out, in pieces that a database can take."""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest

from settler_streams.core.matching import Rules
from settler_streams.errors import InvalidRequestError, StateError
from settler_streams.ids import TenantId
from settler_streams.reconciliation import decisions
from settler_streams.reconciliation import job as job_module
from settler_streams.reconciliation.generator import RULES, generate
from settler_streams.reconciliation.job import ReconciliationCancelledError, reconcile
from settler_streams.reconciliation.records import parse_records
from settler_streams.reconciliation.report import Report, build_report, check_balance
from settler_streams.reconciliation.result import Reconciliation
from settler_streams.reconciliation.sources import FileSource, InlineSource, Source, read_source


@pytest.fixture(autouse=True, params=["without tables", "with tables"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sets take the one path, large ones the other; here both have to do everything."""
    if request.param == "with tables":
        monkeypatch.setattr(job_module, "SMALL_ROWS_MAX", -1)


TENANT = TenantId("0197e000-0000-7000-8000-00000000000a")
BY_REFERENCE = Rules(keys=("reference",), amount_tolerance_minor=50, date_window_days=3, mode="one_to_many")


def row(identity: str, amount: str, reference: str, **fields: Any) -> dict[str, Any]:
    return {"id": identity, "amount": amount, "currency": "EUR", "date": "2026-01-10", "reference": reference, **fields}


def run(left: list[dict[str, Any]], right: list[dict[str, Any]], rules: Rules = BY_REFERENCE) -> Reconciliation:
    return reconcile(InlineSource(left), InlineSource(right), rules, tenant=TENANT, record_sets_dir=Path("/nowhere"))


LEFT = [
    row("p9", "100.00", "A", date="2026-01-11"),
    row("p1", "99.75", "B"),
    row("p2", "60.00", "C"),
    row("p2", "60.00", "C"),
    row("p3", "7.00", "D"),
    row("p4", "7.00", "E"),
    row("p5", "7.00", "F"),
    row("p6", "7.00", "G", currency="USD"),
    row("p7", "oops", "A"),
    row("p8", "100.00", "A"),
]
RIGHT = [
    row("i1", "100.00", "A"),
    row("i2", "100.00", "B"),
    row("i3", "25.00", "C"),
    row("i4", "35.00", "C", date="2026-01-13"),
    row("i5", "9.00", "D"),
    row("i6", "7.00", "E", date="2026-01-14"),
    row("i7", "7.00", "G"),
]


def test_each_outcome_has_its_match_or_its_reason() -> None:
    result = run(LEFT, RIGHT)
    matches = [asdict(chunk) for chunk in result.match_chunks()]
    assert matches == [
        {
            "match_no": [1, 2, 3],
            "kind": ["one_to_one", "one_to_many", "one_to_one"],
            "left_id": ["p1", "p2", "p8"],
            "right_ids": [["i2"], ["i3", "i4"], ["i1"]],
            "left_currency": ["EUR"] * 3,
            "right_currency": ["EUR"] * 3,
            "left_amount_minor": [9975, 6000, 10000],
            "right_amount_minor": [10000, 6000, 10000],
            "difference_minor": [-25, 0, 0],
        }
    ]
    open_rows = list(result.unmatched.select("side", "row", "row_id", "reason").iter_rows())
    assert open_rows == [
        ("left", 1, "p9", "already_matched"),
        ("left", 4, "p2", "duplicate_id"),
        ("left", 5, "p3", "amount_out_of_tolerance"),
        ("left", 6, "p4", "outside_date_window"),
        ("left", 7, "p5", "no_key_match"),
        ("left", 8, "p6", "currency_mismatch"),
        ("left", 9, "p7", "invalid_row"),
        ("right", 5, "i5", "amount_out_of_tolerance"),
        ("right", 6, "i6", "outside_date_window"),
        ("right", 7, "i7", "currency_mismatch"),
    ]


def test_the_report_states_every_total() -> None:
    report = run(LEFT, RIGHT).report
    left = {entry.currency: entry for entry in report.left.currencies}
    assert (report.left.rows, report.left.matched_rows, report.left.unmatched_rows) == (10, 3, 7)
    assert report.left.invalid_rows == 1
    assert left["EUR"].total_minor == 10000 + 9975 + 6000 + 6000 + 700 * 3 + 10000
    assert left["EUR"].matched_minor == 9975 + 6000 + 10000
    assert (left["USD"].rows, left["USD"].unmatched_minor) == (1, 700)
    assert report.matches == {"one_to_many": 1, "one_to_one": 2}
    assert [(entry.currency, entry.difference_minor) for entry in report.differences] == [("EUR", -25)]
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_unmatched_chunks_hold_what_the_database_stores() -> None:
    chunks = list(run(LEFT, RIGHT).unmatched_chunks(rows_max=4))
    assert [len(chunk.side) for chunk in chunks] == [4, 4, 2]
    assert chunks[0].date[0] == dt.date(2026, 1, 11)
    assert (chunks[1].amount_minor[2], chunks[1].currency[2], chunks[1].date[2]) == (None, None, None)
    assert chunks[1].detail[2] == "amount: not a plain decimal"
    assert all(type(value) is int for chunk in chunks for value in chunk.row)


def test_rows_across_currencies_match_by_key_only_when_told_and_unambiguous() -> None:
    left = [row("p1", "10.00", "A"), row("p2", "10.00", "B"), row("p3", "1.00", "B")]
    right = [row("i1", "1500", "A", currency="JPY"), row("i2", "1500", "B", currency="JPY")]
    strict = Rules(keys=("reference",))
    assert run(left, right, strict).matches.height == 0
    result = run(left, right, msgspec.structs.replace(strict, currency_must_match=False))
    assert result.matches.select("kind", "left_id", "right_ids", "difference_minor").rows() == [
        ("cross_currency", "p1", ["i1"], None)
    ]
    assert set(result.unmatched["reason"]) == {"currency_mismatch"}
    assert result.report.differences == ()


def test_empty_sides() -> None:
    assert run([], []).report.left.rows == 0
    result = run(LEFT[:1], [])
    assert result.unmatched["reason"].to_list() == ["no_key_match"]
    assert list(result.match_chunks()) == []
    assert run([], RIGHT, Rules()).unmatched["reason"].to_list() == ["no_key_match"] * len(RIGHT)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_give_the_result_of_the_same_rows_inline(tmp_path: Path, kind: Any) -> None:
    sets = generate(3, 400)
    (tmp_path / TENANT).mkdir()
    sets.write(tmp_path / TENANT, kind)
    sources = FileSource(f"left.{kind}", kind), FileSource(f"right.{kind}", kind)
    from_files = reconcile(*sources, RULES, tenant=TENANT, record_sets_dir=tmp_path)
    inline = run(list(sets.left), list(sets.right), RULES)
    assert from_files.matches.equals(inline.matches)
    assert from_files.unmatched.equals(inline.unmatched)
    assert from_files.report == inline.report


def test_another_tenant_does_not_reach_the_files(tmp_path: Path) -> None:
    (tmp_path / TENANT).mkdir()
    generate(3, 5).write(tmp_path / TENANT, "csv")
    stranger = TenantId("0197e000-0000-7000-8000-00000000000b")
    (tmp_path / stranger).mkdir()
    for path in ("left.csv", f"../{TENANT}/left.csv", str(tmp_path / TENANT / "left.csv")):
        source = FileSource(path, "csv")
        with pytest.raises(InvalidRequestError):
            reconcile(source, source, RULES, tenant=stranger, record_sets_dir=tmp_path)


def test_sources_decode_from_json() -> None:
    decoded = msgspec.json.decode(
        b'[{"type":"file","path":"a.csv","format":"csv"},{"type":"inline","rows":[{"id":"a"}]}]', type=list[Source]
    )
    assert decoded == [FileSource("a.csv", "csv"), InlineSource([{"id": "a"}])]


def test_cancelling_stops_at_every_stage() -> None:
    asked = 0

    def never() -> bool:
        nonlocal asked
        asked += 1
        return False

    def job(cancelled: Any) -> None:
        sides = InlineSource(LEFT), InlineSource(RIGHT)
        reconcile(*sides, BY_REFERENCE, tenant=TENANT, record_sets_dir=Path("/nowhere"), cancelled=cancelled)

    job(never)
    assert asked > 6
    for stop_at in range(asked):
        answers = iter([False] * stop_at + [True])
        with pytest.raises(ReconciliationCancelledError):
            job(lambda answers=answers: next(answers))


def test_rows_beyond_the_step_limit_are_reported_and_the_report_balances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "STEPS_PER_JOB_MAX", 100)
    left = [row(f"p{n:03}", f"{10 + n // 10}.{n % 10}0", "A") for n in range(100)]
    right = [row(f"i{n:03}", f"{10 + n // 10}.{n % 10}3", "A") for n in range(100)]
    report = run(left, right).report
    assert report.left.matched_rows == report.right.matched_rows < 100
    assert set(report.left.reasons) == {"search_limit"}
    assert report.left.matched_rows + report.left.reasons["search_limit"] == 100


def test_small_components_are_not_starved_by_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "STEPS_PER_JOB_MAX", 50)
    left = [row(f"p{n:03}", "1.00", "big") for n in range(60)] + [
        row("q1", "2.00", "small"),
        row("q2", "2.01", "small"),
    ]
    right = [row(f"i{n:03}", f"1.{n % 40 + 1:02}", "big") for n in range(60)]
    right += [row("j1", "2.10", "small"), row("j2", "2.12", "small")]
    result = run(left, right)
    small = result.matches.filter(pl.col("left_id").str.starts_with("q"))
    assert small.select("left_id", "right_ids").rows() == [("q1", ["j2"]), ("q2", ["j1"])]
    assert "search_limit" in result.report.left.reasons


@pytest.mark.parametrize("broken", ["lost row", "double use", "wrong amount"])
def test_a_result_that_does_not_balance_is_refused(broken: str) -> None:
    result = run(LEFT, RIGHT)
    sets = [
        parse_records(
            read_source(InlineSource(rows), ("reference",), tenant=TENANT, record_sets_dir=Path("/nowhere")),
            ("reference",),
        )
        for rows in (LEFT, RIGHT)
    ]
    lefts, rights = result.matches["left_id"], result.matches["right_ids"].explode()
    matched = [
        sets[0].rows.filter(pl.col("id").is_in(lefts.implode())),
        sets[1].rows.filter(pl.col("id").is_in(rights.implode())),
    ]
    assert build_report(sets, result.matches, matched, result.unmatched) == result.report
    matches, unmatched = result.matches, result.unmatched
    if broken == "lost row":
        unmatched = unmatched.slice(1)
    elif broken == "double use":
        matches = pl.concat([matches, matches.head(1)])
    else:
        matches = matches.with_columns(pl.col("left_amount_minor") + 1)
    with pytest.raises(StateError):
        build_report(sets, matches, matched, unmatched)


def test_check_balance_finds_a_difference_that_does_not_add_up() -> None:
    result = run(LEFT, RIGHT)
    (entry,) = result.report.differences
    wrong = msgspec.structs.replace(entry, difference_minor=entry.difference_minor + 1)
    with pytest.raises(StateError, match="differences"):
        check_balance(msgspec.structs.replace(result.report, differences=(wrong,)), result.matches)
