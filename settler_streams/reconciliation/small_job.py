"""Reconcile two small record sets without tables: match, explain, add up."""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from itertools import chain
from typing import TYPE_CHECKING

from settler_streams.core.matching import Kind, Reason, Rules
from settler_streams.reconciliation.report import Difference, Report, SideReport, Sums, check_sums, side_report
from settler_streams.reconciliation.result import MatchChunk, Reconciliation, UnmatchedChunk
from settler_streams.reconciliation.small_pairing import SmallPairing, find_small_matches
from settler_streams.reconciliation.small_reasons import SmallReasons
from settler_streams.reconciliation.small_records import EPOCH, Invalid, Record, SmallSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def reconcile_small(left: SmallSet, right: SmallSet, rules: Rules, checkpoint: Callable[[], None]) -> Reconciliation:
    """Match the left set with the right one; the arguments and guarantees are those of ``job.reconcile``."""
    pairing = find_small_matches(left.rows, right.rows, rules, checkpoint)
    checkpoint()
    matches = _matches(pairing)
    decisions = pairing.decisions
    unmatched = UnmatchedChunk([], [], [], [], [], [], [], [])
    for side, records, others, of_others, used, undecided in (
        ("left", left, right, 1, pairing.used_left, decisions.undecided_left),
        ("right", right, left, 0, pairing.used_right, decisions.undecided_right),
    ):
        checkpoint()
        groups = {key: component[of_others] for key, component in pairing.groups.items()}
        _add_unmatched(unmatched, side, records, used, SmallReasons(others.rows, groups, undecided, rules))
    report = Report(
        left=_side("left", left, pairing.used_left, unmatched),
        right=_side("right", right, pairing.used_right, unmatched),
        matches=dict(sorted(Counter(matches.kind).items())),
        differences=_differences(matches),
    )
    check_sums(report, *_crossed(matches))
    return Reconciliation(matches, unmatched, report)


def _matches(pairing: SmallPairing) -> MatchChunk:
    parts: defaultdict[tuple[int, Kind], list[int]] = defaultdict(list)
    for kind, pairs in (
        (Kind.ONE_TO_ONE, pairing.singles),
        (Kind.ONE_TO_MANY, pairing.several),
        (Kind.CROSS_CURRENCY, pairing.crossed),
    ):
        for left_number, right_number in pairs:
            parts[left_number, kind].append(right_number)
    chunk = MatchChunk([], [], [], [], [], [], [], [], [])
    for number, kind in sorted(parts, key=lambda match: pairing.left[match[0]].row):
        left, rights = pairing.left[number], [pairing.right[part] for part in sorted(parts[number, kind])]
        right_minor = sum(record.amount_minor for record in rights)
        same = left.currency == rights[0].currency
        chunk.match_no.append(len(chunk.match_no) + 1)
        chunk.kind.append(kind.value)
        chunk.left_id.append(left.id)
        chunk.right_ids.append([record.id for record in rights])
        chunk.left_currency.append(left.currency)
        chunk.right_currency.append(rights[0].currency)
        chunk.left_amount_minor.append(left.amount_minor)
        chunk.right_amount_minor.append(right_minor)
        chunk.difference_minor.append(left.amount_minor - right_minor if same else None)
    return chunk


def _add_unmatched(chunk: UnmatchedChunk, side: str, records: SmallSet, used: set[int], reasons: SmallReasons) -> None:
    """Add the rows of one side that have no match, in the order of the set."""
    open_rows: list[tuple[int, Record | Invalid, Reason]] = [
        (record.row, record, reasons.reason(number, record))
        for number, record in enumerate(records.rows)
        if number not in used
    ]
    open_rows += [(record.row, record, Reason.DUPLICATE_ID) for record in records.duplicates]
    open_rows += [(record.row, record, Reason.INVALID_ROW) for record in records.invalid]
    for row, record, reason in sorted(open_rows, key=lambda open_row: open_row[0]):
        chunk.side.append(side)
        chunk.row.append(row)
        chunk.row_id.append(record.id)
        readable = record if isinstance(record, Record) else None
        chunk.currency.append(readable and readable.currency)
        chunk.amount_minor.append(readable and readable.amount_minor)
        chunk.date.append(readable and dt.date.fromordinal(readable.day + EPOCH))
        chunk.reason.append(reason.value)
        chunk.detail.append(record.detail if isinstance(record, Invalid) else None)


def _side(name: str, records: SmallSet, used: set[int], unmatched: UnmatchedChunk) -> SideReport:
    """Total, matched and unmatched come from different lists, so that their balance means something."""
    mine = [place for place, side in enumerate(unmatched.side) if side == name]
    return side_report(
        invalid_rows=len(records.invalid),
        reasons=Counter(unmatched.reason[place] for place in mine),
        readable=_sums((record.currency, record.amount_minor) for record in chain(records.rows, records.duplicates)),
        matched=_sums((records.rows[number].currency, records.rows[number].amount_minor) for number in used),
        unmatched=_sums((unmatched.currency[place], unmatched.amount_minor[place]) for place in mine),
    )


def _differences(matches: MatchChunk) -> tuple[Difference, ...]:
    same = [place for place, difference in enumerate(matches.difference_minor) if difference is not None]
    lefts = _sums((matches.left_currency[place], matches.left_amount_minor[place]) for place in same)
    rights = _sums((matches.right_currency[place], matches.right_amount_minor[place]) for place in same)
    differences = _sums((matches.left_currency[place], matches.difference_minor[place]) for place in same)
    return tuple(
        Difference(
            currency=currency,
            matches=rows,
            left_minor=lefts[currency][1],
            right_minor=rights[currency][1],
            difference_minor=difference_minor,
        )
        for currency, (rows, difference_minor) in sorted(differences.items())
    )


def _crossed(matches: MatchChunk) -> tuple[Sums, Sums]:
    """What the matches across currencies take from each side."""
    crossed = [place for place, difference in enumerate(matches.difference_minor) if difference is None]
    return (
        _sums((matches.left_currency[place], matches.left_amount_minor[place]) for place in crossed),
        _sums((matches.right_currency[place], matches.right_amount_minor[place]) for place in crossed),
    )


def _sums(money: Iterable[tuple[str | None, int | None]]) -> Sums:
    sums: Sums = {}
    for currency, amount_minor in money:
        # Only invalid rows have neither.
        if currency is not None and amount_minor is not None:
            rows, total_minor = sums.get(currency, (0, 0))
            sums[currency] = rows + 1, total_minor + amount_minor
    return sums
