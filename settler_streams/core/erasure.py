"""Erased tenants: what a fold keeps of one is that it was erased, so that nothing which comes late brings it back."""

from __future__ import annotations

from settler_streams.core.fold import Emit, Record, State, Value
from settler_streams.events import TenantErased, TenantForgotten
from settler_streams.ids import TenantId

PREFIX = "erased/"


class Erased(Value, frozen=True, array_like=True):
    """The marker, under ``erased/<tenant>``: the version of the tenant that its erasure was."""

    version: int


def erased_tenants(state: State) -> set[TenantId]:
    """The tenants that a state has markers of."""
    return {TenantId(key[len(PREFIX) :]) for key, value in state.items() if isinstance(value, Erased)}


def forgotten(record: Record, erased: TenantErased, role: str, partition: int) -> Emit:
    """The answer of a fold that keeps nothing of the tenant any more.

    The relay may publish one event twice, and each time is answered, under an id of its own.
    """
    body = TenantForgotten(version=erased.version, role=role, partition=partition)
    tenant = record.event.tenantid
    return Emit("tenant-signals", body, tenant, erased.root_id, f"forgotten/{record.offset}", tenant)


def passed_on(record: Record, erased: TenantErased, pools: int) -> tuple[Emit, ...]:
    """Admission's: the other folds that keep something of tenants are told, and whoever waits for it."""
    tenant, root, at = record.event.tenantid, erased.root_id, record.offset
    told = [
        Emit("pool-inputs", erased, tenant, root, f"erased/{pool}/{at}", tenant, partition=pool)
        for pool in range(pools)
    ]
    told.append(Emit("flag-commands", erased, tenant, root, f"erased/flags/{at}", tenant))
    return (*told, forgotten(record, erased, "admission", record.partition))
