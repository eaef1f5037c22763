"""The decisions about topics, keys, ids and state that are expensive to change later."""

from __future__ import annotations

import itertools
import re
import uuid

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from settler_streams.core.admission import Admission
from settler_streams.core.fold import CLOCK_KEY, FoldClock
from settler_streams.errors import RecordError, StateError
from settler_streams.events import REGISTRY, JobRequested
from settler_streams.ids import derived_id, murmur2, partition_of, uuid7
from settler_streams.runtime.routing import Router
from settler_streams.runtime.state import StateCodec
from settler_streams.settings import Settings
from settler_streams.topology import FOREVER_MS, Topology, full_name, load_topology
from settler_streams.workers.folds import fold_app

TOPOLOGY = load_topology()
DAY_MS = 86_400_000
TENANT = "0190a1b2-0000-7000-8000-0000000000a1"

# From Kafka's own unit test of its murmur2 (signed 32-bit results).
KAFKA_GOLDEN = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}

# Per topic its key, partitions, cleanup and retention in days (None: for ever).
CONTRACT = {
    "job-requests": ("root-tenant", 8, "delete", 7),
    "usage-events": ("root-tenant", 8, "delete", 7),
    "tenant-changes": ("root-tenant", 8, "delete", None),
    "flag-commands": ("root-tenant", 8, "delete", 30),
    "flag-changes": ("root-tenant", 8, "delete", None),
    "flag-state": ("state", 8, "compact", None),
    "job-decisions": ("root-tenant", 8, "delete", 30),
    "pool-inputs": ("partition", 1, "delete", 7),
    "job-dispatches": ("partition", 1, "delete", 1),
    "job-results": ("root-tenant", 8, "delete", 30),
    "tenant-signals": ("root-tenant", 8, "delete", 30),
    "dead-letters": ("partition", 8, "compact,delete", 30),
}
SINGLE_WRITERS = {
    "tenant-changes": "tenant-service",
    "flag-changes": "flags",
    "flag-state": "flags",
    "job-decisions": "admission",
    "job-dispatches": "scheduler",
    "job-results": "scheduler",
}


@pytest.mark.parametrize("key", KAFKA_GOLDEN)
def test_the_partitioner_is_kafkas_murmur2(key: bytes) -> None:
    signed = murmur2(key) - 2**32 if murmur2(key) >= 2**31 else murmur2(key)
    assert signed == KAFKA_GOLDEN[key]
    assert partition_of(key.decode(), 8) == (KAFKA_GOLDEN[key] & 0x7FFFFFFF) % 8


@given(st.text(max_size=80), st.integers(1, 1000))
def test_the_partitioner_agrees_with_the_kafka_clients(key: str, partitions: int) -> None:
    from aiokafka.partitioner import DefaultPartitioner

    numbers = list(range(partitions))
    assert partition_of(key, partitions) == DefaultPartitioner()(key.encode(), numbers, numbers)


@pytest.mark.parametrize("name", CONTRACT)
def test_the_topics_are_those_of_the_contract(name: str) -> None:
    key, partitions, cleanup, days = CONTRACT[name]
    topic = TOPOLOGY.topic(name)
    assert topic.key == key
    assert TOPOLOGY.partitions(name) == partitions
    assert topic.cleanup == cleanup
    assert topic.retention_ms == (FOREVER_MS if days is None else days * DAY_MS)


@pytest.mark.parametrize("name", SINGLE_WRITERS)
def test_facts_have_one_writer(name: str) -> None:
    assert TOPOLOGY.topic(name).writers == (SINGLE_WRITERS[name],)


def test_one_setting_gives_all_tenant_topics_their_partitions() -> None:
    assert TOPOLOGY.tenant_partitions == 8
    assert {TOPOLOGY.partitions(t.name) for t in TOPOLOGY.topics if t.key in ("root-tenant", "state")} == {8}


def test_a_folds_inputs_are_co_partitioned_with_its_changelog_and_journal() -> None:
    counts = {declared.topic: declared.partitions for declared in TOPOLOGY.declared("x")}
    for fold in TOPOLOGY.folds:
        names = (*fold.inputs, fold.changelog, fold.journal)
        assert len({counts[full_name("x", name)] for name in names}) == 1, fold.role


def test_inputs_of_different_partition_counts_are_refused() -> None:
    broken = TOPOLOGY.model_dump(by_alias=True)
    for topic in broken["topics"]:
        topic["retention"] = "forever"
        if topic["name"] == "usage-events":
            topic["partitions"] = 4
    with pytest.raises(ValidationError, match="inputs differ in partition count"):
        Topology.model_validate(broken)


@pytest.mark.parametrize("declared", TOPOLOGY.declared("prefix"), ids=lambda d: d.topic)
def test_every_topic_has_append_time_and_the_prefix(declared) -> None:
    assert declared.config["message.timestamp.type"] == "LogAppendTime"
    assert declared.topic.startswith("prefix.")
    assert re.fullmatch(r"[a-z0-9.-]{1,249}", declared.topic)


