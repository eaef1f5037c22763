"""Every SQL text about webhooks. Each names its tenant, although row-level security does so too."""

from __future__ import annotations

from typing import Final

# Webhooks

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
# Before its deliveries are written: whoever removes a webhook locks it first, then deletes them in an order of its own.
KEEP_WEBHOOK: Final = "SELECT true FROM webhooks WHERE tenant_id = $1 AND id = $2 FOR KEY SHARE"
SET_STATUS: Final = """
UPDATE webhooks SET status = $3, disabled_reason = $4, updated_at = now() WHERE tenant_id = $1 AND id = $2
RETURNING true
"""
ROTATE: Final = """
UPDATE webhooks
SET previous_secret_key_id = secret_key_id, previous_secret_encrypted = secret_encrypted,
    previous_secret_until = now() + make_interval(secs => $5),
    secret_key_id = $3, secret_encrypted = $4, updated_at = now()
WHERE tenant_id = $1 AND id = $2
"""
# Whoever removes it waits for those who write its deliveries, and they for each batch that is removed.
TAKE_WEBHOOK: Final = "SELECT url, status FROM webhooks WHERE tenant_id = $1 AND id = $2 FOR UPDATE"
DELETE_WEBHOOK: Final = "DELETE FROM webhooks WHERE tenant_id = $1 AND id = $2"
DELETE_LANE: Final = "DELETE FROM webhook_lanes WHERE tenant_id = $1 AND webhook_id = $2"
WAKE_LANE: Final = """
UPDATE webhook_lanes SET due_at = now(), failures = 0, failing_since = NULL, paused_until = '-infinity'
WHERE tenant_id = $1 AND webhook_id = $2
"""

# Before deliveries that are there already: whoever queues takes a lane first, then meets what is queued again.
HOLD_LANE: Final = "SELECT true FROM webhook_lanes WHERE tenant_id = $1 AND webhook_id = $2 FOR NO KEY UPDATE"

# Deliveries

WEBHOOK_EXISTS: Final = "SELECT true FROM webhooks WHERE tenant_id = $1 AND id = $2"
INSERT_TEST: Final = """
INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body)
SELECT $1, $2, $3, $4, $5
WHERE NOT EXISTS (
    SELECT FROM webhook_deliveries WHERE tenant_id = $1 AND webhook_id = $2 AND status = 'pending' AND event_type = $4)
RETURNING true
"""
# In the order of an index, so that no batch sorts all that is left; their webhook is taken, so none moves meanwhile.
DELETE_DELIVERIES: Final = """
DELETE FROM webhook_deliveries WHERE tenant_id = $1 AND ctid = ANY (ARRAY(
    SELECT ctid FROM webhook_deliveries WHERE tenant_id = $1 AND webhook_id = $2 ORDER BY event_id LIMIT $3))
"""
LIST_DELIVERIES: Final = """
SELECT webhook_id, event_id, event_type, status, attempts, queued_at, next_attempt_at, last_attempt_at, last_outcome,
       last_status, finished_at
FROM webhook_deliveries
WHERE tenant_id = $1 AND webhook_id = $2 AND ($3::text IS NULL OR status = $3) AND ($4::uuid IS NULL OR event_id = $4)
ORDER BY queued_at DESC, event_id LIMIT $5
"""
REDRIVE: Final = """
WITH chosen AS (
    SELECT event_id FROM webhook_deliveries
    WHERE tenant_id = $1 AND webhook_id = $2 AND status = 'dead' AND ($3::uuid[] IS NULL OR event_id = ANY ($3))
    ORDER BY finished_at, event_id LIMIT $4 FOR UPDATE
)
UPDATE webhook_deliveries d
SET status = 'pending', attempts = 0, queued_at = now(), next_attempt_at = now(), first_attempt_at = NULL,
    finished_at = NULL
FROM chosen WHERE d.tenant_id = $1 AND d.webhook_id = $2 AND d.event_id = chosen.event_id
RETURNING d.event_id
"""

# The courier, across tenants: lanes alone

# Tenants take turns: the first free lane of each, then the second of each; within a turn, who has waited longest. A
# lane that another courier is about to lease is passed over.
CLAIM_LANES: Final = """
WITH busy AS (
    SELECT tenant_id, count(*) AS lanes FROM webhook_lanes WHERE leased_until > now() GROUP BY tenant_id
), ranked AS (
    SELECT lane.tenant_id, lane.webhook_id, GREATEST(due_at, paused_until) AS since,
           coalesce(busy.lanes, 0) + row_number() OVER (
               PARTITION BY lane.tenant_id ORDER BY GREATEST(due_at, paused_until), webhook_id) AS turn
    FROM webhook_lanes lane LEFT JOIN busy USING (tenant_id)
    WHERE due_at <= now() AND paused_until <= now() AND leased_until <= now()
), chosen AS MATERIALIZED (
    SELECT lane.tenant_id, lane.webhook_id
    FROM webhook_lanes lane JOIN ranked USING (tenant_id, webhook_id)
    WHERE turn <= $2 AND due_at <= now() AND paused_until <= now() AND leased_until <= now()
    ORDER BY turn, since LIMIT $1 FOR UPDATE OF lane SKIP LOCKED
)
UPDATE webhook_lanes lane SET lease_id = $3, leased_until = now() + make_interval(secs => $4)
FROM chosen WHERE lane.tenant_id = chosen.tenant_id AND lane.webhook_id = chosen.webhook_id
RETURNING lane.tenant_id, lane.webhook_id
"""
QUEUE_AGE: Final = """
SELECT coalesce(max(extract(epoch FROM now() - GREATEST(due_at, paused_until))), 0)::bigint FROM webhook_lanes
WHERE due_at <= now() AND paused_until <= now() AND leased_until <= now()
"""

