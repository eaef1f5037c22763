"""Every SQL text about webhooks. Each names its tenant, although row-level security does so too."""

from __future__ import annotations

from typing import Final

# Webhooks

LOCK_TENANT: Final = "SELECT status FROM tenants WHERE id = $1 FOR NO KEY UPDATE"
COUNT_WEBHOOKS: Final = "SELECT count(*) FROM webhooks WHERE tenant_id = $1"
INSERT_WEBHOOK: Final = """
INSERT INTO webhooks (tenant_id, id, url, event_types, secret_key_id, secret_encrypted) VALUES ($1, $2, $3, $4, $5, $6)
"""
INSERT_LANE: Final = "INSERT INTO webhook_lanes (tenant_id, webhook_id) VALUES ($1, $2)"
# All of the tenant's, or the one that is named.
READ_WEBHOOKS: Final = """
SELECT w.id, w.url, w.event_types, w.status, w.disabled_reason, w.created_at, w.previous_secret_until, l.failures,
       l.skipped,
       (SELECT count(*) FROM webhook_deliveries d
        WHERE d.tenant_id = w.tenant_id AND d.webhook_id = w.id AND d.status = 'pending') AS pending
FROM webhooks w JOIN webhook_lanes l ON l.tenant_id = w.tenant_id AND l.webhook_id = w.id
WHERE w.tenant_id = $1 AND ($2::uuid IS NULL OR w.id = $2) ORDER BY w.id
"""
LOCK_WEBHOOK: Final = """
SELECT url, status, secret_key_id, secret_encrypted FROM webhooks WHERE tenant_id = $1 AND id = $2 FOR NO KEY UPDATE
"""
SET_STATUS: Final = """
UPDATE webhooks SET status = $3, disabled_reason = $4, updated_at = now() WHERE tenant_id = $1 AND id = $2
"""
ROTATE: Final = """
UPDATE webhooks
SET previous_secret_key_id = secret_key_id, previous_secret_encrypted = secret_encrypted,
    previous_secret_until = now() + make_interval(secs => $5),
    secret_key_id = $3, secret_encrypted = $4, updated_at = now()
WHERE tenant_id = $1 AND id = $2
"""
DELETE_WEBHOOK: Final = "DELETE FROM webhooks WHERE tenant_id = $1 AND id = $2 RETURNING url"
WAKE_LANE: Final = """
UPDATE webhook_lanes SET due_at = now(), failures = 0, paused_until = '-infinity'
WHERE tenant_id = $1 AND webhook_id = $2
"""
