"""Style as a test: what the project has agreed on and no linter checks."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from tests.source_code import parsed

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "settler_streams"
LINES_MAX = 400
LONGER: dict[str, str] = {}
"""Modules that may exceed the limit: path to the reason, which has to be a good one."""
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b|\bNotImplementedError\b")
VAGUE = {"utils", "util", "helpers", "helper", "manager", "data", "info", "misc", "common"}


def files(*suffixes, under=ROOT):
    """Hidden folders are not looked into: other tests make and remove files there meanwhile."""
    found = []
    for folder, folders, names in os.walk(under):
        folders[:] = [
            name for name in folders if not (name.startswith(".") or name in ("node_modules", "dist", "build"))
        ]
        found += [Path(folder, name) for name in names if Path(name).suffix in suffixes and not name.startswith(".")]
    return sorted(found)


MODULES = files(".py", under=PACKAGE)
TESTS = files(".py", under=ROOT / "tests")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def dotted(node):
    """``a.b.c`` as text; empty for anything that is not a plain name."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def calls(path):
    return [(node.lineno, dotted(node.func)) for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]


def imported(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_there_is_something_to_check():
    assert len(MODULES) > 50
    assert len(TESTS) > 20


IMPURE = re.compile(
    r"^(time|random|secrets)\.|(^|\.)(uuid1|uuid4|uuid7)$|(^|\.)(now|utcnow|today)$|^(open|print|input)$"
)
IMPURE_MODULES = {
    "time",
    "random",
    "secrets",
    "os",
    "asyncio",
    "threading",
    "socket",
    "logging",
    "structlog",
    "pathlib",
}


def impurities(path):
    found = [f"{name_of(path)}:{line}: {call}()" for line, call in calls(path) if IMPURE.search(call)]
    return found + [f"{path.name}:{n}: imports {m}" for n, m in imported(path) if m.split(".")[0] in IMPURE_MODULES]


def test_the_core_knows_no_clock_no_chance_and_no_io():
    assert [line for path in MODULES if path.is_relative_to(PACKAGE / "core") for line in impurities(path)] == []


@pytest.mark.parametrize(
    ("code", "impure"),
    [
        ("time.time()", True),
        ("dt.datetime.now(dt.UTC)", True),
        ("dt.date.today()", True),
        ("random.random()", True),
        ("uuid.uuid4()", True),
        ("import time", True),
        ("from os import path", True),
        ("open('x')", True),
        ("dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)", False),
        ("uuid.uuid5(a, b)", False),
        ("event.time.timestamp()", False),
    ],
)
def test_the_check_itself_finds_what_it_should(tmp_path, monkeypatch, code, impure):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    module = tmp_path / "module.py"
    module.write_text(code)
    assert bool(impurities(module)) == impure


def test_no_module_is_longer_than_agreed():
    long = {name_of(p): n for p in MODULES if (n := len(p.read_text(encoding="utf-8").splitlines())) > LINES_MAX}
    assert {path: lines for path, lines in long.items() if path not in LONGER} == {}
    assert set(LONGER) <= set(long), "an exception that is no longer needed"
    assert all(LONGER.values())


def test_every_module_says_what_it_is():
    """Empty ``__init__`` files say nothing because nothing is in them."""
    silent = [name_of(p) for p in MODULES + TESTS if (tree := parsed(p)).body and not ast.get_docstring(tree)]
    assert silent == []


def test_no_exception_is_caught_bare_or_swallowed():
    found = []
    for path in MODULES + TESTS:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                found.append(f"{name_of(path)}:{node.lineno}: bare except")
            elif dotted(node.type) in ("Exception", "BaseException") and all(
                isinstance(statement, ast.Pass | ast.Continue) for statement in node.body
            ):
                found.append(f"{name_of(path)}:{node.lineno}: swallows {dotted(node.type)}")
    assert found == []


POLLS = {
    "tests/services/containers.py": "a container's service has no signal that it is ready; bounded by READY_S_MAX",
}
"""Fixtures that ask an outside service again and again until it answers: path to why, and what bounds it."""


def sleeps(path):
    """Where a module waits for time to pass. ``sleep(0)`` is no wait: it lets other tasks run once."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "sleep":
            argument = node.args[0] if node.args else None
            if not (isinstance(argument, ast.Constant) and argument.value == 0):
                yield f"{name_of(path)}:{node.lineno}"


def test_no_test_sleeps():
    found = [place for path in TESTS for place in sleeps(path)]
    assert [place for place in found if place.partition(":")[0] not in POLLS] == []
    assert {place.partition(":")[0] for place in found} == set(POLLS), "an exception that is no longer needed"
    assert not [path for path in POLLS if Path(path).name.startswith("test_")]


def test_nothing_is_left_unfinished():
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:80]}"
        for path in files(".py", ".sql", ".yaml", ".yml", ".toml", ".md", ".json", ".lua")
        if path.name != "test_tidy.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert found == []


def test_no_module_has_a_name_that_says_nothing():
    assert [name_of(path) for path in MODULES + TESTS if path.stem in VAGUE] == []


def test_test_files_have_names_of_their_own():
    names = [path.stem for path in TESTS if path.stem not in ("__init__", "__main__", "conftest")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
