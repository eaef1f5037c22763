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

from settler_streams.dev.bench.latency import percentiles
from settler_streams.dev.bench.long_run import LongRun
from settler_streams.dev.bench.row_security import Costs, Overhead, Together
from settler_streams.dev.bench.run import Figures
from settler_streams.dev.bench.throughput import Measured

LIBRARIES = ("aiokafka", "faust-streaming", "msgspec", "uvloop", "asyncpg")
SAMPLES_MAX, ROWS_MAX = 60, 12
"""Of a long run's memory, in the document and in the table: enough to see a slope."""


def document(figures: Figures) -> dict[str, Any]:
    """Everything that was measured. Rates are medians of the rounds; a part that was left out has no keys."""
    found: dict[str, Any] = {}
    if figures.pipeline:
        found |= _comparison(figures)
    if figures.recovery is not None:
        found["recovery_keys_per_s"] = round(figures.recovery.keys_per_s)
        found["recovery_cpu_us_per_key"] = round(figures.recovery.cpu_s / figures.recovery.keys * 1e6, 2)
    if figures.latency is not None:
        found["latency_idle_ms"] = percentiles([job.latency_ms for job in figures.latency.idle])
        found["latency_half_load_ms"] = percentiles([job.latency_ms for job in figures.latency.half_load])
        found["tenant_change_ms"] = percentiles(figures.latency.tenant_changes_ms)
        found["latency_idle_hops_ms"] = figures.latency.idle_hops_ms
        found["latency_half_load_hops_ms"] = figures.latency.half_load_hops_ms
        found["latency_jobs_per_s_at_full_load"] = round(figures.latency.capacity_per_s, 1)
    if figures.recorder_rows_per_s is not None:
        found["recorder_rows_per_s"] = round(figures.recorder_rows_per_s)
    if figures.row_security is not None:
        found |= _row_security(figures.row_security)
    if figures.long is not None:
        found |= _long_run(figures.long)
    return {**found, "machine": _machine()}


