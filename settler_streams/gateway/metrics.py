"""The gateway's metrics. A tenant label holds only ids that a valid key has proved, so nobody can add to it at will."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

ANONYMOUS = "-"
"""Value of the tenant label of a request without a valid key."""

HTTP_REQUESTS_TOTAL = Counter("http_requests_total", "HTTP requests.", ["tenant", "method", "route", "status"])
HTTP_REQUEST_DURATION_SECONDS = Histogram(
    "http_request_duration_seconds",
    "Time to the end of the response; an event stream's is not observed.",
    ["tenant", "method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
TENANT_RATE_LIMIT_HITS_TOTAL = Counter(
    "tenant_rate_limit_hits_total", "Requests refused by a rate limit.", ["tenant", "policy"]
)
