"""The tiers: weights, default limits and the Enterprise lane's share, loaded from ``topology/tiers.yaml``."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from settler_streams.errors import ConfigurationError
from settler_streams.events import QuotaType, TenantTier
from settler_streams.published import TOPOLOGY

LIMIT_MAX = 2**53
"""Exact also for a reader of JSON whose numbers are all floats."""
Limit = Annotated[int, Field(ge=0, le=LIMIT_MAX)]


class Tier(BaseModel):
    """One tier's defaults. Units: requests per minute, bytes, jobs, jobs per calendar month, domains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Annotated[int, Field(ge=1, le=1000)]
    enterprise: bool = False
    rate_limit: Annotated[int, Field(ge=1, le=10**9)]
    burst: Annotated[int, Field(ge=1, le=10**9)]
    storage: Limit
    concurrent_jobs: Limit
    monthly_reconciliations: Limit
    custom_domains: Limit
    max_running: Annotated[int, Field(ge=1, le=10**6)]

    def limits(self) -> dict[QuotaType, int]:
        """The default limit of each quota."""
        return {quota: getattr(self, quota.value) for quota in QuotaType}


class Tiers(BaseModel):
    """All tiers, and the two bounds that hold for a whole pool."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1, le=1)]
    reserved_per_mille: Annotated[int, Field(ge=0, le=1000)]
    pool_queue_max: Annotated[int, Field(ge=1, le=10**7)]
    tiers: dict[TenantTier, Tier]

    @model_validator(mode="after")
    def _every_tier_is_given(self) -> Tiers:
        if missing := set(TenantTier) - set(self.tiers):
            raise ValueError(f"tiers missing: {', '.join(sorted(missing))}")
        return self

    def __getitem__(self, tier: TenantTier) -> Tier:
        return self.tiers[tier]


@lru_cache(maxsize=4)
def load_tiers(path: Path = TOPOLOGY / "tiers.yaml") -> Tiers:
    """Read and validate the tiers.

    Raises:
        ConfigurationError: the file is missing, is not YAML, or breaks a rule; the message names the place.
    """
    try:
        return Tiers.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