# The courier, in a tenant's context: one lane

READ_LANE: Final = """
SELECT w.url, w.status, w.secret_key_id, w.secret_encrypted, w.previous_secret_key_id, w.previous_secret_encrypted,
       coalesce(w.previous_secret_until > now(), false) AS previous_signs, l.failures
FROM webhooks w JOIN webhook_lanes l ON l.tenant_id = w.tenant_id AND l.webhook_id = w.id
WHERE w.tenant_id = $1 AND w.id = $2 AND l.lease_id = $3 AND l.leased_until > now()
"""
READ_DUE: Final = """
SELECT event_id, body, attempts FROM webhook_deliveries
WHERE tenant_id = $1 AND webhook_id = $2 AND status = 'pending' AND next_attempt_at <= now()
ORDER BY next_attempt_at, event_id LIMIT $3
"""
RECORD_DELIVERED: Final = """
UPDATE webhook_deliveries
SET status = 'delivered', attempts = attempts + 1, first_attempt_at = coalesce(first_attempt_at, now()),
    last_attempt_at = now(), last_outcome = $4, last_status = $5, finished_at = now()
WHERE tenant_id = $1 AND webhook_id = $2 AND event_id = $3 AND status = 'pending'
RETURNING true
"""
# The last try lies at the end of the period, however long the delay would be.
RECORD_FAILURE: Final = """
UPDATE webhook_deliveries d
SET status = CASE WHEN tried.ended THEN 'dead' ELSE 'pending' END,
    finished_at = CASE WHEN tried.ended THEN now() END,
    attempts = attempts + 1, first_attempt_at = tried.since, last_attempt_at = now(), last_outcome = $4,
    last_status = $5,
    next_attempt_at = LEAST(now() + make_interval(secs => $6), tried.since + make_interval(secs => $7))
FROM (
    SELECT since, since + make_interval(secs => $7) <= now() AS ended FROM (
        SELECT coalesce(first_attempt_at, now()) AS since FROM webhook_deliveries
        WHERE tenant_id = $1 AND webhook_id = $2 AND event_id = $3) AS stored
) AS tried
WHERE tenant_id = $1 AND webhook_id = $2 AND event_id = $3 AND status = 'pending' AND attempts = $8
RETURNING status
"""
RECORD_GONE: Final = """
UPDATE webhook_deliveries SET status = 'dead', finished_at = now(), last_outcome = coalesce(last_outcome, $3)
WHERE tenant_id = $1 AND webhook_id = $2 AND status = 'pending'
RETURNING true
"""
# Of an endpoint that has failed for the whole period, what has waited as long is dead, tried or not.
EXPIRE: Final = """
UPDATE webhook_deliveries d
SET status = 'dead', finished_at = now(), last_outcome = coalesce(last_outcome, 'expired')
FROM webhook_lanes lane
WHERE d.tenant_id = $1 AND d.webhook_id = $2 AND d.status = 'pending'
  AND d.queued_at <= now() - make_interval(secs => $3)
  AND lane.tenant_id = $1 AND lane.webhook_id = $2 AND lane.failing_since <= now() - make_interval(secs => $3)
RETURNING true
"""
LOCK_LANE: Final = """
SELECT true FROM webhook_lanes WHERE tenant_id = $1 AND webhook_id = $2 AND lease_id = $3 FOR UPDATE
"""
# A statement of its own after LOCK_LANE: it sees what was queued until the lock was there, and whoever queues later
# makes the lane due after it. Each lane is visited again in a while ($5), if only to be tidied.
RELEASE_LANE: Final = """
UPDATE webhook_lanes SET
    lease_id = NULL, leased_until = '-infinity', failures = $3::integer,
    failing_since = CASE WHEN $3::integer > 0 THEN coalesce(failing_since, now()) END,
    paused_until = now() + make_interval(secs => $4),
    due_at = LEAST(now() + make_interval(secs => $5), (
        SELECT min(next_attempt_at) FROM webhook_deliveries
        WHERE tenant_id = $1 AND webhook_id = $2 AND status = 'pending'
          AND EXISTS (SELECT FROM webhooks WHERE tenant_id = $1 AND id = $2 AND status = 'active')))
WHERE tenant_id = $1 AND webhook_id = $2
"""
RESEAL: Final = """
UPDATE webhooks SET secret_key_id = $4, secret_encrypted = $5
WHERE tenant_id = $1 AND id = $2 AND secret_encrypted = $3
"""
RESEAL_PREVIOUS: Final = """
UPDATE webhooks SET previous_secret_key_id = $4, previous_secret_encrypted = $5
WHERE tenant_id = $1 AND id = $2 AND previous_secret_encrypted = $3
"""
FORGET_PREVIOUS: Final = """
UPDATE webhooks SET previous_secret_key_id = NULL, previous_secret_encrypted = NULL, previous_secret_until = NULL
WHERE tenant_id = $1 AND id = $2 AND previous_secret_until <= now()
"""
DELETE_ENDED: Final = """
DELETE FROM webhook_deliveries d USING (
    SELECT event_id FROM webhook_deliveries
    WHERE tenant_id = $1 AND webhook_id = $2 AND status <> 'pending'
      AND finished_at < now() - make_interval(days => CASE status WHEN 'dead' THEN $4::integer ELSE $3::integer END)
    ORDER BY finished_at LIMIT $5
) AS ended
WHERE d.tenant_id = $1 AND d.webhook_id = $2 AND d.event_id = ended.event_id
"""
