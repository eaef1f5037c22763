"""A worker, executor or gateway of the rounds: the product's own command, after what the environment says was wrapped.

``CHAOS_ARM``       the fail point of this run, as :meth:`Arm.text` has it
``CHAOS_NOTES``     the file that says which fail points were reached
``CHAOS_NAME``      how this process is called there
``CHAOS_SESSION_S`` the consumer groups' session timeout
``CHAOS_FORMAT``    what is added to every state value's format: a version of the program that is yet to come
``CHAOS_MUTANT``    a planted bug; see :mod:`tests.chaos.mutant_workers`
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.chaos.fail_points import Arm, Trigger, around, install

HEARTBEATS_PER_SESSION = 3


def shorten_sessions(session_s: float) -> None:
    """A dead member is noticed after ``session_s`` instead of ten seconds, so that more faults fit into a round."""
    import faust

    def wrap(original: Any) -> Any:
        def method(app: Any, *args: Any, **options: Any) -> None:
            options["broker_session_timeout"] = session_s
            options["broker_heartbeat_interval"] = session_s / HEARTBEATS_PER_SESSION
            original(app, *args, **options)

        return method

    around(faust.App, "__init__", wrap)


def raise_formats(by: int) -> None:
    """Be a later version of the program: it writes the next format of every value, and reads today's as the former."""
    import msgspec

    from settler_streams.workers.folds import FOLDS

    for kind in {kind for role in FOLDS.values() for kind in role.kinds.values()}:
        kind.FORMAT += by
        kind.from_previous = classmethod(lambda cls, payload: msgspec.msgpack.decode(payload, type=cls))


def main() -> None:
    """Wrap, then run the command in the arguments."""
    environ = os.environ
    if session_s := environ.get("CHAOS_SESSION_S"):
        shorten_sessions(float(session_s))
    if environ.get("CHAOS_FORMAT"):
        raise_formats(int(environ["CHAOS_FORMAT"]))
    if mutant := environ.get("CHAOS_MUTANT"):
        from tests.chaos.mutant_workers import plant

        plant(mutant)
    if arm := environ.get("CHAOS_ARM"):
        install(Trigger(Arm.parse(arm), Path(environ["CHAOS_NOTES"]), environ["CHAOS_NAME"]))
    from settler_streams.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
