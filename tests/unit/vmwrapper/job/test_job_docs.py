"""job-file.md and quickstart.md say what the parser does: every element is described, every example is good."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmwrapper.job import guestfields, hostfields, parse

ROOT = Path(__file__).parents[4]
DOCUMENT = (ROOT / "docs" / "projects" / "job-file.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "docs" / "projects" / "quickstart.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```xml\n(<job_desc>.*?)```", DOCUMENT + QUICKSTART, re.DOTALL)
NAMES = parse.JOB_ELEMENTS | hostfields.HOST_TASK | guestfields.NAMES | {"zipfilename", "filename"}
JOB_FILES = sorted((ROOT / "examples").rglob("job*.xml"))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_element_is_described(name: str) -> None:
    assert f"`{name}`" in DOCUMENT


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_are_good(example: str) -> None:
    findings = parse.examine(example.encode(), "job.xml")
    assert (findings.job is not None, findings.complaints) == (True, [])


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.name)
def test_the_example_files_are_good(path: Path) -> None:
    findings = parse.examine(path.read_bytes(), path.name)
    assert (findings.job is not None, findings.complaints) == (True, [])


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
    assert JOB_FILES
