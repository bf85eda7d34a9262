"""docs/README.md, which GitHub shows for the folder, leads to every page of it."""
import re

import pytest
from test_docs import ROOT

DOCS = ROOT / "docs"
INDEX = (DOCS / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \| (.+) \|$", INDEX, re.MULTILINE)


def test_every_page_is_on_it_once():
    pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path != DOCS / "README.md")
    listed = [link for _, link, _ in ROWS if link.endswith(".md")]
    assert sorted(listed) == pages, f"a row in docs/README.md for each page: {sorted(set(pages) ^ set(listed))}"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", INDEX))
def test_links_lead_somewhere(link):
    assert (DOCS / link).exists()


def test_every_row_says_something_and_the_readers_are_there():
    assert all(len(title) > 3 and len(says) > 20 for title, _, says in ROWS) and len(ROWS) > 20
    headings = re.findall(r"^## (.+)$", INDEX, re.MULTILINE)
    assert [heading.split()[1] for heading in headings[:3]] == ["learners", "practitioners", "researchers"]
