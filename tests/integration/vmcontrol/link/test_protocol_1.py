"""Patterns, results apart, fractions of a second, lost replies: 2009's ways over a real broker."""

from __future__ import annotations

import base64
import json
import socket
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest.agent.identity import cards
from tests.support.agent_of_2009 import Agent2009
from tests.support.agenthost import GUEST_ID, ScriptedHost, agent_process, wait_until
from tests.support.brokers import BrokerAddress, running_broker
from tests.support.hostmains import LIMIT_S, SECRET, RunningHost, embedded_broker, running_hostmain
from vmcontrol.protocol.messages import CommandResult, Hello, Pong

OLD_ID = "02:00:00:00:00:07"
"""Of the made-up hypervisor's VMs without an agent of their own."""


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerAddress]:
    with running_broker("embedded", tmp_path) as broker:
        yield broker


def test_one_request_reaches_every_guest_that_its_pattern_fits(broker: BrokerAddress, tmp_path: Path) -> None:
    others = [card for card in cards() if not card.loopback and card.mac and card.ips]
    if not others:
        pytest.skip("NOT TESTED: this computer has no second network card with an address, for a second guest")
    second = others[0]
    host = ScriptedHost(broker)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        agent_process(tmp_path / "one", broker),
        agent_process(tmp_path / "two", broker, interface=second.name),
    ):
        ids = {host.expect(Hello).id for _ in range(2)}
        assert ids == {GUEST_ID, second.mac}
        request = {"destination": "/topic/cmd_requests", "cmd": "sh", "env": "{}", "path": "None", "fileForStdin": ""}
        script = "['-c', 'pwd']"
        host.frame("SEND", {**request, "to": "*", "cmd-id": "all", "args": script}, "CMD_RUN")
        results: dict[str, Any] = {}
        while len(results) < 2:
            result = host.expect(CommandResult, lambda one: one.id == "all")
            results[result.sender] = result.body["out"]
        assert results == {
            GUEST_ID: f"{tmp_path}/one/work\n",
            second.mac: f"{tmp_path}/two/work\n",
        }
        pattern = second.mac[:2].lower() + ":[!x]?:*"
        if GUEST_ID.startswith(second.mac[:2]):
            pattern = second.mac
        host.frame("SEND", {**request, "to": pattern, "cmd-id": "some", "args": script}, "CMD_RUN")
        assert host.expect(CommandResult, lambda one: one.id == "some").sender == second.mac
        assert not [m for m in host.collect(1.0) if isinstance(m, CommandResult) and m.id == "some"]
    host.close()


def test_a_ping_with_a_fraction_is_given_back_as_it_was(broker: BrokerAddress, tmp_path: Path) -> None:
    host = ScriptedHost(broker)
    with agent_process(tmp_path, broker):
        host.expect(Hello)
        request = {"destination": "/topic/cmd_requests", "to": GUEST_ID, "timestamp": "1795338340.72"}
        host.frame("SEND", request, "PING")
        assert host.expect(Pong) == Pong(GUEST_ID, "1795338340.72")
    host.close()


@pytest.fixture
def mixed(tmp_path: Path) -> Iterator[tuple[RunningHost, Agent2009]]:
    """HostMain with a VM of ours, `vm`, and one with an agent of protocol 1, `CernVM`."""
    with embedded_broker() as (port, login, passcode):
        config = f"[Broker]\nhost=127.0.0.1\nport={port}\nusername={login}\npassword={passcode}\n"
        with running_hostmain(tmp_path, config) as host:
            host.event("broker-connected")
            (host.slot / "mute.img").touch()
            host.vm("CernVM", "mute.img")
            host.vm()
            old = Agent2009(port, login, passcode, OLD_ID)
            assert host.api.waitGuest("CernVM", LIMIT_S) is True, host.log()
            yield host, old
            old.close()


