"""Rows are read exactly or set aside with the rule they break, the same from every format."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.errors import InvalidRequestError
from settler_streams.ids import TenantId
from settler_streams.reconciliation import sources
from settler_streams.reconciliation.currencies import exponent, major_text
from settler_streams.reconciliation.defects import TOTAL_MINOR_MAX
from settler_streams.reconciliation.records import RecordSet
from settler_streams.reconciliation.sources import FileSource, InlineSource, Source, read_source
from tests.reconciliation.both_paths import parse_both

TENANT = TenantId("0197e000-0000-7000-8000-00000000000a")
KEYS = ("reference",)


def parse(source: Source, folder: Path = Path("/nowhere"), keys: tuple[str, ...] = KEYS) -> RecordSet:
    return parse_both(read_source(source, keys, tenant=TENANT, record_sets_dir=folder), keys)


def row(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "amount": "1.00", "currency": "EUR", "date": "2026-01-31", "reference": "r", **fields}


def file(folder: Path, name: str, content: bytes) -> FileSource:
    (folder / TENANT).mkdir(exist_ok=True)
    (folder / TENANT / name).write_bytes(content)
    return FileSource(name, name.rpartition(".")[2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("amount", "currency", "minor"),
    [
        ("12.34", "EUR", 1234),
        ("12", "EUR", 1200),
        ("-0.5", "EUR", -50),
        ("0.07", "EUR", 7),
        ("-0.00", "EUR", 0),
        ("007.10", "EUR", 710),
        ("1234", "JPY", 1234),
        ("1.234", "KWD", 1234),
        ("1.2345", "CLF", 12345),
        ("40000000000000000.01", "USD", 4_000_000_000_000_000_001),
        (5, "EUR", 500),
        ("-0", "EUR", 0),
        ("0" * 5000 + "1", "EUR", 100),
        ("-" + "0" * 30, "KWD", 0),
    ],
)
def test_decimal_text_becomes_minor_units(amount: Any, currency: str, minor: int) -> None:
    parsed = parse(InlineSource([row(amount=amount, currency=currency)]))
    assert parsed.rows["amount"].to_list() == [minor]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"amount": "1.234"}, "more fractional digits"),
        ({"amount": "1.0", "currency": "JPY"}, "more fractional digits"),
        ({"amount": "1,000.00"}, "not a plain decimal"),
        ({"amount": "1e3"}, "not a plain decimal"),
        ({"amount": "NaN"}, "not a plain decimal"),
        ({"amount": "inf"}, "not a plain decimal"),
        ({"amount": "+1"}, "not a plain decimal"),
        ({"amount": " 1"}, "not a plain decimal"),
        ({"amount": "1\n"}, "not a plain decimal"),
        ({"amount": "1."}, "not a plain decimal"),
        ({"amount": ".5"}, "not a plain decimal"),
        ({"amount": "--1"}, "not a plain decimal"),
        ({"amount": "0x10"}, "not a plain decimal"),
        ({"amount": "１"}, "not a plain decimal"),  # noqa: RUF001 (a digit, but not one of ours)
        ({"amount": ""}, "not a plain decimal"),
        ({"amount": "92233720368547758.08"}, "beyond 64 bits"),
        ({"amount": "9" * 400}, "beyond 64 bits"),
        ({"amount": None}, "amount: missing"),
        ({"amount": 1.5}, "amount: give text"),
        ({"amount": True}, "amount: give text"),
        ({"amount": 10**30}, "amount: give text or a 64-bit integer"),
        ({"amount": None, "amount_minor": "1.5"}, "amount_minor: not an integer"),
        ({"amount": None, "amount_minor": "9223372036854775808"}, "beyond 64 bits"),
        ({"amount_minor": 100}, "give one of"),
        ({"currency": "eur"}, "currency"),
        ({"currency": None}, "currency"),
        ({"currency": "EURO"}, "currency"),
        ({"date": "2026-02-30"}, "date"),
        ({"date": "31.01.2026"}, "date"),
        ({"date": "2026-01-31T00:00:00Z"}, "date"),
        ({"date": None}, "date"),
        ({"date": "0000-12-31"}, "date"),
        ({"date": "２026-01-31"}, "date"),  # noqa: RUF001
        ({"date": "2026-W05-6"}, "date"),
        ({"date": "2026-01-31\n"}, "date"),
        ({"currency": "EUR\n"}, "currency"),
        ({"amount_minor": "1_0", "amount": None}, "amount_minor: not an integer"),
        ({"amount": "-" + "9" * 5000}, "beyond 64 bits"),
        ({"id": ""}, "id: missing"),
        ({"id": None}, "id: missing"),
        ({"id": "a\0b"}, "id: holds U\\+0000"),
        ({"id": "x" * 257}, "id: longer"),
        ({"reference": "a\0"}, "reference: holds U\\+0000"),
        ({"reference": ["r"]}, "reference: give text"),
    ],
)
def test_a_bad_row_is_set_aside_and_the_others_stay(change: dict[str, Any], detail: str) -> None:
    parsed = parse(InlineSource([row(), row(id="b"), row(id="z") | change]))
    assert parsed.rows["id"].to_list() == ["a", "b"]
    assert parsed.invalid["row"].to_list() == [3]
    assert pl.Series(parsed.invalid["detail"]).str.contains(detail).to_list() == [True]
    assert parsed.height == 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.sampled_from(["EUR", "JPY", "KWD", "CLF"])), max_size=1))
def test_every_64_bit_amount_survives_the_text(amounts: list[tuple[int, str]]) -> None:
    for minor, currency in amounts:
        text = major_text(minor, currency)
        assert Decimal(text).scaleb(exponent(currency)) == minor
        source = InlineSource([row(amount=text, currency=currency)])
        if abs(minor) > TOTAL_MINOR_MAX:
            with pytest.raises(InvalidRequestError, match="add up to more"):
                parse(source)
        else:
            assert parse(source).rows["amount"].to_list() == [minor]


@given(st.text(alphabet="0123456789.-+eE, _", max_size=12))
def test_amount_text_is_read_as_decimal_reads_it_or_refused(text: str) -> None:
    parsed = parse(InlineSource([row(amount=text)]))
    for minor in parsed.rows["amount"]:
        assert Decimal(text) * 100 == minor


def test_the_first_row_with_an_id_counts() -> None:
    parsed = parse(InlineSource([row(amount="bad"), row(amount="2"), row(amount="3"), row(amount="4")]))
    assert parsed.rows.select("row", "amount").rows() == [(2, 200)]
    assert parsed.duplicates.select("row", "amount").rows() == [(3, 300), (4, 400)]
    assert parsed.invalid["row"].to_list() == [1]


def test_totals_that_could_leave_64_bits_are_refused() -> None:
    half = 2**61
    rows = [row(id=str(n), amount_minor=sign * half) for n, sign in enumerate((1, -1))]
    with pytest.raises(InvalidRequestError, match="add up to more"):
        parse(InlineSource([{k: v for k, v in fields.items() if k != "amount"} for fields in rows]))


def test_of_two_totals_that_are_too_large_the_first_currency_is_named() -> None:
    rows = [
        row(id=str(n), currency=currency, amount="92233720368547758.07") for n, currency in enumerate(("USD", "EUR"))
    ]
    with pytest.raises(InvalidRequestError, match="amounts in EUR"):
        parse(InlineSource(rows))


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [
        row(id="ä;\"1'", reference="x,y"),
        row(id="b", amount="-7", reference=None),
        row(id="c", amount="x"),
        row(id="a", currency="KWD", amount="0.001"),
    ]
    table = pl.DataFrame(rows)
    (tmp_path / TENANT).mkdir()
    table.write_csv(tmp_path / TENANT / "s.csv")
    table.write_ndjson(tmp_path / TENANT / "s.jsonl")
    table.write_parquet(tmp_path / TENANT / "s.parquet")
    expected = parse(InlineSource(rows))
    assert expected.rows["id"].to_list() == ["a", "b", "ä;\"1'"]
    for kind in ("csv", "jsonl", "parquet"):
        parsed = parse(FileSource(f"s.{kind}", kind), tmp_path)  # type: ignore[arg-type]
        assert parsed.rows.equals(expected.rows), kind
        assert parsed.invalid.equals(expected.invalid), kind


def test_parquet_keeps_exact_types_and_refuses_floats(tmp_path: Path) -> None:
    (tmp_path / TENANT).mkdir()
    table = pl.DataFrame(
        {"id": [1], "amount": ["12.30"], "currency": ["EUR"], "date": ["2026-01-31"], "reference": ["r"]}
    ).with_columns(pl.col("date").str.to_date(), pl.col("amount").cast(pl.Decimal(20, 2)))
    source = FileSource("s.parquet", "parquet")
    table.write_parquet(tmp_path / TENANT / "s.parquet")
    assert parse(source, tmp_path).rows.select("id", "amount").rows() == [("1", 1230)]
    table.with_columns(pl.col("amount").cast(pl.Float64)).write_parquet(tmp_path / TENANT / "s.parquet")
    with pytest.raises(InvalidRequestError, match="'amount' has type Float64"):
        parse(source, tmp_path)


def test_a_json_line_that_is_no_object_is_one_invalid_row(tmp_path: Path) -> None:
    good = b'{"id":"a","amount_minor":7,"currency":"EUR","date":"2026-01-31","reference":"r"}'
    long = b'{"id":"' + b"x" * 70_000 + b'"}'
    broken = [b'{"id":', b"[1]", b'{"id":"\xff"}', b'{"id":"x","amount":0.1}', b"null", long]
    parsed = parse(file(tmp_path, "s.jsonl", b"\n".join([good, *broken, b""])), tmp_path)
    assert parsed.rows["amount"].to_list() == [7]
    assert parsed.invalid["row"].to_list() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.csv", b""),
        ("s.csv", b"id,amount,currency,date,reference\na,1,EUR,2026-01-31,r,extra\n"),
        ("s.csv", b"id,id,amount,currency,date,reference\na,b,1,EUR,2026-01-31,r\n"),
        ("s.csv", b"id,amount,currency,date,reference\n\xff,1,EUR,2026-01-31,r\n"),
        ("s.csv", b"id,amount,currency,date\na,1,EUR,2026-01-31\n"),
        ("s.csv", b"id,amount,amount_minor,currency,date,reference\na,1,,EUR,2026-01-31,r\n"),
        ("s.csv", b"id,currency,date,reference\na,EUR,2026-01-31,r\n"),
        ("s.parquet", b""),
        ("s.parquet", b"PAR1 this is no parquet file PAR1"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse(file(tmp_path, name, content), tmp_path)


def test_a_file_without_rows_is_an_empty_set(tmp_path: Path) -> None:
    assert parse(file(tmp_path, "s.csv", b"id,amount,currency,date,reference\n"), tmp_path).height == 0
    assert parse(file(tmp_path, "s.jsonl", b"\n"), tmp_path).height == 0
    assert parse(InlineSource([])).height == 0


def test_too_many_rows_are_refused_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROWS_MAX", 2)
    rows = [row(id=str(n)) for n in range(3)]
    table = pl.DataFrame(rows)
    (tmp_path / TENANT).mkdir()
    table.write_csv(tmp_path / TENANT / "s.csv")
    table.write_ndjson(tmp_path / TENANT / "s.jsonl")
    table.write_parquet(tmp_path / TENANT / "s.parquet")
    given_sources: list[Source] = [InlineSource(rows)]
    given_sources += [FileSource(f"s.{kind}", kind) for kind in ("csv", "jsonl", "parquet")]  # type: ignore[arg-type]
    for source in given_sources:
        with pytest.raises(InvalidRequestError, match="more than 2 rows"):
            parse(source, tmp_path)
