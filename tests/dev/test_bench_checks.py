"""The benchmark's own checks: a run whose outputs are not exactly one per request must not give a figure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.agents import admission
from settler_streams.core.admission import Admission
from settler_streams.core.fold import Record
from settler_streams.dev.bench import log, profile, recovery, workload
from settler_streams.dev.bench.admission_worker import new_logic
from settler_streams.dev.bench.latency import percentiles
from settler_streams.dev.bench.long_run import LongRun, _requests, _Results
from settler_streams.dev.bench.phases import Phases, Place
from settler_streams.dev.bench.programs import Program
from settler_streams.dev.bench.recorder import _check
from settler_streams.dev.bench.row_security import _best, _cost, _overhead, _together
from settler_streams.dev.bench.throughput import Work, check_outputs, compare
from settler_streams.dev.bench.workload import Keyed
from settler_streams.errors import StateError
from settler_streams.events import JobDecided, JobFinished, JobRequested, decode
from settler_streams.ids import partition_of
from settler_streams.runtime.state import Overlay, StateCodec
from settler_streams.topology import load_topology

if TYPE_CHECKING:
    from settler_streams.settings import Settings
    from tests.services.interface import Service, Services

PARTITIONS = load_topology().tenant_partitions
TENANTS = workload.tenants(100, PARTITIONS, 1)
REQUESTS = list(workload.requests(TENANTS, 400, 1))
IDS = [decode(request.value).id for request in REQUESTS]


def test_pauses_of_the_machine_are_no_cost_of_row_level_security() -> None:
    """A tenth more is a tenth more, though every tenth run of one login pauses, and one block is slow for the other."""
    without = [1.0 + number % 7 / 100 for number in range(60)]
    mine = [seconds * 1.1 + (5.0 if number % 10 == 3 else 0.0) for number, seconds in enumerate(without)]
    slow = (_best(mine), _best([4 * seconds for seconds in without]))
    cost = _cost([(_best(mine), _best(without))] * 4 + [slow])
    assert cost.overhead.ratio_p95 == pytest.approx(1.1)
    assert cost.overhead.error == 0
    assert 1.1e3 <= cost.p50_ms <= cost.p95_ms < 1.2e3


def test_the_error_of_a_cost_is_how_its_blocks_scatter() -> None:
    overhead = _overhead([([1.0 + block / 100] * 6, [1.0] * 6) for block in range(5)])
    assert overhead.ratio_p95 == pytest.approx(1.02)
    assert overhead.error == pytest.approx(1.2533 * 0.02 / 1.349 / 5**0.5)


def test_of_many_statements_together_the_single_calls_are_compared_as_well() -> None:
    """Pauses of one login in every tenth run are its single calls' 95th percentile, and no best run's."""
    without = [1.0 + number % 7 / 100 for number in range(60)]
    mine = [seconds * 1.1 + (5.0 if number % 10 == 3 else 0.0) for number, seconds in enumerate(without)]
    together = _together([[(mine, without)] * 4, [(mine, without)] * 3])
    assert together.best.ratio_p95 == pytest.approx(1.1)
    assert together.single.ratio_p95 > 5


def test_every_request_is_valid_has_its_own_id_and_lies_where_its_key_belongs() -> None:
    assert len(set(IDS)) == len(REQUESTS)
    for request in REQUESTS:
        event = decode(request.value)
        assert isinstance(event.data, JobRequested)
        assert request.partition == partition_of(request.key.decode(), PARTITIONS)
    assert {request.partition for request in REQUESTS} == set(range(PARTITIONS))
    assert list(workload.requests(TENANTS, 400, 1)) == REQUESTS


def test_most_requests_are_admitted_and_some_are_refused() -> None:
    """The whole of admission's logic runs: tenants known, limits reached, children charged to their parents."""
    state = Overlay()
    logic: Admission = new_logic(state, 0, load_topology())
    answers: Counter[str] = Counter()
    records = [("tenant-changes", keyed) for keyed in workload.tenant_changes(TENANTS)]
    records += [("job-requests", keyed) for keyed in workload.requests(TENANTS, 20_000, 1)]
    for offset, (topic, keyed) in enumerate(records):
        record = Record(topic, keyed.partition, offset, keyed.key.decode(), decode(keyed.value))
        outcome = logic.decide(record, 1_700_000_000_000 + offset // 50)
        state.apply(outcome.changes)
        answers.update(
            "admitted" if emit.data.admitted else str(emit.data.reason)
            for emit in outcome.emits
            if isinstance(emit.data, JobDecided)
        )
    assert answers.total() == 20_000
    assert 0.6 < answers["admitted"] / 20_000 < 0.95
    assert set(answers) == {"admitted", "concurrent_jobs", "rate_limit"}
    assert any(tenant.parent for tenant in TENANTS)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (IDS[1:], "1 missing, 0 doubled, 0 unknown"),
        ([*IDS, IDS[0]], "0 missing, 1 doubled, 0 unknown"),
        ([*IDS[1:], "another"], "1 missing, 0 doubled, 1 unknown"),
        ([*IDS[1:], IDS[1]], "1 missing, 1 doubled, 0 unknown"),
    ],
)
def test_outputs_that_are_not_one_per_request_are_refused(ids: list[str], said: str) -> None:
    compare("program", IDS, REQUESTS)
    with pytest.raises(StateError, match=said):
        compare("program", ids, REQUESTS)


