"""The whole wrapper with a VM in which an agent of protocol 1 runs: a job of then, its VM as it was."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.files.chirp import rights
from tests.support.agent_of_2009 import Agent2009
from tests.support.agenthost import wait_until
from tests.support.fixedports import ports_of_2009
from tests.support.hostmains import embedded_broker
from tests.support.hypervisor import CALLS, OTHER_ID
from tests.support.slots import HOST_MAIN_TASK, TestSlot
from vmcontrol.protocol.text import BODY_LIMIT
from vmcontrol.transfer.chirp import CHIRP_PORT

TASK = (
    "<task><virtualmachine>CernVM</virtualmachine><image></image><application>./worker.py</application>"
    "<app_pathVM></app_pathVM><stdout_filename>out</stdout_filename>"
    '<stderr_filename>err</stderr_filename><command_line>5 "a b"</command_line></task>'
)


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[tuple[TestSlot, Agent2009]]:
    slot = TestSlot(tmp_path)
    with embedded_broker() as (port, login, passcode):
        config = f"[Broker]\nhost = 127.0.0.1\nport = {port}\nusername = {login}\npassword = {passcode}\n"
        slot.write("HostConfig.cfg", config)
        slot.job(HOST_MAIN_TASK, TASK)
        agent = Agent2009(port, login, passcode, OTHER_ID, ip="127.0.0.1")
        try:
            with agent.beacons():
                yield slot, agent
        finally:
            agent.close()
            slot.clean()


def run(slot: TestSlot) -> int:
    return slot.run("job.xml", DRIVE_HOST_MAIN="real", FAKE_EXISTING="CernVM")


def test_its_output_and_its_end_count(slot: tuple[TestSlot, Agent2009]) -> None:
    here, agent = slot
    agent.serve(lambda headers: f"{headers['cmd']} {headers['args']} é\n", err="a warning\n")
    status = run(here)
    assert status == 0, here.text("stderr.txt")
    assert here.text("out") == "./worker.py ['5', 'a b'] é\n"
    assert here.text("err") == "a warning\n"
    [request] = [headers for headers, body in agent.seen if body.startswith("CMD_RUN")]
    assert (request["env"], request["path"], request["fileForStdin"]) == ("{}", "None", "")
    calls = here.text(CALLS).splitlines()
    assert calls.index("take CernVM PoweredOff") < calls.index("start CernVM from PoweredOff")
    assert "release CernVM" in calls
    here.assert_nothing_runs()


def test_its_failure_is_the_jobs(slot: tuple[TestSlot, Agent2009]) -> None:
    here, agent = slot
    agent.serve(lambda _: "half\n", finished=False, exitCodeOrSignal=3, err="why it failed\n")
    assert run(here) == 195
    assert here.text("out") == "half\n"
    story = here.text("stderr.txt")
    assert "failed in the guest with exit status 3" in story
    assert "why it failed" in story


def test_a_result_that_is_too_large_is_a_failure_and_not_waited_for(slot: tuple[TestSlot, Agent2009]) -> None:
    here, agent = slot
    agent.serve(lambda _: "x" * BODY_LIMIT)
    assert run(here) == 195
    assert f"its result is not known, it was too large: a body of {BODY_LIMIT}"[:-4] in here.text("stderr.txt")


@pytest.fixture
def served() -> Iterator[Path]:
    """What the agent of protocol 1 serves by Chirp, at its own address."""
    program = shutil.which("chirp_server")
    if program is None or shutil.which("chirp_put") is None:
        pytest.skip("NOT TESTED: coop-computing-tools is not installed (tools/setup check installs it)")
    top = Path(tempfile.mkdtemp(prefix="vmwrapper-2009-"))  # pytest's own folders are closed to other users
    top.chmod(0o755)
    base, own = top / "base", top / "own"
    for folder in (base, own):
        folder.mkdir()
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
    (own / "rights").write_text(rights(["127.0.0.1"]))
    command = [program, "-r", str(base), "-y", str(own), "-I", "127.0.0.1", "-p", str(CHIRP_PORT)]
    command += ["-A", str(own / "rights")]
    command += ["--inherit-default-acl", "-a", "address", "-u", "127.0.0.1:1", "-U", "86400"]
    user = "nobody" if os.geteuid() == 0 else None

    def listens() -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", CHIRP_PORT)) == 0

    with ports_of_2009(CHIRP_PORT):
        process = subprocess.Popen(command, user=user, cwd=base, env={**os.environ, "HOME": str(own)})
        try:
            wait_until(listens, "Chirp's server")
            yield base
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(top)


def test_its_files_go_by_chirp(slot: tuple[TestSlot, Agent2009], served: Path) -> None:
    """The whole of a job of 2009: application and input in, run, output out."""
    here, agent = slot

    def work(headers: dict[str, str]) -> str:
        (served / "out").write_text((served / headers["fileForStdin"]).read_text().upper())
        return (served / "worker.py").read_text()

    agent.serve(work)
    here.write("HostConfig.cfg", here.text("HostConfig.cfg") + f"[Host]\nchirp_path = {shutil.which('chirp_put')}\n")
    here.write("worker.py", "#!/usr/bin/python\n", executable=True)
    here.write("stdin_worker", "some input\n")
    files = (
        "<stdin_filename>stdin_worker</stdin_filename><copy_app_to_VM>1</copy_app_to_VM>"
        "<copy_file_to_VM>stdin_worker</copy_file_to_VM><copy_file_from_VM>out</copy_file_from_VM></task>"
    )
    here.job(HOST_MAIN_TASK, TASK.replace("<stdout_filename>out<", "<stdout_filename>said<").replace("</task>", files))
    status = run(here)
    assert status == 0, here.text("stderr.txt")
    assert here.text("out") == "SOME INPUT\n"
    assert here.text("said") == "#!/usr/bin/python\n"
