"""The Python SDK."""

from settler_streams.client.client import Job, JobRejectedError, SettlerClient
from settler_streams.client.http import HttpTransport
from settler_streams.client.kafka import KafkaTransport
from settler_streams.client.transport import Caller, Start, Transport

__all__ = [
    "Caller",
    "HttpTransport",
    "Job",
    "JobRejectedError",
    "KafkaTransport",
    "SettlerClient",
    "Start",
    "Transport",
]
