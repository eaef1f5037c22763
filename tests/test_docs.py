"""The documentation names files, tests and sections that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
