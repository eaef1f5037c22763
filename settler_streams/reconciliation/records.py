"""Parse the raw columns of a record set into a table of typed rows, exactly or not at all.

An amount is decimal text in major units and becomes 64-bit minor units by moving digits, never through a float.
A row that breaks a rule is set aside with the rule's name; it takes no part in matching or in any total. Small sets are
parsed by ``small_records``, to the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from settler_streams.reconciliation.currencies import DEFAULT_EXPONENT, EXPONENTS
from settler_streams.reconciliation.defects import TEXT_CHARS_MAX, Defect, check_total, holds_nul, too_long
from settler_streams.reconciliation.sources import key_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from settler_streams.reconciliation.sources import TextColumns


@dataclass(frozen=True, slots=True)
class RecordSet:
    """One side after parsing.

    Attributes:
        rows: one line per distinct readable id, ordered by id: ``n`` (UInt32, position in that order), ``row``,
            ``id``, ``currency``, ``amount`` (Int64 minor units), ``day`` (Int32 since 1970), and the key columns.
        duplicates: readable rows whose id came before: ``row``, ``id``, ``currency``, ``amount``, ``day``.
        invalid: ``row``, ``id`` (null when unusable), ``detail``.
    """

    rows: pl.DataFrame
    duplicates: pl.DataFrame
    invalid: pl.DataFrame

    @property
    def height(self) -> int:
        """Rows of the set as given."""
        return self.rows.height + self.duplicates.height + self.invalid.height


def as_table(raw: pl.DataFrame | TextColumns) -> pl.DataFrame:
    """The raw columns as a table."""
    return raw if isinstance(raw, pl.DataFrame) else pl.DataFrame(raw, schema=dict.fromkeys(raw, pl.String))


def parse_records(raw: pl.DataFrame | TextColumns, keys: Sequence[str]) -> RecordSet:
    """Type the rows of one side.

    The first row with an id counts; later ones with the same id are duplicates. An empty match key is null, which
    equals nothing.

    Raises:
        InvalidRequestError: the amounts of a currency add up to more than ``TOTAL_MINOR_MAX``.
    """
    raw = as_table(raw)
    amount, amount_defect = _amount(raw.columns)
    # There was no year 0, and neither Python nor Postgres has one; Polars does.
    dated = pl.col("date").str.contains(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$") & (pl.col("date") >= "0001")
    typed = raw.with_row_index("row", offset=1).lazy()
    typed = typed.with_columns(
        _exponent=pl.col("currency").replace_strict(EXPONENTS, default=DEFAULT_EXPONENT, return_dtype=pl.UInt8),
        _day=pl.when(dated).then(pl.col("date").str.to_date("%Y-%m-%d", strict=False)).cast(pl.Int32),
    )
    typed = typed.with_columns(_amount=amount)
    defect = pl.coalesce(
        pl.col("_defect"),
        _text_defect("id", "id"),
        pl.when(pl.col("id").fill_null("") == "").then(_word(Defect.ID_MISSING)),
        pl.when(~pl.col("currency").fill_null("").str.contains(r"^[A-Z]{3}$")).then(_word(Defect.CURRENCY)),
        amount_defect,
        pl.when(pl.col("_day").is_null()).then(_word(Defect.DATE)),
        *(_text_defect(column, key) for column, key in zip(key_columns(keys), keys, strict=True)),
    )
    parsed = typed.with_columns(detail=defect).collect()
    return _split(parsed, key_columns(keys))


def _split(parsed: pl.DataFrame, keys: Sequence[str]) -> RecordSet:
    invalid = parsed.filter(pl.col("detail").is_not_null()).select(
        "row",
        pl.when(_text_defect("id", "id").is_null() & (pl.col("id") != "")).then(pl.col("id")).alias("id"),
        "detail",
    )
    readable = parsed.filter(pl.col("detail").is_null()).select(
        "row",
        "id",
        "currency",
        pl.col("_amount").alias("amount"),
        pl.col("_day").alias("day"),
        *(pl.when(pl.col(key) != "").then(pl.col(key)).alias(key) for key in keys),
    )
    _check_totals(readable)
    first = readable["id"].is_first_distinct()
    rows = readable.filter(first).sort("id").with_row_index("n")
    duplicates = readable.filter(~first).select("row", "id", "currency", "amount", "day")
    return RecordSet(rows, duplicates, invalid)


def _amount(columns: Sequence[str]) -> tuple[pl.Expr, pl.Expr]:
    """The amount in minor units (null when it has none), and what is wrong with it."""
    major, minor = pl.col("amount"), pl.col("amount_minor")
    whole = r"^(-?[0-9]+)(?:\.[0-9]+)?$"
    fraction = major.str.extract(r"\.([0-9]+)$").fill_null("")
    zeros = pl.lit("0000").str.slice(0, pl.col("_exponent").cast(pl.Int64) - fraction.str.len_bytes().cast(pl.Int64))
    from_major = (
        pl.when(fraction.str.len_bytes() <= pl.col("_exponent"))
        .then(pl.concat_str(major.str.extract(whole), fraction, zeros))
        .cast(pl.Int64, strict=False)
    )
    from_minor = pl.when(minor.str.contains(r"^-?[0-9]+$")).then(minor).cast(pl.Int64, strict=False)
    beyond = _word(Defect.AMOUNT_SIZE)
    major_defect = (
        pl.when(~major.str.contains(whole))
        .then(_word(Defect.AMOUNT_TEXT))
        .when(fraction.str.len_bytes() > pl.col("_exponent"))
        .then(_word(Defect.AMOUNT_DIGITS))
        .when(pl.col("_amount").is_null())
        .then(beyond)
    )
    minor_defect = (
        pl.when(~minor.str.contains(r"^-?[0-9]+$"))
        .then(_word(Defect.AMOUNT_MINOR_TEXT))
        .when(pl.col("_amount").is_null())
        .then(beyond)
    )
    missing = _word(Defect.AMOUNT_MISSING)
    if "amount_minor" not in columns:
        return from_major, pl.when(major.is_null()).then(missing).otherwise(major_defect)
    if "amount" not in columns:
        return from_minor, pl.when(minor.is_null()).then(missing).otherwise(minor_defect)
    defect = (
        pl.when(major.is_not_null() & minor.is_not_null())
        .then(_word(Defect.AMOUNT_TWICE))
        .when(major.is_null() & minor.is_null())
        .then(missing)
        .when(major.is_not_null())
        .then(major_defect)
        .otherwise(minor_defect)
    )
    return pl.when(major.is_not_null()).then(from_major).otherwise(from_minor), defect


def _text_defect(column: str, name: str) -> pl.Expr:
    return (
        pl.when(pl.col(column).str.contains("\0", literal=True))
        .then(pl.lit(holds_nul(name)))
        .when(pl.col(column).str.len_chars() > TEXT_CHARS_MAX)
        .then(pl.lit(too_long(name)))
    )


def _word(defect: Defect) -> pl.Expr:
    return pl.lit(defect.value)


def _check_totals(rows: pl.DataFrame) -> None:
    totals = rows.group_by("currency").agg(pl.col("amount").cast(pl.Int128).abs().sum().alias("total"))
    for currency, total in totals.sort("currency").iter_rows():
        check_total(currency, total)
