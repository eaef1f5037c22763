-- Undoes 0006.
DROP TABLE outbox, stream_positions;