def as_text(found: dict[str, Any]) -> str:
    """The document as it is written to a file."""
    return json.dumps(found, indent=2) + "\n"


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table: what was measured, the figure, and what to know about it."""
    table: list[tuple[str, str, str]] = []
    for key, what in (
        ("stock_faust", "(a) stock Faust, at least once"),
        ("ceiling", "(b) aiokafka loop, exactly once: the ceiling"),
        ("pipeline", "(c) admission, exactly once, one worker"),
        ("pipeline_two_workers", "(c) admission, exactly once, two workers"),
    ):
        if f"{key}_eps" in found:
            rates = [run["eps"] for run in found["rounds"][key]]
            cpu_us = found["worker_cpu_us_per_event"][key]
            spread = f"rounds: {min(rates):,} to {max(rates):,}; {cpu_us:g} us of processor time each"
            table.append((what, f"{found[f'{key}_eps']:,} events/s", spread))
    if "pipeline_eps" in found:
        table.append(("(c) by (a)", f"{found['pipeline_to_stock']:.1f}", ""))
        table.append(("(c) by (b)", f"{found['pipeline_to_ceiling']:.2f}", ""))
        share = f"{found['two_workers_broker_share']:.0%}"
        table.append(("broker's share of the processor time", share, "with two workers"))
    if "recovery_keys_per_s" in found:
        table.append(("(d) recovery", f"{found['recovery_keys_per_s']:,} keys/s", "all folds of one worker"))
    for key, when in (("latency_idle_ms", "idle"), ("latency_half_load_ms", "half load")):
        if key in found:
            times = found[key]
            hops = ", ".join(f"{hop} {ms:g}" for hop, ms in found[key.replace("_ms", "_hops_ms")].items())
            table.append((f"(e) request to result, {when}", f"p50 {times['p50']} ms, p99 {times['p99']} ms", hops))
    if "tenant_change_ms" in found:
        times = found["tenant_change_ms"]
        table.append(
            ("a tenant's change in admission's state", f"p50 {times['p50']} ms, p99 {times['p99']} ms", "idle")
        )
    if "recorder_rows_per_s" in found:
        table.append(("(f) recorder into PostgreSQL", f"{found['recorder_rows_per_s']:,} rows/s", "under RLS"))
    table += _row_security_rows(found)
    if "peak_rss_mib" in found:
        table.append(("(g) memory of an admission worker, peak", f"{found['peak_rss_mib']:,} MiB", ""))
    if "long_run" in found:
        run = found["long_run"]
        table.append(("long run", f"{run['events']:,} events", f"{run['eps']:,} a second with their results"))
        table.append(("growth of memory", f"{run['growth']:.2f}", "last quarter by second quarter"))
        samples = _thinned(run["rss_mib_samples"], ROWS_MAX)
        table += [("", f"{mib:,} MiB", f"after {events:,}") for events, mib in samples]
    return table


def _more(overhead: dict[str, Any], where: str = "p95") -> tuple[str, str]:
    return f"{overhead['ratio_p95'] - 1:+.1%}", f"+- {overhead['ratio_p95_error']:.1%} at {where}"


def _row_security(costs: Costs) -> dict[str, Any]:
    def ratio(overhead: Overhead) -> dict[str, float]:
        return {"ratio_p95": round(overhead.ratio_p95, 4), "ratio_p95_error": round(overhead.error, 4)}

    def together(costs: Together) -> dict[str, Any]:
        return {**ratio(costs.best), "single_calls": ratio(costs.single)}

    return {
        "row_security_gateway": together(costs.gateway),
        "row_security_recorder": together(costs.recorder),
        "row_security": {
            name: {"p50_ms": round(cost.p50_ms, 3), "p95_ms": round(cost.p95_ms, 3), **ratio(cost.overhead)}
            for name, cost in costs.statements.items()
        },
    }


def _row_security_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    table = []
    for key, what in (("row_security_gateway", "gateway's reads"), ("row_security_recorder", "recorder's batches")):
        if key in found:
            table.append((f"row-level security: the {what}", *_more(found[key])))
            table.append(("", *_more(found[key]["single_calls"], "p95 of single calls")))
    for name, cost in found.get("row_security", {}).items():
        more, error = _more(cost)
        times = f"p50 {cost['p50_ms']} ms, p95 {cost['p95_ms']} ms"
        table.append((f"row-level security: {name}", more, f"{error}; {times}"))
    return table


def _comparison(figures: Figures) -> dict[str, Any]:
    rounds = {
        "stock_faust": figures.stock,
        "ceiling": figures.ceiling,
        "pipeline": figures.pipeline,
        "pipeline_two_workers": figures.pipeline_two,
    }
    rates = {f"{name}_eps": round(statistics.median(run.eps for run in runs)) for name, runs in rounds.items()}
    return {
        **rates,
        "peak_rss_mib": round(max(run.peak_rss_mib for run in figures.pipeline), 1),
        "pipeline_to_stock": round(rates["pipeline_eps"] / rates["stock_faust_eps"], 2),
        "pipeline_to_ceiling": round(rates["pipeline_eps"] / rates["ceiling_eps"], 3),
        "two_workers_broker_share": round(statistics.median(run.broker_share for run in figures.pipeline_two), 3),
        "worker_cpu_us_per_event": {
            name: round(statistics.median(map(_cpu_us, runs)), 1) for name, runs in rounds.items()
        },
        "rounds": {name: [_run(run) for run in runs] for name, runs in rounds.items()},
    }


def _cpu_us(run: Measured) -> float:
    return run.workers_cpu_s / run.events * 1e6


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
        "workers_waited_s": round(run.workers_waited_s, 2),
        "peak_rss_mib": round(run.peak_rss_mib, 1),
    }


def _long_run(run: LongRun) -> dict[str, Any]:
    return {
        "peak_rss_mib": round(run.peak_rss_mib, 1),
        "long_run": {
            "events": run.events,
            "admitted": run.admitted,
            "seconds": round(run.seconds, 1),
            "eps": round(run.events / run.seconds),
            "growth": round(run.growth, 3),
            "rss_mib_samples": _thinned(run.samples, SAMPLES_MAX),
        },
    }


def _thinned(samples: Sequence[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """At most ``count``, the last among them."""
    step = -(-len(samples) // count)
    return [*reversed(samples[::-1][::step])]


def _machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "memory_mib": psutil.virtual_memory().total // 2**20,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }
