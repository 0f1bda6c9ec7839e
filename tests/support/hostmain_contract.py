"""What the wrapper relies on of HostMain's XML-RPC methods, as statements: for the real one and for the scripted one.

A test module gives the fixture `host`. The program in the guest takes steps as its arguments; the scripted HostMain
takes the same steps without running anything (tests/support/fake_hostmain.py).
"""

from __future__ import annotations

import hashlib
import json
import time
import xmlrpc.client
from typing import Any

import pytest

from tests.support.hostmains import RunningHost
from vmcontrol.protocol import vmends
from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.vm import VmInfo, VmSettings, VmState
from vmcontrol.protocol.vmends import Outcome

WORKER = """#!/usr/bin/env python3
import sys, time
print("begun", flush=True)
for step in sys.argv[1:]:
    word, _, value = step.partition("=")
    if word == "sleep":
        time.sleep(float(value))
    elif word == "make":
        open(value, "w").write("made")
    elif word == "exit":
        sys.exit(int(value))
"""


def fault_of(method: Any, *arguments: object) -> xmlrpc.client.Fault:
    with pytest.raises(xmlrpc.client.Fault) as caught:
        method(*arguments)
    return caught.value


class HostMainContract:
    """The statements."""

    def define(self, host: RunningHost, name: str = "vm") -> None:
        assert host.api.defineVM(name, str(host.slot / "disk.img"), VmSettings().to_struct()) is True

    def running(self, host: RunningHost) -> Any:
        self.define(host)
        assert host.api.start("vm") is True
        assert host.api.waitGuest("vm", 30.0) is True, host.log()
        worker = host.slot / "worker"
        worker.write_text(WORKER)
        worker.chmod(0o755)
        host.api.putFile("vm", str(worker), "worker")
        return host.api

    def run(self, host: RunningHost, id: str, *steps: str, attempt: int = 1) -> CommandStatus:
        request = {"id": id, "command": "./worker", "arguments": list(steps), "attempt": attempt}
        return CommandStatus.from_struct(host.api.runCommand("vm", request))

    def end_of(self, host: RunningHost, id: str) -> CommandStatus:
        status = CommandStatus.from_struct(host.api.waitCommand("vm", id, 0, 0))
        deadline = time.monotonic() + 30
        while status.state is CommandState.RUNNING and time.monotonic() < deadline:
            status = CommandStatus.from_struct(host.api.waitCommand("vm", id, status.version, 5.0))
        return status

    def test_a_command_in_a_container_that_the_vm_does_not_have_ends_with_an_error(self, host: RunningHost) -> None:
        api = self.running(host)
        request: dict[str, Any] = {"id": "c1", "attempt": 1, "command": "./worker", "arguments": []}
        request["container"] = {"disk": "0" * 64, "workdir": "/app"}
        api.runCommand("vm", request)
        end = self.end_of(host, "c1")
        assert end.state is CommandState.FINISHED
        assert end.result is not None
        assert (end.result["exit_status"], bool(end.result["error"])) == (None, True)

    def test_it_says_when_it_listens_and_when_the_broker_is_connected(self, host: RunningHost) -> None:
        assert host.event("broker-connected")

    def test_a_vm_is_made_once_and_deleted_any_number_of_times(self, host: RunningHost) -> None:
        assert host.api.listAvailableVMs() == []
        self.define(host)
        assert host.api.defineVM("vm", str(host.slot / "disk.img"), VmSettings().to_struct()) is False
        assert host.api.listAvailableVMs() == ["vm"]
        assert host.api.getState("vm") == "PoweredOff"
        assert [host.api.deleteVM("vm"), host.api.deleteVM("vm")] == [True, True]
        assert host.api.listAvailableVMs() == []

    def test_a_vm_that_is_not_there_is_named_in_the_fault(self, host: RunningHost) -> None:
        for method in (host.api.getState, host.api.start, host.api.getVMInfo, host.api.powerOff):
            fault = fault_of(method, "none")
            assert (fault.faultCode, fault.faultString) == (-1, "No VM by the name/id none found")

    def test_the_limits_have_numbers(self, host: RunningHost) -> None:
        limits = host.api.getLimits()
        assert set(limits) == {"max_cpus", "min_memory_mb", "max_memory_mb"}
        assert all(limit > 0 for limit in limits.values())

    def test_the_life_of_a_vm(self, host: RunningHost) -> None:
        api = self.running(host)
        assert api.getState("vm") == VmState.RUNNING
        assert [api.pause("vm"), api.pause("vm"), api.getState("vm")] == [True, True, VmState.PAUSED]
        assert api.waitGuest("vm", 0.1) is False, "a guest that is paused cannot be reached"
        assert [api.unpause("vm"), api.unpause("vm"), api.getState("vm")] == [True, True, VmState.RUNNING]
        assert [api.saveState("vm"), api.getState("vm")] == [True, VmState.SAVED]
        assert [api.start("vm"), api.getState("vm")] == [True, VmState.RUNNING]
        assert [api.powerOff("vm"), api.powerOff("vm"), api.getState("vm")] == [True, True, VmState.POWERED_OFF]

    def test_what_is_known_of_a_vm_has_one_form(self, host: RunningHost) -> None:
        api = self.running(host)
        struct = api.getVMInfo("vm")
        info = VmInfo.from_struct(struct)
        assert set(struct) == set(info.to_struct())
        assert (info.name, info.state, info.trouble, info.unusable) == ("vm", VmState.RUNNING, "", "")
        assert info.vm_is_descendant is True
        assert not info.resumable

    def test_a_state_is_waited_for_up_to_the_time_out(self, host: RunningHost) -> None:
        api = self.running(host)
        assert api.waitVM("vm", ["Running", "Paused"], 10.0) == "Running"
        began = time.monotonic()
        assert api.waitVM("vm", ["Saved"], 0.3) == "Running"
        assert time.monotonic() - began >= 0.3

    def test_signs_of_life(self, host: RunningHost) -> None:
        api = self.running(host)
        assert api.pingGuest("vm", 10.0, False) is True
        assert 0 <= api.waitSilent("vm", 100.0, 0.1) < 30
        assert isinstance(api.getGuestUptime("vm"), float)
        figures = api.getPerformanceData("vm")
        assert figures["cpu_time_s"] >= 0

    def test_share_and_network_can_be_set(self, host: RunningHost) -> None:
        api = self.running(host)
        assert api.setCpuCap("vm", 50) in (True, False)
        assert api.setNetwork("vm", False) is True

    def test_snapshots_are_listed_deleted_and_restored(self, host: RunningHost) -> None:
        api = self.running(host)
        assert [api.saveSnapshot("vm", "one", ""), api.saveSnapshot("vm", "two", "")] == [True, True]
        assert api.getVMInfo("vm")["snapshots"] == ["one", "two"]
        assert [api.deleteSnapshot("vm", "one"), api.deleteSnapshot("vm", "one")] == [True, True]
        assert api.getVMInfo("vm")["snapshots"] == ["two"]
        api.powerOff("vm")
        assert api.restoreSnapshot("vm", "two") is True

    def test_a_command_runs_to_its_end_and_is_forgotten_when_it_is_acknowledged(self, host: RunningHost) -> None:
        api = self.running(host)
        begun = self.run(host, "c1", "sleep=0.3", "make=result", "exit=3")
        assert (begun.id, begun.state, begun.attempt) == ("c1", CommandState.RUNNING, 1)
        assert begun.result is None
        end = self.end_of(host, "c1")
        assert end.state is CommandState.FINISHED
        assert end.version > begun.version
        assert end.result is not None
        assert (end.result["exit_status"], end.result["signal"], end.result["attempt"]) == (3, None, 1)
        assert api.getFile("vm", end.result["stdout_path"], str(host.slot / "out"))["size"] > 0
        assert [row["id"] for row in api.listCommands("vm")] == ["c1"]
        assert [api.acknowledgeResult("vm", "c1"), api.acknowledgeResult("vm", "c1")] == [True, True]
        assert api.queryCommand("vm", "c1")["state"] == CommandState.UNKNOWN

    def test_the_same_attempt_is_started_once_and_a_higher_one_again(self, host: RunningHost) -> None:
        self.running(host)
        self.run(host, "c1", "exit=0")
        assert self.end_of(host, "c1").attempt == 1
        assert self.run(host, "c1", "exit=0").state is CommandState.FINISHED
        again = self.run(host, "c1", "sleep=0.2", attempt=2)
        assert (again.state, again.attempt) == (CommandState.RUNNING, 2)

    def test_a_command_is_cancelled_and_then_has_a_result(self, host: RunningHost) -> None:
        api = self.running(host)
        self.run(host, "c1", "sleep=60")
        assert api.cancelCommand("vm", "c1", 5.0)["state"] in ("running", "finished")
        end = self.end_of(host, "c1")
        assert end.result is not None
        assert (end.result["exit_status"], end.result["signal"]) == (None, 15)

    def test_an_unknown_command_is_unknown(self, host: RunningHost) -> None:
        self.running(host)
        status = CommandStatus.from_struct(host.api.queryCommand("vm", "none"))
        assert (status.id, status.state, status.result) == ("none", CommandState.UNKNOWN, None)
        assert host.api.listCommands("vm") == []

    def test_files_go_in_and_out_with_size_and_digest(self, host: RunningHost) -> None:
        api = self.running(host)
        source, target = host.slot / "in", host.slot / "out"
        source.write_text("content\n")
        put = api.putFile("vm", str(source), "there")
        assert (put["size"], put["sha256"]) == (8, hashlib.sha256(b"content\n").hexdigest())
        got = api.getFile("vm", "there", str(target))
        assert (got["size"], target.read_text()) == (8, "content\n")
        listed = {one["name"]: (one["size"], one["folder"]) for one in api.listFiles("vm", "")}
        assert listed["there"] == (8, False)

    def test_why_a_file_cannot_be_had(self, host: RunningHost) -> None:
        api = self.running(host)
        (host.slot / "in").write_text("content\n")
        api.putFile("vm", str(host.slot / "in"), "there")
        missing = fault_of(api.getFile, "vm", "missing", str(host.slot / "out"))
        large = fault_of(api.getFile, "vm", "there", str(host.slot / "out"), 7)
        assert (missing.faultCode, large.faultCode) == (2, 2)
        told = json.loads(missing.faultString)
        assert told["path"] == "missing"
        assert "there" in told["listing"]
        assert json.loads(large.faultString)["reason"].startswith("has 8 bytes")
        assert not (host.slot / "out").exists()

    def test_a_guest_that_is_off_is_silent(self, host: RunningHost) -> None:
        self.define(host)
        assert host.api.waitGuest("vm", 0.1) is False
        assert fault_of(host.api.getFile, "vm", "there", str(host.slot / "out")).faultCode == 3

    def test_shutdown_answers_what_became_of_each_vm_and_ends(self, host: RunningHost) -> None:
        self.running(host)
        ends = vmends.read(host.api.shutdown(True))
        assert [(end.name, end.outcome) for end in ends.values()] == [("vm", Outcome.SAVED)]
        assert host.ended() == 0

    def test_the_end_of_the_wrapper_saves_the_vms_and_says_so(self, host: RunningHost) -> None:
        self.running(host)
        host.cut_lifeline()
        ends = vmends.read(host.event("vms-ended")["vms"])
        assert [(end.name, end.outcome) for end in ends.values()] == [("vm", Outcome.SAVED)]
        assert host.ended() == 0
