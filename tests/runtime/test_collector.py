"""The cycle collector rests while state is loaded, and only then."""

from __future__ import annotations

import gc

import pytest

from settler_streams.runtime import collector


def test_it_rests_until_the_last_of_those_who_load_side_by_side_has_ended():
    with collector.paused():
        second = collector.paused()
        second.__enter__()
        assert not gc.isenabled()
    assert not gc.isenabled(), "the second still loads"
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_a_load_that_fails_leaves_it_at_work():
    with pytest.raises(ZeroDivisionError), collector.paused():
        raise ZeroDivisionError
    assert gc.isenabled()
