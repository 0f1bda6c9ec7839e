"""The whole wrapper with a VM in which an agent of 2009 runs: a job of then, its VM as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.agent_of_2009 import Agent2009
from tests.integration.hostmains import embedded_broker
from tests.integration.slots import HOST_MAIN_TASK, TestSlot
from tests.support_hypervisor import CALLS, OTHER_ID
from vmcontrol import words

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
        agent = Agent2009(port, login, passcode, OTHER_ID)
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
    agent.serve(lambda _: "x" * words.BODY_LIMIT)
    assert run(here) == 195
    assert f"its result is not known, it was too large: a body of {words.BODY_LIMIT}"[:-4] in here.text("stderr.txt")
