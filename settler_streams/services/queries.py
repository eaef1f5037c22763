"""Every SQL text of the services and the gateway. Each names its tenant, although row-level security does so too."""

from __future__ import annotations

from typing import Final

# Tenants

READ_TENANT: Final = """
SELECT id, parent_id, root_id, slug, name, tier, status, config, quotas, version, erase_after, restored_as
FROM tenants WHERE id = $1
"""
# Not FOR UPDATE, which would keep projections waiting: their rows refer to the tenant's.
LOCK_TENANT: Final = READ_TENANT + "FOR NO KEY UPDATE"
SHARE_TENANT: Final = READ_TENANT + "FOR SHARE"
INSERT_TENANT: Final = """
INSERT INTO tenants (id, parent_id, root_id, slug, name, tier, config, quotas)
VALUES ($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8::text::jsonb)
"""
UPDATE_TENANT: Final = """
UPDATE tenants SET tier = $2, status = $3, quotas = $4::text::jsonb, version = $5, name = $6, config = $7::text::jsonb,
       erase_after = $8, restored_as = $9, updated_at = now()
WHERE id = $1
"""
NEXT_VERSION_OF_TENANT: Final = """
UPDATE tenants SET version = version + 1, updated_at = now() WHERE id = $1
RETURNING id, parent_id, root_id, slug, name, tier, status, config, quotas, version, erase_after, restored_as
"""
INSERT_CHILD: Final = "INSERT INTO tenant_children (tenant_id, child_id) VALUES ($1, $2)"
CHILDREN_AFTER: Final = """
SELECT child_id FROM tenant_children WHERE tenant_id = $1 AND ($2::uuid IS NULL OR child_id > $2)
ORDER BY child_id LIMIT $3
"""
INSERT_OWNER: Final = """
INSERT INTO users (tenant_id, id, email, password_hash, role) VALUES ($1, $2, $3, $4, 'owner')
"""
INSERT_AUDIT_ENTRY: Final = """
INSERT INTO audit_logs (tenant_id, id, actor, action, subject, before, after, request_id, recorded_at)
VALUES ($1, $2, $3, $4, $5, $6::text::jsonb, $7::text::jsonb, $8, now())
"""

# Users

_USER: Final = "SELECT id, email, role, status FROM users WHERE tenant_id = $1 "
USERS_AFTER: Final = _USER + "AND ($2::uuid IS NULL OR id > $2) ORDER BY id LIMIT $3"
READ_USER: Final = _USER + "AND id = $2"
FIND_USER_BY_EMAIL: Final = _USER + "AND email = $2"
INSERT_USER: Final = """
INSERT INTO users (tenant_id, id, email, role, status, password_hash, invitation_hash, invitation_expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
"""
UPDATE_USER: Final = "UPDATE users SET role = $3, status = $4, updated_at = now() WHERE tenant_id = $1 AND id = $2"
DELETE_USER: Final = "DELETE FROM users WHERE tenant_id = $1 AND id = $2"
HAS_OWNER: Final = """
SELECT EXISTS (SELECT FROM users WHERE tenant_id = $1 AND role = 'owner' AND status = 'active')
"""
INVITE_AGAIN: Final = """
UPDATE users SET role = $3, invitation_hash = $4, invitation_expires_at = $5, updated_at = now()
WHERE tenant_id = $1 AND id = $2
"""
INVITATION_HOLDS: Final = """
SELECT true FROM users WHERE tenant_id = $1 AND id = $2 AND invitation_hash = $3 AND invitation_expires_at > now()
"""
ACCEPT_INVITATION: Final = """
UPDATE users SET status = 'active', password_hash = $4, invitation_hash = NULL, invitation_expires_at = NULL,
       updated_at = now()
WHERE tenant_id = $1 AND id = $2 AND invitation_hash = $3 AND invitation_expires_at > now()
RETURNING id, email, role, status
"""

# Retention

READ_RETENTION: Final = """
SELECT r.kind, r.keep_days FROM tenants t LEFT JOIN tenant_retention r ON r.tenant_id = t.id WHERE t.id = $1
"""
KEEP_FOR: Final = """
INSERT INTO tenant_retention (tenant_id, kind, keep_days) VALUES ($1, $2, $3)
ON CONFLICT (tenant_id, kind) DO UPDATE SET keep_days = excluded.keep_days, updated_at = now()
"""
KEEP_FOR_EVER: Final = "DELETE FROM tenant_retention WHERE tenant_id = $1 AND kind = $2"

# API keys

