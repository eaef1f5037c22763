"""The topology: the file that is shipped is sound, its roles are the ones that run, and a wrong file is refused."""

from __future__ import annotations

import re

import pytest
import yaml

from settler_streams.errors import ConfigurationError
from settler_streams.events import REGISTRY
from settler_streams.published import TOPOLOGY
from settler_streams.runtime.session import LOAD_DEADLINE_S
from settler_streams.tiers import load_tiers
from settler_streams.topology import FOREVER_MS, full_name, load_topology
from settler_streams.workers.folds import FOLDS, PROJECTIONS

SHIPPED = load_topology()
DAY_MS = 86_400_000


def test_every_fold_that_is_declared_runs_and_the_other_way_round():
    assert {fold.role for fold in SHIPPED.folds} == set(FOLDS)
    assert set(PROJECTIONS) <= {projection.role for projection in SHIPPED.projections}


def test_every_event_type_that_travels_has_exactly_one_kind_of_topic():
    carried = {event for topic in SHIPPED.topics for event in topic.events}
    journal = {"settler.fold.journal.v1"}
    assert carried | journal == set(REGISTRY)


@pytest.mark.parametrize("topic", SHIPPED.topics, ids=lambda topic: topic.name)
def test_each_topic_has_writers_and_readers(topic):
    assert topic.writers
    assert topic.readers
    assert topic.retention_ms == FOREVER_MS or topic.retention_ms >= DAY_MS
    assert topic.cleanup != "compact" or topic.key == "state", "compaction needs a key that names the state"


def test_admission_has_its_requests_from_one_topic():
    """Their offsets name what it stores of open jobs."""
    inputs = SHIPPED.fold("admission").inputs
    assert [name for name in inputs if "settler.job.requested.v1" in SHIPPED.topic(name).events] == ["job-requests"]


def test_decisions_results_and_dispatches_have_one_writer():
    for name in ("job-decisions", "job-results", "job-dispatches", "flag-changes", "flag-state"):
        assert len(SHIPPED.topic(name).writers) == 1, name


def test_a_tick_is_written_by_the_fold_that_reads_it():
    for fold in SHIPPED.folds:
        if fold.tick is not None:
            assert "settler.clock.tick.v1" in SHIPPED.topic(fold.tick).events
            assert fold.role in SHIPPED.topic(fold.tick).writers


def test_what_the_broker_gets():
    declared = {one.topic: one for one in SHIPPED.declared("demo")}
    assert len(declared) == len(SHIPPED.topics) + 2 * len(SHIPPED.folds)
    requests = declared[full_name("demo", "job-requests")]
    assert requests.partitions == SHIPPED.tenant_partitions
    assert requests.config["message.timestamp.type"] == "LogAppendTime"
    assert int(requests.config["max.message.bytes"]) == 2 * SHIPPED.topic("job-requests").max_message_bytes
    changelog = declared["demo.admission-changelog"]
    assert changelog.config["cleanup.policy"] == "compact"
    assert "retention.ms" not in changelog.config
    assert int(changelog.config["segment.bytes"]) < 2**27, "the newest segment is never compacted"
    assert int(changelog.config["max.compaction.lag.ms"]) <= DAY_MS // 24
    assert declared["demo.tenant-changes"].config["retention.ms"] == "-1"
    assert declared["demo.scheduler-journal"].partitions == SHIPPED.worker_pools


def test_no_load_of_state_outlasts_the_tombstones():
    compacted = [one for one in SHIPPED.declared("demo") if "compact" in one.config["cleanup.policy"]]
    assert {one.topic for one in compacted} >= {full_name("demo", fold.changelog) for fold in SHIPPED.folds}
    for one in compacted:
        assert int(one.config["delete.retention.ms"]) >= 2_000 * LOAD_DEADLINE_S


def test_a_dead_letter_has_room_for_any_record():
    room = SHIPPED.topic("dead-letters").max_message_bytes
    assert all(2 * topic.max_message_bytes <= room for topic in SHIPPED.topics if topic.name != "dead-letters")


def test_unknown_names_are_key_errors():
    for look_up in (SHIPPED.topic, SHIPPED.fold, SHIPPED.projection, SHIPPED.partitions):
        with pytest.raises(KeyError, match="nowhere"):
            look_up("nowhere")


@pytest.mark.parametrize(
    ("duration", "ms"), [("1s", 1_000), ("90m", 5_400_000), ("12h", DAY_MS // 2), ("7d", 7 * DAY_MS), ("forever", -1)]
)
def test_durations(tmp_path, duration, ms):
    path = changed(tmp_path, lambda document: document["topics"][0].update(retention=duration))
    assert load_topology(path).topics[0].retention_ms == ms


def changed(tmp_path, change):
    document = yaml.safe_load((TOPOLOGY / "topics.yaml").read_text(encoding="utf-8"))
    change(document)
    path = tmp_path / "topics.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def fold_of(document, role):
    return next(fold for fold in document["folds"] if fold["role"] == role)


def topic_of(document, name):
    return next(topic for topic in document["topics"] if topic["name"] == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["topics"].append(d["topics"][0]), "declared twice"),
        (lambda d: d["topics"][0].update(events=["settler.nothing.v1"]), "no such event types"),
        (lambda d: d["topics"][0].update(retention="7 days"), "a duration such as"),
        (lambda d: d["topics"][0].update(partitions=0), "partitions"),
        (lambda d: d["topics"][0].update(name="Job_Requests"), "name"),
        (lambda d: d["topics"][0].update(colour="red"), "colour"),
        (lambda d: fold_of(d, "admission").update(inputs=["job-requests", "nowhere"]), "nowhere"),
        (lambda d: fold_of(d, "admission")["inputs"].append("pool-inputs"), "does not name it as a reader"),
        (lambda d: topic_of(d, "clock-ticks").update(partitions=3), "differ in partition count"),
        (lambda d: fold_of(d, "flags").update(tick="clock-ticks"), "tick topic"),
        (lambda d: topic_of(d, "pool-inputs").update(writers=["admission"]), "tick topic"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d.update(tenant_partitions=0), "tenant_partitions"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_and_says_where(tmp_path, change, message):
    path = changed(tmp_path, change)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_topology(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", [None, "a: [", "", "42"])
@pytest.mark.parametrize("load", [load_topology, load_tiers])
def test_a_file_that_is_missing_or_no_yaml_is_refused(tmp_path, text, load):
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=re.escape(str(path))):
        load(path)
