"""Searches in several processes, each with databases of its own: two that write to the same rows would wait."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

from tests.isolation.search import Searched, search, shares

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    from settler_streams.settings import Settings

_twins: dict[str, Settings] = {}
"""Of this process, if it is one that searches."""


def searches(databases: Sequence[Mapping[str, Settings]], seed: int, statements: int) -> Generator[Searched]:
    """What each share of ``statements`` has come to, in any order; one process for each of the twins in ``databases``.

    Closing it waits for what is under way.
    """
    context = multiprocessing.get_context("spawn")
    twins = context.SimpleQueue()
    for each in databases:
        twins.put(each)
    pool = ProcessPoolExecutor(len(databases), context, _take, (twins,))
    try:
        for done in as_completed([pool.submit(_search, *share) for share in shares(seed, statements)]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _take(twins: SimpleQueue[Mapping[str, Settings]]) -> None:
    _twins.update(twins.get())


def _search(seed: int, statements: int) -> Searched:
    return search(_twins, seed, statements)