def test_runcmd_takes_a_pattern_and_results_are_kept_apart(mixed: tuple[RunningHost, Agent2009]) -> None:
    host, old = mixed
    large = "x" * 1_000_000
    old.serve(lambda headers: f"2009: {headers['args']} {large}")
    api = host.api
    id: Any = api.runCmd("0?:00:*", "/bin/echo", ["both "], "{}", "None", "")
    wait_until(lambda: api.listFinishedCmds() == [id, id], "both results")
    assert json.loads(str(api.getCmdDetails(id)))["to"] == "0?:00:*"
    results: list[Any] = [api.getCmdResults(id), api.getCmdResults(id)]
    assert sorted(result["out"][:20] for result in results) == ["2009: ['both '] xxxx", "both \n"]
    assert max(len(result["out"]) for result in results) > 1_000_000
    assert api.getCmdResults(id) == ""
    # by the newer methods too, each by its VM
    assert api.waitCommand("vm", id, 0, 0)["result"]["out"] == "both \n"
    assert api.waitCommand("CernVM", id, 0, 0)["result"]["out"].startswith("2009")
    only: Any = api.runCmd("02:*", "/bin/echo", ["one"])
    wait_until(lambda: api.listFinishedCmds() == [only], "one result")
    assert api.getCmdResults(only)["out"].startswith("2009")
    with pytest.raises(xmlrpc.client.Fault, match=r"'FF:\*' is not a registered VM\."):
        api.runCmd("FF:*", "/bin/echo")
    assert [body for _, body in old.seen].count("CMD_RUN") == 2, "an agent of protocol 1 is sent each request once"


def test_a_reply_that_its_client_never_reads_loses_nothing(mixed: tuple[RunningHost, Agent2009]) -> None:
    host, _ = mixed
    id: Any = host.api.runCmd("vm", "/bin/echo", ["kept"])
    wait_until(lambda: host.api.listFinishedCmds() == [id], "the result")
    call = xmlrpc.client.dumps((id,), "getCmdResults").encode()
    token = base64.b64encode(f"vmwrapper:{SECRET}".encode()).decode()
    head = f"POST /RPC2 HTTP/1.1\r\nContent-Type: text/xml\r\nAuthorization: Basic {token}\r\n"
    with socket.create_connection(("127.0.0.1", host.port), LIMIT_S) as gone:
        gone.sendall(f"{head}Content-Length: {len(call)}\r\n\r\n".encode() + call)
        wait_until(lambda: host.api.listFinishedCmds() == [], "the result to be given out")
    assert host.api.getCmdResults(id) == ""
    assert host.api.waitCommand("vm", id, 0, 0)["result"]["out"] == "kept\n"
    assert host.api.waitCommand("vm", id, 0, 0)["result"]["out"] == "kept\n", "and again"


def test_an_agent_of_2009_is_warned_about_and_dropped_unless_we_paused_its_vm(tmp_path: Path) -> None:
    """vm_gc_grace: it says nothing after its HELLO."""
    with embedded_broker() as (port, login, passcode):
        config = (
            f"[Broker]\nhost=127.0.0.1\nport={port}\nusername={login}\npassword={passcode}\n[Host]\nvm_gc_grace=1\n"
        )
        with running_hostmain(tmp_path, config) as host:
            host.event("broker-connected")
            (host.slot / "mute.img").touch()
            host.vm("CernVM", "mute.img")
            old = Agent2009(port, login, passcode, OLD_ID)
            assert host.api.waitGuest("CernVM", LIMIT_S) is True
            host.api.pause("CernVM")
            wait_until(lambda: host.api.getStatus()["guests"][0]["heard_s_ago"] > 2.5, "2.5 graces")
            assert host.api.listRegisteredVMs() == ["CernVM"]
            assert "has not been heard" not in host.log()
            host.api.unpause("CernVM")
            wait_until(lambda: "has not been heard" in host.log(), "the warning")
            assert host.api.listRegisteredVMs() == ["CernVM"], "it is warned about first"
            wait_until(lambda: host.api.listRegisteredVMs() == [], "the guest to be dropped")
            old.say("/topic/connections", f"id:{OLD_ID}\nip:192.168.56.101", "STILL_ALIVE")
            wait_until(lambda: host.api.listRegisteredVMs() == ["CernVM"], "a beacon to register it")
            old.close()
