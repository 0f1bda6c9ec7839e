"""HostMain with real brokers, XML-RPC clients and agents; only the hypervisor is made up (processes as VMs)."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
import xmlrpc.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.agent_of_2009 import Agent2009
from tests.support.agenthost import GUEST_ID, agent_process, wait_until
from tests.support.brokers import KINDS, KINDS_OF_2009, free_port, running_broker
from tests.support.hostmains import (
    EMBEDDED,
    LIMIT_S,
    SECRET,
    HostMainProcess,
    LossyProxy,
    RunningHost,
    embedded_broker,
    running_hostmain,
    with_broker_port,
)
from tests.support.limits import after
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.transfer.parts import PREFIX


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RunningHost]:
    with running_hostmain(tmp_path) as host:
        yield host


@pytest.fixture(params=KINDS)
def any_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningHost]:
    """HostMain on an external broker of each kind."""
    with running_broker(request.param, tmp_path) as broker:
        login = {"VMWRAPPER_BROKER_LOGIN": broker.login, "VMWRAPPER_BROKER_PASSCODE": broker.passcode}
        with running_hostmain(tmp_path, f"[Broker]\nhost={broker.host}\nport={broker.port}\n", login) as host:
            yield host


def fault(code: int, *words: str) -> Any:
    class Raises:
        def __enter__(self) -> None: ...

        def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
            assert isinstance(error, xmlrpc.client.Fault), error
            assert error.faultCode == code, error
            assert all(word in error.faultString for word in words), error
            return True

    return Raises()


def shell(script: str, id: str, **more: object) -> dict[str, object]:
    return {"id": id, "command": "/bin/sh", "arguments": ["-c", script], **more}


def test_the_whole_way_on_every_broker(any_broker: RunningHost) -> None:
    host, api = any_broker, any_broker.api
    host.vm(memory_mb=256, cpus=2, network=True, port_forwards=[{"guest_port": 80}])
    assert "create vm 256 2 True [PortForward(guest_port=80, host_port=0, remote=False)]" in host.calls
    assert api.defineVM("vm", "disk.img", {}) is False
    assert api.ping("vm") == "PONG from vm"
    info: Any = api.getVMInfo("vm")
    assert (info["state"], info["id"], info["forwards"]) == ("Running", GUEST_ID, {"80": 4711})
    assert psutil.pid_exists(info["pid"])

    (host.slot / "in").write_bytes(b"some input\n" * 1000)
    put: Any = api.putFile("vm", "in", "stdin_file")
    assert put["size"] == 11000
    started: Any = api.runCommand(
        "vm", shell('cat; echo "$A $1" >&2', "c1", stdin="stdin_file", environment={"A": "b"})
    )
    assert started["state"] in ("running", "finished")
    done = host.finished("c1")
    assert done["result"]["exit_status"] == 0
    assert done["result"]["stdout_size"] == 11000
    assert api.listFinishedCmds() == ["c1"]
    got: Any = api.getFile("vm", done["result"]["stdout_path"], "out")
    assert got["sha256"] == put["sha256"]
    assert (host.slot / "out").read_bytes() == b"some input\n" * 1000
    again = host.finished("c1")
    assert again["result"] == done["result"]
    assert api.acknowledgeResult("vm", "c1") is True
    assert api.acknowledgeResult("vm", "c1") is True
    assert api.queryCommand("vm", "c1")["state"] == "unknown"
    assert api.listFinishedCmds() == []
    status: Any = api.getStatus()
    assert status["broker"] is True
    assert status["hypervisor"] == "Fake"
    assert [guest["id"] for guest in status["guests"]] == [GUEST_ID]


def test_the_calls_of_2009(host: RunningHost) -> None:
    """As VMwrapper.py made them, with its argument forms."""
    api = host.connect(host.port, path="/")
    assert api.listAvailableVMs() == []
    assert api.createVM("CernVM", "disk.img") == [True, "CernVM"]
    with fault(-1, "CernVM"):
        api.createVM("CernVM", "disk.img")
    assert api.getState("CernVM") == "PoweredOff"
    assert api.restoreSnapshot("CernVM") is True
    with fault(-1, "'CernVM' is not a registered VM."):
        api.runCmd("CernVM", "/bin/true")
    with fault(-1, "Unregistered VM: CernVM"):
        api.cpFileToVM("CernVM", "in", "in")
    with fault(-1, "PING timeout (for CernVM)"):
        api.ping("CernVM", 0.1)
    assert api.start("CernVM") is True
    deadline = after(LIMIT_S)
    while True:
        try:
            assert api.ping("CernVM") == "PONG from CernVM"
            break
        except xmlrpc.client.Fault as error:
            assert "PING timeout" in error.faultString, host.log()  # noqa: PT017
            assert time.monotonic() < deadline
    assert api.waitGuest("CernVM", LIMIT_S) is True
    assert api.listAvailableVMs() == api.listRunningVMs() == api.listRegisteredVMs() == ["CernVM"]
    assert api.getNamesToIdsMapping() == {"CernVM": GUEST_ID}
    assert api.getIdsToNamesMapping() == {GUEST_ID: "CernVM"}
    assert api.getState(GUEST_ID) == "Running"
    performance: Any = api.getPerformanceData("CernVM")
    assert performance["memory_bytes"] == 3e9

    (host.slot / "worker.sh").write_text('read line; echo "$line $1"; echo oops >&2; exit 3\n')
    (host.slot / "stdin_worker").write_text("hello\n")
    assert api.cpFileToVM("CernVM", str(host.slot / "worker.sh"), "worker.sh") == ["", "", 0]
    assert api.cpFileToVM("CernVM", "stdin_worker") == ["", "", 0]
    out, err, status = api.cpFileToVM("CernVM", "nothing", "x")
    assert (out, status) == ("", 1)
    assert "nothing" in err
    id: Any = api.runCmd("CernVM", "/bin/sh", ["worker.sh", "1 "], "{}", f"'{host.home('CernVM')}'", "stdin_worker")
    assert re.fullmatch(r"[0-9a-f-]{36}", id)
    wait_until(lambda: bool(api.listFinishedCmds()), "the command to end")
    assert api.listFinishedCmds() == [id]
    details = json.loads(str(api.getCmdDetails(id)))
    assert (details["cmd"], details["args"], details["env"]) == ("/bin/sh", ["worker.sh", "1 "], "{}")
    results: Any = api.getCmdResults(id)
    assert (results["out"], results["err"]) == ("hello 1 \n", "oops\n")
    assert (results["finished"], results["exitCodeOrSignal"]) == (False, 3)
    assert results["resources"]["ru_utime"] >= 0
    assert api.listFinishedCmds() == []
    assert api.getCmdResults(id) == ""
    assert json.loads(str(api.getCmdDetails(id)))["cmd"] == "/bin/sh"
    assert api.getCmdDetails("none") == "null"
    repeated: Any = api.waitCommand("CernVM", id, 0, 5)
    assert repeated["result"]["out"] == "hello 1 \n", "a lost reply loses nothing"
    assert api.cpFileFromVM("CernVM", "stdin_worker", "back") == ["", "", 0]
    assert (host.slot / "back").read_text() == "hello\n"
    out, err, status = api.cpFileFromVM("CernVM", "nothing")
    assert status == 1
    assert "worker.sh" in err, "what is there is named"

    assert api.saveSnapshot("CernVM", "s1") is True
    assert api.saveSnapshot("CernVM", "s2", "with a text") is True
    assert api.pause("CernVM") is True
    assert api.getState("CernVM") == "Paused"
    assert api.unpause("CernVM") is True
    assert api.ping("CernVM", 10.0) == "PONG from CernVM"
    assert api.saveState("CernVM") is True
    assert api.getState("CernVM") == "Saved"
    assert api.listRegisteredVMs() == []
    assert api.powerOff("CernVM") is True
    with fault(-1, "No VM by the name/id Nobody found"):
        api.start("Nobody")
    with fault(8001):
        api.noSuchMethod()
    with fault(8001):
        api.__getattr__("system.listMethods")()
    assert "runCmd(vm, cmd, args=(), env=None, path=None, fileForStdin='')" in str(api.help())
    assert str(api.help("getState")).startswith("getState(vm):")
    with fault(-1, "nothing"):
        api.help("nothing")
    with fault(-1, "getState(vm)"):
        api.getState()


def test_output_that_is_no_text_and_large_output(host: RunningHost) -> None:
    host.vm()
    script = r"printf 'bell \007 nul \000 byte \377 \r\n'; head -c 9000000 /dev/zero | tr '\0' x >&2"
    host.api.runCommand("vm", shell(script, "files"))
    path = host.finished("files")["result"]["stderr_path"]
    others = [host.connect(host.port) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda api: api.getCmdResults("files"), [host.api, *others]))
    results: Any = next(answer for answer in answers if answer)
    assert all(answer in ("", results) for answer in answers), "who comes later finds it taken"
    assert results["out"] == "bell \\x07 nul \\x00 byte \\xff \r\n"
    assert len(results["err"]) < 8 * 1024 * 1024 + 100
    assert results["err"].endswith("9000000 in all]\n")
    host.api.ping("vm")  # what was said to the agent before has arrived
    assert host.api.getFile("vm", path, "err")["size"] == 9_000_000, "the exact bytes stay until they are acknowledged"
    assert host.api.acknowledgeResult("vm", "files") is True
    with fault(2):
        host.api.getFile("vm", path, "err")
    host.api.runCommand("vm", shell("true", "silent"))
    host.finished("silent")
    silent: Any = host.api.getCmdResults("silent")
    assert (silent["out"], silent["err"], silent["finished"]) == ("", "", True)


def test_output_of_runcmd_is_here_when_it_is_listed_also_without_the_vm(host: RunningHost) -> None:
    host.vm()
    script = r"printf 'bell \007 byte \377\n'; head -c 9000000 /dev/zero | tr '\0' x >&2"
    ids: list[Any] = [host.api.runCmd("vm", "/bin/sh", ["-c", script]), host.api.runCmd("vm", "/no/such/program")]
    wait_until(lambda: sorted(host.api.listFinishedCmds()) == sorted(ids), "the results")
    host.api.powerOff("vm")
    assert sorted(host.api.listFinishedCmds()) == sorted(ids)
    results: Any = host.api.getCmdResults(ids[0])
    assert results["out"] == "bell \\x07 byte \\xff\n"
    assert len(results["err"]) < 8 * 1024 * 1024 + 100
    assert results["err"].endswith("[cut at 8388608 bytes; 9000000 in all]\n")
    failed: Any = host.api.getCmdResults(ids[1])
    assert (failed["out"], failed["finished"]) == ("", False)
    assert failed["err"].startswith("application-missing: ")


def test_what_getcmdresults_has_given_out_is_forgotten_in_the_guest(host: RunningHost) -> None:
    host.vm()
    id: Any = host.api.runCmd("vm", "/bin/echo", ["1"])
    wait_until(lambda: host.api.listFinishedCmds() == [id], "the result")
    assert [row["id"] for row in host.api.listCommands("vm")] == [id]
    host.api.getCmdResults(id)
    wait_until(lambda: host.api.listCommands("vm") == [], "the agent to forget it")


def test_the_newer_calls_about_vms(host: RunningHost) -> None:
    api = host.api
    with fault(-1, "is no file"):
        api.defineVM("vm", "fault.img", {})
    (host.slot / "fault.img").touch()
    with pytest.raises(xmlrpc.client.Fault) as trouble:
        api.defineVM("vm", "fault.img", {})
    assert json.loads(trouble.value.faultString) == {
        "key": "disk-full",
        "reason": "no room for the disk; free 1 GB",
        "delay_s": 600,
    }
    for bad in ("", "../x", "a/b", ".x", "n" * 101):
        with fault(-1, "name"):
            api.defineVM(bad, "disk.img", {})
    bad_settings: Any
    for bad_settings in ({"memory_mb": "512"}, {"memory": 5}, {"cpus": 0}, {"port_forwards": [{}]}, [], 5):
        with fault(-1):
            api.defineVM("vm", "disk.img", bad_settings)
    for forwards, what in (([{"guest_port": AGENT_PORT}], "agent's"), ([{"guest_port": 80}] * 2, "80 is there twice")):
        with fault(-1, what):
            api.defineVM("vm", "disk.img", {"port_forwards": forwards})
    with fault(4, "network_mode"):
        api.defineVM("vm", "disk.img", {"network_mode": "hostonly"})
    (host.slot / "mute.img").touch()
    assert api.defineVM("vm", "mute.img") is True
    began = time.monotonic()
    assert api.waitVM("vm", ["Running"], 0.2) == "PoweredOff"
    assert time.monotonic() - began < 5
    waiting: list[Any] = []
    other = host.connect(host.port)
    thread = threading.Thread(target=lambda: waiting.append(other.waitVM("vm", ["Running"], LIMIT_S)))
    thread.start()
    api.start("vm")
    thread.join(LIMIT_S)
    assert waiting == ["Running"]
    with fault(-1, "vm is Running"):
        api.start("vm")
    assert api.waitGuest("vm", 0.1) is False
    with fault(3):
        api.listFiles("vm", "")
    assert api.saveSnapshot("vm", "vmwrapper_1", "text") is True
    assert api.listSnapshots("vm") == ["vmwrapper_1"]
    assert api.getVMInfo("vm")["current_snapshot"] == "vmwrapper_1"
    assert api.deleteSnapshot("vm", "vmwrapper_1") is True
    assert api.setNetwork("vm", False) is True
    assert api.setCpuCap("vm", 50) is True
    with fault(-1, "percent"):
        api.setCpuCap("vm", 0)
    assert host.calls[-2:] == ["network vm False", "cap vm 50"]
    with fault(-1, "is Running"):
        api.restoreSnapshot("vm", "vmwrapper_1")
    assert api.powerOff("vm") is True
    assert api.restoreSnapshot("vm", "vmwrapper_1") is True
    assert host.calls[-1] == "restore vm vmwrapper_1"
    assert api.deleteVM("vm") is True
    assert api.deleteVM("vm") is True
    assert api.listAvailableVMs() == []


def test_files_of_the_guest(host: RunningHost) -> None:
    host.vm()
    (host.home() / "folder").mkdir()
    (host.home() / "folder" / "file").write_bytes(b"12345")
    listing: Any = host.api.listFiles("vm", "folder")
    assert listing == [{"name": "file", "size": 5, "folder": False}]
    with pytest.raises(xmlrpc.client.Fault) as missing:
        host.api.getFile("vm", "folder/none", "x")
    assert missing.value.faultCode == 2
    said = json.loads(missing.value.faultString)
    assert said["path"].endswith("none")
    assert said["listing"] == ["file"]
    with fault(2, "none"):
        host.api.putFile("vm", "none", "x")
    assert not (host.slot / "x").exists()


def test_long_polls_cancel_list_and_refusal(host: RunningHost) -> None:
    host.vm()
    api = host.api
    started: Any = api.runCommand("vm", shell("echo 0.25 > done; sleep 600", "long", fraction_done_file="done"))
    version = started["version"]
    deadline = after(LIMIT_S)
    command: Any = started
    while command["fraction_done"] != 0.25:
        assert time.monotonic() < deadline, host.log()
        command = api.waitCommand("vm", "long", version, 10.0)
        version = command["version"]
    assert command["state"] == "running"
    repeated: Any = api.runCommand("vm", shell("sleep 600", "long"))
    assert (repeated["state"], repeated["attempt"]) == ("running", 1), "a repeated call starts nothing"
    rows: Any = api.listCommands("vm")
    assert [(row["id"], row["state"]) for row in rows] == [("long", "running")]
    cancelled: Any = api.cancelCommand("vm", "long", 1.0)
    assert cancelled["state"] in ("running", "finished")
    ended = host.finished("long")
    assert ended["result"]["signal"] in (15, 9)
    # a higher attempt is another run, a lower one is refused
    second: Any = api.runCommand("vm", shell("exit 5", "long", attempt=2))
    assert second["attempt"] == 2
    assert host.finished("long")["result"]["exit_status"] == 5
    assert host.finished("long")["attempt"] == 2
    refused: Any = api.runCommand("vm", shell("true", "long", attempt=1))
    assert refused["state"] in ("refused", "finished")
    api.runCommand("vm", {"id": "missing", "command": "/no/such/program"})
    assert host.finished("missing")["result"]["error"]
    for bad in ({}, {"id": "x"}, {"id": "x", "command": ""}, {"id": "x", "command": "y", "extra": 1}, "x"):
        with fault(-1):
            api.runCommand("vm", bad)
    assert api.waitCommand("vm", "never", 0, 0.1)["state"] == "unknown"


def test_an_id_that_no_message_can_carry_is_refused_at_once(host: RunningHost) -> None:
    host.api.defineVM("vm", "disk.img", {})  # and not started: nobody is waited for
    for id in ("", "\n", " x", "x ", "\x85", "x" * 201):
        for name, arguments in (
            ("runCommand", [{"id": id, "command": "/bin/true"}]),
            ("waitCommand", [id, 0, 60.0]),
            ("queryCommand", [id]),
            ("cancelCommand", [id]),
            ("acknowledgeResult", [id]),
        ):
            with fault(-1, "id: expected"):
                getattr(host.api, name)("vm", *arguments)


def test_arguments_arrive_as_they_were(host: RunningHost) -> None:
    host.vm()
    arguments = ["", " ", "a b", "'\"`$(x)", "new\nline", "ünï©ode 🐍", "back\\slash", "-x", "tab\t", "~/*"]
    host.api.runCommand(
        "vm", {"id": "args", "command": "/bin/sh", "arguments": ["-c", 'printf "%s\\0" "$@"', "sh", *arguments]}
    )
    host.api.getFile("vm", host.finished("args")["result"]["stdout_path"], "args")
    assert (host.slot / "args").read_bytes().decode().split("\0")[:-1] == arguments


def test_whatever_is_lost_the_command_runs_once_and_its_result_arrives(tmp_path: Path) -> None:
    with embedded_broker() as (broker_port, login, passcode):
        proxy = LossyProxy(broker_port)
        config = f"[Broker]\nhost=127.0.0.1\nport={proxy.port}\nusername={login}\npassword={passcode}\n"
        try:
            with running_hostmain(tmp_path, config) as host:
                host.vm()
                proxy.lose = {"CMD_RUN": 2, "CMD_STATE": 2, "CMD_RESULT": 1, "CMD_FORGET": 1, "CMD_FORGOTTEN": 1}
                host.api.runCommand("vm", shell("echo once >> witness", "c1", folder=str(host.home())))
                assert host.finished("c1")["result"]["exit_status"] == 0
                assert host.api.acknowledgeResult("vm", "c1") is True
                assert not any(proxy.lose.values()), proxy.lose
                # every connection breaks while it runs
                host.api.runCommand("vm", shell("while [ ! -e go ]; do sleep 0.1; done; echo 2 >> witness", "c2"))
                proxy.cut()
                host.event("broker-lost")
                (host.home() / "go").touch()
                host.event("broker-connected")
                assert host.finished("c2")["result"]["exit_status"] == 0
                assert (host.home() / "witness").read_text() == "once\n2\n"
        finally:
            proxy.close()


def test_a_broker_that_comes_late_and_is_restarted(tmp_path: Path) -> None:
    port = free_port()
    config = f"[Broker]\nhost=127.0.0.1\nport={port}\nusername=guest\npassword=secret\n"
    with running_hostmain(tmp_path, config) as host:
        host.api.defineVM("vm", "disk.img", {})
        assert host.api.start("vm") is True, "the VM starts without the broker"
        assert host.api.waitGuest("vm", 0.5) is False
        assert host.api.getStatus()["broker"] is False
        with embedded_broker(port):
            host.event("broker-connected")
            assert host.api.waitGuest("vm", LIMIT_S) is True, host.log()
            host.api.runCommand("vm", shell("while [ ! -e go ]; do sleep 0.1; done; echo x >> witness", "c1"))
        host.event("broker-lost")
        (host.home() / "go").touch()
        wait_until((host.home() / "witness").exists, "the command to end")
        with embedded_broker(port):
            host.event("broker-connected")
            assert host.finished("c1")["result"]["exit_status"] == 0
            assert (host.home() / "witness").read_text() == "x\n"


def test_suspend_save_resume(host: RunningHost) -> None:
    host.vm()
    api = host.api
    api.runCommand("vm", shell("while [ ! -e go ]; do sleep 0.1; done", "c1"))
    api.pause("vm")
    assert api.waitGuest("vm", 0.2) is False
    api.unpause("vm")
    assert api.waitGuest("vm", LIMIT_S) is True
    api.saveState("vm")
    assert api.waitGuest("vm", 0.2) is False
    api.start("vm")
    assert api.waitGuest("vm", LIMIT_S) is True
    assert api.queryCommand("vm", "c1")["state"] == "running"
    (host.home() / "go").touch()
    assert host.finished("c1")["result"]["exit_status"] == 0
    # power off: the agent's memory is gone, and so is what we knew from it
    api.powerOff("vm")
    api.start("vm")
    assert api.waitGuest("vm", LIMIT_S) is True
    assert api.queryCommand("vm", "c1")["state"] == "unknown"


def test_a_vm_that_dies(host: RunningHost) -> None:
    host.vm()
    host.api.runCommand("vm", shell("sleep 600", "c1"))
    pid: Any = host.api.getVMInfo("vm")["pid"]
    os.kill(pid, signal.SIGKILL)
    assert host.api.waitVM("vm", ["Aborted"], LIMIT_S) == "Aborted"
    wait_until(lambda: host.api.waitCommand("vm", "c1", 0, 0)["state"] == "unknown", "the command to be unknown")
    assert host.api.waitGuest("vm", 0.1) is False
    assert host.api.listRegisteredVMs() == []


def test_a_guest_that_falls_silent_is_dropped(tmp_path: Path) -> None:
    with running_hostmain(tmp_path, EMBEDDED.replace("vm_gc_grace = 30", "vm_gc_grace = 2")) as host:
        host.vm()
        pid: Any = host.api.getVMInfo("vm")["pid"]
        os.kill(pid, signal.SIGSTOP)  # behind the hypervisor's back
        try:
            wait_until(lambda: host.api.listRegisteredVMs() == [], "the guest to be dropped")
        finally:
            os.kill(pid, signal.SIGCONT)
        assert "has not been heard" in host.log()
        assert host.api.waitGuest("vm", LIMIT_S) is True
        host.api.pause("vm")
        time.sleep(3.5)  # longer than 1.5 x the grace: a VM that we paused is not dropped
        assert host.api.listRegisteredVMs() == ["vm"]
        host.api.unpause("vm")
        assert host.api.waitGuest("vm", LIMIT_S) is True


def post(port: int, headers: dict[str, str], body: bytes | None = None, method: str = "POST") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    call = xmlrpc.client.dumps((), "listAvailableVMs").encode()
    connection.putrequest(method, "/RPC2", skip_host="Host" in headers)
    body = call if body is None else body
    for key, value in {"Content-Type": "text/xml", "Content-Length": str(len(body)), **headers}.items():
        connection.putheader(key, value)
    connection.endheaders(body)
    try:
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_the_secret_is_demanded(host: RunningHost) -> None:
    for wrong in (None, "wrong", SECRET + "x", ""):
        with pytest.raises(xmlrpc.client.ProtocolError) as refused:
            host.connect(host.port, wrong).listAvailableVMs()
        assert refused.value.errcode == 401
    for header in ("Basic", "Basic !!!", "Bearer x", "Basic " + "A" * 3000):
        assert post(host.port, {"Authorization": header})[0] == 401
    assert host.api.listAvailableVMs() == []


@pytest.fixture
def host_with_broker_port(tmp_path: Path) -> Iterator[RunningHost]:
    with running_hostmain(tmp_path, with_broker_port()) as host:
        yield host


def test_what_strangers_do_fills_no_log(host_with_broker_port: RunningHost) -> None:
    host = host_with_broker_port
    host.event("broker-connected")
    stranger = host.connect(host.port, "wrong")
    broker = json.loads((host.slot / "vmwrapper_ports.json").read_text())["broker"]
    before = len(host.log().splitlines())
    for _ in range(100):
        with pytest.raises(xmlrpc.client.ProtocolError):
            stranger.getStatus()
        with socket.create_connection(("127.0.0.1", broker), LIMIT_S) as connection:
            connection.sendall(b"CONNECT\naccept-version:1.2\nhost:x\n\n\0")
            assert connection.recv(5) == b"ERROR"
    assert host.api.getStatus()["broker"] is True
    assert len(host.log().splitlines()) - before < 30


def test_web_pages_cannot_call(tmp_path: Path) -> None:
    port = free_port()
    config = EMBEDDED + f"xmlrpc_port = {port}\n"
    host = HostMainProcess(tmp_path, config, standalone=True)
    try:
        standalone = host.connect(port, None)
        wait_until(lambda: _answers(standalone), "HostMain")
        assert standalone.listAvailableVMs() == []
        assert post(port, {})[0] == 200
        assert post(port, {"Host": "localhost:1"})[0] == 200
        assert post(port, {"Content-Type": "text/xml; charset=utf-8"})[0] == 200
        assert post(port, {"Content-Type": "text/plain"})[0] == 415
        assert post(port, {"Content-Type": "application/x-www-form-urlencoded"})[0] == 415
        assert post(port, {"Origin": "http://example.org"})[0] == 403
        assert post(port, {"Origin": "null"})[0] == 403
        assert post(port, {"Sec-Fetch-Site": "cross-site"})[0] == 403
        assert post(port, {"Host": "rebound.example.org"})[0] == 403
        assert post(port, {"Host": "127.0.0.1.example.org"})[0] == 403
        assert post(port, {}, method="GET")[0] == 405
        status, _ = post(port, {"Access-Control-Request-Method": "POST", "Origin": "http://x"}, method="OPTIONS")
        assert status == 403
        assert "every user of this computer" in host.log()
        assert json.loads((tmp_path / "vmwrapper_ports.json").read_text())["xmlrpc"] == port
    finally:
        host.close()
    assert host.process.returncode == 0
    assert not (tmp_path / "vmwrapper_ports.json").exists()


def _answers(api: Any) -> bool:
    try:
        api.getStatus()
    except OSError:
        return False
    return True


def test_bodies_are_bounded_and_nothing_hostile_stops_it(host: RunningHost) -> None:
    token = {"Authorization": "Basic " + base64.b64encode(f"vmwrapper:{SECRET}".encode()).decode()}
    before = psutil.Process(host.process.pid).memory_info().rss
    with socket.create_connection(("127.0.0.1", host.port), LIMIT_S) as raw:
        raw.sendall(b"POST /RPC2 HTTP/1.1\r\nContent-Type: text/xml\r\nContent-Length: 1000000000\r\n\r\n")
        assert b" 413 " in raw.recv(100)
    with socket.create_connection(("127.0.0.1", host.port), LIMIT_S) as raw:
        raw.sendall(b"POST /RPC2 HTTP/1.1\r\nContent-Type: text/xml\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.settimeout(LIMIT_S)
        with pytest.raises(OSError):  # noqa: PT011, PT012
            for _ in range(1000):
                raw.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
    for body in (b"<a>" * 500_000, b"x" * 1_000_000, b"<?xml version='1.0'?><!DOCTYPE x><x/>"):
        assert post(host.port, token, body)[0] == 200
    fault_answer = post(host.port, token, b"<methodCall/>")[1]
    assert b"faultCode" in fault_answer
    assert psutil.Process(host.process.pid).memory_info().rss - before < 64 * 1024 * 1024
    assert host.api.listAvailableVMs() == []


def test_a_thousand_calls_are_cheap(host: RunningHost) -> None:
    process = psutil.Process(host.process.pid)
    host.api.listFinishedCmds()
    memory, before = process.memory_info().rss, process.cpu_times()
    for _ in range(1000):
        host.api.listFinishedCmds()
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) < 3.0
    assert process.memory_info().rss - memory < 8 * 1024 * 1024


def test_a_caller_that_goes_away_costs_nothing(host: RunningHost) -> None:
    (host.slot / "mute.img").touch()
    host.api.defineVM("vm", "mute.img")
    call = xmlrpc.client.dumps(("vm", ["Running"], 600.0), "waitVM").encode()
    head = f"Authorization: Basic {base64.b64encode(f'vmwrapper:{SECRET}'.encode()).decode()}\r\n"
    request = f"POST / HTTP/1.1\r\nContent-Type: text/xml\r\n{head}Content-Length: {len(call)}\r\n\r\n".encode() + call
    for _ in range(300):  # more than CONNECTIONS at once
        with socket.create_connection(("127.0.0.1", host.port), LIMIT_S) as raw:
            raw.sendall(request)
    assert host.api.start("vm") is True
    assert "Unhandled" not in host.log()
    assert "Traceback" not in host.log()


def test_the_end_of_the_lifeline_saves_and_ends(host: RunningHost) -> None:
    host.vm()
    pid: Any = host.api.getVMInfo("vm")["pid"]
    host.cut_lifeline()
    assert host.ended() == 0
    assert host.calls[-2:] == ["save vm", "closed"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert "the wrapper is gone" in host.log()
    assert "Traceback" not in host.log()


def test_a_save_that_its_caller_does_not_live_to_see_is_finished(host: RunningHost) -> None:
    (host.slot / "mute-slow.img").touch()
    host.vm(image="mute-slow.img")
    call = xmlrpc.client.dumps(("vm",), "saveState").encode()
    token = base64.b64encode(f"vmwrapper:{SECRET}".encode()).decode()
    with socket.create_connection(("127.0.0.1", host.port), LIMIT_S) as wrapper:
        wrapper.sendall(
            f"POST / HTTP/1.1\r\nContent-Type: text/xml\r\nAuthorization: Basic {token}\r\n"
            f"Content-Length: {len(call)}\r\n\r\n".encode()
            + call
        )
        assert host.api.waitVM("vm", ["Saving"], LIMIT_S) == "Saving"
    host.cut_lifeline()
    assert host.ended() == 0
    assert host.calls[-3:] == ["save vm", "saved vm", "closed"]
    assert "Traceback" not in host.log()
    assert "Unhandled" not in host.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end(host: RunningHost, number: signal.Signals) -> None:
    (host.slot / "mute.img").touch()
    host.vm(image="mute.img")
    host.process.send_signal(number)
    host.process.send_signal(number)
    assert host.ended() == 0
    assert host.calls[-2:] == ["save vm", "closed"]


@pytest.mark.parametrize(("save", "last"), [(True, "save vm"), (False, "power off vm")])
def test_shutdown_answers_and_ends(host: RunningHost, save: bool, last: str) -> None:
    (host.slot / "mute.img").touch()
    host.vm(image="mute.img")
    poll: list[object] = []

    def wait() -> None:
        try:
            poll.append(host.connect(host.port).waitVM("vm", ["Stuck"], 600.0))
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            poll.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    began = time.monotonic()
    outcome = "saved" if save else "off"
    assert host.api.shutdown(save) == [{"name": "vm", "outcome": outcome, "reason": "", "key": ""}]
    assert host.ended() == 0
    assert time.monotonic() - began < 5
    thread.join(LIMIT_S)
    assert isinstance(poll[0], Exception), "who waits is not left waiting"
    assert host.calls[-2:] == [last, "closed"]
    with pytest.raises(OSError):  # noqa: PT011
        host.api.getStatus()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[Broker]\nport = x\n", r"HostMain: HostConfig.cfg: \[Broker\] port: expected"),
        ("[Broker]\ntype = embedded\nport = {busy}\n", r"HostMain: cannot listen on 127.0.0.1:{busy}"),
        ("[Broker]\ntype = embedded\n[Host]\nxmlrpc_port = {busy}\n", r"HostMain: cannot listen on 127.0.0.1:{busy}"),
    ],
)
def test_what_keeps_it_from_starting_is_one_clear_line(tmp_path: Path, config: str, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        host = HostMainProcess(tmp_path, config.replace("{busy}", port))
        try:
            assert host.ended() == (2 if "expected" in said else 3)
        finally:
            host.close()
    assert re.search(said.replace("{busy}", port), host.log().splitlines()[-1]), host.log()
    assert "Traceback" not in host.log()


def test_a_log_level_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    with contextlib.closing(HostMainProcess(tmp_path, environment={"VMWRAPPER_LOG_LEVEL": "verbose"})) as host:
        assert host.ended() == 2
    said = host.log().splitlines()
    assert said == ["HostMain: VMWRAPPER_LOG_LEVEL: 'verbose' is none of DEBUG, INFO, WARNING, ERROR"]


def test_an_agent_of_ours_on_the_link_of_2009(tmp_path: Path) -> None:
    """The agent dials the broker, and files go by HTTP to its address."""
    with running_broker("embedded", tmp_path) as broker, agent_process(tmp_path, broker) as agent:
        agent.kill()
        text = agent._config.read_text()  # where HostMain looks for it
        agent._config.write_text(re.sub("listen_port = .*", f"listen_port = {AGENT_PORT}", text))
        agent.start()
        config = f"[Broker]\nhost=127.0.0.1\nport={broker.port}\nusername={broker.login}\npassword={broker.passcode}\n"
        with running_hostmain(tmp_path, config, {"FAKE_SILENT_ID": GUEST_ID}) as host:
            (host.slot / "mute.img").touch()
            host.api.defineVM("CernVM", "mute.img")
            host.api.start("CernVM")
            assert host.api.waitGuest("CernVM", LIMIT_S) is True, host.log() + agent.log.read_text()
            host.api.runCommand("CernVM", shell("echo hello", "c1"))
            assert host.finished("c1", "CernVM")["result"]["exit_status"] == 0
            (host.slot / "in").write_text("hello\n")
            assert host.api.cpFileToVM("CernVM", "in") == ["", "", 0]
            assert host.api.cpFileFromVM("CernVM", "in", "back") == ["", "", 0]
            assert (host.slot / "back").read_text() == "hello\n"
            assert host.api.getCmdResults("c1")["out"] == "hello\n"
            id: Any = host.api.runCmd("CernVM", "/bin/echo", ["1 "], "{}", "None", "")
            wait_until(lambda: id in host.api.listFinishedCmds(), "the command")
            assert host.api.getCmdResults(id)["out"] == "1 \n"


def test_a_second_one_in_the_slot_says_so_and_leaves_the_first_alone(host: RunningHost) -> None:
    host.vm()
    with contextlib.closing(HostMainProcess(host.slot)) as second:
        assert second.ended() == 3
    assert re.search("^HostMain: another HostMain is running in ", host.log(), re.MULTILINE)
    assert "Traceback" not in host.log()
    assert (host.slot / "vmwrapper_ports.json").exists()
    assert host.api.getState("vm") == "Running"
    host.process.kill()
    host.process.wait()
    with running_hostmain(host.slot) as third:
        assert third.api.listAvailableVMs() == []


def test_what_a_killed_one_was_copying_goes_with_the_next(tmp_path: Path) -> None:
    with running_hostmain(tmp_path) as host:
        host.vm()
        (host.home() / "out").write_text("x")
        host.api.pause("vm")
        (tmp_path / "folder").mkdir()
        calls, names = [host.connect(host.port) for _ in range(2)], ("out", "folder/out")
        with ThreadPoolExecutor() as pool:
            copies = [pool.submit(api.getFile, "vm", "out", name) for api, name in zip(calls, names, strict=True)]
            wait_until(lambda: len(list(tmp_path.rglob(f"{PREFIX}*"))) == 2, "the copies to begin")
            host.process.kill()
            for copy in copies:
                with pytest.raises((OSError, http.client.HTTPException)):
                    copy.result(LIMIT_S)
    assert len(list(tmp_path.rglob(f"{PREFIX}*"))) == 2
    with running_hostmain(tmp_path):
        wait_until(lambda: not list(tmp_path.rglob(f"{PREFIX}*")), "the next one to remove them")


@pytest.mark.parametrize("any_broker", KINDS_OF_2009, indirect=True)
def test_an_agent_of_2009(any_broker: RunningHost) -> None:
    host = any_broker
    (host.slot / "mute.img").touch()
    host.vm("CernVM", "mute.img")
    config = (host.slot / "HostConfig.cfg").read_text()
    port = int(config.split("port=")[1].split()[0])
    environment = psutil.Process(host.process.pid).environ()
    host.event("broker-connected")
    id = "02:00:00:00:00:07"
    agent = Agent2009(port, environment["VMWRAPPER_BROKER_LOGIN"], environment["VMWRAPPER_BROKER_PASSCODE"], id)
    try:
        assert host.api.waitGuest("CernVM", LIMIT_S) is True, host.log()

        def pong() -> None:
            while True:
                _, headers, body = agent.read()
                if body == "PING":
                    agent.say("/topic/cmd_responses", f"from:{id}\ntimestamp:{headers['timestamp']}", "PONG")
                    return

        thread = threading.Thread(target=pong)
        thread.start()
        assert host.api.ping("CernVM", LIMIT_S) == "PONG from CernVM"
        thread.join(LIMIT_S)
        command: Any = host.api.runCmd("CernVM", "worker.py", ["1 "], "{}", "None", "stdin_worker")
        _, headers, body = agent.read()
        assert body == "CMD_RUN"
        assert (headers["cmd"], headers["fileForStdin"], headers["to"]) == ("worker.py", "stdin_worker", id)
        assert eval(headers["args"]) == ["1 "]
        assert eval(headers["env"]) == {}
        assert eval(headers["path"]) is None
        result = {
            "cmd-id": command,
            "out": "1\n",
            "err": "",
            "finished": True,
            "exitCodeOrSignal": 0,
            "resources": {"ru_utime": 5.0, "ru_stime": 0.25, "ru_maxrss": 2**31},
        }
        agent.say("/topic/cmd_responses", f"cmd-id:{headers['cmd-id']}", f"CMD_RESULT {json.dumps(result)}")
        wait_until(lambda: host.api.listFinishedCmds() == [command], "the result")
        assert host.api.getCmdResults(command) == {
            "out": "1\n",
            "err": "",
            "finished": True,
            "exitCodeOrSignal": 0,
            "resources": {"ru_utime": 5.0, "ru_stime": 0.25, "ru_maxrss": 2.0**31},
        }
        with fault(-1, "protocol 1"):
            host.api.cancelCommand("CernVM", command)
        for nonsense in ("CMD_RESULT {", "PONG", "STILL_ALIVE", "", "__import__('os')", "CMD_STATE []"):
            agent.say("/topic/cmd_responses", "x:y", nonsense)
        agent.say("/topic/connections", f"id:{id}\nip:192.168.56.101", "BYE")
        wait_until(lambda: host.api.listRegisteredVMs() == [], "the guest to be gone")
        assert "dropped" in host.log()
    finally:
        agent.close()
