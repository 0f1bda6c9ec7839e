"""Host jobs under the real BOINC client: suspend, resume, quit and another start, abort, a kill -9, exit statuses."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import boinc_client
from tests.support.boinc_client import BoincClient, Job, JobFile
from tests.support.slots import is_frozen

pytestmark = [
    pytest.mark.boinc,
    pytest.mark.skipif(not boinc_client.AVAILABLE, reason=boinc_client.WHY_NOT),
]

ROOT = Path(__file__).parents[4]
MAIN = f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m vmwrapper "$@"\n'.encode()
WORKER = b"""#!/bin/sh
# Counts its starts, leaves a grandchild in a session of its own, and works until there is a file `go`.
trap 'echo term >> log; exit 1' TERM
echo start >> log
(setsid sleep 600 &)
echo 0.25 > progress
while test ! -e go || test -z "$1"; do sleep 0.02; done
echo end >> log
cat log > "$1"
"""
STUBBORN = b"""#!/bin/sh
trap '' TERM
echo start >> log
while :; do sleep 0.05; done
"""
JOB = b"""<job_desc>
<task><application>worker</application><command_line>boinc_resolve(out)</command_line>
<fraction_done_filename>progress</fraction_done_filename><weight>3</weight></task>
<task><application>sh</application><command_line>-c "exit 0"</command_line></task></job_desc>"""


def host_job(name: str, worker: bytes = WORKER, job: bytes = JOB, outputs: tuple[str, ...] = ("out",)) -> Job:
    files = [JobFile("job.xml", job), JobFile("worker", worker, executable=True)]
    return Job(name, MAIN, "", files, outputs)


FAILING = b'<job_desc><task><application>sh</application><command_line>-c "exit 7"</command_line></task></job_desc>'
DAEMON = b"""<job_desc><task><application>worker</application><daemon/></task>
<task><application>sh</application><command_line>-c "until test -e go; do sleep 0.02; done"</command_line></task>
</job_desc>"""
JOBS = [
    host_job("suspend"), host_job("quit"), host_job("kill"), host_job("abort", STUBBORN),
    host_job("fail", job=FAILING), host_job("wrong", job=b"<job_desc><task/></job_desc>"),
    host_job("daemon", job=DAEMON, outputs=()),
]  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoincClient]:
    with BoincClient(tmp_path_factory.mktemp("boinc"), JOBS, checkpoint_period_s=2.0) as client:
        yield client


def log_of(client: BoincClient, name: str) -> list[str]:
    path = client.slot(name) / "log"
    return path.read_text().split() if path.exists() else []


def started(client: BoincClient, name: str, count: int = 1) -> Path:
    client.wait_for(lambda: client.result(name).slot is not None, f"{name} has a slot")
    client.wait_for(lambda: log_of(client, name).count("start") == count, f"{name} started {count} times")
    return client.slot(name)


def programs(slot: Path, *, wrapper: bool = False) -> list[psutil.Process]:
    """What runs in a slot, the wrapper itself excepted."""
    found = []
    for process in psutil.process_iter():
        try:
            is_wrapper = "vmwrapper" in process.cmdline()
            if process.cwd() == str(slot) and process.status() != psutil.STATUS_ZOMBIE and is_wrapper == wrapper:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def command_lines(slot: Path) -> list[str]:
    """Those of what runs in a slot; what has ended since it was listed has none."""
    lines = []
    for process in programs(slot):
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
    return lines


def is_still(slot: Path) -> bool:
    """Whether nothing of the job computes: stopped, or in a frozen control group."""
    members = programs(slot)
    try:
        return bool(members) and all(
            process.status() == psutil.STATUS_STOPPED or is_frozen(process.pid) for process in members
        )
    except (psutil.Error, OSError):
        return False  # it comes and goes


def gone(client: BoincClient, slot: Path) -> None:
    client.wait_for(lambda: not programs(slot) and not programs(slot, wrapper=True), "nothing runs", 25)


def test_suspend_resume_and_the_end(client: BoincClient) -> None:
    slot = started(client, "suspend")
    client.wait_for(lambda: 0.18 < client.result("suspend").fraction_done < 0.19, "its fraction done is known")
    client.suspend("suspend")
    client.wait_for(lambda: is_still(slot), "everything stands", 5)
    assert len(programs(slot)) >= 2
    client.resume("suspend")
    client.wait_for(lambda: not is_still(slot), "it goes on", 5)
    (slot / "go").touch()
    client.wait_for(lambda: client.result("suspend").ready_to_report, "finished")
    assert client.result("suspend").state == boinc_client.RESULT_FILES_UPLOADED, client.log()
    assert client.output("suspend", "out").read_text() == "start\nend\n"
    gone(client, slot)


def test_a_killed_wrapper_never_has_two_copies_of_a_task(client: BoincClient) -> None:
    slot = started(client, "kill")
    (wrapper,) = programs(slot, wrapper=True)
    wrapper.send_signal(signal.SIGKILL)
    started(client, "kill", 2)
    commands = command_lines(slot)
    assert (
        sum(command.endswith("worker ../../projects/127.0.0.1_vmwrapper_test/kill_0_out") for command in commands) == 1
    )
    assert sum("sleep 600" in command for command in commands) == 1, "the first one's grandchild is gone"
    (slot / "go").touch()
    client.wait_for(lambda: client.result("kill").ready_to_report, "finished")
    assert client.output("kill", "out").read_text() == "start\nstart\nend\n"
    gone(client, slot)


def test_abort_of_a_task_that_ignores_term(client: BoincClient) -> None:
    slot = started(client, "abort")
    began = time.monotonic()
    client.abort("abort")
    client.wait_for(lambda: client.result("abort").state == boinc_client.RESULT_ABORTED, "aborted")
    gone(client, slot)
    assert time.monotonic() - began < 24, "KILL comes 15 s after the abort"


@pytest.mark.parametrize(("name", "status"), [("fail", 195), ("wrong", 206)])
def test_failures_have_their_status(client: BoincClient, name: str, status: int) -> None:
    client.wait_for(lambda: client.result(name).ready_to_report, f"{name} ended")
    assert (client.result(name).state, client.result(name).exit_status) == (boinc_client.RESULT_COMPUTE_ERROR, status)


def test_a_daemon_ends_with_the_job(client: BoincClient) -> None:
    slot = started(client, "daemon")
    (slot / "go").touch()
    client.wait_for(lambda: client.result("daemon").ready_to_report, "finished")
    assert client.result("daemon").state == boinc_client.RESULT_FILES_UPLOADED, client.log()
    gone(client, slot)


def test_quit_and_another_start(client: BoincClient) -> None:
    """The last test: the client itself ends and comes again."""
    slot = started(client, "quit")
    client.quit()
    assert programs(slot) == []
    assert (slot / "log").read_text().split() == ["start", "term"]
    assert not (slot / "boinc_finish_called").exists()
    client.start()
    started(client, "quit", 2)
    (slot / "go").touch()
    client.wait_for(lambda: client.result("quit").ready_to_report, "finished")
    assert client.output("quit", "out").read_text() == "start\nterm\nstart\nend\n"
