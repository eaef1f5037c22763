-- Where Postgres and Kafka meet.

-- Events that have to reach Kafka because a transaction committed. Written in the tenant's context with the change
-- itself, deleted by the relay once Kafka has acknowledged them. A relay that dies in between publishes an event
-- again; its id is in the event, and the tenant's version makes the repetition harmless.
CREATE TABLE outbox (
    tenant_id  uuid NOT NULL,
    id         bigint GENERATED ALWAYS AS IDENTITY,
    topic      text NOT NULL,
    key        text NOT NULL,
    event      bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);

-- The relay reads across tenants. It could do so through a SECURITY DEFINER function, but that works only if the owner
-- happens to bypass row-level security, and it hides who reads. Asking each tenant in turn costs a query per tenant
-- that has nothing to say. So the relay is a role: it can read and delete rows of this table and nothing else in the
-- database, and only in the platform's context (nil UUID). The services' login may switch to it (SET LOCAL ROLE) but
-- does not inherit it, so a query in a tenant's context never meets this policy. The services themselves can only
-- append here.
ALTER TABLE outbox ENABLE ROW LEVEL SECURITY;
ALTER TABLE outbox FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_rows ON outbox
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid))
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
CREATE POLICY relay_rows ON outbox TO settler_relay
    USING ((SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) = '00000000-0000-0000-0000-000000000000')
    WITH CHECK (false);
CREATE POLICY tenant_rows_only ON outbox AS RESTRICTIVE
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           OR (current_user = 'settler_relay'
               AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
                   = '00000000-0000-0000-0000-000000000000'))
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
GRANT INSERT ON outbox TO settler_services;
GRANT SELECT, DELETE ON outbox TO settler_relay;

-- How far each consumer has come; moved in the transaction that holds the effects of the batch. Not tenant data.
-- Kafka's id of the topic is part of the key: a topic that was deleted and made again starts without a position
-- instead of with a wrong one.
CREATE TABLE stream_positions (
    consumer    text NOT NULL,
    topic_id    uuid NOT NULL,
    topic       text NOT NULL,
    partition   integer NOT NULL CHECK (partition >= 0),
    next_offset bigint NOT NULL CHECK (next_offset >= 0),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, topic_id, partition)
);
GRANT SELECT, INSERT ON stream_positions TO settler_services;
GRANT UPDATE (next_offset, updated_at) ON stream_positions TO settler_services;
