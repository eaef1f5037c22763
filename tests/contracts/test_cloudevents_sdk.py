"""The official CloudEvents SDK and this package read each other's events (JSON, structured mode)."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_structured, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from settler_streams.events import CONTENT_TYPE, UsageRecorded, decode, encode
from settler_streams.published import SCHEMAS

if TYPE_CHECKING:
    from pathlib import Path

ID = "0190a1b2-c3d4-7e5f-8a6b-0123456789ac"
TENANT = "0190a1b2-0000-7000-8000-0000000000a1"


@pytest.mark.parametrize("path", sorted((SCHEMAS / "examples").glob("*/valid-*.json")), ids=lambda p: p.stem)
def test_the_sdk_reads_our_events(path: Path) -> None:
    ours = decode(path.read_bytes())
    headers = {"content-type": CONTENT_TYPE.encode()}
    theirs = from_structured(KafkaMessage(headers, None, encode(ours)), JSONFormat(), CloudEvent)
    assert theirs.get_type() == ours.type
    assert theirs.get_id() == ours.id
    assert theirs.get_source() == ours.source
    assert theirs.get_subject() == ours.subject
    assert theirs.get_time() == ours.time
    assert theirs.get_extension("tenantid") == ours.tenantid
    assert theirs.get_data() == json.loads(encode(ours))["data"]


def test_we_read_the_sdks_events() -> None:
    moment = dt.datetime(2026, 3, 1, 10, 30, tzinfo=dt.timezone(dt.timedelta(hours=1)))
    attributes = {
        "type": "settler.usage.recorded.v1", "source": "/billing", "id": ID, "specversion": "1.0", "time": moment,
        "tenantid": TENANT, "datacontenttype": "application/json", "partitionkey": TENANT, "subject": "march",
    }  # fmt: skip
    theirs = CloudEvent(attributes, {"resource": "requests", "quantity": 3})
    message = to_structured(theirs, JSONFormat())
    assert message.headers["content-type"].startswith(b"application/cloudevents+json")
    ours = decode(message.value)
    assert (ours.type, ours.id, ours.source, ours.subject) == ("settler.usage.recorded.v1", ID, "/billing", "march")
    assert ours.tenantid == TENANT
    assert ours.time == moment
    assert ours.data == UsageRecorded(resource="requests", quantity=3)  # type: ignore[arg-type]
