"""The services that the specification names, and what they need to run."""

from settler_streams.services.acknowledgements import Acknowledgements
from settler_streams.services.api_keys import ApiKey, ApiKeys, AuthenticationError, IssuedApiKey, Principal, Scope
from settler_streams.services.directory import TenantDirectory
from settler_streams.services.domains import Domain, DomainNotProvenError, DomainService, DomainStatus
from settler_streams.services.erasure import Erasure, ErasureIncompleteError, ErasureService
from settler_streams.services.flags import FeatureFlagService, FlagAnswer
from settler_streams.services.neighbours import NoisyNeighborDetection, NoisyVerdict
from settler_streams.services.onboarding import Onboarding, OnboardingService, Step
from settler_streams.services.outbox_relay import OutboxRelay
from settler_streams.services.passwords import hash_password, verify_password
from settler_streams.services.placement import move_tenant
from settler_streams.services.publisher import EventPublisher
from settler_streams.services.queue import PrioritizedQueue, QueueItem
from settler_streams.services.quotas import QuotaCheck, QuotaExceededError, QuotaService, QuotaStanding
from settler_streams.services.retention import Retention, RetentionKind, RetentionService, RetentionSweeper, Swept
from settler_streams.services.tenant_configurations import TenantConfigurations
from settler_streams.services.tenant_lists import list_tenants
from settler_streams.services.tenants import CreatedTenant, Owner, Tenant, TenantNotYetKnownError, TenantService
from settler_streams.services.users import Invitation, InvitationError, Role, User, UserService, UserStatus

__all__ = [
    "Acknowledgements",
    "ApiKey",
    "ApiKeys",
    "AuthenticationError",
    "CreatedTenant",
    "Domain",
    "DomainNotProvenError",
    "DomainService",
    "DomainStatus",
    "Erasure",
    "ErasureIncompleteError",
    "ErasureService",
    "EventPublisher",
    "FeatureFlagService",
    "FlagAnswer",
    "Invitation",
    "InvitationError",
    "IssuedApiKey",
    "NoisyNeighborDetection",
    "NoisyVerdict",
    "Onboarding",
    "OnboardingService",
    "OutboxRelay",
    "Owner",
    "Principal",
    "PrioritizedQueue",
    "QueueItem",
    "QuotaCheck",
    "QuotaExceededError",
    "QuotaService",
    "QuotaStanding",
    "Retention",
    "RetentionKind",
    "RetentionService",
    "RetentionSweeper",
    "Role",
    "Scope",
    "Step",
    "Swept",
    "Tenant",
    "TenantConfigurations",
    "TenantDirectory",
    "TenantNotYetKnownError",
    "TenantService",
    "User",
    "UserService",
    "UserStatus",
    "hash_password",
    "list_tenants",
    "move_tenant",
    "verify_password",
]
