-- Undoes 0002: without it there are no tenants.
DROP TABLE webhooks, domains, api_keys, users, tenant_slugs, tenants;
DROP FUNCTION register_slug();
