-- Jobs and their results. `jobs` and `executions` are projected from topics; `matches`, `unmatched` and `reports` are
-- written by executors. They come from different writers in any order, so no foreign key ties one to another.

-- One row per job, filled from two topics: the decision columns from job decisions, the result columns from job
-- results. Each side writes its own columns only, and only with a newer version of its own source (the offset of the
-- record), so either may come first and neither overwrites the other. `status` follows from both and is never
-- written: once an outcome is there, no late decision can take the job back.
CREATE TABLE jobs (
    tenant_id        uuid NOT NULL,
    job_id           uuid NOT NULL,

    kind             text,
    priority         text CHECK (priority IN ('low', 'normal', 'high', 'critical')),
    decision         text CHECK (decision IN ('admitted', 'rejected')),
    reason           text,
    current_usage    bigint,
    limit_value      bigint,
    retry_after_ms   bigint CHECK (retry_after_ms >= 0),
    requested_at     timestamptz,
    decided_at       timestamptz,
    decision_version bigint CHECK (decision_version >= 0),

    outcome          text CHECK (outcome IN ('succeeded', 'failed', 'cancelled', 'expired')),
    accepted_attempt integer CHECK (accepted_attempt >= 1),
    finished_at      timestamptz,
    result_version   bigint CHECK (result_version >= 0),

    status           text NOT NULL GENERATED ALWAYS AS (coalesce(outcome, decision)) STORED,

    PRIMARY KEY (tenant_id, job_id),
    CHECK ((decision IS NULL) = (decision_version IS NULL)),
    CHECK ((outcome IS NULL) = (result_version IS NULL))
);
CREATE INDEX jobs_by_status ON jobs (tenant_id, status, decided_at);
CALL protect_tenant_table('jobs');
GRANT SELECT, INSERT, UPDATE ON jobs TO settler_services;

CREATE TABLE executions (
    tenant_id      uuid NOT NULL,
    job_id         uuid NOT NULL,
    attempt        integer NOT NULL CHECK (attempt >= 1),
    executor       text NOT NULL,
    status         text NOT NULL CHECK (status IN ('running', 'succeeded', 'failed', 'cancelled', 'expired')),
    started_at     timestamptz,
    finished_at    timestamptz,
    worker_us      bigint CHECK (worker_us >= 0),
    error          text,
    source_version bigint NOT NULL CHECK (source_version >= 0),
    PRIMARY KEY (tenant_id, job_id, attempt)
);
CALL protect_tenant_table('executions');
GRANT SELECT, INSERT, UPDATE ON executions TO settler_services;

-- One row per match: a left record and the right record, or records, that it settles. `right_amount_minor` is their sum;
-- across currencies there is no difference.
CREATE TABLE matches (
    tenant_id          uuid NOT NULL,
    job_id             uuid NOT NULL,
    attempt            integer NOT NULL CHECK (attempt >= 1),
    match_no           bigint NOT NULL,
    kind               text NOT NULL,
    left_id            text NOT NULL,
    right_ids          text[] NOT NULL CHECK (cardinality(right_ids) >= 1),
    left_currency      text NOT NULL CHECK (left_currency ~ '^[A-Z]{3}$'),
    right_currency     text NOT NULL CHECK (right_currency ~ '^[A-Z]{3}$'),
    left_amount_minor  bigint NOT NULL,
    right_amount_minor bigint NOT NULL,
    difference_minor   bigint,
    PRIMARY KEY (tenant_id, job_id, attempt, match_no)
);
CALL protect_tenant_table('matches');
GRANT SELECT, INSERT, DELETE ON matches TO settler_services;

-- One row per record without a partner. `record_no` is its place in its set, from 1. A record that could not be read
-- has a detail, and no currency, amount or date.
CREATE TABLE unmatched (
    tenant_id    uuid NOT NULL,
    job_id       uuid NOT NULL,
    attempt      integer NOT NULL CHECK (attempt >= 1),
    row_no       bigint NOT NULL,
    side         text NOT NULL CHECK (side IN ('left', 'right')),
    record_no    bigint NOT NULL CHECK (record_no >= 1),
    record_id    text,
    currency     text CHECK (currency ~ '^[A-Z]{3}$'),
    amount_minor bigint,
    record_date  date,
    reason       text NOT NULL,
    detail       text,
    PRIMARY KEY (tenant_id, job_id, attempt, row_no)
);
CALL protect_tenant_table('unmatched');
GRANT SELECT, INSERT, DELETE ON unmatched TO settler_services;

-- One row per currency. The books balance to the last minor unit, or the row is refused.
CREATE TABLE reports (
    tenant_id             uuid NOT NULL,
    job_id                uuid NOT NULL,
    attempt               integer NOT NULL CHECK (attempt >= 1),
    currency              text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    matches               bigint NOT NULL CHECK (matches >= 0),
    left_rows             bigint NOT NULL CHECK (left_rows >= 0),
    left_rows_matched     bigint NOT NULL CHECK (left_rows_matched >= 0),
    left_rows_unmatched   bigint NOT NULL CHECK (left_rows_unmatched >= 0),
    left_total_minor      bigint NOT NULL,
    left_matched_minor    bigint NOT NULL,
    left_unmatched_minor  bigint NOT NULL,
    right_rows            bigint NOT NULL CHECK (right_rows >= 0),
    right_rows_matched    bigint NOT NULL CHECK (right_rows_matched >= 0),
    right_rows_unmatched  bigint NOT NULL CHECK (right_rows_unmatched >= 0),
    right_total_minor     bigint NOT NULL,
    right_matched_minor   bigint NOT NULL,
    right_unmatched_minor bigint NOT NULL,
    PRIMARY KEY (tenant_id, job_id, attempt, currency),
    CHECK (left_rows = left_rows_matched + left_rows_unmatched),
    CHECK (right_rows = right_rows_matched + right_rows_unmatched),
    CHECK (left_total_minor = left_matched_minor + left_unmatched_minor),
    CHECK (right_total_minor = right_matched_minor + right_unmatched_minor)
);
CALL protect_tenant_table('reports');
GRANT SELECT, INSERT, DELETE ON reports TO settler_services;

-- What readers use: the rows of the attempt that the scheduler accepted, and no other.
CREATE VIEW accepted_matches WITH (security_invoker = true) AS
SELECT m.* FROM matches m
JOIN jobs j ON j.tenant_id = m.tenant_id AND j.job_id = m.job_id AND j.accepted_attempt = m.attempt;

CREATE VIEW accepted_unmatched WITH (security_invoker = true) AS
SELECT u.* FROM unmatched u
JOIN jobs j ON j.tenant_id = u.tenant_id AND j.job_id = u.job_id AND j.accepted_attempt = u.attempt;

CREATE VIEW accepted_reports WITH (security_invoker = true) AS
SELECT r.* FROM reports r
JOIN jobs j ON j.tenant_id = r.tenant_id AND j.job_id = r.job_id AND j.accepted_attempt = r.attempt;

GRANT SELECT ON accepted_matches, accepted_unmatched, accepted_reports TO settler_services;
