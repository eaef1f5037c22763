"""How aiokafka says that a newer producer of the same transactional id exists."""

from __future__ import annotations

from aiokafka.errors import InvalidProducerEpoch, InvalidProducerIdMapping, ProducerFenced

_FENCED = (ProducerFenced, InvalidProducerEpoch, InvalidProducerIdMapping)


def fenced(error: BaseException) -> bool:
    """Whether ``error`` means that another producer has taken over."""
    return isinstance(error, _FENCED)
