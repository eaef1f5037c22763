"""What a round says of the logs of its workers: an end that no fault explains is found, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.check_ends import wrong_ends


def _said(folder: Path, event: str, error: str) -> list[str]:
    (folder / "worker-1.log").write_text(
        f"starting\n{json.dumps({'event': event, 'error': error})}\nTraceback (most recent call last):\n"
    )
    return list(wrong_ends(folder))


@pytest.mark.parametrize("event", ["worker failed", "worker did not start"])
@pytest.mark.parametrize("error", ["KeyError('tenant')", "StateError('offset 7 comes twice')", "CancelledError()"])
def test_an_end_that_no_fault_explains_is_found(tmp_path: Path, event: str, error: str) -> None:
    assert _said(tmp_path, event, error) == [f"worker-1.log: {event}: {error}"]


@pytest.mark.parametrize("event", ["worker failed", "worker did not start"])
@pytest.mark.parametrize(
    "error",
    [
        "FencedError('another owner')",
        "UnavailableError('no broker')",
        "StateError('the stored format is 3, and this worker knows 2')",
    ],
)
def test_an_end_that_a_fault_explains_is_none(tmp_path: Path, event: str, error: str) -> None:
    assert _said(tmp_path, event, error) == []


@pytest.mark.parametrize("event", ["worker stalled", "the event loop stands still"])
def test_a_standstill_is_found_whatever_it_says(tmp_path: Path, event: str) -> None:
    assert _said(tmp_path, event, "UnavailableError('no broker')") != []
