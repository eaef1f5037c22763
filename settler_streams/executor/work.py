"""What one attempt computes: reconcile two record sets, and lay the result out as the columns that Postgres takes.

Runs in a child process of the executor: the work is bound by the processor, and a crash of it costs one attempt only.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec

from settler_streams.adapters.postgres.results import MatchColumns, ReportRow, UnmatchedColumns
from settler_streams.core.job_requests import rules_of
from settler_streams.events import FileRecords, InlineRecords, JobRequested
from settler_streams.ids import TenantId
from settler_streams.reconciliation.job import reconcile
from settler_streams.reconciliation.report import CurrencyTotals, Report
from settler_streams.reconciliation.result import Reconciliation
from settler_streams.reconciliation.sources import FileSource, InlineSource, Source

PREVIEW = "reconciliation-preview"
"""The kind of job that reports totals only; its matches and unmatched rows are counted and not stored."""


@dataclass(frozen=True)
class AttemptRows:
    """The result of one attempt. ``worker_us`` is the time the work took; the counts are the reconciliation's."""

    matches: list[MatchColumns]
    unmatched: list[UnmatchedColumns]
    report: list[ReportRow]
    match_count: int
    unmatched_count: int
    worker_us: int


def warm_up() -> int:
    """Called once in each child process, so that its imports are not part of the first job. Returns its pid."""
    return os.getpid()


def end_with_parent() -> None:
    """Run once in each child process: when the executor is killed, its children must not go on without it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True, name="parent watch").start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def run_job(request: JobRequested, tenant: TenantId, record_sets_dir: Path) -> AttemptRows:
    """Do the job.

    Raises:
        InvalidRequestError: a source or a rule is not acceptable; another attempt would end the same way.
    """
    started = time.perf_counter_ns()
    left, right = _source(request.left), _source(request.right)
    result = reconcile(left, right, rules_of(request), tenant=tenant, record_sets_dir=record_sets_dir)
    stored = request.kind != PREVIEW
    return AttemptRows(
        matches=_matches(result) if stored else [],
        unmatched=_unmatched(result) if stored else [],
        report=_report(result.report),
        match_count=sum(result.report.matches.values()),
        unmatched_count=result.report.left.unmatched_rows + result.report.right.unmatched_rows,
        worker_us=(time.perf_counter_ns() - started) // 1000,
    )


def _source(records: FileRecords | InlineRecords) -> Source:
    if isinstance(records, FileRecords):
        return msgspec.convert({"type": "file", "path": records.path, "format": records.format}, FileSource)
    return InlineSource(rows=records.rows)


def _matches(result: Reconciliation) -> list[MatchColumns]:
    return [
        MatchColumns(
            kind=chunk.kind,
            left_id=chunk.left_id,
            right_ids=[msgspec.json.encode(ids).decode() for ids in chunk.right_ids],
            left_currency=chunk.left_currency,
            right_currency=chunk.right_currency,
            left_amount_minor=chunk.left_amount_minor,
            right_amount_minor=chunk.right_amount_minor,
            difference_minor=chunk.difference_minor,
        )
        for chunk in result.match_chunks()
    ]


def _unmatched(result: Reconciliation) -> list[UnmatchedColumns]:
    return [
        UnmatchedColumns(
            side=chunk.side,
            record_no=chunk.row,
            record_id=chunk.row_id,
            currency=chunk.currency,
            amount_minor=chunk.amount_minor,
            record_date=chunk.date,
            reason=chunk.reason,
            detail=chunk.detail,
        )
        for chunk in result.unmatched_chunks()
    ]


def _report(report: Report) -> list[ReportRow]:
    left = {totals.currency: totals for totals in report.left.currencies}
    right = {totals.currency: totals for totals in report.right.currencies}
    matches = {difference.currency: difference.matches for difference in report.differences}
    return [
        ReportRow(currency, matches.get(currency, 0), *_totals(left.get(currency)), *_totals(right.get(currency)))
        for currency in sorted(left.keys() | right.keys())
    ]


def _totals(totals: CurrencyTotals | None) -> tuple[int, int, int, int, int, int]:
    if totals is None:
        return 0, 0, 0, 0, 0, 0
    return (
        totals.rows,
        totals.matched_rows,
        totals.unmatched_rows,
        totals.total_minor,
        totals.matched_minor,
        totals.unmatched_minor,
    )
