"""The conductor: strikes fault after fault, keeps fail points armed, thaws the frozen, and sees that work goes on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from settler_streams.errors import SettlerError, UnavailableError
from settler_streams.events import QuotaType, TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import TenantService
from tests.chaos.fail_points import (
    EXECUTOR_POINTS,
    OPEN_POINTS,
    REFUSED_POINTS,
    ROW_POINTS,
    STEP_POINTS,
    STOP_POINTS,
    Arm,
)
from tests.chaos.faults import ZOMBIE_S, Fault
from tests.chaos.field_of_work import EXECUTORS, WORKERS, Field
from tests.chaos.fleet import Member
from tests.chaos.pace import LOOK_INTERVAL_S, NotObservedError, elapse, observe, observe_advance

RECOVERED_S_MAX = 60.0
"""Longest time until every partition decides again and jobs finish, once processes are no longer killed. A worker may
have to notice a hung transaction (ten seconds), give up a step (thirty), and start."""
HOLD_AFTER_S = 15.0
"""While work is awaited for longer, processes start without a fail point: killed faster than they can start, on a slow
machine, they would never come to work, and nothing be shown."""
COORDINATOR_LOST = "is out of sync with the underlying log"
COORDINATOR_LOST_TIMES = 2
"""Said once, a broker loads the coordinator anew; said again after that, it goes on so until it is restarted."""
OPERATOR = "broker restarted by an operator, its coordinator lost"
HITS_MIN = 3
"""Each fail point is reached this often in a round, or the round has not shown what it is for."""
WIDEN_AFTER_S = 20.0
"""Once no fail point has been met for so long, what is left of them is armed for any role."""
NTH_MAX = {"admission": 12, "scheduler": 6, "noisy-neighbour": 12, "noisy-detector": 3, "flags": 2, "": 4}
"""A fail point is met at one of the first passes of its role, and so within seconds: roles differ in pace."""
ROLES = ("admission", "admission", "scheduler", "noisy-neighbour", "noisy-detector", "flags")
"""Whose steps are struck; admission's most."""
REFUSED_ROLES = ("admission", "scheduler", "noisy-neighbour", "flags")
"""Whose events are refused."""
CHANGE_INTERVAL_S = 7.0


