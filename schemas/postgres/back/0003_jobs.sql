-- Undoes 0003.
DROP VIEW accepted_matches, accepted_unmatched, accepted_reports;
DROP TABLE jobs, executions, matches, unmatched, reports;
