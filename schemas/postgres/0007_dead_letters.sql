-- An index of the dead letters: where each lies in Kafka, whose it is, and why it was refused. The bytes stay in Kafka.
--
-- The tenant is the record's key where that is a tenant's id; whatever cannot be attributed is the platform's.
CREATE TABLE dead_letters (
    tenant_id        uuid NOT NULL,
    letter_partition integer NOT NULL CHECK (letter_partition >= 0),
    letter_offset    bigint NOT NULL CHECK (letter_offset >= 0),
    role             text NOT NULL,
    reason           text NOT NULL,
    detail           text NOT NULL,
    origin_topic     text NOT NULL,
    origin_partition integer NOT NULL,
    origin_offset    bigint NOT NULL,
    attempts         integer NOT NULL CHECK (attempts >= 1),
    refused_at       timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, letter_partition, letter_offset)
);
CREATE INDEX dead_letters_by_time ON dead_letters (tenant_id, refused_at);
CALL protect_tenant_table('dead_letters');
GRANT SELECT, INSERT ON dead_letters TO settler_services;
