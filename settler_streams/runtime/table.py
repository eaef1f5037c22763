"""A role's state as Faust sees it: one table per role, whose changelog is the folds' changelog.

Each open session owns the data of its partition, loads it, and drops it with its producer's epoch; the table is those
sessions side by side. So Faust's own recovery, changelog sends, standbys and wall-clock windows have no part in it:
the step sends one changelog record per touched key in its transaction, and a value that is windowed holds a fixed
array of event-time buckets, which its own fold moves on and expires by the fold's clock.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import faust
from faust.streams import current_event

from settler_streams.core.fold import Value
from settler_streams.runtime.batch import Batch
from settler_streams.runtime.state import Overlay


class FoldTable(faust.Table[str, Value]):
    """The values of the folds that this worker owns.

    Inside a step it is the state of the fold in hand, with the step's own changes, and may be written: what is put is
    part of the step's transaction. Anywhere else it shows the committed values of all open folds and cannot be written.
    A key that several of them hold (each has its clock) is there once, from one of them.

    Args:
        changelog: full name of the topic.
        kinds: the value type of each key prefix.
        open_states: the states of the open sessions, by partition number.
    """

    def __init__(
        self,
        app: faust.App,
        *,
        name: str,
        changelog: str,
        partitions: int,
        kinds: Mapping[str, type[Value]],
        open_states: Callable[[], Mapping[int, Overlay]],
    ) -> None:
        topic = app.topic(changelog, partitions=partitions, compacting=True, internal=False, acks=False)
        super().__init__(app, name=name, partitions=partitions, changelog_topic=topic)
        self._kinds = kinds
        self._open_states = open_states

    @property
    def data(self) -> Any:
        """Where reads and writes go."""
        if (batch := _in_step()) is not None:
            return batch.state
        committed: list[Any] = [state.committed for state in self._open_states().values()]
        return ChainMap(*committed)

    def partition(self, number: int) -> Mapping[str, Value]:
        """The committed values of one open fold.

        Raises:
            KeyError: this worker has not opened it.
        """
        return self._open_states()[number].committed

    def on_key_set(self, key: str, value: Value) -> None:
        """Faust's hook before a write."""
        self._check_writable()
        kind = self._kinds.get(key.partition("/")[0])
        if kind is None or not isinstance(value, kind):
            raise TypeError(f"{self.name}: {type(value).__name__} is no value for the key {key!r}")
        self._sensor_on_set(self, key, value)

    def on_key_del(self, key: str) -> None:
        """Faust's hook before a deletion."""
        self._check_writable()
        self._sensor_on_del(self, key)

    def on_clear(self) -> NoReturn:
        """Faust's hook. The fold's clock and positions lie here too, so nothing clears a table."""
        raise TypeError(f"{self.name}: a fold's state is not cleared; delete the keys that are meant")

    async def on_start(self) -> None:
        """There is no store to open, and topics are created by ``settler topology apply``."""

    def using_window(self, window: Any, *, key_index: bool = False) -> NoReturn:  # noqa: ARG002 - Faust's signature
        """Refused: Faust's windows expire by the wall clock and are not rebuilt on recovery."""
        raise TypeError(f"{self.name}: a windowed value holds its own buckets of event time")

    def send_changelog(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused: a record outside the step's transaction would be state that no committed step has put."""
        raise TypeError(f"{self.name}: the step writes the changelog")

    def apply_changelog_batch(self, _batch: Iterable[Any]) -> NoReturn:
        """Refused: the session loads its state when it opens."""
        raise TypeError(f"{self.name}: the session loads the changelog")

    def reset_state(self) -> NoReturn:
        """Refused: state and positions belong together."""
        raise TypeError(f"{self.name}: a fold's state is not reset; delete the deployment's topics together")

    def _check_writable(self) -> None:
        if _in_step() is None:
            raise TypeError(f"{self.name}: state is written inside a step only")


def _in_step() -> Batch | None:
    """The batch whose step the calling agent is in."""
    event = current_event()
    batch = None if event is None else event.value
    return batch if isinstance(batch, Batch) and batch.in_step else None
