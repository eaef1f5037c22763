-- Undoes 0009: positions are bound to no context.
DROP POLICY platform_rows ON stream_positions;
ALTER TABLE stream_positions NO FORCE ROW LEVEL SECURITY;
ALTER TABLE stream_positions DISABLE ROW LEVEL SECURITY;
