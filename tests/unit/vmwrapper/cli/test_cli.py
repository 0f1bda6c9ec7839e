"""The command `vmwrapper`, as a process: streams and exit statuses of what needs no job to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.vmwrapper.job.test_job_parse import PAGE_EXAMPLE
from vmwrapper import __version__


def vmwrapper(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmwrapper", *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )


def test_help_and_version(tmp_path: Path) -> None:
    shown = vmwrapper(tmp_path, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: vmwrapper [options] [JOB_FILE] [ARGS...]")
    shown = vmwrapper(tmp_path, "--version")
    assert (shown.returncode, shown.stdout) == (0, f"vmwrapper {__version__}\n")


def test_version_under_a_client_ends_the_job_as_boincs_wrapper_does(tmp_path: Path) -> None:
    (tmp_path / "init_data.xml").write_text("<app_init_data></app_init_data>")
    shown = vmwrapper(tmp_path, "--version")
    assert (shown.returncode, shown.stderr) == (0, f"vmwrapper {__version__}\n")
    assert (tmp_path / "boinc_finish_called").read_text() == "0\n"


def test_arguments_that_cannot_be_understood(tmp_path: Path) -> None:
    refused = vmwrapper(tmp_path, "--frobnicate")
    assert refused.returncode == 206
    assert refused.stderr.startswith("vmwrapper: unknown option '--frobnicate'")


class TestCheck:
    def test_a_good_file(self, tmp_path: Path) -> None:
        (tmp_path / "job.xml").write_text(PAGE_EXAMPLE)
        for words in (["check", "job.xml"], ["check"]):
            result = vmwrapper(tmp_path, *words)
            assert (result.returncode, result.stderr) == (0, "")
            assert "job.xml: good: 3 unzip tasks, 2 VMmanage tasks, 1 tasks" in result.stdout

    def test_everything_that_is_wrong_is_said_in_the_order_of_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "job.xml").write_text(
            "<job_desc>\n<task>\n<application>a</application>\n<frobnicate/>\n<weight>-1</weight>\n"
            "<applicatoin>é</applicatoin></task></job_desc>"
        )
        result = vmwrapper(tmp_path, "check", "job.xml")
        assert (result.returncode, result.stdout) == (206, "")
        lines = result.stderr.splitlines()
        assert [line.split(": ")[:2] for line in lines] == [
            ["job.xml:4", "<frobnicate>"],
            ["job.xml:5", "<weight>"],
            ["job.xml:6", "<applicatoin>"],
        ]
        assert "did you mean <application>?" in lines[2]

    def test_unknown_elements_alone_are_errors(self, tmp_path: Path) -> None:
        (tmp_path / "j").write_text("<job_desc><x/><task><application>a</application></task></job_desc>")
        assert vmwrapper(tmp_path, "check", "j").returncode == 206

    def test_a_missing_file(self, tmp_path: Path) -> None:
        result = vmwrapper(tmp_path, "check", "no.xml")
        assert result.returncode == 206
        assert "no.xml: the job file cannot be read: No such file or directory" in result.stderr

    def test_a_soft_link_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "job_0.01.xml").write_text(PAGE_EXAMPLE)
        (tmp_path / "job.xml").write_text("<soft_link>job_0.01.xml</soft_link>\n")
        assert vmwrapper(tmp_path, "check").returncode == 0

    @pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
    def test_any_name_can_be_printed(self, tmp_path: Path, environment: dict[str, str]) -> None:
        (tmp_path / "j").write_text("<job_desc><é/></job_desc>", encoding="utf-8")
        result = vmwrapper(tmp_path, "check", "j", **environment)
        assert result.returncode == 206
        assert "Traceback" not in result.stderr

    def test_it_starts_no_reactor(self, tmp_path: Path) -> None:
        (tmp_path / "job.xml").write_text(PAGE_EXAMPLE)
        program = (
            "import sys; from vmwrapper.cli.main import main; status = main(['check', 'job.xml']); "
            "print([m for m in sys.modules if m.startswith('twisted')]); sys.exit(status)"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "[]"


class TestDoctor:
    """The drivers' own probes are tested with the drivers; here it is about what is said and the exit status."""

    PROGRAM = (
        "import sys\nfrom vmcontrol.hypervisors import choose\n"
        "from vmcontrol.hypervisors.interface import HypervisorError, Probe\n"
        "class Driver:\n"
        "    async def probe(self):\n"
        "        if {raises}: raise HypervisorError('no such device')\n"
        "        return Probe({usable}, '1.0', 'a detail')\n"
        "    async def close(self): print('closed')\n"
        "choose.DRIVERS = {{'QEMU': lambda reactor, folder: Driver()}}\n"
        "from vmwrapper.cli.main import main\nsys.exit(main(['doctor']))\n"
    )

    def doctor(self, folder: Path, *, usable: bool, raises: bool = False) -> subprocess.CompletedProcess[str]:
        program = self.PROGRAM.format(usable=usable, raises=raises)
        return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60)

    def test_a_computer_that_can(self, tmp_path: Path) -> None:
        result = self.doctor(tmp_path, usable=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert "QEMU: can be used: 1.0 a detail" in result.stdout
        assert result.stdout.splitlines()[-1] == "This computer can run virtual machines."
        assert "closed" in result.stdout
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("raises", "detail"), [(False, "1.0 a detail"), (True, "no such device")])
    def test_a_computer_that_cannot(self, tmp_path: Path, raises: bool, detail: str) -> None:
        result = self.doctor(tmp_path, usable=False, raises=raises)
        assert result.returncode == 1
        assert detail in next(line for line in result.stdout.splitlines() if line.startswith("QEMU: cannot be used"))
