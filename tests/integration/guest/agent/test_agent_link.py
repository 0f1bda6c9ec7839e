"""VMMain's links, with the real brokers: 2009's (it dials the broker) and the default one (the host dials it)."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agenthost import (
    GUEST_ID,
    AgentProcess,
    ScriptedHost,
    agent_process,
    exists,
    killed_at_the_end,
    running,
    wait_until,
)
from tests.support.brokers import KINDS_OF_2009, BrokerAddress, running_broker
from vmcontrol.protocol.command import CommandState
from vmcontrol.protocol.handshake import HostHandshake, Mode, Outcome
from vmcontrol.protocol.messages import (
    Bye,
    CommandForget,
    CommandForgotten,
    CommandQuery,
    CommandResult,
    Hello,
    Ping,
    Pong,
    StillAlive,
)


@pytest.fixture(scope="module", params=KINDS_OF_2009)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerAddress]:
    with running_broker(request.param, tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture
def host(broker: BrokerAddress) -> Iterator[ScriptedHost]:
    host = ScriptedHost(broker)
    yield host
    host.close()


def test_hello_beacon_ping_and_bye(host: ScriptedHost, broker: BrokerAddress, tmp_path: Path) -> None:
    with agent_process(tmp_path, broker) as agent:
        assert host.expect(Hello) == Hello(GUEST_ID, "127.0.0.1", 2, "VMMain")
        host.send(Ping("00:00:*", "1795338340720"))
        assert host.expect(Pong) == Pong(GUEST_ID, "1795338340720")
        assert host.expect(StillAlive).id == GUEST_ID
        assert agent.stop() == 0
        assert host.expect(Bye) == Bye(GUEST_ID, "127.0.0.1")


def test_a_host_of_2009_runs_a_command(host: ScriptedHost, broker: BrokerAddress, tmp_path: Path) -> None:
    with agent_process(tmp_path, broker) as agent:
        host.expect(Hello)
        (agent.home / "stdin_worker").write_text("from the host\n")
        headers = {
            "destination": "/topic/cmd_requests",
            "to": GUEST_ID,
            "cmd-id": "5b1e9a4c",
            "cmd": "sh",
            "args": "['-c', 'cat; echo \"$0|$HOME\"', '1 ']",
            "env": "{}",
            "path": "None",
            "fileForStdin": "stdin_worker",
        }
        host.frame("SEND", headers, "CMD_RUN")
        result = host.result("5b1e9a4c")
        assert result["out"] == f"from the host\n1 |{Path.home()}\n"
        assert (result["cmd-id"], result["err"], result["finished"]) == ("5b1e9a4c", "", True)
        assert result["exitCodeOrSignal"] == 0
        assert "ru_utime" in result["resources"]
        # such a host never acknowledges, so the result comes once
        assert not [message for message in host.collect(3) if isinstance(message, CommandResult)]


def test_after_a_cold_boot_a_started_command_is_lost_and_a_finished_one_kept(
    host: ScriptedHost, broker: BrokerAddress, tmp_path: Path
) -> None:
    with agent_process(tmp_path, broker) as agent:
        host.expect(Hello)
        host.run("finished", "echo", "kept", inline_output=False)
        before = host.result("finished")
        host.run("started", "sh", "-c", "(setsid sleep 603 &); sleep 604", inline_output=False)
        pid = host.state("started", lambda status: status.pid is not None).pid
        agent.kill()
        assert pid is not None
        wait_until(lambda: not exists(pid), "the end of an agent's command without its agent")
        agent.start()
        host.expect(Hello)
        assert host.result("finished") == before
        assert (agent.home / before["stdout_path"]).read_text() == "kept\n"
        host.send(CommandQuery(GUEST_ID, "started"))
        assert host.state("started").state is CommandState.LOST
        host.run("started", "echo", "again", attempt=1)
        assert host.state("started").state is CommandState.LOST
        host.run("started", "echo", "again", attempt=2)
        assert host.result("started")["out"] == "again\n"
        for id in ("finished", "started"):
            host.send(CommandForget(GUEST_ID, id))
            host.expect(CommandForgotten, lambda message, id=id: message.id == id)  # type: ignore[misc]
        assert json.loads((agent.home / ".vmwrapper" / "journal.json").read_text()) == {}


def test_results_that_cannot_be_sent_do_not_stop_the_others(
    host: ScriptedHost, broker: BrokerAddress, tmp_path: Path
) -> None:
    agent = AgentProcess(tmp_path, broker)
    results: dict[str, object] = {
        "a": {"finished": True},
        "no-number": {"cpu_time_s": float("nan")},
        "no-path": {"stdout_path": 5},
        "half": {"stdout_path": "x.out"},
        "z": {"finished": True},
    }
    entries = {id: {"attempt": 1, "inline": True, "legacy": False, "result": body} for id, body in results.items()}
    (agent.home / ".vmwrapper").mkdir()
    (agent.home / ".vmwrapper" / "journal.json").write_text(json.dumps(entries))
    with running(agent):
        host.expect(Hello)
        assert host.result("a") == host.result("z") == {"finished": True}
        host.run("new", "echo", "hi")
        assert host.result("new")["out"] == "hi\n"
        assert host.result("z", limit_s=10) == {"finished": True}, "it is repeated too"


def test_folders_where_outputs_were_do_not_keep_the_agent_from_starting(
    host: ScriptedHost, broker: BrokerAddress, tmp_path: Path
) -> None:
    agent = AgentProcess(tmp_path, broker)
    state = agent.home / ".vmwrapper"
    (state / "x.out").mkdir(parents=True)
    (state / "y.err").write_text("of an earlier agent")
    with running(agent):
        host.expect(Hello)
        assert not (state / "y.err").exists()
        host.run("c", "echo", "hi")
        assert host.result("c")["out"] == "hi\n"


def test_term_kills_what_runs(host: ScriptedHost, broker: BrokerAddress, tmp_path: Path) -> None:
    with agent_process(tmp_path, broker) as agent:
        host.expect(Hello)
        host.run("long", "sh", "-c", "trap '' TERM; sleep 605; sleep 606")
        pid = host.state("long", lambda status: status.pid is not None).pid
        assert agent.stop() == 0
        assert pid is not None
        assert not exists(pid)


def test_term_kills_also_what_has_stopped_its_supervisor(tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    with (
        running_broker("embedded", tmp_path / "broker") as broker,
        contextlib.closing(ScriptedHost(broker)) as host,
        agent_process(tmp_path, broker) as agent,
    ):
        host.expect(Hello)
        host.run("stopper", "sh", "-c", "kill -STOP $PPID; exec sleep 607")
        pid = host.state("stopper", lambda status: status.pid is not None).pid
        assert pid is not None
        supervisor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        with killed_at_the_end(supervisor, pid):
            assert agent.stop() == 0
            wait_until(lambda: not exists(pid) and not exists(supervisor), "the command's end", 5)


def test_it_comes_back_when_the_broker_does_and_repeats_what_was_missed(tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    with running_broker("embedded", tmp_path / "broker") as first:
        host = ScriptedHost(first)
        agent = agent_process(tmp_path, first)
        running = agent.__enter__()
        host.expect(Hello)
        host.run("while-away", "sh", "-c", "while [ ! -e away ]; do sleep 0.05; done; echo done")
        host.state("while-away", lambda status: status.pid is not None)
        host.close()
    try:
        (running.work / "away").touch()
        wait_until(lambda: "ended: exit status 0" in running.log.read_text(), "the command's end")
        # the agent keeps what it was told at first: the same port, other secrets would not let it in
        with _same_broker(first) as again:
            host = ScriptedHost(again)
            assert host.expect(Hello).id == GUEST_ID
            assert host.result("while-away")["out"] == "done\n"
            host.close()
            agent.__exit__(None, None, None)
    finally:
        agent.__exit__(None, None, None)


@contextlib.contextmanager
def _same_broker(old: BrokerAddress) -> Iterator[BrokerAddress]:
    """An embedded broker with the port and the credentials of another that has ended."""
    import os
    import subprocess
    import sys

    environment = {
        **os.environ,
        "VMWRAPPER_BROKER_PORT": str(old.port),
        "VMWRAPPER_BROKER_LOGIN": old.login,
        "VMWRAPPER_BROKER_PASSCODE": old.passcode,
        "BROKER_LIMITS": "{}",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.brokers"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith(b"listening")
            yield old
        finally:
            process.kill()


# --- the default link -------------------------------------------------------------------------------------------------

SECRET = "5ec4e7" * 10


class Dialler:
    """The host's end of one dialled-in connection, joined to the broker."""

    def __init__(self, agent: AgentProcess, broker: BrokerAddress, secret: str = SECRET) -> None:
        self.connection = _dial(agent.port)
        handshake = HostHandshake(secret.encode(), Mode.STOMP)
        self.connection.sendall(handshake.opening)
        step = handshake.receive(self.connection.recv(4096))
        while step.outcome is None:
            self.connection.sendall(step.send)
            step = handshake.receive(self.connection.recv(4096))
        self.open = step.outcome is Outcome.OPEN
        if not self.open:
            return
        offer = {"login": broker.login, "passcode": broker.passcode, "time": time.time()}
        self.connection.sendall(json.dumps(offer).encode() + b"\n")
        self.broker = socket.create_connection((broker.host, broker.port))
        for ends in ((self.connection, self.broker), (self.broker, self.connection)):
            threading.Thread(target=_pump, args=ends, daemon=True).start()

    def close(self) -> None:
        for end in (self.connection, self.broker):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _dial(port: int) -> socket.socket:
    found: list[socket.socket] = []

    def answers() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            found.append(socket.create_connection(("127.0.0.1", port), 10))
        return bool(found)

    wait_until(answers, "the agent's port")
    return found[0]


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


