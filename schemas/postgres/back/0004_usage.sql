-- Undoes 0004.
DROP TABLE tenant_usage, tenant_quota_usage, tenant_signals;
