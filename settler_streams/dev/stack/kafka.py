"""One Kafka node, broker and controller at once (KRaft), from Maven Central's jars."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from typing import TYPE_CHECKING

from settler_streams.dev.stack.jvm import KAFKA_VERSION, Runtime
from settler_streams.dev.stack.part import HOST, Part
from settler_streams.dev.stack.probes import kafka_answers
from settler_streams.dev.stack.state import write_private
from settler_streams.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

HEAP_MB_MAX = 768
"""Ample for the topics of one deployment: the live set after a full test run is under 150 MB."""

FORMAT_S_MAX = 60.0
"""Formatting takes a second; a machine with all cores busy may need many times that."""

_FORMATTED_BY = "formatted-by"
"""In the data directory: the version of Kafka that made it."""

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers={host}:{controller_port}
controller.listener.names=CONTROLLER
listeners=CLIENT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=CLIENT://{host}:{port}
inter.broker.listener.name=CLIENT
listener.security.protocol.map=CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
message.max.bytes=1048588
offsets.topic.replication.factor=1
offsets.topic.num.partitions=8
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=8
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
# After a crash the node takes up its leaderships, loses them once its former registration has lapsed, and gets them
# anew. A group coordinator that still loads then is taken for loaded when it is not (docs/guarantees.md, "Under
# faults"): so loading is kept short, by segments small enough to be compacted, and the lapse late.
offsets.topic.segment.bytes=1048576
transaction.state.log.segment.bytes=1048576
broker.session.timeout.ms=9000
broker.heartbeat.interval.ms=500
# The cleaner allocates this at its start: 16 MiB hold 700,000 keys a pass; the default is a sixth of the heap.
log.cleaner.dedupe.buffer.size=16777216
"""


class Kafka(Part):
    """A single node on loopback, without authentication; topics are created by administration only.

    Args:
        home: the part's folder.
        port: for clients, on 127.0.0.1.
        controller_port: for the node's own controller, on 127.0.0.1.
        runtime: the Java runtime and jars.
    """

    name = "kafka"
    ready_s_max = 90.0  # 1 to 3 s; after a crash it first checks every open segment
    stop_s_max = 60.0  # 0.3 s; the run that records the start-up archive writes it at its end, in 6 s on two idle cores

    def __init__(self, home: Path, port: int, controller_port: int, *, runtime: Runtime | None = None) -> None:
        super().__init__(home, port)
        self.controller_port = controller_port
        self.runtime = runtime or Runtime()

    @property
    def executable(self) -> Path:
        return self.runtime.java

    @property
    def ports(self) -> tuple[int, ...]:
        return (self.port, self.controller_port)

    @property
    def data(self) -> Path:
        """The log directory of the broker and its metadata."""
        return self.home / "data"

    @property
    def _properties(self) -> Path:
        return self.home / "server.properties"

    @property
    def _recording(self) -> Path:
        return self.home / "startup.aot"

    def prepare(self) -> None:
        if not self.data.exists():
            self._format()
        self._refuse_later_data()
        write_private(self._properties, self.properties(self.data))

    def command(self) -> list[str]:
        return self._java("kafka.Kafka", str(self._properties), options=self.runtime.archive_options(self._recording))

    def answers(self) -> bool:
        return kafka_answers(HOST, self.port, self._cluster_id())

    def stop(self) -> None:
        """End it in order; keep the start-up archive that this run has recorded, if it did."""
        if self._process is None:
            return
        in_order = self._process.stop(deadline_s=self.stop_s_max, signum=self.stop_signal)
        if in_order and "AOTCache creation is complete" in self._process.log_tail():
            self.runtime.keep_archive(self._recording)
        self._recording.unlink(missing_ok=True)

    def format_options(self) -> list[str]:
        """What formatting is told beside the cluster's id, such as first users."""
        return []

    def _cluster_id(self) -> str | None:
        """What formatting wrote down."""
        lines = (self.data / "meta.properties").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line).get("cluster.id")

    def _refuse_later_data(self) -> None:
        """A broker reads what an older one has written; what a later one has written ends it with a Java trace.

        Raises:
            ConfigurationError: the data was written by a later Kafka, or by one that left no note of its version.
        """
        try:
            version = (self.data / _FORMATTED_BY).read_text(encoding="utf-8")
        except FileNotFoundError:
            version = "4.3.1"  # what there was before versions were noted
        if _comparable(version) > _comparable(KAFKA_VERSION):
            raise ConfigurationError(
                f"the data in {self.data} was written by Kafka {version}, which {KAFKA_VERSION} cannot read; "
                "`settler down --delete` deletes the local system's data, and the next start begins anew"
            )

    def _format(self) -> None:
        """Format beside the final place; a crash half-way leaves nothing that looks formatted."""
        fresh = self.home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        properties = self.home / "format.properties"
        write_private(properties, self.properties(fresh))
        cluster_id = "S" + secrets.token_urlsafe(16)[1:]  # 16 bytes in base64; a leading '-' would look like an option
        command = self._java(
            "kafka.tools.StorageTool", "format", "--standalone", "-t", cluster_id, "-c", str(properties),
            *self.format_options(), options=self.runtime.archive_options(None),
        )  # fmt: skip
        try:
            done = subprocess.run(  # noqa: S603 - the command is ours, and no shell reads it
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self.home,
                env=self.environ,
                timeout=FORMAT_S_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"formatting Kafka's storage took longer than {FORMAT_S_MAX:g} s") from error
        if done.returncode != 0:
            raise UnavailableError(f"formatting Kafka's storage failed: {done.stdout.decode(errors='replace')}")
        properties.unlink()
        (fresh / _FORMATTED_BY).write_text(KAFKA_VERSION, encoding="utf-8")
        fresh.rename(self.data)

    def properties(self, data: Path) -> bytes:
        """The broker's configuration, with ``data`` as its log directory."""
        return _PROPERTIES.format(host=HOST, port=self.port, controller_port=self.controller_port, data=data).encode()

    def _java(self, main_class: str, *arguments: str, options: list[str]) -> list[str]:
        return [
            str(self.executable),
            f"-Xmx{HEAP_MB_MAX}m",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Djava.awt.headless=true",
            # The quick compiler alone: for the first 100,000 records, in 2,000 transactions, the broker took 10.7 s
            # of processor time and 280 MB; with the optimising compiler beside it, 16.8 s and 450 MB.
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",  # would leave a file in the shared temporary folder
            *options,
            "-cp",
            self.runtime.class_path(),
            main_class,
            *arguments,
        ]


def _comparable(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
