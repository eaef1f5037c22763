"""Python's cycle collector, out of the way while state is loaded.

Loading makes millions of objects, none of them in a cycle, and the collector would start again and again to look at
them all. Reference counts free what is freed meanwhile.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_pauses: set[object] = set()
"""Those who have asked for it and not yet left."""


@contextmanager
def paused() -> Iterator[None]:
    """No collection until the last of those who have asked for it leaves; folds of a worker load side by side."""
    pause = object()
    _pauses.add(pause)
    gc.disable()
    try:
        yield
    finally:
        _pauses.remove(pause)
        if not _pauses:
            gc.enable()
