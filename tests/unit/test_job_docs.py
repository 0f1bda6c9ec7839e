"""docs/job-file.md says what the parser does: every element is described, every example is good."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmwrapper.job import guestfields, parse

DOCUMENT = (Path(__file__).parents[2] / "docs" / "job-file.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```xml\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.mark.parametrize("name", sorted(guestfields.NAMES | parse.TASK_ONLY | parse.HOST_ONLY))
def test_every_element_is_described(name: str) -> None:
    assert f"`{name}`" in DOCUMENT


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_are_good(example: str) -> None:
    findings = parse.examine(example.encode(), "job.xml")
    assert (findings.job is not None, findings.complaints) == (True, [])


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
