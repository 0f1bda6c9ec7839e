"""Both runtimes under the real BOINC client: it starts, suspends, quits, aborts and postpones a small application."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.vmwrapper.boinc.test_boinc_runtime import have_library
from tests.support import boinc_client
from tests.support.boinc_client import BoincClient, Job, JobFile

pytestmark = [
    pytest.mark.boinc,
    pytest.mark.skipif(not boinc_client.AVAILABLE, reason=boinc_client.WHY_NOT),
]

APP = Path(__file__).parents[3] / "support" / "boinc_app.py"
KINDS = ["python", *(["library"] if have_library() else [])]
PURPOSES = ("suspend", "finish", "fail", "temporary", "abort", "preferences", "checkpoint")


@pytest.fixture(params=["library", "python"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param not in KINDS:
        pytest.skip("package libboinc-app7 is not installed")
    return str(request.param)


def job(kind: str, purpose: str) -> Job:
    script = f'#!/bin/sh\nPYTHONPATH="{APP.parents[2]}" exec "{sys.executable}" "{APP}" {kind}\n'
    return Job(f"{kind}_{purpose}", script.encode())


def wrapper_job(kind: str) -> Job:
    """The wrapper itself, with a task on the host."""
    job_xml = (
        b'<job_desc><task><application>worker</application><command_line>"a b" ./in</command_line>'
        b"<stdout_filename>out</stdout_filename></task></job_desc>"
    )
    script = (
        f'#!/bin/sh\nexport PYTHONPATH="{APP.parents[2]}" VMWRAPPER_BOINC_RUNTIME={kind}\n'
        f'exec "{sys.executable}" -m vmwrapper "$@"\n'
    )
    worker = b'#!/bin/sh\ncat "$2"; for word; do echo "[$word]"; done\n'
    files = [JobFile("job.xml", job_xml), JobFile("in", b"input "), JobFile("worker", worker, executable=True)]
    return Job(f"{kind}_wrapper", script.encode(), "x --nthreads 2 y", files, ["out"])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoincClient]:
    """One client with a job for each test, all of which run side by side."""
    jobs = [job(kind, purpose) for kind in KINDS for purpose in PURPOSES] + [wrapper_job(kind) for kind in KINDS]
    with BoincClient(tmp_path_factory.mktemp("boinc"), jobs, checkpoint_period_s=2.0) as client:
        yield client


def wait_for_event(client: BoincClient, name: str, event: str) -> None:
    def happened() -> bool:
        events = client.slot(name) / "events.txt"
        return events.exists() and event in events.read_text().splitlines()

    client.wait_for(happened, f"{name}: {event}")


def started(client: BoincClient, kind: str, purpose: str) -> tuple[str, Path]:
    """Name and slot of a job whose application has begun."""
    name = f"{kind}_{purpose}"
    client.wait_for(lambda: client.result(name).is_running, f"{name} started")
    wait_for_event(client, name, f"init {name} 0")
    return name, client.slot(name)


def test_what_the_application_reports_is_what_boinccmd_shows(client: BoincClient, kind: str) -> None:
    name, _ = started(client, kind, "suspend")
    client.wait_for(lambda: client.result(name).fraction_done == 0.375, "fraction done is known")
    shown = next(text for text in client.boinccmd("--get_tasks").split(") -----------") if f"name: {name}\n" in text)
    assert "fraction done: 0.375000" in shown
    assert "current CPU time: 17.000000" in shown
    assert "CPU time at last checkpoint: 11.000000" in shown


def test_suspend_and_resume(client: BoincClient, kind: str) -> None:
    name, _ = started(client, kind, "suspend")
    client.suspend(name)
    wait_for_event(client, name, "suspended")
    client.resume(name)
    wait_for_event(client, name, "resumed")


def test_it_runs_to_its_end(client: BoincClient, kind: str) -> None:
    name, slot = started(client, kind, "finish")
    (slot / "order").write_text("finish")
    client.wait_for(lambda: client.result(name).ready_to_report, "finished")
    result = client.result(name)
    assert (result.state, result.exit_status) == (boinc_client.RESULT_FILES_UPLOADED, 0)
    assert "<final_cpu_time>42.000000</final_cpu_time>" in result.text  # the very last status arrived
    assert "Message from task: the app is done" in client.log()


def test_a_failure_is_one_for_the_client_too(client: BoincClient, kind: str) -> None:
    name, slot = started(client, kind, "fail")
    (slot / "order").write_text("fail")
    client.wait_for(lambda: client.result(name).ready_to_report, "failed")
    result = client.result(name)
    assert (result.state, result.exit_status) == (boinc_client.RESULT_COMPUTE_ERROR, 195)


def test_a_temporary_exit_shows_its_reason(client: BoincClient, kind: str) -> None:
    name, slot = started(client, kind, "temporary")
    (slot / "order").write_text("temporary")
    client.wait_for(lambda: client.result(name).wait_reason, "postponed")
    assert client.result(name).wait_reason == "Waiting for a better day"
    assert f"Task {name} postponed for 3600 seconds: Waiting for a better day" in client.log()


def test_abort(client: BoincClient, kind: str) -> None:
    name, _ = started(client, kind, "abort")
    client.abort(name)
    client.wait_for(lambda: client.result(name).state == boinc_client.RESULT_ABORTED, "aborted")
    client.wait_for(lambda: not client.result(name).is_running, "ended")


def test_preferences_that_change_are_seen(client: BoincClient) -> None:
    names = [started(client, kind, "preferences")[0] for kind in KINDS]
    override = client.folder / "global_prefs_override.xml"
    override.write_text(override.read_text().replace("<disk_interval>2.0<", "<disk_interval>3.0<"))
    client.reread_preferences()
    for name in names:
        wait_for_event(client, name, "period 3")


def test_checkpoints_come_by_the_clients_preferences(client: BoincClient, kind: str) -> None:
    name, _ = started(client, kind, "checkpoint")
    wait_for_event(client, name, "checkpoint")


def test_the_wrapper_runs_a_task_on_the_host(client: BoincClient, kind: str) -> None:
    name = f"{kind}_wrapper"
    client.wait_for(lambda: client.result(name).ready_to_report, f"{name} finished")
    assert client.result(name).state == boinc_client.RESULT_FILES_UPLOADED, client.log()
    lines = client.output(name, "out").read_text().splitlines()
    assert lines == ["input [a b]", f"[../../projects/{boinc_client.PROJECT_FOLDER}/{name}_in]", "[x]", "[y]"]


def wait_for_checkpoint(client: BoincClient, name: str) -> None:
    client.wait_for(lambda: client.result(name).checkpoint_cpu_time == 11.0, "its checkpoint is known")


def test_quit_and_another_start(tmp_path: Path) -> None:
    with BoincClient(tmp_path, [job(kind, "quit") for kind in KINDS]) as client:
        for kind in KINDS:
            name, _ = started(client, kind, "quit")
            wait_for_checkpoint(client, name)
        slots = {kind: client.slot(f"{kind}_quit") for kind in KINDS}
        client.quit()
        for kind, slot in slots.items():
            assert (slot / "events.txt").read_text().splitlines()[-1] == "quit", kind
            assert not (slot / "boinc_finish_called").exists()
        client.start()
        for kind in KINDS:
            # The CPU time of the last checkpoint is given back.
            wait_for_event(client, f"{kind}_quit", f"init {kind}_quit 11")
