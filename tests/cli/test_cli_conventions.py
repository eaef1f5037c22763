"""What holds for every command: environment twins, JSON, exit codes, errors that say what to do next."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from settler_streams.cli import main as entry
from settler_streams.cli.main import COMMANDS, settler
from settler_streams.cli.output import EXIT_CODES, print_table
from settler_streams.dev.stack.stack import GIVEN_BY
from settler_streams.dev.stack.state import State, StateFile
from settler_streams.errors import Disposition
from settler_streams.events import REGISTRY, QuotaType
from tests.cli.in_process import logs_as_they_were

UNTIL_STOPPED = {"worker", "executor", "courier", "gateway"}
FOR_PEOPLE = {"demo"}
TENANT, KEY = "0190a1b2-c3d4-7e5f-8a6b-9c0d1e2f3a4b", "0190a1b2-c3d4-7e5f-8a6b-9c0d1e2f3a4c"


def leaves() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        yield from under(name, settler.get_command(click.Context(settler), name))  # type: ignore[attr-defined]


def under(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for sub, nested in command.commands.items():
        yield from under(f"{name} {sub}", nested)


LEAVES = dict(leaves())


@pytest.mark.parametrize("name", LEAVES)
def test_every_flag_has_an_environment_twin_in_its_help(name: str) -> None:
    shown = CliRunner().invoke(settler, [*name.split(), "--help"], terminal_width=400)
    assert shown.exit_code == 0
    for option in LEAVES[name].params:
        if isinstance(option, click.Option):
            assert option.envvar, f"{name} {option.opts}"
            assert str(option.envvar) in shown.output
            assert option.help, f"{name} {option.opts}"
    assert LEAVES[name].help


@pytest.mark.parametrize("name", sorted(LEAVES.keys() - UNTIL_STOPPED - FOR_PEOPLE))
def test_every_command_speaks_json(name: str) -> None:
    assert "--json" in {opt for option in LEAVES[name].params for opt in option.opts}


def test_every_disposition_has_an_exit_code_of_its_own() -> None:
    assert set(EXIT_CODES) == set(Disposition)
    assert len(set(EXIT_CODES.values()) - {0, 2, 3}) == len(Disposition)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["settler", *arguments])
    with logs_as_they_were(), pytest.raises(SystemExit) as ended:
        entry.main()
    return int(ended.value.code or 0)


def test_schemas_are_where_they_are_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SETTLER_JSON", "1")
    assert run(monkeypatch, "schemas") == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["events"]) == set(REGISTRY)
    for event_type, path in printed["events"].items():
        assert json.loads(Path(path).read_bytes())["title"] == event_type


def test_a_system_that_is_not_up_is_reported_and_creates_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "status", "--json", "--state-dir", str(tmp_path / "none")) == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["running"] is False
    assert {"kafka", "postgres_owner_url", "postgres_app_url", "redis_url", "gateway_url", "metrics_url"} <= set(
        printed
    )
    assert run(monkeypatch, "down", "--state-dir", str(tmp_path / "none")) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (("dlq", "redrive"), 4, "settler dlq list"),
        (("worker", "--roles", "admission,barista"), 4, "no such roles: barista; there are admission"),
        (("topology", "check", "--sideways"), 2, "No such option"),
        (("tenants", "keys", "scopes", TENANT, KEY), 2, "Missing option '--scope'"),
        (("tenants", "keys", "expiry", TENANT, KEY), 4, "either --days or --never"),
        (("tenants", "keys", "expiry", TENANT, KEY, "--days", "9", "--never"), 4, "either --days or --never"),
        (("brew",), 2, "No such command"),
    ],
)
def test_errors_say_what_to_do_and_have_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    hint: str,
) -> None:
    monkeypatch.setenv("SETTLER_KEY_SCOPES", "jobs:read")  # what new keys may do, and for how long, changes no old one
    monkeypatch.setenv("SETTLER_KEY_DAYS", "9")
    assert run(monkeypatch, *arguments) == code
    printed = capsys.readouterr()
    assert hint in printed.err
    assert "Traceback" not in printed.err


def test_an_unreachable_broker_is_worth_another_try(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    assert run(monkeypatch, "topology", "plan", "--state-dir", str(tmp_path / "none")) == 75
    assert "Kafka at 127.0.0.1:1 did not answer" in capsys.readouterr().err


def test_a_local_system_that_is_not_up_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in GIVEN_BY.values():
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "services").mkdir()
    StateFile(tmp_path / "services" / "state.json").save(State())
    assert run(monkeypatch, "dlq", "list", "--state-dir", str(tmp_path)) == 75
    assert "`settler up` starts it" in capsys.readouterr().err


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DB_PORT", "many")
    assert run(monkeypatch, "gateway") == 1
    assert "DB_PORT" in capsys.readouterr().err


def test_a_cell_with_several_things_shows_them_as_people_write_them(capsys):
    quotas = {QuotaType.STORAGE: 1_000_000, QuotaType.RATE_LIMIT: 5}
    print_table(("", ""), {"quotas": quotas, "steps": ["folds", "rows"], "parent_id": None, "version": 4}.items())
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "quotas     storage=1000000, rate_limit=5",
        "steps      folds, rows",
        "parent_id",
        "version    4",
    ]


@pytest.mark.parametrize("width", [80, 40])
def test_a_terminal_cuts_no_value_and_takes_none_for_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    url = "https://hooks.example/[b]/:key:/" + "0123456789" * 9
    print_table(("id", "url"), [(KEY, url)])
    _, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == width
    ends = lines[0].index("  ")
    assert "".join(line[:ends].rstrip() for line in lines) == KEY
    assert "".join(line[ends + 2 :].rstrip() for line in lines) == url
    assert (ends == len(KEY)) is (width == 80)


def test_without_a_terminal_a_row_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("id", "url"), [(KEY, "u" * 2000)])
    assert capsys.readouterr().out.splitlines()[1] == f"{KEY}  {'u' * 2000}"
