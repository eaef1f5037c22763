"""The figures as one JSON document and as a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import psutil

from settler_streams.dev.bench.run import Figures
from settler_streams.dev.bench.throughput import Measured

LIBRARIES = ("aiokafka", "faust-streaming", "msgspec", "uvloop", "asyncpg")


def document(figures: Figures) -> dict[str, Any]:
    """Everything that was measured. Rates are medians of the rounds."""
    stock, ceiling = _median(figures.stock), _median(figures.ceiling)
    pipeline, two = _median(figures.pipeline), _median(figures.pipeline_two)
    return {
        "stock_faust_eps": round(stock),
        "ceiling_eps": round(ceiling),
        "pipeline_eps": round(pipeline),
        "pipeline_two_workers_eps": round(two),
        "peak_rss_mib": round(max(run.peak_rss_mib for run in figures.pipeline), 1),
        "pipeline_to_stock": round(pipeline / stock, 2),
        "pipeline_to_ceiling": round(pipeline / ceiling, 3),
        "two_workers_broker_share": round(statistics.median(run.broker_share for run in figures.pipeline_two), 3),
        "rounds": {
            "stock_faust": [_run(run) for run in figures.stock],
            "ceiling": [_run(run) for run in figures.ceiling],
            "pipeline": [_run(run) for run in figures.pipeline],
            "pipeline_two_workers": [_run(run) for run in figures.pipeline_two],
        },
        "machine": {
            "cpus": os.cpu_count(),
            "memory_mib": psutil.virtual_memory().total // 2**20,
            "system": platform.platform(),
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
        },
    }


def as_text(found: dict[str, Any]) -> str:
    """The document as it is written to a file."""
    return json.dumps(found, indent=2) + "\n"


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table: what was measured, the figure, the spread of the rounds."""
    table = []
    for key, what in (
        ("stock_faust", "(a) stock Faust, at least once"),
        ("ceiling", "(b) aiokafka loop, exactly once: the ceiling"),
        ("pipeline", "(c) admission, exactly once, one worker"),
        ("pipeline_two_workers", "(c) admission, exactly once, two workers"),
    ):
        rates = [run["eps"] for run in found["rounds"][key]]
        table.append((what, f"{found[f'{key}_eps']:,} events/s", f"{min(rates):,} to {max(rates):,}"))
    table.append(("(c) / (a)", f"{found['pipeline_to_stock']:.1f}", ""))
    table.append(("(c) / (b)", f"{found['pipeline_to_ceiling']:.2f}", ""))
    table.append(("(g) memory of the admission worker, peak", f"{found['peak_rss_mib']:,} MiB", ""))
    return table


def _median(runs: Sequence[Measured]) -> float:
    return statistics.median(run.eps for run in runs)


def _run(run: Measured) -> dict[str, Any]:
    return {
        "eps": round(run.eps),
        "events": run.events,
        "seconds": round(run.seconds, 3),
        "admitted": run.admitted,
        "refused": run.refused,
        "broker_share": round(run.broker_share, 3),
        "broker_cpu_s": round(run.broker_cpu_s, 2),
        "workers_cpu_s": round(run.workers_cpu_s, 2),
        "peak_rss_mib": round(run.peak_rss_mib, 1),
    }
