-- Undoes 0001. The roles stay: they belong to the cluster.
DROP PROCEDURE protect_tenant_table(regclass, name);
REVOKE SELECT ON schema_migrations FROM settler_services;
ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON ROUTINES TO PUBLIC;
