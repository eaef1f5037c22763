"""Reconcile with tables and without, and hold both to one result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from settler_streams.core.matching import Rules
from settler_streams.errors import InvalidRequestError
from settler_streams.ids import TenantId
from settler_streams.reconciliation import job
from settler_streams.reconciliation.records import RecordSet, parse_records
from settler_streams.reconciliation.result import Reconciliation
from settler_streams.reconciliation.small_records import parse_small
from settler_streams.reconciliation.sources import InlineSource, TextColumns

TENANT = TenantId("0197e000-0000-7000-8000-00000000000a")
TABLES = -1
"""No set is as small as this."""


def reconcile_both(
    left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]], rules: Rules, *, rows_max: int = 3
) -> Reconciliation:
    """The result of both paths.

    Raises:
        InvalidRequestError: both paths refuse, in the same words.
    """
    small, tables = (_outcome(left, right, rules, limit) for limit in (len(left) + len(right), TABLES))
    if isinstance(small, InvalidRequestError):
        assert str(small) == str(tables)
        raise small
    assert isinstance(tables, Reconciliation), tables
    assert isinstance(tables.match_rows, pl.DataFrame)
    assert not isinstance(small.match_rows, pl.DataFrame)
    assert_equal(small, tables, rows_max=rows_max)
    return small


def assert_equal(one: Reconciliation, other: Reconciliation, *, rows_max: int) -> None:
    assert_frame_equal(one.matches, other.matches)
    assert_frame_equal(one.unmatched, other.unmatched)
    assert list(one.match_chunks(rows_max)) == list(other.match_chunks(rows_max))
    assert list(one.unmatched_chunks(rows_max)) == list(other.unmatched_chunks(rows_max))
    # The text, so that the order of what is inside counts as well.
    assert msgspec.json.encode(one.report) == msgspec.json.encode(other.report)


def parse_both(raw: pl.DataFrame | TextColumns, keys: Sequence[str]) -> RecordSet:
    """The rows as both parsers read them.

    Raises:
        InvalidRequestError: both refuse, in the same words.
    """
    try:
        tables = parse_records(raw, keys)
    except InvalidRequestError as error:
        with pytest.raises(InvalidRequestError) as refused:
            parse_small(raw, keys)
        assert str(refused.value) == str(error)
        raise
    small = parse_small(raw, keys).as_tables(keys)
    for part in fields(RecordSet):
        assert_frame_equal(getattr(small, part.name), getattr(tables, part.name))
    return tables


def _outcome(
    left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]], rules: Rules, small_rows_max: int
) -> Reconciliation | InvalidRequestError:
    sources = InlineSource(left), InlineSource(right)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "SMALL_ROWS_MAX", small_rows_max)
        try:
            return job.reconcile(*sources, rules, tenant=TENANT, record_sets_dir=Path("/nowhere"))
        except InvalidRequestError as error:
            return error
