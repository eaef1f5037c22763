"""What one client cannot take from all others: the loop, the connections, the database pool."""

from __future__ import annotations

import pytest

from settler_streams.errors import InvalidRequestError
from settler_streams.events import JobRequested
from settler_streams.gateway.bodies import MODEL_BODY_BYTES_MAX, read_event, read_model
from settler_streams.gateway.controls import FlagChange

pytestmark = pytest.mark.services


@pytest.mark.parametrize("rows", ["1," * 480_000 + "1", "[]," * 300_000 + "[]", '{"":1},' * 130_000 + "{}"])
def test_a_body_of_nothing_but_mistakes_is_refused_at_the_first(rows: str) -> None:
    body = f'{{"left":{{"source":"inline","rows":[{rows}]}},"right":{{"source":"inline","rows":[]}},"rules":{{}}}}'
    with pytest.raises(InvalidRequestError) as refused:
        read_event(JobRequested, body.encode())
    assert "rows[0]" in str(refused.value)
    assert ";" not in str(refused.value)


def test_a_model_has_a_bounded_body() -> None:
    with pytest.raises(InvalidRequestError, match="bytes"):
        read_model(FlagChange, b"{" + b" " * MODEL_BODY_BYTES_MAX + b"}")
