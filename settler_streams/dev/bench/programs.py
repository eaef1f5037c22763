"""The programs that are compared: their processes, and where each reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.dev.bench import admission_worker, ceiling, stock_faust
from settler_streams.dev.bench.ground import Ground
from settler_streams.dev.stack import ChildProcess
from settler_streams.settings import Settings

Name = Literal["stock_faust", "ceiling", "pipeline"]
MODULES: dict[Name, str] = {
    "stock_faust": stock_faust.__name__,
    "ceiling": ceiling.__name__,
    "pipeline": admission_worker.__name__,
}
GROUPS: dict[Name, str] = {"stock_faust": stock_faust.GROUP, "ceiling": ceiling.GROUP, "pipeline": "admission"}
INPUTS: dict[Name, str] = {"stock_faust": "requests", "ceiling": "requests", "pipeline": "job-requests"}
OUTPUTS: dict[Name, str] = {"stock_faust": "outputs", "ceiling": "outputs", "pipeline": "job-decisions"}


@dataclass(frozen=True, slots=True)
class Program:
    """One of the programs, under a deployment name of its own."""

    name: Name
    settings: Settings
    """``settings.deployment`` is the run's own: nothing else has its topics and groups."""
    partitions: int
    workers: int = 1

    @property
    def cluster(self) -> Cluster:
        """The broker that it works on."""
        return Cluster.of(self.settings)

    @property
    def group(self) -> str:
        """The consumer group that commits its positions."""
        return f"{self.settings.deployment}.{GROUPS[self.name]}"

    @property
    def input_topic(self) -> str:
        """Where requests come from."""
        return f"{self.settings.deployment}.{INPUTS[self.name]}"

    @property
    def output_topic(self) -> str:
        """Where exactly one record per request goes."""
        return f"{self.settings.deployment}.{OUTPUTS[self.name]}"

    def processes(self, ground: Ground) -> list[ChildProcess]:
        """Its processes, not started yet."""
        module = MODULES[self.name]
        return [ground.process(self.settings, f"worker-{number}", module) for number in range(self.workers)]
