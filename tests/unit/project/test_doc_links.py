"""Links in the documents lead somewhere: to a file that is there, and to a heading that it has."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SKIPPED = {".venv", ".cache", ".git", "node_modules"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not SKIPPED & set(path.relative_to(ROOT).parts))
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
PATH_IN_TEXT = re.compile(r"(?<![\w/.-])docs/[\w/.-]+\.(?:md|svg)")
SOURCES = sorted(
    path
    for folder in ("vmwrapper", "vmcontrol", "guest", "tests", "tools", "bench", "examples", "packaging", ".github")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix != ".pyc"
)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them: lower case, no punctuation, blanks become hyphens."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        seen = found.get(anchor, 0)
        found[anchor] = seen + 1
        result.add(f"{anchor}-{seen}" if seen else anchor)
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    wrong = []
    for first, second in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        link = first or second
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            wrong.append(link)
    assert wrong == []


def test_every_page_that_a_source_or_a_document_names_is_there() -> None:
    named = {
        (path.relative_to(ROOT), name)
        for path in [*SOURCES, *PAGES, ROOT / "pyproject.toml"]
        for name in PATH_IN_TEXT.findall(path.read_text(encoding="utf-8", errors="replace"))
    }
    of_others = {"docs/interop/qcow2.rst", "docs/interop/qmp-spec.txt"}
    assert [one for one in sorted(named) if one[1] not in of_others and not (ROOT / one[1]).is_file()] == []
    assert len(named) > 20


ROOMS = sorted(
    path.parent.relative_to(ROOT)
    for program in ("vmwrapper", "vmcontrol", "guest")
    for path in (ROOT / program).glob("*/__init__.py")
)


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_every_room_is_in_the_architecture_and_in_its_picture(room: Path) -> None:
    internals = ROOT / "docs" / "internals"
    assert f"`{room.as_posix()}`" in (internals / "architecture.md").read_text(encoding="utf-8")
    assert f">{room.name}<" in (internals / "rooms.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_of_the_code_that_a_page_names_is_there(page: Path) -> None:
    paths = re.findall(
        r"`((?:vmwrapper|vmcontrol|guest|tests|tools|packaging|bench|examples)/[\w./-]+)`",
        page.read_text(encoding="utf-8"),
    )
    assert [path for path in paths if not re.search(r"ROOM|NAME", path) and not (ROOT / path).exists()] == []
