"""Make realistic record sets whose true matches are known.

Each obligation is an invoice or an order that was invoiced in parts, with the payment that settled it. Then the world
happens to it: fees, late value dates, typing errors in references, rows that never arrive, payments made twice, files
exported with a row repeated. ``truth`` says what settles what, also where no rule can find it, so recall is honest.
"""

from __future__ import annotations

import datetime as dt
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import polars as pl

from settler_streams.core.matching import Rules
from settler_streams.reconciliation.currencies import major_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from settler_streams.reconciliation.result import Reconciliation

Record = dict[str, str]
Match = tuple[str, tuple[str, ...]]
"""A left id and the right ids that it settles, ascending."""

RULES = Rules(keys=("reference",), amount_tolerance_minor=50, date_window_days=5, mode="one_to_many", group_size_max=8)
"""The rules that an operator would give for these sets."""

_FIRST_DAY = dt.date(2026, 1, 1)
_DAYS = 90
_CURRENCIES = ("EUR", "USD", "GBP", "JPY", "KWD")
_CURRENCY_WEIGHTS = (50, 25, 10, 10, 5)
_SYLLABLES = ("nor", "vel", "tan", "ash", "mer", "lux", "ped", "gar", "io", "sol", "bru", "kin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How often something happens to an obligation; each is a probability."""

    fee: float = 0.10
    large_fee: float = 0.005
    date_shift: float = 0.30
    very_late: float = 0.005
    split: float = 0.03
    left_missing: float = 0.02
    right_missing: float = 0.05
    paid_twice: float = 0.015
    repeated_row: float = 0.002
    reference_typo: float = 0.01
    reference_reused: float = 0.01


@dataclass(frozen=True, slots=True)
class GeneratedSets:
    """Payments (left), invoices (right), and the true matches between rows that are in both sets."""

    left: list[Record]
    right: list[Record]
    truth: frozenset[Match]

    def write(self, folder: Path, file_format: Literal["csv", "jsonl", "parquet"]) -> tuple[Path, Path]:
        """Write ``left.<format>`` and ``right.<format>`` into ``folder``."""
        paths = folder / f"left.{file_format}", folder / f"right.{file_format}"
        for rows, path in zip((self.left, self.right), paths, strict=True):
            table = pl.DataFrame(rows)
            if file_format == "csv":
                table.write_csv(path)
            elif file_format == "jsonl":
                table.write_ndjson(path)
            else:
                table.write_parquet(path)
        return paths


@dataclass(frozen=True, slots=True)
class Score:
    """Precision: the share of found matches that are true. Recall: the share of true matches that were found."""

    precision: float
    recall: float


def generate(seed: int, rows: int, noise: Noise | None = None) -> GeneratedSets:
    """Make two sets of exactly ``rows`` rows each; the same arguments make the same sets on every machine.

    Raises:
        ValueError: ``rows`` is not positive.
    """
    if rows < 1:
        raise ValueError(f"rows must be positive, not {rows}")
    # Reproducible noise is the purpose; nothing here is secret.
    world = _World(random.Random(seed), rows, noise or Noise())  # noqa: S311
    while world.room_left and world.room_right:
        world.obligation()
    while world.room_left:
        world.pay(*world.new_terms())
    while world.room_right:
        world.invoice(*world.new_terms())
    world.chance.shuffle(world.left)
    world.chance.shuffle(world.right)
    return GeneratedSets(world.left, world.right, frozenset(world.truth))


def score(result: Reconciliation, truth: Iterable[Match]) -> Score:
    """Compare whole matches: one with a wrong, missing or extra right row is wrong."""
    true = {(left, tuple(sorted(rights))) for left, rights in truth}
    pairs = result.matches.select("left_id", "right_ids").iter_rows()
    found = {(left, tuple(sorted(rights))) for left, rights in pairs}
    right = len(found & true)
    return Score(right / len(found) if found else 1.0, right / len(true) if true else 1.0)


@dataclass(slots=True)
class _World:
    """The sets while they grow."""

    chance: random.Random
    rows: int
    noise: Noise
    left: list[Record] = field(default_factory=list)
    right: list[Record] = field(default_factory=list)
    truth: set[Match] = field(default_factory=set)
    _reference: str = ""
    _made: int = 0

    @property
    def room_left(self) -> int:
        return self.rows - len(self.left)

    @property
    def room_right(self) -> int:
        return self.rows - len(self.right)

    def obligation(self) -> None:
        """One order with its invoices and its payment, and what happens to them."""
        terms = amount, currency, day, reference = self.new_terms()
        if self._happens(self.noise.left_missing):
            self.invoice(*terms)
            return
        if self._happens(self.noise.right_missing):
            self.pay(*terms)
            return
        parts = self._parts(amount)
        invoices = tuple(sorted(self.invoice(part, currency, day, reference) for part in parts))
        paid, paid_on, quoted = self._paid(amount), self._paid_on(day), self._quoted(reference)
        payment = self.pay(paid, currency, paid_on, quoted)
        self.truth.add((payment, invoices))
        if self._happens(self.noise.paid_twice) and self.room_left:
            self.pay(paid, currency, paid_on + dt.timedelta(days=self.chance.randint(0, 2)), quoted)
        if self._happens(self.noise.repeated_row) and self.room_left:
            self.left.append(dict(self.left[-1]))

    def new_terms(self) -> tuple[int, str, dt.date, str]:
        """Amount in minor units, currency, date and reference of a new order."""
        currency = self.chance.choices(_CURRENCIES, _CURRENCY_WEIGHTS)[0]
        # Log-normal, as invoice amounts roughly are; at least 1,000 minor units so that a fee is never the whole.
        amount = 1_000 + int(self.chance.lognormvariate(9.5, 1.2))
        day = _FIRST_DAY + dt.timedelta(days=self.chance.randrange(_DAYS))
        if not self._reference or not self._happens(self.noise.reference_reused):
            self._reference = f"ORD-{self.chance.randrange(10**10):010d}"
        return amount, currency, day, self._reference

    def pay(self, amount: int, currency: str, day: dt.date, reference: str) -> str:
        return self._add(self.left, "P", amount, currency, day, reference)

    def invoice(self, amount: int, currency: str, day: dt.date, reference: str) -> str:
        return self._add(self.right, "I", amount, currency, day, reference)

    def _add(self, rows: list[Record], letter: str, amount: int, currency: str, day: dt.date, reference: str) -> str:
        self._made += 1
        identity = f"{letter}{self._made:08d}"
        rows.append(
            {
                "id": identity,
                "amount": major_text(amount, currency),
                "currency": currency,
                "date": day.isoformat(),
                "reference": reference,
                "counterparty": "".join(self.chance.choices(_SYLLABLES, k=3)).title(),
            }
        )
        return identity

    def _parts(self, amount: int) -> list[int]:
        pieces = self.chance.randint(2, 5)
        if not self._happens(self.noise.split) or pieces > self.room_right:
            return [amount]
        cuts = sorted(self.chance.sample(range(1, amount), pieces - 1))
        return [end - start for start, end in zip([0, *cuts], [*cuts, amount], strict=True)]

    def _paid(self, amount: int) -> int:
        if self._happens(self.noise.large_fee):
            return amount - amount // 10
        if self._happens(self.noise.fee):
            return amount - self.chance.randint(1, RULES.amount_tolerance_minor)
        return amount

    def _paid_on(self, day: dt.date) -> dt.date:
        if self._happens(self.noise.very_late):
            return day + dt.timedelta(days=self.chance.randint(15, 40))
        if self._happens(self.noise.date_shift):
            return day + dt.timedelta(days=self.chance.randint(1, RULES.date_window_days))
        return day

    def _quoted(self, reference: str) -> str:
        if not self._happens(self.noise.reference_typo):
            return reference
        at = self.chance.randrange(4, len(reference) - 1)
        swapped = reference[at + 1] + reference[at]
        return reference[:at] + swapped + reference[at + 2 :]

    def _happens(self, probability: float) -> bool:
        return self.chance.random() < probability
