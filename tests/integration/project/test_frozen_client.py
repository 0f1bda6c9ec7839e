"""The frozen wrapper as main program of jobs under the real BOINC client: on the host and in a virtual machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.support import boinc_client
from tests.support.boinc_client import BoincClient, Job, JobFile
from tests.support.client_vm import HOST_CONFIG, TICKER, processes_in, qemu_of, task, times_of
from tests.support.frozen_programs import frozen_programs, second_process, unpacked
from tests.support.slots import HOST_MAIN_TASK

pytestmark = [
    pytest.mark.boinc,
    pytest.mark.slow,
    pytest.mark.skipif(not boinc_client.AVAILABLE, reason=boinc_client.WHY_NOT),
]
needs_qemu = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is missing")
PAUSED, RUNNING = r"driver: \S+: Paused$", r"driver: \S+: Running$"

BROKER = """#!/bin/sh
# a VMmanage task beside HostMain: says what the supervisor gave it
env > kept_environment
sleep 1000
"""


def host_job(name: str, script: str, outputs: Sequence[str] = ()) -> Job:
    xml = f"<job_desc><task><application>sh</application><command_line>-c '{script}'</command_line></task></job_desc>"
    return Job(name, frozen_programs() / "vmwrapper", files=[JobFile("job.xml", xml.encode())], outputs=outputs)


def guest_job(name: str, image: Path, ticks: int) -> Job:
    xml = (
        f"<job_desc>{HOST_MAIN_TASK}<VMmanage_task><application>./broker</application></VMmanage_task>"
        f"{task(ticks, interval_s=3)}</job_desc>"
    )
    files = [
        JobFile("job.xml", xml.encode()),
        JobFile("HostConfig.cfg", HOST_CONFIG, copied=True),
        JobFile("ticker.py", TICKER, executable=True),
        JobFile("broker", BROKER.encode(), executable=True, copied=True),
        JobFile("guest.vdi", image),
    ]
    return Job(name, frozen_programs() / "vmwrapper", files=files, outputs=["out"])


def first_process(slot: Path) -> psutil.Process:
    """The process that the client started: a child of the client."""
    (found,) = [p for p in processes_in(slot) if "boinc" in (p.parent() or p).name()]
    return found


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def story(slot: Path) -> str:
    names = ("stderr.txt", "stderr_HostMain")
    return "".join((slot / name).read_text(errors="replace") for name in names if (slot / name).exists())


def test_jobs_on_the_host(tmp_path: Path) -> None:
    """One is done, one is killed and started again, one is aborted; all at once."""
    jobs = [
        host_job("done", "echo result > out"),
        host_job("killed", "test -e again || { touch again; exec sleep 1000; }"),
        host_job("aborted", "sleep 1000"),
    ]
    with BoincClient(tmp_path, jobs) as client:
        client.wait_for(lambda: client.result("killed").is_running, "started")
        killed = client.slot("killed")
        client.wait_for((killed / "again").exists, "the task runs")
        first = first_process(killed)
        second = second_process(first.pid)
        first.kill()
        psutil.wait_procs([second], timeout=10)
        assert not second.is_running()
        client.wait_for(lambda: client.result("aborted").is_running, "the other runs")
        aborted = client.slot("aborted")
        client.abort("aborted")
        client.wait_for(lambda: client.result("aborted").state == boinc_client.RESULT_ABORTED, "aborted")
        for name in ("done", "killed"):
            client.wait_for(lambda name=name: client.result(name).ready_to_report, name)  # type: ignore[misc]
            result = client.result(name)
            assert (result.state, result.exit_status) == (boinc_client.RESULT_FILES_UPLOADED, 0), client.log()
        assert not processes_in(killed)
        assert not processes_in(aborted)
        assert "which a killed run had unpacked" in client.stderr_of("killed")
        assert "libboinc_api.so.7)" in client.stderr_of("done")
        assert not list((tmp_path / "slots").glob("*/_MEI*"))
        assert not list((tmp_path / "projects").rglob("_MEI*"))


@pytest.mark.qemu
@pytest.mark.timeout(600)
@needs_qemu
def test_a_job_in_a_virtual_machine(tmp_path: Path) -> None:
    """Suspended, resumed, quit and started again, kill -9 of the wrapper, then to its end."""
    from guest.image.cache import guest_image

    image = tmp_path / "guest.vdi"
    shutil.copyfile(guest_image(Path(__file__).parents[3] / ".cache" / "guest-image"), image)
    client_folder = tmp_path / "client"
    client_folder.mkdir()
    with BoincClient(client_folder, [guest_job("vm", image, 150)], checkpoint_period_s=2.0) as client:
        client.wait_for(lambda: client.result("vm").is_running, "started")
        slot = client.slot("vm")
        client.wait_for(lambda: client.result("vm").fraction_done > 0, "the program runs", 180)
        client.wait_for(lambda: "PATH=" in text_of(slot / "kept_environment"), f"the broker runs\n{story(slot)}", 30)
        environment = text_of(slot / "kept_environment")
        assert "LD_LIBRARY_PATH=../../projects" in environment, "the client's"
        assert "_PYI" not in environment
        assert "_MEI" not in environment
        assert_one_folder_serves_all(slot)

        client.suspend("vm")
        client.wait_for(lambda: times_of(slot, PAUSED), "paused", 20)
        client.resume("vm")
        client.wait_for(lambda: len(times_of(slot, RUNNING)) > 1, "resumed", 20)

        client.quit()
        assert not processes_in(slot), story(slot)
        assert unpacked(slot) == []
        assert json.loads((slot / "vmwrapper_checkpoint.json").read_text())["vms"][0]["saved_state_expected"] is True
        times_run = len(times_of(slot, RUNNING))
        client.start()
        client.wait_for(lambda: len(times_of(slot, RUNNING)) > times_run, "the VM runs again", 60)

        first, qemu = first_process(slot), qemu_of(slot)
        stale = unpacked(slot)
        first.kill()
        _, alive = psutil.wait_procs([qemu], timeout=60)
        assert not alive, story(slot)
        client.wait_for(lambda: client.result("vm").ready_to_report, "finished", 240)
        assert client.result("vm").state == boinc_client.RESULT_FILES_UPLOADED, story(slot)
        assert client.output("vm", "out").read_text() == "out\n", "it ran once on this disk"
        stderr = client.stderr_of("vm")
        assert f"removed {stale[0]}" in stderr
        assert "rollback" not in stderr, "HostMain could still save its VM"
        assert not processes_in(slot)
        assert not list((client_folder / "slots").glob("*/_MEI*"))


def assert_one_folder_serves_all(slot: Path) -> None:
    """Wrapper, HostMain and supervisor have their libraries from the same folder."""
    (folder,) = unpacked(slot)
    first = first_process(slot)
    ours = [process for process in processes_in(slot) if process.exe() == first.exe() and process != first]
    assert len(ours) == 3, ours
    for process in ours:
        mapped = {mapping.path for mapping in process.memory_maps() if "_MEI" in mapping.path}
        assert mapped
        assert all(path.startswith(f"{slot / folder}/") for path in mapped)
