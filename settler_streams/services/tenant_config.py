"""A tenant's configuration: a JSON object of the tenant's own, which this system keeps and does not read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from settler_streams.errors import InvalidRequestError

CONFIG_BYTES_MAX = 16 * 1024
"""As JSON in UTF-8: settings, not content; every version of it is in the audit log, twice."""


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as PostgreSQL will give it back.

    Raises:
        InvalidRequestError: it is no object, holds what JSON cannot, or is too large.
    """
    if not isinstance(config, Mapping):
        raise InvalidRequestError("a configuration is a JSON object")
    try:
        text = json.dumps(dict(config), allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the configuration is not JSON: {error}") from error
    if size > CONFIG_BYTES_MAX:
        raise InvalidRequestError(f"the configuration has {size} bytes as JSON; {CONFIG_BYTES_MAX} are allowed")
    checked: dict[str, Any] = json.loads(text)
    return checked
