"""Program (a): what one writes with Faust as it is shipped. JSON in, a count per tenant in a table, one event out.

Nothing is tuned, and the delivery is Faust's default, at least once.
"""

from __future__ import annotations

import tempfile
from typing import Any

import faust

from settler_streams.settings import Settings
from settler_streams.topology import load_topology

GROUP = "stock"


def new_app(settings: Settings, partitions: int) -> faust.App:
    """The application: one agent, one table, one output topic."""
    deployment = settings.deployment
    app = faust.App(
        f"{deployment}.{GROUP}",
        broker=f"kafka://{settings.kafka_bootstrap_servers}",
        topic_partitions=partitions,
        web_enabled=False,
        datadir=tempfile.gettempdir(),
    )
    requests = app.topic(f"{deployment}.requests", value_serializer="json")
    outputs = app.topic(f"{deployment}.outputs", value_serializer="json")
    counts = app.Table("counts", default=int, partitions=partitions)

    @app.agent(requests)  # type: ignore[untyped-decorator]
    async def count(events: Any) -> None:
        async for event in events:
            tenant = event["tenantid"]
            counts[tenant] += 1
            await outputs.send(key=tenant, value={"id": event["id"], "tenant": tenant, "count": counts[tenant]})

    @app.on_rebalance_complete.connect  # type: ignore[untyped-decorator]
    async def ready(*_args: Any, **_kwargs: Any) -> None:
        print("bench ready", flush=True)  # noqa: T201 - the parent waits for this line

    return app


def main() -> None:
    """Run until SIGTERM. Settings come from the environment."""
    app = new_app(Settings.from_environment(), load_topology().tenant_partitions)
    faust.Worker(app, loglevel="info", daemon=True).execute_from_commandline()


if __name__ == "__main__":
    main()
