"""The example of the VmApps page, literally and with real parts: its job.xml, archives, table, VM and ports.

"CernVM" is a VM that exists already, here one of the QEMU driver: a guest with 2009's VMConfig.cfg, which dials
ActiveMQ on port 61613 and serves its home by Chirp. First 2009's client drives it through a HostMain that was started
by hand, and leaves it saved; then our wrapper runs the page's job.xml in the same slot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.client_of_2009 import Task, VmWrapper2009
from tests.support.fixedports import ports_of_2009
from tests.support.owned import owned
from tests.support.slots import TestSlot

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "make_2009_archives.py"
CHIRP = "./cctools-2_5_2-i686-linux-2.6/bin"

pytestmark = [pytest.mark.slow, pytest.mark.broker]

needs_parts = pytest.mark.skipif(
    not all(map(shutil.which, ("chirp_put", "java", "tar")))
    or not Path("/usr/share/activemq/bin/activemq.jar").exists(),
    reason="NOT TESTED: ActiveMQ, Java or coop-computing-tools are not installed (tools/setup check installs them)",
)
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="NOT TESTED: package qemu-system-x86 is not installed"
)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path / "slot")
    with ports_of_2009():
        yield slot
        slot.clean()


def make(page: TestSlot, *more: str) -> Path:
    project = page.folder.parent / "project"
    command = [sys.executable, str(TOOL), str(project), "--slot", str(page.folder), *more]
    made = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert made.returncode == 0, made.stderr
    return project


@contextlib.contextmanager
def standalone(page: TestSlot, name: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program as somebody starts it in the slot, ended by TERM."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VMWRAPPER_")}
    with (page.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            owned(command), cwd=page.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=clean
        )
    try:
        yield process
        assert process.poll() is None, f"{name} runs in the foreground:\n{page.text(f'{name}.log')}"
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listening(pid: int) -> list[tuple[str, int]]:
    return sorted(
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )


@needs_parts
@needs_qemu
@pytest.mark.qemu
@pytest.mark.timeout(600)
def test_the_page_literally(page: TestSlot) -> None:
    project = make(page, "--hypervisor", "QEMU")
    for name in ("cctools-2_5_2-i686-linux-2.6.tar", "apache-activemq-5.2.0.tar", "boincvm_0.01.tar"):
        subprocess.run(["tar", "-xf", project / name], cwd=page.folder, check=True, timeout=60)
    definition = page.folder / "vm" / "CernVM" / "vm.json"

    # 2009's client, HostMain and broker by hand
    task = Task(
        virtualmachine="CernVM",
        application="./worker.py",
        app_path=str(project / "worker_1.13_i686-pc-linux-gnu.py"),
        copy_files_to_vm={"in": "in", "stdin_worker": str(project / "stdin")},
        input_path="stdin_worker",
        copy_files_from_vm=("out",),
        command_line="1",
    )
    results_folder = page.folder / "of_2009"
    results_folder.mkdir()
    with (
        standalone(page, "broker", "./apache-activemq-5.2.0/bin/activemq") as broker,
        standalone(page, "hostmain", sys.executable, "./boincvm/HostMain.py", "./boincvm/HostConfig.cfg") as hostmain,
    ):
        client = VmWrapper2009(task)
        assert client.wait_for_hostmain() == ["CernVM"]
        client.run_vm()
        assert 0 < client.cpu_time() < 300
        results = client.finish(results_folder / "stdout", results_folder / "stderr")
        assert listening(hostmain.pid) == [("127.0.0.1", 8080)]
        assert [(ip.removeprefix("::ffff:"), port) for ip, port in listening(broker.pid)] == [("127.0.0.1", 61613)]
        assert "every user of this computer can control HostMain" in page.text("hostmain.log")
    assert (results["finished"], results["exitCodeOrSignal"]) == (True, 0)
    assert 1 <= results["cpu"] < 100
    assert (results_folder / "stdout").read_text() == (project / "stdin").read_text().upper()
    assert (results_folder / "out").read_text() == (project / "in").read_text().upper()
    assert (definition.parent / "saved.state").exists()
    before = definition.read_text()

    # the page's job.xml
    assert page.text("job.xml") == f"<soft_link>{(project / 'job_1.12.xml').resolve()}</soft_link>\n"
    (page.folder / "in").write_text("another text\n")
    (page.folder / "guest_console.log").unlink()  # vmwrapper begins where no guest has been: it follows links then
    status = page.run("job.xml", program=[sys.executable, "-m", "vmwrapper"], limit_s=200)
    story = page.text("stderr.txt") + page.text("stderr_HostMain") + page.text("stdout_broker")
    assert status == 0, story
    assert page.text("out") == "ANOTHER TEXT\n"
    assert (project / "worker_nodelete_1").read_text() == (project / "stdin").read_text().upper()
    assert "29 characters on stdin" in (project / "worker_nodelete_2").read_text()
    assert "its saved state is resumed" in story
    assert "XML-RPC at http://127.0.0.1:8080/RPC2" in story
    assert "connected to the broker at localhost:61613" in story
    assert "Connector stomp started" in page.text("stdout_broker")

    # never created, deleted or reconfigured by us; left as it was found
    assert (definition.parent / "saved.state").exists()
    assert not (definition.parent / "taken.json").exists()
    assert definition.read_text() == before
    snapshots = subprocess.run(
        ["qemu-img", "snapshot", "-l", definition.parent / "disk.qcow2"], capture_output=True, text=True, check=True
    )
    assert "vmwrapper" not in snapshots.stdout
    page.assert_nothing_runs()


@needs_parts
def test_what_lies_in_the_slot_is_what_the_page_shows(page: TestSlot) -> None:
    project = make(page)
    links = {
        path.name: Path(path.read_text().removeprefix("<soft_link>").removesuffix("</soft_link>\n")).name
        for path in page.folder.iterdir()
        if path.read_text().startswith("<soft_link>")
    }
    assert links == {
        "job.xml": "job_1.12.xml",
        "stdin_worker": "stdin",
        "worker.py": "worker_1.13_i686-pc-linux-gnu.py",
        "stdout_worker": "worker_nodelete_1",
        "stderr_worker": "worker_nodelete_2",
        "cctools-2_5_2-i686-linux-2.6.tar": "cctools-2_5_2-i686-linux-2.6.tar",
        "apache-activemq-5.2.0.tar": "apache-activemq-5.2.0.tar",
        "boincvm.tar": "boincvm_0.01.tar",
    }
    assert (page.folder / "in").read_bytes() == (project / "in").read_bytes()
    again = project.parent / "again"
    subprocess.run([sys.executable, TOOL, again], check=True, timeout=100)
    for name in project.iterdir():
        assert (again / name.name).read_bytes() == name.read_bytes(), "the same files give the same bytes"
    for archive, entry in (
        ("cctools-2_5_2-i686-linux-2.6.tar", f"{CHIRP}/chirp_get".removeprefix("./")),
        ("apache-activemq-5.2.0.tar", "apache-activemq-5.2.0/bin/activemq"),
        ("boincvm_0.01.tar", "boincvm/HostMain.py"),
    ):
        listed = subprocess.run(["tar", "-tf", project / archive], capture_output=True, text=True, check=True)
        assert entry in listed.stdout.splitlines()
        assert all(line.startswith(entry.split("/")[0] + "/") for line in listed.stdout.splitlines())


@needs_parts
def test_with_the_pages_configuration_a_vm_that_is_not_there_ends_the_job_and_nothing_runs_on(
    page: TestSlot,
) -> None:
    """Without VirtualBox, and without its CernVM, the volunteer reads why."""
    make(page, "--hypervisor", "QEMU")
    shutil.rmtree(page.folder / "vm")
    status = page.run("job.xml", program=[sys.executable, "-m", "vmwrapper"], limit_s=100)
    assert status == 206, page.text("stderr.txt")
    assert "there is no virtual machine CernVM" in page.text("stderr.txt")
    page.assert_nothing_runs()
