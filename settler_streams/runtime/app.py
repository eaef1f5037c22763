"""A Faust app per role, and an agent per app that receives batches."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import faust
from aiokafka.errors import KafkaError
from faust.app.base import BootStrategy
from faust.exceptions import ConsumerNotStarted
from faust.tables.manager import TableManager
from mode.supervisors import CrashingSupervisor

from settler_streams.adapters.kafka.broker import require
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.core.fold import Value
from settler_streams.errors import UnavailableError
from settler_streams.runtime.batch import Batch
from settler_streams.runtime.state import Overlay
from settler_streams.runtime.table import FoldTable
from settler_streams.runtime.ticker import Ticker
from settler_streams.runtime.watchdog import Standing, Watchdog

BatchAgent = Callable[[Any], Awaitable[None]]


class BatchSchema(faust.Schema):
    """Hands a batch on as it is: decoding belongs to the step, where a bad record becomes a dead letter."""

    def compile(self, app: Any, **_kwargs: Any) -> Any:
        """Faust's hook: the function that turns a message into an event."""

        async def decode(message: Any, *, propagate: bool = False) -> Any:  # noqa: ARG001 - Faust's signature
            return app.create_event(None, message.value, {}, message)

        return decode


class FoldTables(TableManager):
    """Replaces Faust's recovery: each fold's session loads its own state before its first step."""

    async def on_start(self) -> None:
        """Nothing is recovered up front."""
        self._tables_finalized.set()
        for table in self.values():
            await table.maybe_start()
        self._tables_registered.set()

    async def wait_until_recovery_completed(self) -> bool:
        """Folds recover one by one, each when it is assigned."""
        return False

    def on_partitions_revoked(self, _revoked: Any) -> None:
        """The consumer drops sessions when it knows the new assignment; a fold that stays keeps its own."""

    async def on_rebalance(self, assigned: Any, _revoked: Any, _newly_assigned: Any, _generation_id: int = 0) -> None:
        """Hand the assignment to the folds and let the flow go on."""
        app = self.app
        await app.consumer.assign_folds(assigned)
        app.consumer.resume_partitions(assigned)
        app.flow_control.resume()
        app.consumer.resume_flow()
        app.on_rebalance_end()
        await app._fetcher.maybe_start()  # noqa: SLF001 - as Faust's own recovery does

    async def on_stop(self) -> None:
        """Stop fetching."""
        await self.app._fetcher.stop()  # noqa: SLF001
        for table in self.values():
            await table.stop()


class FoldBoot(BootStrategy):
    """Starts no producer beside the consumer: each session has its own."""

    enable_kafka_producer = False


class FoldApp(faust.App):
    """The Faust app of one role. ``failure`` resolves with the reason when anything in it crashes."""

    BootStrategy = FoldBoot

    def __init__(
        self,
        role: str,
        group: str,
        *,
        cluster: Cluster,
        input_topics: tuple[str, ...],
        partitions: int,
        new_session: Callable[[int], Any],
        output_topics: Mapping[str, int] | None = None,
        gather_s: float = 0.0,
    ) -> None:
        brokers = ";".join(f"settler://{server}" for server in cluster.servers.split(","))
        super().__init__(
            group,
            broker=brokers,
            TableManager=FoldTables,
            autodiscover=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            web_enabled=False,
            datadir=tempfile.gettempdir(),
            table_standby_replicas=0,
            stream_wait_empty=True,
            broker_session_timeout=10.0,
            broker_heartbeat_interval=3.0,
            broker_request_timeout=30.0,
            broker_max_poll_interval=300.0,
        )
        self.role = role
        self.input_topics = input_topics
        self.partitions = partitions
        self.output_topics = output_topics or {}
        """Topics that must exist beside the inputs, with their partition counts."""
        self.cluster = cluster
        self.gather_s = gather_s
        """How long a small batch waits for its step."""
        self.new_session = new_session
        self.ticker: Ticker | None = None
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def on_start(self) -> None:
        """Refuse to start on topics that are missing or of another size: the group would leave folds out silently.

        Raises:
            ConfigurationError: names each such topic.
            UnavailableError: Kafka did not answer.
        """
        wanted = {**self.output_topics, **dict.fromkeys(self.input_topics, self.partitions)}
        async with self.cluster.admin() as client:
            await require(client, wanted)
        await super().on_start()
        self.add_future(Watchdog(self).run())

    def batch_agent(self, agent: BatchAgent) -> Any:
        """Register ``agent`` on the role's inputs. Batches of different folds reach it side by side.

        An exception in it stops the worker: no supervisor restarts it past a record. There are as many of the agent as
        folds; a fold never has two batches under way, so its records stay in order whoever takes them.
        """
        topic = self.topic(*self.input_topics, acks=False, internal=False, schema=BatchSchema())
        return self.agent(topic, concurrency=self.partitions, supervisor_strategy=CrashingSupervisor)(agent)

    def fold_table(self, changelog: str, kinds: Mapping[str, type[Value]]) -> FoldTable:
        """Register the role's state as a table, under the role's name. ``changelog`` is the topic's full name."""
        table = FoldTable(
            self, name=self.role, changelog=changelog, partitions=self.partitions, kinds=kinds,
            open_states=self._open_states,
        )  # fmt: skip
        self.tables.add(table)
        return table

    def _open_states(self) -> Mapping[int, Overlay]:
        consumer = self._consumer
        return consumer.open_states() if consumer is not None else {}

    async def standings(self) -> Mapping[int, Standing]:
        """Where each fold of this worker stands, by partition number; see the consumer's.

        Raises:
            UnavailableError: the broker did not answer, or nobody is there to ask it.
        """
        try:
            standings: Mapping[int, Standing] = await self.consumer.standings()
        except (KafkaError, ConsumerNotStarted) as error:
            raise UnavailableError(f"{self.conf.id}: {error!r}") from error
        return standings

    def open_folds(self) -> list[int]:
        """The partition numbers whose sessions are open in this process."""
        consumer = self._consumer
        return consumer.open_folds() if consumer is not None else []

    def clocks(self) -> Mapping[int, int]:
        """The ``now`` of each such fold, in milliseconds, as it has committed it."""
        consumer = self._consumer
        return consumer.clocks() if consumer is not None else {}

    def fail(self, reason: BaseException) -> None:
        """Something met an error that nobody may pass over: the worker has to stop."""
        if not self.failure.done():
            self.failure.set_result(reason)

    def _crash(self, reason: BaseException) -> None:
        super()._crash(reason)
        self.fail(reason)


Batches = Any
"""What an agent iterates over: a Faust stream of :class:`Batch`."""

__all__ = ["Batch", "Batches", "FoldApp"]