@pytest.fixture(scope="module")
def settings(services: Services, kafka: Service, deployment: str) -> Settings:
    """Settings of the module's own deployment on the running broker."""
    return services.settings.model_copy(update={"deployment": deployment})


@pytest.mark.services
async def test_outputs_are_counted_in_the_log_and_only_committed_ones(settings: Settings) -> None:
    program = Program("ceiling", settings, PARTITIONS)
    work = Work((), REQUESTS)
    outputs = [
        Keyed(r.partition, r.key, b'{"id":"%s","tenant":"t","count":1}' % decode(r.value).id.encode()) for r in REQUESTS
    ]
    await log.create_topic(program.cluster, program.output_topic, PARTITIONS)
    async with log.Load(program.cluster, f"{settings.deployment}.aborted") as load:
        await load.append(program.output_topic, outputs)
    with pytest.raises(StateError, match="400 missing"):
        await check_outputs(program, work)
    async with log.Load(program.cluster, f"{settings.deployment}.load") as load:
        await load.append(program.output_topic, outputs)
        await load.commit()
        last_ms, answers = await check_outputs(program, work)
        assert last_ms > 1_700_000_000_000
        assert not answers
        await load.append(program.output_topic, outputs[:3])
        await load.commit()
        with pytest.raises(StateError, match="0 missing, 3 doubled, 0 unknown"):
            await check_outputs(program, work)
    await log.delete_topics(Cluster.of(settings), f"{settings.deployment}.")


class Tables:
    """A connection whose tables hold so many decisions, outcomes and executions."""

    def __init__(self, *counts: int) -> None:
        self._counts = counts

    async def fetchrow(self, _statement: str) -> tuple[int, ...]:
        return self._counts


async def test_rows_that_are_not_those_of_the_events_are_refused() -> None:
    await _check(Tables(10, 5, 5), 10)
    for wrong in ((9, 5, 5), (10, 4, 5), (10, 5, 6)):
        with pytest.raises(StateError):
            await _check(Tables(*wrong), 10)


def test_a_state_to_recover_has_as_many_different_keys_as_asked_for() -> None:
    for keys in (19, 20_011, 39_990):
        assert len({(record.partition, record.key) for record in recovery.state(keys, PARTITIONS)}) == keys
    records = list(recovery.state(30_000, PARTITIONS))
    assert len({(record.partition, record.key) for record in records}) == 30_000
    codec = StateCodec(admission.KINDS)
    kinds = Counter(type(codec.decode(record.key.decode(), record.value)).__name__ for record in records)
    assert kinds["Tenant"] == kinds["Usage"]
    assert kinds["Reservations"] > 2_900
    assert kinds["SeenIds"] == 2
    assert kinds.total() == 30_000


def test_requests_and_results_of_a_long_run_differ_by_their_ids_alone() -> None:
    ids = [decode(keyed.value).id for keyed in _requests(list(TENANTS), 30)]
    assert len(set(ids)) == 30
    keyed = _Results(TENANTS).of(TENANTS[0].id, ids[0])
    event = decode(keyed.value)
    assert isinstance(event.data, JobFinished)
    assert (event.id, event.data.job_id, event.tenantid) == (ids[0], ids[0], TENANTS[0].id)


def test_memory_that_grows_shows() -> None:
    assert LongRun(samples=[(n, 100.0) for n in range(40)]).growth == 1.0
    assert LongRun(samples=[(n, 100.0 + n) for n in range(40)]).growth > 1.1


def test_percentiles() -> None:
    assert percentiles([float(n) for n in range(101)]) == {"p50": 50.0, "p99": 99.0}


class Nested:
    """Two callables, one of which calls the other."""

    def outer(self) -> list[int]:
        return [self.inner(n) for n in range(100)]

    def inner(self, n: int) -> int:
        return sum(range(n * 10))

    def turns(self):
        yield from range(3)


def test_phases_count_calls_and_give_each_callable_back() -> None:
    before = dict(vars(Nested))
    phases = Phases(
        [
            Place("outer", Nested, "outer"),
            Place("inner", Nested, "inner"),
            Place("turns", Nested, "turns"),
            Place("gone", Nested, "no_longer"),
        ]
    )
    with phases.timing():
        Nested().outer()
        assert list(Nested().turns()) == [0, 1, 2]
    assert dict(vars(Nested)) == before
    assert phases.calls["outer"] == 1
    assert phases.calls["inner"] == 100
    assert phases.own_ns["inner"] > 0
    assert phases.gone == ["Nested.no_longer"]


async def test_the_profile_names_every_phase_and_none_is_gone() -> None:
    lines = await profile.profile(events=300, per_step=100, tenants=100, profiler=None)
    text = "\n".join(lines)
    assert "300 requests" in text
    for place in profile.PLACES:
        assert place.phase in text
    assert "no longer there" not in text
