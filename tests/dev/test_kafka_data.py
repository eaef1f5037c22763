"""Data that a later Kafka has written is refused before a broker fails on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from settler_streams.dev.stack.jvm import KAFKA_VERSION
from settler_streams.dev.stack.kafka import Kafka
from settler_streams.errors import ConfigurationError


def kafka_over(home: Path, formatted_by: str | None) -> Kafka:
    kafka = Kafka(home, 1, 2)
    kafka.data.mkdir(parents=True)
    if formatted_by is not None:
        (kafka.data / "formatted-by").write_text(formatted_by)
    return kafka


@pytest.mark.parametrize("formatted_by", [KAFKA_VERSION, "4.0.0", "3.9.1"])
def test_data_of_this_or_an_older_kafka_is_taken(tmp_path: Path, formatted_by: str) -> None:
    kafka_over(tmp_path, formatted_by).prepare()
    assert (tmp_path / "server.properties").exists()


@pytest.mark.parametrize("formatted_by", ["4.3.0", "4.10.0", "5.0.0", None])
def test_data_of_a_later_kafka_or_of_one_unknown_is_refused(tmp_path: Path, formatted_by: str | None) -> None:
    kafka = kafka_over(tmp_path, formatted_by)
    with pytest.raises(ConfigurationError, match="cannot read; `settler down --delete`"):
        kafka.prepare()
    assert kafka.data.exists()
    assert not (tmp_path / "server.properties").exists()
