"""Rules outside of their bounds are refused, when built and when decoded."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from settler_streams.core.matching import Rules
from settler_streams.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"amount_tolerance_minor": -1}, "amount_tolerance_minor"),
        ({"amount_tolerance_minor": 10**15 + 1}, "amount_tolerance_minor"),
        ({"date_window_days": -1}, "date_window_days"),
        ({"date_window_days": 3661}, "date_window_days"),
        ({"group_size_max": 1}, "group_size_max"),
        ({"group_size_max": 17}, "group_size_max"),
        ({"keys": ("reference", "reference")}, "keys"),
        ({"keys": ("amount",)}, "keys"),
        ({"keys": ("",)}, "keys"),
        ({"keys": ("k" * 4001,)}, "keys"),
        ({"keys": ("a\0b",)}, "keys"),
        ({"keys": ("_defect",)}, "keys"),
        ({"keys": tuple("abcdefghi")}, "keys"),
        ({"currency_must_match": False}, "currency_must_match"),
        ({"mode": "many_to_many"}, "mode"),
    ],
)
def test_a_bad_rule_is_named(change: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"rules\.{names}"):
        Rules(**change)


def test_decoding_checks_as_well() -> None:
    with pytest.raises(InvalidRequestError, match="group_size_max"):
        msgspec.json.decode(b'{"group_size_max": 99}', type=Rules)
    assert msgspec.json.decode(b'{"keys": ["reference"]}', type=Rules) == Rules(keys=("reference",))
