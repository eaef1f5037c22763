"""What a reconciliation gives back: matches, unmatched rows and a report, in pieces that a database can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import polars as pl

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterator, Mapping

    from polars._typing import PolarsDataType

    from settler_streams.reconciliation.report import Report

CHUNK_ROWS = 5_000
"""Rows per chunk: a statement of about 1 MB."""


@dataclass(frozen=True, slots=True)
class MatchChunk:
    """Columns of equal length, one entry per match.

    ``difference_minor`` is left minus right, and None across currencies. ``match_no`` counts from 1 in the order of
    the left rows, so a repeated attempt gives the same numbers.
    """

    match_no: list[int]
    kind: list[str]
    left_id: list[str]
    right_ids: list[list[str]]
    left_currency: list[str]
    right_currency: list[str]
    left_amount_minor: list[int]
    right_amount_minor: list[int]
    difference_minor: list[int | None]


@dataclass(frozen=True, slots=True)
class UnmatchedChunk:
    """Columns of equal length, one entry per unmatched row.

    ``row`` is the position in the set, from 1. An invalid row has a ``detail``, and no currency, amount or date.
    """

    side: list[str]
    row: list[int]
    row_id: list[str | None]
    currency: list[str | None]
    amount_minor: list[int | None]
    date: list[dt.date | None]
    reason: list[str]
    detail: list[str | None]


MATCHES: Mapping[str, PolarsDataType] = {
    "match_no": pl.UInt32,
    "kind": pl.String,
    "left_id": pl.String,
    "right_ids": pl.List(pl.String),
    "left_currency": pl.String,
    "right_currency": pl.String,
    "left_amount_minor": pl.Int64,
    "right_amount_minor": pl.Int64,
    "difference_minor": pl.Int64,
}
"""The columns of :class:`MatchChunk` as a table."""

UNMATCHED: Mapping[str, PolarsDataType] = {
    "side": pl.String,
    "row": pl.UInt32,
    "row_id": pl.String,
    "currency": pl.String,
    "amount_minor": pl.Int64,
    "date": pl.Date,
    "reason": pl.String,
    "detail": pl.String,
}
"""The columns of :class:`UnmatchedChunk` as a table."""

Chunk = TypeVar("Chunk", MatchChunk, UnmatchedChunk)


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The result. A large one is held as tables, a small one as the one chunk that all of it makes."""

    match_rows: pl.DataFrame | MatchChunk
    unmatched_rows: pl.DataFrame | UnmatchedChunk
    report: Report
    """It balances."""

    @property
    def matches(self) -> pl.DataFrame:
        """The matches as a table with the columns of a chunk."""
        return _table(self.match_rows, MATCHES)

    @property
    def unmatched(self) -> pl.DataFrame:
        """The unmatched rows as a table with the columns of a chunk."""
        return _table(self.unmatched_rows, UNMATCHED)

    def match_chunks(self, rows_max: int = CHUNK_ROWS) -> Iterator[MatchChunk]:
        """The matches as Python lists, at most ``rows_max`` at a time."""
        return _chunks(self.match_rows, MatchChunk, rows_max)

    def unmatched_chunks(self, rows_max: int = CHUNK_ROWS) -> Iterator[UnmatchedChunk]:
        """The unmatched rows as Python lists, left side first, in the order of the set."""
        return _chunks(self.unmatched_rows, UnmatchedChunk, rows_max)


def _table(rows: pl.DataFrame | MatchChunk | UnmatchedChunk, schema: Mapping[str, PolarsDataType]) -> pl.DataFrame:
    if isinstance(rows, pl.DataFrame):
        return rows
    return pl.DataFrame({name: getattr(rows, name) for name in schema}, schema=schema)


def _chunks(rows: pl.DataFrame | Chunk, kind: type[Chunk], rows_max: int) -> Iterator[Chunk]:
    if isinstance(rows, pl.DataFrame):
        for part in rows.iter_slices(rows_max):
            yield kind(**part.to_dict(as_series=False))
        return
    columns = [getattr(rows, name) for name in kind.__slots__]
    for start in range(0, len(columns[0]), rows_max):
        yield kind(*(column[start : start + rows_max] for column in columns))
