"""Kafka, PostgreSQL and Valkey as child processes, from wheels and Maven Central, on loopback alone."""

from __future__ import annotations

from settler_streams.dev.stack.process import ChildProcess, ProcessRef
from settler_streams.dev.stack.stack import EmbeddedStack, PartName, PartStatus

__all__ = ["ChildProcess", "EmbeddedStack", "PartName", "PartStatus", "ProcessRef"]
