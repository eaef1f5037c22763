"""A Faust transport driver that hands whole batches of a fold to its agent.

Registered under Faust's entry-point group ``faust.transports`` as ``settler``: an app whose broker is
``settler://host:port`` uses it. Faust keeps the group membership, the assignment, the flow control and the agents;
what it does per message (offset bookkeeping, acknowledgement, commit) is replaced by the step, which commits the
offsets of a batch in the same Kafka transaction as its outputs and its state.

What is overridden, and why:

===========================  ========================================================================================
``_drain_messages``          reads nothing: one :class:`FoldRunner` per assigned fold does, batch by batch, from a
                             consumer of its own; says that the member is alive
``_heed_the_group``          (added) fails of what keeps the member out of its group, which nobody's poll would hear of
``commit``, ``ack``          do nothing: offsets are committed by the step, in its transaction
``wait_empty``               before a rebalance and at shutdown, waits for the steps under way and for nothing else
``_create_worker_consumer``  a member of the group that reads nothing and never resets an offset; always uses the
                             co-partitioned assignor
``RebalanceListener``        pauses what is assigned before the client can ask for it
===========================  ========================================================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import aiokafka
import structlog
from aiokafka.errors import KafkaConnectionError
from aiokafka.structs import TopicPartition
from faust.exceptions import ConsumerNotStarted
from faust.transport.drivers import aiokafka as stock
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from mode import Service

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.errors import ConfigurationError, UnavailableError
from settler_streams.runtime.batch import Batch
from settler_streams.runtime.runner import FoldRunner
from settler_streams.runtime.state import Overlay
from settler_streams.runtime.watchdog import Standing

log = structlog.get_logger(__name__)

ALIVE_INTERVAL_S = 1.0
"""Far below any poll interval, and one call to another thread per second."""
DRAIN_DEADLINE_S = 10.0
"""Longest wait for steps under way when partitions are taken away; a longer one is fenced by its successor."""

T = TypeVar("T")


class ConsumerThread(stock.AIOKafkaConsumerThread):
    """The stock consumer thread, with a consumer configured for transactions."""

    def _create_worker_consumer(self, _transport: Any) -> aiokafka.AIOKafkaConsumer:
        conf = self.app.conf
        self._assignor = self.app.assignor
        consumer: aiokafka.AIOKafkaConsumer = self.app.cluster.consumer(
            client_id=conf.broker_client_id,
            group_id=conf.id,
            partition_assignment_strategy=[self._assignor],
            enable_auto_commit=False,
            auto_offset_reset="none",
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
            session_timeout_ms=int(conf.broker_session_timeout * 1000),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000),
            max_poll_interval_ms=int(conf.broker_max_poll_interval * 1000),
            metadata_max_age_ms=30_000,
        )
        return consumer

    async def on_start(self) -> None:
        """Faust's hook.

        Raises:
            UnavailableError: Kafka does not answer, which it did a moment ago, when the app looked at its topics.
        """
        try:
            await super().on_start()
        except KafkaConnectionError as error:
            raise UnavailableError(f"Kafka at {self.app.cluster.servers} did not answer: {error!r}") from error

    async def in_thread(self, work: Callable[[aiokafka.AIOKafkaConsumer], Coroutine[Any, Any, T]]) -> T:
        """Run ``work`` on the consumer, in the thread that owns it.

        Raises:
            UnavailableError: the thread has ended.
        """
        running = work(self._ensure_consumer())
        try:
            future = asyncio.run_coroutine_threadsafe(running, self.thread_loop)
        except RuntimeError as error:
            running.close()
            raise UnavailableError("the consumer's thread has ended") from error
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise UnavailableError("the consumer's thread has ended") from None  # and took the work with it


class RebalanceListener(stock.ConsumerRebalanceListener):
    """The stock listener, for a consumer that is a member and reads nothing: each fold has a reader of its own."""

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Aiokafka's hook."""
        assigned = list(assigned)
        self._thread._ensure_consumer().pause(*assigned)  # noqa: SLF001
        await super().on_partitions_assigned(assigned)


