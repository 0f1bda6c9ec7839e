"""Started with streams that are closed, full or without a reader, in a folder that is gone, without a package: the exit
status says what became of the job, and there is no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slots import TestSlot

ROOT = Path(__file__).parents[4]
JOB = (
    "<task><application>sh</application><command_line>-c 'ls -l /proc/self/fd > fds; echo out; echo err >&amp;2'"
    "</command_line></task>"
)
HAVE_FULL = Path("/dev/full").exists()


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.job(JOB)
    yield slot
    slot.clean()


def shell(slot: TestSlot, arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and all that was said, of a command line with redirections."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$PYTHON" -m vmwrapper {arguments}'],
        cwd=slot.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


@pytest.mark.parametrize("redirections", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_job_is_done_with_streams_that_are_closed(slot: TestSlot, redirections: str) -> None:
    status, said = shell(slot, f"job.xml {redirections}")
    assert status == 0, said
    assert "err\n" in slot.text("stderr.txt")
    ours = [line for line in slot.text("fds").splitlines() if "vmwrapper" in line or "job.xml" in line]
    assert ours == [], "no file of ours is a stream of the program"


@pytest.mark.parametrize(
    "where", [pytest.param("/dev/full", marks=pytest.mark.skipif(not HAVE_FULL, reason="Linux")), "&-"]
)
@pytest.mark.parametrize(
    ("arguments", "status"),
    [("check", 0), ("check nowhere.xml", 206), ("--help", 0), ("--version", 0), ("licenses", 0)],
)
def test_the_status_counts_where_nothing_can_be_said(slot: TestSlot, arguments: str, status: int, where: str) -> None:
    found, said = shell(slot, f"{arguments} >{where} 2>{where}")
    assert (found, said) == (status, "")
    found, said = shell(slot, f"{arguments} >{where}")
    assert found == status
    assert "Traceback" not in said
    assert "Exception" not in said


def test_a_reader_that_has_gone_is_no_failure(slot: TestSlot) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vmwrapper", "check"],
            cwd=slot.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_folder_that_is_gone_is_said_in_one_line(slot: TestSlot) -> None:
    gone = slot.folder / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir "$PWD"; exec "$PYTHON" -m vmwrapper'],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 206
    assert done.stderr.decode().splitlines() == ["vmwrapper: the folder in which it was started is gone"]


@pytest.mark.parametrize(
    ("package", "arguments"), [("twisted", "job.xml"), ("psutil", "job.xml"), ("psutil", "doctor")]
)
def test_a_missing_package_is_named_in_one_line(slot: TestSlot, package: str, arguments: str) -> None:
    hide = slot.folder / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    status, said = shell(slot, arguments, PYTHONPATH=f"{hide}:{ROOT}")
    assert status == 206, said
    assert said.splitlines() == [f"vmwrapper: the Python package {package} is missing: install vmwrapper with pip"]


def test_names_of_any_script_work_in_a_locale_that_is_not_utf_8(slot: TestSlot) -> None:
    slot.job(
        "<task><application>sh</application><command_line>-c 'echo $PYTHONUTF8 é > \"$0\"' входные</command_line>"
        "<stdout_filename>Ausgabe-ä</stdout_filename></task>"
    )
    not_utf8 = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    status, said = shell(slot, "job.xml", **not_utf8)
    assert status == 0, said
    assert slot.text("входные").startswith("0 "), "the program's environment is as it was"
    assert slot.text("входные").endswith("é\n")
    assert (slot.folder / "Ausgabe-ä").exists()
    assert shell(slot, "check", **not_utf8)[0] == 0


def test_our_own_programs_have_the_same_encoding() -> None:
    script = "from vmwrapper.process.selfstart import own_program; print(own_program('json')[0][1:3])"
    for option, words in (("utf8", "['-X', 'utf8']"), ("utf8=0", "['-P', '-m']")):
        done = subprocess.run([sys.executable, "-X", option, "-c", script], capture_output=True, check=True, cwd=ROOT)
        assert done.stdout.decode().strip() == words
