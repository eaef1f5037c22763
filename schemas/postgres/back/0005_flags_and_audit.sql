-- Undoes 0005.
DROP TABLE feature_flags, audit_logs;
