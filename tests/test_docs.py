"""The documentation names files, tests and sections that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from settler_streams.topology import FOREVER_MS, load_topology

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAMED = re.compile(r"`([\w./-]+\.(?:py|yaml|yml|sql|lua))(?:::(\w+))?`")
LINK = re.compile(r"\]\(([^)]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
GIVEN_BY_THE_READER = {"producer.py", "consumer.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    missing = []
    for name, test in NAMED.findall(page.read_text(encoding="utf-8")):
        if name in GIVEN_BY_THE_READER:
            continue
        found = [path for folder in ("", "settler_streams", "tests") if (path := ROOT / folder / name).is_file()]
        if not found or (test and f"def {test}(" not in found[0].read_text(encoding="utf-8")):
            missing.append(f"{name}::{test}" if test else name)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, section = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        if not target.exists() or (section and section not in sections(target)):
            broken.append(link)
    assert broken == []


def test_every_alert_links_a_section_of_the_runbook() -> None:
    rules = (ROOT / "monitoring" / "prometheus-rules.yml").read_text(encoding="utf-8")
    linked = re.findall(r"runbook_url: docs/SRE_RUNBOOK\.md#(\S+)", rules)
    assert linked
    assert set(linked) <= sections(ROOT / "docs" / "SRE_RUNBOOK.md")


def sections(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_guarantees_say_of_every_topic_how_long_an_erased_tenants_records_stay() -> None:
    guarantees = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    section = guarantees.partition("## What an erasure leaves")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    said = {topic: stays.strip() for names, stays in rows for topic in re.findall(r"`([\w-]+)`", names)}
    topics = {topic.name: topic for topic in load_topology().topics if topic.events or topic.name == "dead-letters"}
    assert said.keys() == topics.keys() - {"clock-ticks"}
    for name, stays in said.items():
        topic = topics[name]
        if "compact" in topic.cleanup:
            assert stays.startswith("a tombstone"), name
        elif topic.retention_ms == FOREVER_MS:
            assert stays.startswith("for ever"), name
        else:
            days = topic.retention_ms // 86_400_000
            assert stays.startswith(f"{days} day{'s' * (days > 1)}, "), name
