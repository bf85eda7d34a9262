"""Links: those of the README stand alone (PyPI shows it without the tree), those of the pages lead to what is there.

Whatever names our own address is held to the one in setup.cfg and to a file of this tree; links of pages in docs/ are
relative, and lead to a file, and to a heading of it where they name one.
"""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def prose(text):
    """The text without fenced blocks and code, where brackets are no links."""
    without_blocks = re.sub(r"^(\s*)(`{3,}|~{3,}).*?^\s*\2[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", without_blocks, flags=re.DOTALL)


def definitions(text):
    """Name to address, of the lines `[name]: address`."""
    return dict(re.findall(r"^ {0,3}\[([^\]]+)\]: (\S+)", text, re.MULTILINE))


def links(text):
    """Every address that the prose of a page leads to, pictures included."""
    text = prose(text)
    inline = re.findall(r"\]\(\s*<?([^)>\s]+)>?[^)]*\)", text)
    return inline + list(definitions(text).values()) + re.findall(r"<(https?://[^>\s]+)>", text)


def headings(text):
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL),
                            re.MULTILINE):
        found.append(re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-"))
    return found


@pytest.fixture(scope="module")
def address():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser["metadata"]["url"]


def place_in_the_tree(link, address):
    """The file or folder of this tree that a link of our own address shows, or None for the address itself."""
    for kind in ("/blob/main/", "/tree/main/"):
        if link.startswith(address + kind):
            return ROOT / link[len(address + kind):].partition("#")[0]
    raw = address.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    if link.startswith(raw):
        return ROOT / link[len(raw):]
    assert link in (address, address + "/issues"), f"{link}: not an address of a file, say {address}/blob/main/PATH"
    return None


def is_ours(link):
    return re.match(r"https?://(raw\.)?github\w*\.com/.*minilora", link) is not None


def test_readme_links_work_where_the_tree_is_not():
    assert [link for link in links(README.read_text(encoding="utf-8")) if not link.startswith("https://")] == []


def test_readme_links_lead_to_files_of_the_tree(address):
    text = README.read_text(encoding="utf-8")
    ours = [link for link in links(text) if is_ours(link)] + re.findall(r"git clone (\S+)", text)
    assert len(ours) > 30
    for link in ours:
        place = place_in_the_tree(link, address)
        assert place is None or place.exists(), f"{link}: no such file in the tree"
        assert place is None or place.is_dir() == ("/tree/" in link), f"{link}: blob is a file, tree a folder"


def test_readme_defines_what_it_names_and_names_what_it_defines():
    text = prose(README.read_text(encoding="utf-8"))
    named = {reference or name for name, reference in re.findall(r"\[([^\]]+)\]\[([^\]]*)\]", text)}
    defined = definitions(text)
    assert named == set(defined)
    paths = {name: link.partition("/main/")[2] for name, link in defined.items() if name != "picture"}
    assert {name: name.rstrip("/") for name in paths} == paths  # a name is the path it leads to


def test_readme_leads_to_every_page(address):
    reached = {place_in_the_tree(link, address) for link in links(README.read_text(encoding="utf-8")) if is_ours(link)}
    assert [page.name for page in PAGES if page not in reached] == []


def test_project_urls_are_of_the_one_address(address):
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    urls = dict(re.split(r"\s*=\s*", line) for line in parser["metadata"]["project_urls"].splitlines() if line)
    assert set(urls) == {"Documentation", "Source", "Changelog", "Issues"}
    for link in urls.values():
        place = place_in_the_tree(link, address)
        assert place is None or place.exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            assert not is_ours(link), f"{page.name}: {link}: a page of docs/ links its neighbours as files"
            continue
        name, _, heading = link.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {link} leads to no file"
        if heading:
            assert heading in headings(place.read_text(encoding="utf-8")), f"{page.name}: {link} leads to no heading"


@pytest.mark.parametrize("text, found", [
    ("see [a](b.md) and ![c](d.png \"title\")", ["b.md", "d.png"]),
    ("`[a](b.md)` is code\n```\n[a](b.md)\n```\n", []),
    ("``a ` [x](y)`` [z](w#v)", ["w#v"]),
    ("[a][]\n\n[a]: https://x.org/a\n", ["https://x.org/a"]),
    ("x[0](1) in `x[0](1)`", ["1"]),
])
def test_links_are_found(text, found):
    assert links(text) == found


def test_anchors_are_those_of_github():
    assert headings("# A b\n## The `x.y` of *z*: 1.2\n```\n# no\n```\n### it's\n") == ["a-b", "the-xy-of-z-12", "its"]
