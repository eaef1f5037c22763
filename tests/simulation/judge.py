"""The verdict on one seed, from its log alone."""

from __future__ import annotations

from settler_streams.core.fold import CLOCK_KEY
from tests.simulation.committed import CommittedLog
from tests.simulation.ledger import AdmissionBooks, JobBooks, check_homes, check_windows
from tests.simulation.refold import Refold
from tests.simulation.world import DEPLOYMENT, TOPOLOGY, World, simulate


def violations_of(world: World) -> list[str]:
    """What is wrong; empty when every guarantee has held."""
    found = _hanging(world)
    report = found.append
    log = CommittedLog(world.broker, DEPLOYMENT)
    jobs = JobBooks(log, report)
    jobs.check()
    check_homes(log, report)
    check_windows(log, report)
    decided: list[str] = []
    for role in world.roles:
        for partition in range(TOPOLOGY.fold_partitions(role)):
            refold = Refold(log, role, partition, report).run()
            _check_held(world, refold)
            if role == "admission":
                books = AdmissionBooks(refold, jobs.decisions, report)
                books.check()
                decided += books.decided
    if sorted(decided) != sorted(jobs.decisions):
        report(f"decisions without a request: {sorted(jobs.decisions.keys() - set(decided))}")
    return found + world.violations


def _check_held(world: World, refold: Refold) -> None:
    """What the fold's last session holds is what the log says; a table reads the session, not the log."""
    held = world.states.get((refold.role, refold.partition), {})
    held.pop(CLOCK_KEY, None)
    if held != refold.state:
        wrong = sorted(key for key in held.keys() | refold.state.keys() if held.get(key) != refold.state.get(key))
        refold.report(f"{refold.fold_id}: its session holds another state than its log says: {wrong}")


def _hanging(world: World) -> list[str]:
    return [
        f"{name}-{partition.tp.partition}: a transaction hangs from {partition.stable_end} on"
        for name, topic in world.broker.topics.items()
        for partition in topic.partitions
        if partition.stable_end != partition.end
    ]


def judged(seed: int) -> tuple[World, list[str]]:
    """Run one seed and judge it."""
    world = simulate(seed)
    try:
        return world, violations_of(world)
    except Exception as error:  # noqa: BLE001 - a log that cannot even be read is a violation like any other
        return world, [*world.violations, f"the log cannot be judged: {error!r}"]