def test_changelogs_are_compacted_and_journals_end() -> None:
    configs = {declared.topic: declared.config for declared in TOPOLOGY.declared("x")}
    for fold in TOPOLOGY.folds:
        assert configs[f"x.{fold.changelog}"]["cleanup.policy"] == "compact"
        assert "retention.ms" not in configs[f"x.{fold.changelog}"]
        assert configs[f"x.{fold.journal}"]["cleanup.policy"] == "delete"
        assert int(configs[f"x.{fold.journal}"]["retention.ms"]) >= 30 * DAY_MS


def test_a_dead_letter_topic_takes_the_largest_record_that_any_topic_takes() -> None:
    limits = {declared.topic: int(declared.config["max.message.bytes"]) for declared in TOPOLOGY.declared("x")}
    assert limits["x.dead-letters"] == max(limits.values())


def test_two_deployments_share_no_topic() -> None:
    one = {declared.topic for declared in TOPOLOGY.declared(Settings().deployment)}
    two = {declared.topic for declared in TOPOLOGY.declared("t-other")}
    assert not one & two


def test_a_record_in_a_wrong_partition_has_a_home_elsewhere() -> None:
    router = Router(TOPOLOGY)
    home = partition_of(TENANT, 8)
    for topic in (topic for topic in TOPOLOGY.topics if topic.key == "root-tenant"):
        for arrived_in in range(8):
            assert router.home_of(topic.name, TENANT, arrived_in) == home
        with pytest.raises(RecordError, match="keyed by their root tenant"):
            router.home_of(topic.name, "", 0)
    assert router.home_of("pool-inputs", TENANT, 0) == 0


@pytest.mark.parametrize("event_type", sorted(REGISTRY))
def test_a_type_ends_in_its_version_and_has_a_topic(event_type: str) -> None:
    assert re.fullmatch(r"settler(\.[a-z][a-z-]*)+\.v[1-9][0-9]*", event_type)
    homes = [topic.name for topic in TOPOLOGY.topics if event_type in topic.events]
    assert homes or event_type == "settler.fold.journal.v1"
    assert len(homes) <= 1 or event_type in ("settler.clock.tick.v1", "settler.tenant.erased.v1")


def test_strings_and_integers_stay_within_what_postgres_takes() -> None:
    for body in REGISTRY.values():
        for name, field in body.model.model_json_schema()["properties"].items():
            for schema in (field, *field.get("anyOf", ())):
                if schema.get("type") == "integer":
                    assert -(2**63) <= schema["minimum"] <= schema["maximum"] < 2**63, (body, name)
                if schema.get("type") == "string" and "const" not in schema:
                    assert "pattern" in schema or "enum" in schema, (body, name)
                assert schema.get("type") != "number", (body, name)


def test_ids_of_outputs_are_derived_and_never_change() -> None:
    derived = derived_id("0190a1b2-c3d4-7e5f-8a6b-0123456789ab", "decided")
    assert derived == "81c85ed6-8654-546d-8ab6-295f686943fa"
    assert derived != derived_id("0190a1b2-c3d4-7e5f-8a6b-0123456789ab", "enqueued")


def test_ids_of_producers_are_uuid7_and_sort_by_time() -> None:
    ids = [uuid7(now_ms) for now_ms in (1_772_357_400_250, 1_772_357_400_251, 2_000_000_000_000)]
    assert ids == sorted(ids)
    for made in ids:
        parsed = uuid.UUID(made)
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert str(parsed) == made
    assert uuid.UUID(ids[0]).int >> 80 == 1_772_357_400_250


def test_ids_of_one_millisecond_ascend_and_cannot_be_guessed() -> None:
    ids = [uuid.UUID(uuid7(1_772_357_400_250)) for _ in range(10_000)]
    assert ids == sorted(set(ids))
    assert {(made.version, made.variant, made.int >> 80) for made in ids} == {(7, uuid.RFC_4122, 1_772_357_400_250)}
    steps = {later.int - earlier.int for earlier, later in itertools.pairwise(ids)}
    assert len(steps) > 9_990
    assert uuid.UUID(uuid7(1_772_357_400_249)).int >> 80 == 1_772_357_400_249, "the time is the caller's"


def test_a_state_value_starts_with_its_format() -> None:
    codec = StateCodec({"clock": FoldClock})
    stored = codec.encode(FoldClock(7))
    assert stored[0] == FoldClock.FORMAT == 1
    assert codec.decode(CLOCK_KEY, stored) == FoldClock(7)
    with pytest.raises(StateError, match="stored format 9"):
        codec.decode(CLOCK_KEY, b"\x09" + stored[1:])


def test_every_kind_of_state_has_a_format_that_fits_a_byte() -> None:
    for prefix, kind in {"clock": FoldClock, **Admission.kinds}.items():
        assert 1 <= kind.FORMAT <= 255, prefix
        assert "/" not in prefix


def test_a_body_costs_a_struct_at_run_time() -> None:
    assert issubclass(JobRequested, msgspec.Struct)  # type: ignore[arg-type]


async def test_fausts_own_version_is_never_raised() -> None:
    """It is part of the group's name: another one would abandon the group and the state."""
    app = fold_app("admission", Settings(), TOPOLOGY)
    assert app.conf.version == 1
    assert app.conf.id == "settler.admission"
