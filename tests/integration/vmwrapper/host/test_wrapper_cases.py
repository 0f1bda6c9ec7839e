"""Jobs that BOINC's `wrapper` runs, run by vmwrapper: the outcome is what `wrapper` had.

The jobs are those of tools/wrapper_cases.py, which tools/compare_with_wrapper.py runs with the real `wrapper` too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tools import compare_with_wrapper
from tools.compare_with_wrapper import lay_out, run
from tools.wrapper_cases import IGNORED, Case

VMWRAPPER = [sys.executable, "-m", "vmwrapper"]
LATIN = os.fsdecode("aus_ä".encode("latin-1"))
OUTCOMES: dict[str, dict[str, str]] = {
    "a setenv without =": {"out": "none|none\n"},
    "an empty setenv": {"out": "none\n"},
    "a setenv twice": {"out": "1\n"},
    "a good and a bad pattern": {"z": "archive of {'ab': b'\\n'}"},
    "names in ISO-8859-1": {f"project/{LATIN}_7": "in\nthere\n"},
    "names in UTF-8, and Windows' line ends": {"out": "in\n"},
    "a byte order mark": {"out": "a\n"},
    "a job file of 2 MB": {"out": "a\na\n"},
    "--device 0,1": {"out": "[0]\n"},
    "--nthreads x": {"out": "[0]\n"},
    "a folder with &": {"out": "p\n"},
    "a folder in ISO-8859-1": {"out": "0\n"},
    "preferences: <motd>one<br>two</motd>": {"out": "0 $GPU_DEVICE_NUM\n"},
    "preferences: <slot>9</slot>": {"out": "0 $GPU_DEVICE_NUM\n"},
    "an archive: UTF-8 without the flag": {"out": "a\n"},
    "an archive: cp437": {"out": "a\n"},
    "an archive: job.xml inside": {"out": "a\n"},
    "an archive: a link that nobody follows": {"out": "a\n"},
    "an archive: a link inside": {"out": "a\n"},
    "an archive: odd members": {
        "out": "./A_o\n./a_o\n./abs/y_o\n./d\\z_o\n./lib/x_o\n./twice_o\n1",
        "twice_o": "4",
        "d\\z_o": "7",
        "abs/y_o": "2",
    },
    "an archive: out of the slot": {"out": "a\n"},
    "job.xml edited: a comment": {"out": "one\ntwo\ntwo\nthree\n"},
    "job.xml edited: a task appended": {"out": "one\ntwo\ntwo\nthree\n"},
}
"""By the job's name; files of the slot, in `project/` those of the project's folder."""


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[bytes, Case]]:
    return {name: case for name, case in compare_with_wrapper.cases().items() if name in OUTCOMES}


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_outcome_is_that_of_boincs_wrapper(tmp_path: Path, cases: dict[str, tuple[bytes, Case]], name: str) -> None:
    job, case = cases[name]
    slot = lay_out(tmp_path / "run", job, case)
    outcome = run(VMWRAPPER, slot, case)
    story = (slot / "stderr.txt").read_text(errors="replace")
    assert (outcome.status, outcome.finish, outcome.left) == ("0", "0", 0), story
    assert {one: outcome.files.get(one) for one in OUTCOMES[name]} == OUTCOMES[name], story
    assert not list(tmp_path.rglob("evil"))


def test_everything_that_wrapper_ignores_is_told_and_found_by_check(tmp_path: Path) -> None:
    """Each in a task of its own, all in one job."""
    from vmwrapper.job import parse

    tasks = "\n".join(f"<task><application>p</application>{one}</task>" for one in IGNORED if one != "<task>")
    findings = parse.examine(f"<job_desc>\n{tasks}\n</job_desc>".encode(), "job.xml")
    assert findings.job is not None, findings.errors
    lines = {complaint.line for complaint in findings.complaints}
    good = {"<weight>0x2</weight>", "<command_line>1</command_line><command_line/>"}
    wanted = {line for line, one in enumerate((one for one in IGNORED if one != "<task>"), 2) if one not in good}
    assert lines >= wanted, [findings.complaints]


@pytest.mark.parametrize("runtime", ["library", "python"])
def test_both_runtimes_read_the_same_init_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    if runtime == "library":
        pytest.importorskip("vmwrapper.boinc.library")
        from vmwrapper.boinc.library import LibraryMissing, load_libraries

        try:
            load_libraries()
        except LibraryMissing as missing:
            pytest.skip(str(missing))
    monkeypatch.setenv("VMWRAPPER_BOINC_RUNTIME", runtime)
    case = Case(
        "",
        {"p": b'#!/bin/sh\ntest -d "$1"; echo "$? $2"\n'},
        preferences=b"</x><a b=c><slot>9</slot>\xff & <" + b"<y>" * 300,
        folder=os.fsdecode(b"R&D \xfc"),
    )
    job = b"<job_desc><task><application>p</application><command_line>'$PROJECT_DIR' $GPU_DEVICE_NUM</command_line>"
    job += b"<stdout_filename>out</stdout_filename></task></job_desc>"
    slot = lay_out(tmp_path, job, case)
    outcome = run(VMWRAPPER, slot, case)
    assert outcome.files["out"] == "0 $GPU_DEVICE_NUM\n", (slot / "stderr.txt").read_text(errors="replace")
    assert outcome.messages["fraction"] == "1.00", "the client is spoken to"
