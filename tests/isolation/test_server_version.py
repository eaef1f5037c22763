"""No schema is brought to a server whose row-level security is known to have a hole."""

from __future__ import annotations

import pytest

from settler_streams.adapters.postgres import migrations
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.server_version import refuse_unsafe
from settler_streams.errors import ConfigurationError


@pytest.mark.parametrize("version", [130022, 140019, 150014, 160010, 170006, 170010, 180000, 180006, 190000])
def test_a_server_without_known_holes_is_accepted(version):
    refuse_unsafe(version)


@pytest.mark.parametrize("version", [90624, 120022, 130021, 140018, 150003, 150013, 160004, 160009, 170000, 170005])
def test_a_server_with_a_known_hole_is_refused(version):
    with pytest.raises(ConfigurationError, match="upgrade to"):
        refuse_unsafe(version)


@pytest.mark.services
async def test_migrate_asks_the_server_before_it_makes_anything(cluster_settings, owner, monkeypatch):
    running = await owner.fetchval("SELECT current_setting('server_version_num')::integer")

    def refuse(version):
        assert version == running
        raise ConfigurationError("upgrade")

    monkeypatch.setattr(migrations, "refuse_unsafe", refuse)
    settings = cluster_settings.model_copy(update={"db_name": "never_made"})
    with pytest.raises(ConfigurationError, match="upgrade"):
        await migrate(settings)
    assert not await owner.fetchval("SELECT count(*) FROM pg_database WHERE datname = 'never_made'")
