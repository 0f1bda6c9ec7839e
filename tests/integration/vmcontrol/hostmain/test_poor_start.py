"""Started with few descriptors or with closed streams: the wrapper works as BOINC's does."""

from __future__ import annotations

import shlex
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slots import PlayedClient, TestSlot


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    yield slot
    slot.clean()


def task(script: str, more: str = "") -> str:
    return f"<task><application>sh</application><command_line>-c '{script}'</command_line>{more}</task>"


def run(slot: TestSlot, before: str, *words: str) -> int:
    command = f"{before}; exec {shlex.quote(sys.executable)} -m vmwrapper {' '.join(words)}"
    return slot.start(program=["/bin/sh", "-c", command]).wait(30)


STREAMS = (
    "<stdin_filename>in</stdin_filename><stdout_filename>out</stdout_filename><stderr_filename>err</stderr_filename>"
)


@pytest.mark.parametrize("before", ["ulimit -n 20", "ulimit -S -n 12", "ulimit -n 20; exec 0<&- 1>&- 2>&-"])
def test_a_job_with_everything_runs_with_few_descriptors(slot: TestSlot, before: str) -> None:
    slot.write("in", "input\n")
    with zipfile.ZipFile(slot.folder / "in.zip", "w") as archive:
        archive.writestr("packed", "packed\n")
    slot.job(
        "<unzip_input><zipfilename>in.zip</zipfilename></unzip_input>",
        task("while :; do sleep 0.1; done", "<daemon/>"),
        task('cat; ulimit -n; (setsid sh -c "sleep 0.5; echo left > left" &amp;) >/dev/null 2>&amp;1', STREAMS),
        task("cat; cat packed; echo error >&amp;2", STREAMS),
        "<zip_output><zipfilename>z.zip</zipfilename><filename>left</filename><filename>out</filename></zip_output>",
    )
    PlayedClient(slot)
    assert run(slot, before) == 0
    limit = "12" if before.endswith("12") else "20"
    assert slot.text("out") == f"input\n{limit}\ninput\npacked\n", "programs have the limit that we were given"
    assert slot.text("err") == "error\n"
    assert zipfile.ZipFile(slot.folder / "z.zip").namelist() == ["left", "out"]


@pytest.mark.parametrize("before", ["exec 2>&-", "exec 2>/dev/null", "exec 2</dev/null", "exec 0<&- 1>&- 2>&-"])
def test_the_story_is_in_stderr_txt_whatever_fd_2_is(slot: TestSlot, before: str) -> None:
    slot.write("stderr.txt", "what was there\n")
    slot.job(task("echo said >&amp;2; readlink /proc/self/fd/0 /proc/self/fd/1 > fds; exit 3"))
    PlayedClient(slot)
    assert run(slot, before) == 195
    story = slot.text("stderr.txt")
    assert story.startswith("what was there\n")
    assert "\nsaid\n" in story
    assert "sh ended with exit status 3" in story


def test_standalone_a_closed_fd_2_takes_nothing_and_stderr_txt_has_it_once(slot: TestSlot) -> None:
    slot.job(task("exit 3"))
    assert run(slot, "exec 2>&-", "job.xml") == 195
    assert slot.text("stderr.txt").count("sh ended with exit status 3") == 1
