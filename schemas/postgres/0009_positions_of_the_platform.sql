-- Positions are moved in the platform's context alone. In a tenant's context, whatever statement was smuggled into it
-- neither rewinds a consumer, nor lets it pass over everybody's records, nor sees how far it has come.

ALTER TABLE stream_positions ENABLE ROW LEVEL SECURITY;
ALTER TABLE stream_positions FORCE ROW LEVEL SECURITY;
CREATE POLICY platform_rows ON stream_positions
    USING ((SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) = '00000000-0000-0000-0000-000000000000')
    WITH CHECK (
        (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) = '00000000-0000-0000-0000-000000000000');
