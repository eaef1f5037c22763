"""Who may do what on Kafka, derived from the topology's writers and readers.

A role is the part that a process plays: a fold, a projection, the gateway, an SDK's producer. By default each has a
principal of its own, ``User:<deployment>-<role>``; roles that one process plays together can share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import for_code
from aiokafka.protocol.admin import CreateAclsRequest_v1, DescribeAclsRequest
from aiokafka.protocol.api import Request

from settler_streams.errors import ConfigurationError
from settler_streams.topology import Topology, full_name

OPERATOR = "operator"


class Resource(IntEnum):
    """What a permission is about; values as on the wire (Kafka's ``ResourceType``)."""

    TOPIC = 2
    GROUP = 3
    TRANSACTIONAL_ID = 5


class Match(IntEnum):
    """Whether a name is the whole name or its beginning (Kafka's ``PatternType``)."""

    LITERAL = 3
    PREFIXED = 4


class Operation(IntEnum):
    """What is allowed (Kafka's ``AclOperation``). Reading and writing imply describing."""

    READ = 3
    WRITE = 4
    CREATE = 5
    DESCRIBE_CONFIGS = 10
    ALTER_CONFIGS = 11


_ANY = 1
_ALLOW = 3
_ANY_HOST = "*"


@dataclass(frozen=True, slots=True, order=True)
class Permission:
    """One ACL: ``principal`` may do ``operation`` on ``resource`` called ``name``, from any host."""

    principal: str
    resource: Resource
    match: Match
    name: str
    operation: Operation


def roles_of(topology: Topology) -> list[str]:
    """Every role that the topology names, as writer or reader of some topic."""
    return sorted({role for topic in topology.topics for role in (*topic.writers, *topic.readers)})


def principals(topology: Topology, deployment: str, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
    """The principal of each role: the chosen one, or ``User:<deployment>-<role>``.

    Raises:
        ConfigurationError: ``chosen`` names a role that the topology does not have, or something that is no principal.
    """
    chosen = chosen or {}
    roles = roles_of(topology)
    if unknown := sorted(set(chosen) - set(roles)):
        raise ConfigurationError(f"no such roles: {', '.join(unknown)}; there are {', '.join(roles)}")
    for role, principal in chosen.items():
        if ":" not in principal:
            raise ConfigurationError(f"{role}={principal}: a principal is written User:name")
    return {role: chosen.get(role, f"User:{deployment}-{role}") for role in roles}


def permissions(topology: Topology, deployment: str, principal_of: Mapping[str, str]) -> list[Permission]:
    """What each role needs and nothing else, sorted."""
    wanted: set[Permission] = set()

    def allow(role: str, resource: Resource, name: str, *operations: Operation, match: Match = Match.LITERAL) -> None:
        full = full_name(deployment, name)
        wanted.update(Permission(principal_of[role], resource, match, full, operation) for operation in operations)

    for topic in topology.topics:
        for role in topic.writers:
            allow(role, Resource.TOPIC, topic.name, Operation.WRITE)
        for role in topic.readers:
            allow(role, Resource.TOPIC, topic.name, Operation.READ)
    for fold in topology.folds:
        allow(fold.role, Resource.GROUP, fold.role, Operation.READ)
        allow(fold.role, Resource.TRANSACTIONAL_ID, f"{fold.role}-", Operation.WRITE, match=Match.PREFIXED)
        allow(fold.role, Resource.TOPIC, fold.changelog, Operation.READ, Operation.WRITE)
        allow(fold.role, Resource.TOPIC, fold.journal, Operation.WRITE)
        for name in fold.inputs:
            if topology.forwarder(name) == fold.role:  # it puts records of a wrong partition into the right one
                allow(fold.role, Resource.TOPIC, name, Operation.WRITE)
    for projection in topology.projections:
        allow(projection.role, Resource.GROUP, projection.role, Operation.READ)
    _allow_operator(allow, topology)
    return sorted(wanted)


def _allow_operator(allow: Any, topology: Topology) -> None:
    """Declares topics, reads everything, and puts dead letters back where they came from."""
    of_topics = (Operation.READ, Operation.CREATE, Operation.DESCRIBE_CONFIGS, Operation.ALTER_CONFIGS)
    allow(OPERATOR, Resource.TOPIC, "", *of_topics, match=Match.PREFIXED)
    allow(OPERATOR, Resource.TRANSACTIONAL_ID, "redrive", Operation.WRITE)
    set_aside = set(topology.topic("dead-letters").writers)
    for topic in topology.topics:
        if set_aside & set(topic.readers):  # a dead letter of this role may have come from here
            allow(OPERATOR, Resource.TOPIC, topic.name, Operation.WRITE)


async def missing(client: AIOKafkaAdminClient, wanted: Iterable[Permission]) -> list[Permission]:
    """Those of ``wanted`` that the broker does not have.

    Raises:
        KafkaError: the broker has no authoriser, or we may not ask.
    """
    request = DescribeAclsRequest(_ANY, None, _ANY, None, None, _ANY, _ANY)  # None is any
    response: Any = await client._send_request(request)  # noqa: SLF001 - aiokafka's client has no public door to ACLs
    if response.error_code:
        raise for_code(response.error_code)(response.error_message)
    live = {
        (resource, match, name, principal, operation)
        for resource, name, match, acls in response.resources
        for principal, host, operation, permission in acls
        if host == _ANY_HOST and permission == _ALLOW
    }
    return [p for p in wanted if (p.resource, p.match, p.name, p.principal, p.operation) not in live]


async def grant(client: AIOKafkaAdminClient, wanted: Iterable[Permission]) -> None:
    """Create ``wanted``; those that exist stay as they are.

    Raises:
        KafkaError: the broker has no authoriser, or we may not change its rules.
    """
    response: Any = await client._send_request(_CreateAcls(wanted))  # noqa: SLF001
    for error_code, message in response.creation_responses:
        if error_code:
            raise for_code(error_code)(message)


class _CreateAcls(Request[CreateAclsRequest_v1]):
    """All in one request; aiokafka's own takes one rule at a time."""

    API_KEY = CreateAclsRequest_v1.API_KEY

    def __init__(self, wanted: Iterable[Permission]) -> None:
        self._wanted = list(wanted)

    def build(self, request_struct_class: type[CreateAclsRequest_v1]) -> CreateAclsRequest_v1:
        return request_struct_class(
            [(p.resource, p.name, p.match, p.principal, _ANY_HOST, p.operation, _ALLOW) for p in self._wanted]
        )
