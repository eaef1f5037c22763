"""Record sets as they come: a file in one of three formats, or rows inside the job, read into text columns.

Every format ends in the same raw columns, all text, so that what an amount or a date is does not depend on the format:

=========== =============================================================================
``id`` …     ``id``, ``amount`` or ``amount_minor`` (or both), ``currency`` and ``date``
``_key0`` …  the match keys in the order of the rules; their own names could be those of our columns
``_defect``  why the row could not even be read, else null
=========== =============================================================================
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import polars as pl

from settler_streams.errors import InvalidRequestError
from settler_streams.reconciliation.tenant_files import read_tenant_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from settler_streams.ids import TenantId

Format = Literal["csv", "jsonl", "parquet"]

ROWS_MAX = 1_000_000
"""Rows of one side: ten times the size that is held to 5 s and 1 GiB."""

LINE_BYTES_MAX = 64 * 1024
"""Longest JSON line: a hundred times a usual row, and too short to unfold into much memory."""

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_REQUIRED = ("id", "currency", "date")
_AMOUNTS = ("amount", "amount_minor")


class FileSource(msgspec.Struct, frozen=True, tag="file", forbid_unknown_fields=True):
    """A file below the tenant's directory; ``path`` is relative to it."""

    path: str
    format: Format


class InlineSource(msgspec.Struct, frozen=True, tag="inline", forbid_unknown_fields=True):
    """Rows inside the job: JSON objects with the columns of a record set."""

    rows: Sequence[Mapping[str, Any]]


Source = FileSource | InlineSource

TextColumns = dict[str, list[str | None]]
"""The raw columns as lists of equal length."""


def key_columns(keys: Sequence[str]) -> list[str]:
    """The raw columns that hold the match keys."""
    return [f"_key{place}" for place in range(len(keys))]


def read_source(
    source: Source, keys: Sequence[str], *, tenant: TenantId, record_sets_dir: Path
) -> pl.DataFrame | TextColumns:
    """The raw columns of a record set: lists where it came as objects, else a table.

    Raises:
        InvalidRequestError: the path leaves the tenant's directory, the file cannot be parsed at all, a column is
            missing or of a type that cannot be exact, or there are more than ``ROWS_MAX`` rows.
    """
    if isinstance(source, InlineSource):
        return _from_objects(((row, None) for row in source.rows), keys)
    content = read_tenant_file(tenant, record_sets_dir, source.path)
    if source.format == "jsonl":
        lines = (line for line in io.BytesIO(content) if not line.isspace())
        return _from_objects(map(_json_object, lines), keys)
    try:
        table = _read_table(content, source.format, keys)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        cause = next(iter(str(error).splitlines()), "")[:200]
        raise InvalidRequestError(f"{source.path!r} is not a readable {source.format} file: {cause}") from error
    _check_rows(table.height)
    return _text_columns(table, keys)


def _read_table(content: bytes, file_format: Literal["csv", "parquet"], keys: Sequence[str]) -> pl.DataFrame:
    """Read the columns that matter and one row more than allowed: what else the file holds takes no memory."""
    if file_format == "csv":
        # Everything stays text: inference would turn amounts into floats and "007" into 7.
        scan = pl.scan_csv(io.BytesIO(content), infer_schema=False, n_rows=ROWS_MAX + 1)
    else:
        scan = pl.scan_parquet(io.BytesIO(content), n_rows=ROWS_MAX + 1)
    wanted = {*_REQUIRED, *_AMOUNTS, *keys}
    names = scan.collect_schema().names()
    # Polars renames the second of two equal columns; which of them was meant is not ours to guess.
    if file_format == "csv" and any(f"{name}_duplicated_0" in names for name in wanted):
        raise ValueError("a column name occurs twice")
    return scan.select([name for name in names if name in wanted]).collect()


def _text_columns(table: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    columns = _columns(table.columns, keys)
    return table.select(
        *(_as_text(name, table.schema[name]) for name in columns),
        *(_as_text(name, table.schema[name]).alias(alias) for name, alias in zip(keys, key_columns(keys), strict=True)),
        pl.lit(None, dtype=pl.String).alias("_defect"),
    )


def _as_text(name: str, kind: pl.DataType) -> pl.Expr:
    """A column as text, only from types whose text is exact."""
    exact = kind.is_integer() or kind.is_decimal() or isinstance(kind, pl.String | pl.Date | pl.Categorical | pl.Null)
    if not exact:
        raise InvalidRequestError(f"column {name!r} has type {kind}; give text, an integer or a decimal")
    return pl.col(name).cast(pl.String)


def _columns(present: Iterable[str], keys: Sequence[str]) -> list[str]:
    have = set(present)
    missing = [name for name in (*_REQUIRED, *keys) if name not in have]
    if missing:
        raise InvalidRequestError(f"missing columns: {', '.join(missing)}")
    amounts = [name for name in _AMOUNTS if name in have]
    if len(amounts) != 1:
        raise InvalidRequestError("give one of the columns amount and amount_minor")
    return [*_REQUIRED, *amounts]


class _InexactNumber(str):
    """The text of a JSON number that is not an integer; kept apart so that it never becomes an amount."""

    __slots__ = ()


_JSON = msgspec.json.Decoder(dict[str, Any], float_hook=_InexactNumber)


def _json_object(line: bytes) -> tuple[Mapping[str, Any], str | None]:
    if len(line) > LINE_BYTES_MAX:
        return {}, f"longer than {LINE_BYTES_MAX} bytes"
    try:
        return _JSON.decode(line), None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return {}, f"not a JSON object: {error}"


def _from_objects(objects: Iterable[tuple[Mapping[str, Any], str | None]], keys: Sequence[str]) -> TextColumns:
    """Objects may differ in their fields, so a field that is missing makes its row invalid, not the set."""
    names = (*_REQUIRED, *_AMOUNTS, *keys)
    columns: TextColumns = {name: [] for name in (*_REQUIRED, *_AMOUNTS, *key_columns(keys), "_defect")}
    *texts, defects = columns.values()
    for count, (fields, unreadable) in enumerate(objects, 1):
        _check_rows(count)
        defect = unreadable
        for name, column in zip(names, texts, strict=True):
            value = fields.get(name)
            if value is not None and type(value) is not str:
                # A bool is an int to Python, and the text of an integer of any length is a way to burn time.
                if type(value) is int and _INT64_MIN <= value <= _INT64_MAX:
                    value = str(value)
                else:
                    defect = defect or f"{name}: give text or a 64-bit integer"
                    value = None
            column.append(value)
        defects.append(defect)
    return columns


def _check_rows(count: int) -> None:
    if count > ROWS_MAX:
        raise InvalidRequestError(f"the record set has more than {ROWS_MAX} rows")