def test_the_host_dials_and_dials_again(host: ScriptedHost, broker: BrokerAddress, tmp_path: Path) -> None:
    with agent_process(tmp_path, None, f"secret={SECRET} interface=lo") as agent:
        first = Dialler(agent, broker)
        assert first.open
        assert host.expect(Hello).id == GUEST_ID
        host.run("over", "sh", "-c", "while [ ! -e over ]; do sleep 0.05; done; echo still here")
        host.state("over", lambda status: status.pid is not None)
        first.close()
        second = Dialler(agent, broker)
        host.expect(Hello)
        third = Dialler(agent, broker)  # as after a restore: the older one looks alive to the agent
        host.expect(Hello)
        (agent.work / "over").touch()
        assert host.result("over")["out"] == "still here\n"
        assert not (agent.home / ".vmwrapper" / "journal.json").exists()
        assert agent.stop() == 0
        host.expect(Bye)
        second.close()
        third.close()


def test_who_does_not_know_the_secret_gets_nothing(broker: BrokerAddress, tmp_path: Path) -> None:
    with agent_process(tmp_path, None, SECRET) as agent:
        assert not Dialler(agent, broker, "0" * 60).open


def test_without_any_link_the_agent_says_why(tmp_path: Path) -> None:
    with agent_process(tmp_path, None, "") as agent:
        wait_until(lambda: "no secret in SMBIOS" in agent.log.read_text(), "the reason")
        assert agent.wait() == 1
