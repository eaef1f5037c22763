"""Generated sets repeat, hold what they promise, and are reconciled well."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from settler_streams.ids import TenantId
from settler_streams.reconciliation.generator import RULES, GeneratedSets, Noise, generate, score
from settler_streams.reconciliation.job import reconcile
from settler_streams.reconciliation.sources import InlineSource

TENANT = TenantId("0197e000-0000-7000-8000-00000000000a")
SILENT = Noise(**dict.fromkeys(Noise.__slots__, 0.0))


@pytest.fixture(scope="module")
def sets() -> GeneratedSets:
    return generate(7, 5_000)


def test_the_same_seed_makes_the_same_sets(sets: GeneratedSets) -> None:
    assert generate(7, 5_000) == sets
    assert generate(8, 5_000) != sets


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 101])
def test_both_sides_have_exactly_the_rows_asked_for(rows: int) -> None:
    sets = generate(1, rows)
    assert len(sets.left) == len(sets.right) == rows


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        generate(1, 0)


def test_the_noise_is_all_there(sets: GeneratedSets) -> None:
    assert {row["currency"] for row in sets.left} == {"EUR", "USD", "GBP", "JPY", "KWD"}
    left, right = ({row["id"]: row for row in side} for side in (sets.left, sets.right))
    assert len(left) < len(sets.left)  # rows exported twice
    true = [(left[a], [right[b] for b in parts]) for a, parts in sets.truth]
    assert sum(len(invoices) > 1 for _, invoices in true) > 50
    exact = Counter(Decimal(a["amount"]) == sum(Decimal(b["amount"]) for b in parts) for a, parts in true)
    assert exact[True] > 5 * exact[False] > 500
    assert sum(a["date"] != parts[0]["date"] for a, parts in true) > 500
    assert sum(a["reference"] != parts[0]["reference"] for a, parts in true) > 10
    used = {part for _, parts in sets.truth for part in parts}
    assert len(left.keys() - {a for a, _ in sets.truth}) > 50
    assert len(right.keys() - used) > 50
    assert len(used) == sum(len(parts) for _, parts in sets.truth)


def test_realistic_sets_are_reconciled_with_high_precision_and_recall(sets: GeneratedSets) -> None:
    result = reconcile(
        InlineSource(sets.left), InlineSource(sets.right), RULES, tenant=TENANT, record_sets_dir=Path("/nowhere")
    )
    quality = score(result, sets.truth)
    assert quality.precision > 0.995
    # Typing errors, large fees and very late payments hide about two in a hundred from these rules.
    assert 0.97 < quality.recall < 1


def test_without_noise_everything_is_found() -> None:
    sets = generate(5, 2_000, SILENT)
    result = reconcile(
        InlineSource(sets.left), InlineSource(sets.right), RULES, tenant=TENANT, record_sets_dir=Path("/nowhere")
    )
    quality = score(result, sets.truth)
    assert (quality.precision, quality.recall) == (1.0, 1.0)
    assert result.unmatched.height == 0


def test_the_score_counts_whole_matches(sets: GeneratedSets) -> None:
    result = reconcile(
        InlineSource(sets.left), InlineSource(sets.right), RULES, tenant=TENANT, record_sets_dir=Path("/nowhere")
    )
    found = [(a, tuple(parts)) for a, parts in result.matches.select("left_id", "right_ids").iter_rows()]
    assert score(result, found).precision == score(result, found).recall == 1.0
    half = found[: len(found) // 2]
    assert score(result, half).recall == 1.0
    assert score(result, half).precision == len(half) / len(found)
    assert score(result, [(a, (*parts, "other")) for a, parts in found]).recall == 0.0
