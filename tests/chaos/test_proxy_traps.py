"""The proxy's traps know what they are for in the bytes that really pass."""

from __future__ import annotations

import pytest

from tests.chaos.proxy import postgres_commit, postgres_commit_reply

COMMITTED = b"C\x00\x00\x00\x0bCOMMIT\x00"
READY = b"Z\x00\x00\x00\x05I"
SET_BACK = b'S\x00\x00\x00\x23search_path\x00"$user", public\x00'


@pytest.mark.parametrize(
    ("piece", "from_client", "trapped"),
    [
        (COMMITTED + READY, False, True),
        (COMMITTED + SET_BACK + READY, False, True),
        (b"C\x00\x00\x00\x0dROLLBACK\x00" + READY, False, False),
        (COMMITTED + READY, True, False),
        (b"D\x00\x00\x00\x0fa text: COMMIT", False, False),
    ],
)
def test_the_word_that_postgres_has_committed(piece: bytes, from_client: bool, trapped: bool) -> None:
    assert postgres_commit_reply(0, piece, from_client) is trapped


def test_a_commit_on_its_way() -> None:
    assert postgres_commit(0, b"Q\x00\x00\x00\x0cCOMMIT;\x00", True)
    assert not postgres_commit(0, b"Q\x00\x00\x00\x0eROLLBACK;\x00", True)
