"""Events that folds write about themselves: the journal of what a step consumed."""

from __future__ import annotations

from settler_streams.events.fields import Count, Millis, PartitionNumber, Text
from settler_streams.events.structs import Part, event, part


@part
class OffsetRun(Part):
    """An unbroken piece of one input, in the order in which the step folded it."""

    topic: Text
    first: Count
    last: Count
    records: Count


@event("settler.fold.journal.v1")
class StepJournal(Part):
    """What one step of a fold consumed, in which order and at which ``now``, so that a replay can do the same."""

    role: Text
    partition: PartitionNumber
    runs: tuple[OffsetRun, ...]
    now_ms: Millis
    outputs: Count
    code_version: Text