class Consumer(stock.Consumer):
    """Runs the folds that are assigned to this member."""

    RebalanceListener = RebalanceListener

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._runners: dict[int, FoldRunner] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @Service.task
    async def _heed_the_group(self) -> None:
        """Ask aiokafka what keeps this member out of its group, such as the want of a right, and fail of it.

        Aiokafka tells it to the next poll, stays out until then, and here nobody polls. A worker without folds that
        waits in vain looks like a spare one.
        """

        async def check(consumer: aiokafka.AIOKafkaConsumer) -> None:
            if consumer._coordinator is not None:  # noqa: SLF001 - it has started
                consumer._coordinator.check_errors()  # noqa: SLF001 - what `getmany` does first

        while not self.should_stop:
            await self.sleep(ALIVE_INTERVAL_S)
            try:
                await self._thread.in_thread(check)
            except ConsumerNotStarted:
                continue
            except UnavailableError:
                if self.should_stop or self._thread.should_stop:  # the process ends, and the thread was first
                    return
                raise

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def is_assigned(self, partition: int) -> bool:
        """Whether Kafka, asked now, still counts this member as the owner of the fold.

        What the member itself believes is not enough: one that was frozen opens a fold that has long had a new owner.
        """

        assigned: bool = await self._thread.in_thread(lambda consumer: self._is_assigned(consumer, partition))
        return assigned

    async def _is_assigned(self, consumer: aiokafka.AIOKafkaConsumer, partition: int) -> bool:
        coordinator = consumer._coordinator  # noqa: SLF001 - no public door to a heartbeat
        alive = await coordinator._do_heartbeat()  # noqa: SLF001
        current = alive and not coordinator._rejoin_needed_fut.done()  # noqa: SLF001 - a newer generation forms
        return current and all(
            TopicPartition(topic, partition) in consumer.assignment() for topic in self.app.input_topics
        )

    async def standings(self) -> dict[int, Standing]:
        """Where each fold stands, by partition number.

        Raises:
            KafkaError, UnavailableError: the broker did not answer; it is asked even where no fold is assigned.
            ConsumerNotStarted: there is no consumer yet.
        """

        async def answers(consumer: aiokafka.AIOKafkaConsumer) -> None:
            if consumer._fetcher is None:  # noqa: SLF001 - constructed, and still on its way to the broker
                raise ConsumerNotStarted
            await consumer.end_offsets([TopicPartition(self.app.input_topics[0], 0)])

        await self._thread.in_thread(answers)
        runners = list(self._runners.values())
        standings = await asyncio.gather(*(runner.standing() for runner in runners))
        return {runner.partition: standing for runner, standing in zip(runners, standings, strict=True)}

    async def assign_folds(self, assigned: Iterable[TP]) -> None:
        """Drop the folds that are gone, keep those that stay (their epoch is still valid), start the new ones."""
        partitions = self._partitions_of(assigned)
        await asyncio.gather(*(self._drop(partition) for partition in set(self._runners) - partitions))
        for partition in sorted(partitions - set(self._runners)):
            session = self.app.new_session(partition)
            runner = self._runners[partition] = FoldRunner(
                partition, session, self.is_assigned, self._deliver, self.app.gather_s
            )
            task = self._tasks[partition] = asyncio.create_task(runner.run())
            task.add_done_callback(self._on_runner_done)
        for runner in self._runners.values():
            runner.resume()
        log.info("folds assigned", app=self.app.conf.id, folds=sorted(partitions))

    def open_folds(self) -> list[int]:
        """Partition numbers of the folds that are ready for records."""
        return [partition for partition, runner in self._runners.items() if runner.opened]

    def clocks(self) -> dict[int, int]:
        """The ``now`` of each such fold, by partition number."""
        return {partition: runner.session.now_ms for partition, runner in self._runners.items() if runner.opened}

    def open_states(self) -> dict[int, Overlay]:
        """The state of each such fold, by partition number."""
        return {partition: runner.session.state for partition, runner in self._runners.items() if runner.opened}

    def _partitions_of(self, assigned: Iterable[TP]) -> set[int]:
        """The fold numbers of an assignment; each must come with all of its inputs, or decisions would be split."""
        wanted = set(self.app.input_topics)
        topics: dict[int, set[str]] = {}
        for tp in assigned:
            topics.setdefault(tp.partition, set()).add(tp.topic)
        for partition, got in topics.items():
            if got != wanted:
                raise ConfigurationError(
                    f"{self.app.conf.id}: partition {partition} was assigned without {sorted(wanted - got)}; "
                    "the inputs of a fold must exist, have equal partition counts and be assigned together"
                )
        return set(topics)

    async def _deliver(self, batch: Batch) -> None:
        """Put a batch on its agent's channel, as the value of one Faust message."""
        tp = TP(self.app.input_topics[0], batch.partition)
        message = ConsumerMessage(
            tp.topic, tp.partition, 0, 0.0, 0, (), None, batch, None, 0, 0, tp,
            generation_id=self.app.consumer_generation_id,
        )  # fmt: skip
        await self.callback(message)

    async def _drain_messages(self, fetcher: Any) -> None:
        """The runners fetch for themselves; Faust's fetcher only has to stay up until it is told to stop.

        Meanwhile it says that this process is alive, on behalf of all folds and of members that have none: aiokafka
        leaves the group, for good, when nothing was polled through its public door for ``broker_max_poll_interval``.
        """

        async def alive(consumer: aiokafka.AIOKafkaConsumer) -> None:
            with consumer._subscription.fetch_context():  # noqa: SLF001 - what `getmany` does around a poll
                pass

        while True:
            try:
                async with asyncio.timeout(ALIVE_INTERVAL_S):
                    await fetcher._stopped.wait()  # noqa: SLF001
                    return
            except TimeoutError:
                try:
                    await self._thread.in_thread(alive)
                except UnavailableError:
                    if self._thread.should_stop:  # the process ends, and the thread was first
                        return
                    raise
                except asyncio.CancelledError:
                    if fetcher.should_stop:  # by its stop, which Faust would take for a crash while it rebalances
                        return
                    raise

    def _on_runner_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.app.fail(error)

    async def _drop(self, partition: int) -> None:
        runner = self._runners.pop(partition)
        runner.give_up()  # the end of a rebalance may have let the flow go on after a stop had paused it
        if (task := self._tasks.pop(partition, None)) is not None:
            task.cancel()
            await asyncio.wait([task])
        await runner.session.close()
        METRICS.fold_closed(self.app.role, self.app.input_topics, partition)

    async def wait_empty(self) -> None:
        """Wait for the steps under way; a batch that no agent has begun is given up and will be read again.

        A session that has not taken its fold yet is dropped: it could do so after the fold has got its next owner. It
        is opened anew if the fold stays here.
        """
        untaken = [partition for partition, runner in self._runners.items() if not runner.session.taken]
        try:
            async with asyncio.timeout(DRAIN_DEADLINE_S):
                # Together: what takes long to drop keeps no other fold from pausing before the deadline.
                taken = [runner for runner in self._runners.values() if runner.session.taken]
                await asyncio.gather(*map(self._drop, untaken), *(runner.pause() for runner in taken))
        except TimeoutError:
            log.exception("a step outlasts the drain deadline", app=self.app.conf.id, deadline_s=DRAIN_DEADLINE_S)

    async def on_stop(self) -> None:
        """Finish the steps under way and give every fold back."""
        await self.wait_empty()
        await asyncio.gather(*(self._drop(partition) for partition in list(self._runners)))
        transport: Any = self.transport
        transport._topic_waiters.clear()  # noqa: SLF001 - what the stock consumer does on stop

    async def commit(self, *_args: Any, **_kwargs: Any) -> bool:
        """Nothing to do: the step commits its offsets in its own transaction."""
        return False

    def ack(self, _message: Any) -> bool:
        """Nothing to do: a batch is acknowledged by its commit."""
        return False

    def verify_event_path(self, _now: float, _tp: TP) -> None:
        """Faust's per-message liveness check does not apply to batches."""


class Transport(stock.Transport):
    """The driver: stock aiokafka transport with the consumer above."""

    Consumer = Consumer
    driver_version = f"settler-{stock.Transport.driver_version}"
