"""An output that is not where the client looks for it is explained in stderr.txt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slots import PlayedClient, TestSlot


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    (tmp_path / "slot").mkdir()
    (tmp_path / "project").mkdir()
    slot = TestSlot(tmp_path / "slot")
    for name in ("out", "in"):
        slot.write(name, f"<soft_link>../project/{name}_0</soft_link>\n")
    (tmp_path / "project" / "in_0").write_text("input\n")
    PlayedClient(slot)
    yield slot
    slot.clean()


def story_after(slot: TestSlot, script: str) -> list[str]:
    script = script.replace(">", "&gt;").replace("&&", "&amp;&amp;")
    slot.job(
        "<task><application>sh</application>"
        f"<command_line>-c '{script}'</command_line><stdout_filename>out</stdout_filename></task>"
    )
    assert slot.start(program=[sys.executable, "-m", "vmwrapper"]).wait(30) == 0
    return [line for line in slot.text("stderr.txt").splitlines() if "WARNING" in line]


def test_what_is_where_its_link_leads_needs_no_line(slot: TestSlot) -> None:
    assert story_after(slot, "echo hello && mv in used") == [], "what becomes of an input is nobody's business"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("rm ../project/out_0; echo hello > tmp; mv tmp out", "replaced the client's link by a file of its own"),
        ("rm ../project/out_0; echo hello > tmp; ln -sf tmp out", "replaced the client's link by a file of its own"),
        ("rm ../project/out_0 out", "removed the client's link"),
        ("rm ../project/out_0", "not written: out. Unless it is optional"),
    ],
)
def test_what_is_not_gets_one_line(slot: TestSlot, script: str, words: str) -> None:
    (line,) = story_after(slot, script)
    assert words in line
    assert line.endswith('the client will report "upload failure"')


def test_what_was_written_before_the_link_was_replaced_is_what_is_uploaded(slot: TestSlot) -> None:
    (line,) = story_after(slot, "echo first; echo second > tmp; mv tmp out")
    assert "what is uploaded is what was written to" in line
    assert (slot.folder.parent / "project" / "out_0").read_text() == "first\n"