INSERT_API_KEY: Final = """
INSERT INTO api_keys (tenant_id, id, key_hash, name, scopes, expires_at) VALUES ($1, $2, $3, $4, $5, $6)
"""
_API_KEY: Final = """
SELECT id, name, scopes, created_at, expires_at, revoked_at FROM api_keys WHERE tenant_id = $1
"""
READ_API_KEY: Final = _API_KEY + "AND id = $2"
API_KEYS_AFTER: Final = _API_KEY + "AND ($2::uuid IS NULL OR id > $2) ORDER BY id LIMIT $3"
UPDATE_API_KEY: Final = """
UPDATE api_keys SET scopes = $3, expires_at = $4, revoked_at = $5 WHERE tenant_id = $1 AND id = $2
"""
ROTATIONS_OF_API_KEY: Final = """
SELECT (before->>'expires_at')::timestamptz AS expires_before, (after->>'expires_at')::timestamptz AS expires_after
FROM audit_logs WHERE tenant_id = $1 AND subject = $2 AND action = 'api-key.rotated' AND recorded_at > $3
"""
_KEY_IN_FORCE: Final = """
FROM api_keys k JOIN tenants t ON t.id = k.tenant_id
WHERE k.tenant_id = $1 AND k.revoked_at IS NULL
  AND (k.expires_at IS NULL OR k.expires_at > now()) AND t.status <> 'deleted'
"""
FIND_API_KEY: Final = "SELECT k.id, k.scopes, t.root_id, t.tier, t.status" + _KEY_IN_FORCE + "AND k.key_hash = $2"
API_KEY_HOLDS: Final = "SELECT true" + _KEY_IN_FORCE + "AND k.id = $2 AND $3 = ANY (k.scopes)"

# Domains

_DOMAIN: Final = "SELECT id, domain, status, verification_token, verified_at FROM domains WHERE tenant_id = $1 "
READ_DOMAIN: Final = _DOMAIN + "AND id = $2"
DOMAINS_AFTER: Final = _DOMAIN + "AND ($2::uuid IS NULL OR id > $2) ORDER BY id LIMIT $3"
INSERT_DOMAIN: Final = "INSERT INTO domains (tenant_id, id, domain, verification_token) VALUES ($1, $2, $3, $4)"
VERIFY_DOMAIN: Final = "UPDATE domains SET status = 'verified', verified_at = $3 WHERE tenant_id = $1 AND id = $2"
DELETE_DOMAIN: Final = "DELETE FROM domains WHERE tenant_id = $1 AND id = $2"
COUNT_DOMAINS: Final = "SELECT count(*) FROM domains WHERE tenant_id = $1"

# Onboarding

READ_ONBOARDING: Final = """
SELECT EXISTS (SELECT FROM users WHERE tenant_id = $1 AND role = 'owner' AND status = 'active'),
       EXISTS (SELECT FROM api_keys WHERE tenant_id = $1 AND revoked_at IS NULL
               AND (expires_at IS NULL OR expires_at > now())),
       EXISTS (SELECT FROM domains WHERE tenant_id = $1 AND status = 'verified')
       OR EXISTS (SELECT FROM webhooks WHERE tenant_id = $1 AND status = 'active'),
       EXISTS (SELECT FROM jobs WHERE tenant_id = $1 AND finished_at IS NOT NULL)
FROM tenants WHERE id = $1
"""

# Quotas and signals

# Of every quota, of which there are five: with an array of those wanted the server would plan it anew for each call.
READ_QUOTA_USAGE: Final = """
SELECT quota_type, used + reserved AS used FROM tenant_quota_usage
WHERE tenant_id = $1 AND (window_end IS NULL OR window_end > now())
"""
CURRENT_VERDICTS: Final = """
SELECT DISTINCT ON (resource) resource, kind, detail, signalled_at
FROM tenant_signals WHERE tenant_id = $1 AND kind IN ('noisy', 'quiet')
ORDER BY resource, signalled_at DESC, source_version DESC
"""

# Jobs

READ_JOB: Final = """
SELECT j.job_id, j.kind, j.priority, j.status, j.decision, j.reason, j.current_usage, j.limit_value, j.retry_after_ms,
       j.requested_at, j.decided_at, j.outcome, j.accepted_attempt, j.finished_at,
       e.executor, e.worker_us, e.error
FROM jobs j
LEFT JOIN executions e ON e.tenant_id = j.tenant_id AND e.job_id = j.job_id AND e.attempt = j.accepted_attempt
WHERE j.tenant_id = $1 AND j.job_id = $2
"""
READ_MATCHES: Final = """
SELECT match_no, kind, left_id, right_ids, left_currency, right_currency, left_amount_minor, right_amount_minor,
       difference_minor
FROM accepted_matches WHERE tenant_id = $1 AND job_id = $2 AND match_no > $3 ORDER BY match_no LIMIT $4
"""
READ_UNMATCHED: Final = """
SELECT row_no, side, record_no, record_id, currency, amount_minor, record_date::text, reason, detail
FROM accepted_unmatched WHERE tenant_id = $1 AND job_id = $2 AND row_no > $3 ORDER BY row_no LIMIT $4
"""
READ_REPORT: Final = """
SELECT currency, matches, left_rows, left_rows_matched, left_rows_unmatched, left_total_minor,
       left_matched_minor, left_unmatched_minor, right_rows, right_rows_matched, right_rows_unmatched,
       right_total_minor, right_matched_minor, right_unmatched_minor
FROM accepted_reports WHERE tenant_id = $1 AND job_id = $2 ORDER BY currency
"""
ANSWERS: Final = "SELECT 1"