class Conductor:
    """Runs a list of faults over a field."""

    def __init__(self, field: Field, say: Callable[[str], None] = str, *, zombie_s: float = ZOMBIE_S) -> None:
        self._field = field
        self._zombie_s = zombie_s
        self._say = say
        self._chance = random.Random(field.seed + 1)  # noqa: S311 - repeatable, not secret
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.recoveries_s: list[float] = []
        self.changes = 0

    def arm(self, hits: int = HITS_MIN) -> None:
        """Give every worker and executor its fail points, one for each of its next starts."""
        arms = [self._arm(point, ROLES) for point in STEP_POINTS for _ in range(hits)]
        arms += [self._arm(point) for point in (*OPEN_POINTS, *ROW_POINTS) for _ in range(hits)]
        arms += [self._arm(point, ("admission",), "stop") for point in STOP_POINTS for _ in range(hits // HITS_MIN)]
        arms += [self._arm(point, REFUSED_ROLES, "refuse") for point in REFUSED_POINTS for _ in range(hits)]
        self._deal(arms, WORKERS)
        attempts = [self._arm(point) for point in EXECUTOR_POINTS for _ in range(hits)]
        self._deal(attempts, EXECUTORS)

    def arm_for_mutants(self) -> None:
        """A few kills and refusals of admission's steps, on every worker: what brings a planted bug to light."""
        admission = ("admission",)
        for name in WORKERS:
            arms = self._field.fleet.members[name].arms
            for point in self._chance.sample(STEP_POINTS[2:], 3):
                # Before it has sent anything: an open transaction would keep the next owner waiting until it has ended.
                arms += [self._arm("folded", admission, "stop")] * (name == WORKERS[0])
                arms += [self._arm("produce", admission, "refuse"), self._arm(point, admission)]
        self._deal([], WORKERS)

    async def blows(self, least: Mapping[str, int], deadline_s: float) -> None:
        """Wait until the fail points have acted so often and nobody is stopped any more, or for ``deadline_s``."""

        async def enough() -> bool:
            noted = Counter(note["action"] for note in self._field.fleet.noted())
            reached = all(noted[action] >= count for action, count in least.items())
            return reached and not self._field.fleet.frozen()

        with contextlib.suppress(NotObservedError):
            await observe("enough blows", enough, deadline_s)

    def _deal(self, arms: list[Arm], names: tuple[str, ...]) -> None:
        self._chance.shuffle(arms)
        for number, arm in enumerate(arms):
            self._field.fleet.members[names[number % len(names)]].arms.append(arm)
        for name in names:  # a process is armed when it starts
            self._field.injected[f"{name.partition('-')[0]} SIGKILL"] += self._field.fleet.signal(name, signal.SIGKILL)

    def disarm(self) -> None:
        """No further start is armed."""
        for member in self._field.fleet.members.values():
            member.arms.clear()

    def _arm(self, point: str, roles: tuple[str, ...] = ("",), action: str = "kill") -> Arm:
        role = self._chance.choice(roles)
        return Arm(point, role, self._chance.randint(1, NTH_MAX[role]), action)

    async def __aenter__(self) -> Conductor:
        self._tasks = [asyncio.create_task(self._thaw()), asyncio.create_task(self._change_tenants())]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def strike(self, faults: Sequence[Fault], until_s: float) -> None:
        """Two faults at a time, in an order of the seed's, each pair followed by a look that work goes on.

        Every fault has its turn once; then again, in another order, until the time is over.
        """
        loop = asyncio.get_running_loop()
        first, struck_before = True, 0
        while first or loop.time() < until_s:
            order = self._chance.sample(list(faults), len(faults))
            while order and (first or loop.time() < until_s):
                pair = [order.pop() for _ in range(min(2, len(order)))]
                before = Counter(self._field.injected)
                draws = [self._draws(f"fault {struck_before + place}") for place in range(len(pair))]
                struck_before += len(pair)
                await asyncio.gather(*(fault(self._field, drawn) for fault, drawn in zip(pair, draws, strict=True)))
                await self.recovered()
                struck = ", ".join(sorted(self._field.injected - before)) or "nothing"
                self._say(f"{struck}; at work again after {self.recoveries_s[-1]:.1f} s")
            first = False

    def _draws(self, purpose: str) -> random.Random:
        """Draws for one purpose alone: what others draw, and when, does not change them."""
        return random.Random(f"{self._field.seed} {purpose}")  # noqa: S311 - repeatable, not secret

    async def recovered(self) -> None:
        """Wait until every partition under load has decided anew, and a job has finished."""
        field = self._field
        wanted = field.partitions_under_load()
        before, done = Counter(field.watch.decisions), len(field.watch.finished)

        def silent() -> set[int]:
            return {partition for partition in wanted if field.watch.decisions[partition] <= before[partition]}

        async def at_work() -> bool:
            return not silent() and len(field.watch.finished) > done

        began_s = asyncio.get_running_loop().time()
        try:
            await observe("work goes on under blows", at_work, HOLD_AFTER_S)
        except NotObservedError:
            field.fleet.holding = True
            await self._recovered_with_an_operator(at_work, silent)
        finally:
            field.fleet.holding = False
        self.recoveries_s.append(asyncio.get_running_loop().time() - began_s)

    async def _recovered_with_an_operator(
        self, at_work: Callable[[], Awaitable[bool]], silent: Callable[[], set[int]]
    ) -> None:
        """Wait for work to go on; where the broker has lost a coordinator, do what the runbook has an operator do."""
        kafka = self._field.stack.part("kafka")

        async def goes_on() -> None:
            what = "work goes on after a fault"
            await observe(what, at_work, RECOVERED_S_MAX, lambda: f"partitions {silent()} are silent")

        try:
            await goes_on()
        except NotObservedError:
            if kafka.process.log.read_text(errors="replace").count(COORDINATOR_LOST) < COORDINATOR_LOST_TIMES:
                raise
            self._field.injected[OPERATOR] += 1
            await asyncio.to_thread(kafka.stop)
            await self._field.bring_up("kafka")
            await goes_on()

    async def fail_points_met(self, patience_s: float) -> None:
        """Wait until every armed place has been reached.

        A process that does not come by, since it leads no fold of the armed role, is armed for any role instead.
        """
        with contextlib.suppress(NotObservedError):
            await observe_advance("fail points", self._points_left, WIDEN_AFTER_S)
            return
        for member in self._armed_members():
            wide = [dataclasses.replace(arm, role="", nth=1) for arm in member.arms]
            if member.armed is not None and not self._met(member):
                wide.insert(0, dataclasses.replace(member.armed, role="", nth=1))
                member.armed = None
            member.arms = deque(wide)
            if wide:
                self._field.injected[f"{member.name.partition('-')[0]} SIGKILL"] += self._field.fleet.signal(
                    member.name, signal.SIGKILL
                )
        with contextlib.suppress(NotObservedError):  # the report says which are missing
            await observe_advance("fail points", self._points_left, patience_s)

    async def _points_left(self) -> int:
        members = self._armed_members()
        # While a member starts, its process is still the one before, which may have met the point that it was given.
        waiting = [m for m in members if m.armed is not None and not (m.running and self._met(m))]
        return len(waiting) + sum(len(member.arms) for member in members)

    def _armed_members(self) -> list[Member]:
        return [self._field.fleet.members[name] for name in (*WORKERS, *EXECUTORS)]

    def _met(self, member: Member) -> bool:
        """Whether the present run of a member has come by its fail point."""
        return member.process is not None and any(
            note["pid"] == member.process.pid for note in self._field.fleet.noted()
        )

    async def _thaw(self) -> None:
        """SIGCONT to whoever has been stopped for long enough to be taken for dead; at the end, too, none is left."""
        since: dict[int, float] = {}
        loop = asyncio.get_running_loop()
        while (frozen := set(self._field.fleet.frozen())) or not self._over.is_set():
            since = {pid: since.get(pid, loop.time()) for pid in frozen}
            for pid, began_s in since.items():
                if loop.time() - began_s > self._zombie_s:
                    os.kill(pid, signal.SIGCONT)
            await elapse(LOOK_INTERVAL_S)

    async def _change_tenants(self) -> None:
        """One tenant changes its tier, its limits and its standing all the time."""
        field = self._field
        if "changing" not in field.tenants:
            return
        tenant = TenantId(field.tenants["changing"].id)
        chance = self._draws("tenant changes")
        while not self._over.is_set():
            try:
                async with TenantService.connect(field.settings) as service:
                    await self._keep_changing(service, tenant, chance)
            except UnavailableError:  # from the start, faults strike what it connects to
                await elapse(1.0, self._over)

    async def _keep_changing(self, service: TenantService, tenant: TenantId, chance: random.Random) -> None:
        while not await elapse(CHANGE_INTERVAL_S, self._over):
            changes = [
                lambda: service.change_tier(tenant, chance.choice(list(TenantTier)[:4])),
                lambda: service.change_quotas(tenant, {QuotaType.CONCURRENT_JOBS: chance.randint(1, 6)}),
                lambda: service.suspend(tenant),
                lambda: service.reactivate(tenant),
            ]
            with contextlib.suppress(SettlerError):  # it may be stored or not; the log says which
                await chance.choice(changes)()
                self.changes += 1
