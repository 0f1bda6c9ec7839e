"""The dialled link: the host's GuestLink, the agent's LinkServer (a subprocess), a proxy and a broker."""

import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol

from guest.agent.linkserver import LinkServer
from tests.support.linkagent import Secret
from tests.support.linkproxy import Proxy
from tests.support.linkrig import LIMIT_S, SECRET, Agent
from vmcontrol.broker.embedded import EmbeddedBroker
from vmcontrol.common.eventloop import Event, sleep, start, with_limit
from vmcontrol.link.dialler import Broker, GuestLink
from vmcontrol.link.errors import GuestRefused, LinkDown, LinkEnded
from vmcontrol.link.outerbroker import OuterBroker
from vmcontrol.protocol.handshake import LINE_LIMIT, HostHandshake, Mode
from vmcontrol.protocol.messages import StompMessage
from vmcontrol.stomp.client import StompClient
from vmcontrol.transfer.http import HttpTransfer

reactor: Any = global_reactor


class Listener(Protocol):
    """A broker that writes down what it hears."""

    transport: Any = None

    def __init__(self, house: "House") -> None:
        self.house = house
        self.heard = b""
        self.lost = False

    def connectionMade(self) -> None:
        self.house.sessions.append(self)
        self.house.changed.pulse()

    def dataReceived(self, data: bytes) -> None:
        self.heard += data
        self.house.changed.pulse()

    def connectionLost(self, reason: object = None) -> None:
        self.lost = True
        self.house.changed.pulse()


class House:
    """Where the listeners are."""

    def __init__(self) -> None:
        self.sessions: list[Listener] = []
        self.changed = Event()
        self.port: Any = None
        self.open()

    def open(self, number: int = 0) -> None:
        factory: Any = Factory()
        factory.buildProtocol = lambda _: Listener(self)
        self.port = reactor.listenTCP(number, factory, interface="127.0.0.1")
        self.number = self.port.getHost().port

    def broker(self) -> Broker:
        return OuterBroker(reactor, "127.0.0.1", self.number, "agent", "pass")

    async def session(self, number: int, heard: bytes = b"hello agent\n") -> Listener:
        async def wait() -> Listener:
            while len(self.sessions) <= number or not self.sessions[number].heard.startswith(heard):
                await self.changed.wait()
            return self.sessions[number]

        return await with_limit(reactor, LIMIT_S, f"session {number}", wait())

    async def lost(self, session: Listener) -> None:
        async def wait() -> None:
            while not session.lost:
                await self.changed.wait()

        await with_limit(reactor, LIMIT_S, "the end of a session", wait())

    async def close(self) -> None:
        for session in self.sessions:
            session.transport.abortConnection()
        await self.port.stopListening()


class Rig:
    def __init__(self, agent: Agent, proxy: Proxy, house: House, link: GuestLink) -> None:
        self.agent, self.proxy, self.house, self.link = agent, proxy, house, link
        self.told: list[str] = []
        link.on_up.append(lambda: self.told.append("up"))
        link.on_down.append(lambda: self.told.append("down"))


@asynccontextmanager
async def rig(folder: Path, *, secret: bytes = SECRET, token: bytes = b"") -> AsyncIterator[Rig]:
    agent = await Agent.start(reactor, folder)
    proxy, house = Proxy(reactor, agent.address), House()
    link = GuestLink(reactor, name="guest1", address=proxy.address, secret=secret, broker=house.broker, token=token)
    try:
        yield Rig(agent, proxy, house, link)
    finally:
        await link.stop()
        await proxy.close()
        await house.close()
        await agent.stop()


@pytest_twisted.ensureDeferred
async def test_the_agents_session_reaches_the_broker_both_ways(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.link.start()
        await r.link.wait_up(LIMIT_S)
        assert (await r.agent.line("offered"))["passcode"] == "pass"
        session = await r.house.session(0)
        session.transport.write(b"answer\n")
        assert (await r.agent.line("heard"))["heard"] == "answer\n"
        session.transport.loseConnection()  # the broker goes: the agent's client is told, and gets another offer
        await r.agent.line("session")
        await r.agent.line("offered")
        await r.house.session(1)
        await r.link.stop()
        await r.agent.line("session")
        assert r.told[:3] == ["up", "down", "up"]
        assert not r.link.is_up


@pytest_twisted.ensureDeferred
async def test_an_agent_that_knows_the_token_is_told_the_secret_before_anything_else(tmp_path: Path) -> None:
    token, lasting = SECRET, b"5ec2e7" * 8
    async with rig(tmp_path, secret=lasting, token=token) as r:
        r.link.start()
        await r.link.wait_up(LIMIT_S)
        assert (await r.agent.line("offered"))["passcode"] == "pass"
        assert (await r.link.status())["protocol"]
        await r.link.stop()
        for known, accepted in ((token, False), (lasting, True)):
            again = GuestLink(reactor, name="again", address=r.agent.address, secret=known, broker=lambda: None)
            try:
                assert bool((await again.status())["protocol"]) is accepted
            except LinkDown:
                assert not accepted
            finally:
                await again.stop()


@pytest_twisted.ensureDeferred
async def test_a_link_that_is_cut_comes_back(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.link.start()
        session = await r.house.session(0)
        r.proxy.cut_all()
        await r.house.lost(session)
        await r.house.session(1)


@pytest_twisted.ensureDeferred
async def test_of_many_handshakes_at_once_the_first_that_is_proved_is_kept(tmp_path: Path) -> None:
    """An agent that comes up finds many connections at its port: all dialled while it booted, all with a first line."""
    async with rig(tmp_path) as r:
        r.agent.transport.signalProcess("STOP")  # its kernel accepts for it, as a port forward does
        r.link.start()
        while r.proxy.accepted < 8:
            await sleep(reactor, 0.05)
        r.agent.transport.signalProcess(signal.SIGCONT)
        await r.link.wait_up(LIMIT_S)
        session = await r.house.session(0)
        dialled = r.proxy.accepted
        assert (await r.link.status())["protocol"]  # the agent has by now read what the others had sent
        await sleep(reactor, 0.5)
        assert r.told == ["up"]
        assert not session.lost
        assert len(r.house.sessions) == 1
        assert r.proxy.accepted == dialled + 1  # that of the status
        assert sum("offered" in line for line in r.agent.lines) == 1


@pytest_twisted.ensureDeferred
async def test_another_address_is_dialled_and_the_connections_to_the_old_one_go(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.link.start()
        await r.house.session(0)
        other = Proxy(reactor, r.agent.address)
        try:
            r.link.set_address(other.address)
            await r.house.session(1)
            assert (await r.agent.line("session"))["session"] == "ended"
            assert (await r.link.status())["id"] == "52:54:00:00:00:01"
        finally:
            await other.close()


@pytest_twisted.ensureDeferred
async def test_the_newest_carrier_wins(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.link.start()
        first = await r.house.session(0)
        newer = GuestLink(reactor, name="again", address=r.agent.address, secret=SECRET, broker=r.house.broker)
        newer.start()
        try:
            await r.house.lost(first)
            await r.link.stop()
            await r.house.session(1)
        finally:
            await newer.stop()


@pytest_twisted.ensureDeferred
async def test_without_a_broker_the_link_is_up_and_the_offer_follows(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        there: list[Broker] = []
        link = GuestLink(
            reactor, name="g", address=r.agent.address, secret=SECRET, broker=lambda: there[0] if there else None
        )
        link.start()
        try:
            await link.wait_up(LIMIT_S)
            assert (await link.status())["agent"] == "vmwrapper"
            there.append(r.house.broker())
            link.broker_changed()
            first = await r.house.session(0)
            second_house = House()
            there[0] = second_house.broker()
            link.broker_changed()
            await r.house.lost(first)
            await second_house.session(0)
            await second_house.close()
        finally:
            await link.stop()


@pytest_twisted.ensureDeferred
async def test_the_agent_is_reached_soon_after_a_forward_that_hung(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.proxy.mute = True  # accepts, and says nothing: a port forward of a guest that boots
        r.link.start()
        with pytest.raises(LinkDown):
            await r.link.wait_up(0.7)
        r.proxy.mute = False
        since = reactor.seconds()
        await r.link.wait_up(LIMIT_S)
        assert reactor.seconds() - since < 2.0  # 0.15 s and the handshake, on a busy machine
        assert r.proxy.accepted < 30


@pytest_twisted.ensureDeferred
async def test_a_wrong_secret_never_comes_up(tmp_path: Path) -> None:
    async with rig(tmp_path, secret=b"x" * 32) as r:
        r.link.start()
        with pytest.raises(LinkDown):
            await r.link.wait_up(1.0)
        with pytest.raises(LinkDown):
            await r.link.status()
        assert r.house.sessions == []


@pytest_twisted.ensureDeferred
async def test_small_requests(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        status = await r.link.status()
        assert status["base_folder"] == str(tmp_path)
        assert await r.link.set_clock() > 1e9
        assert (await r.agent.line("clock"))["clock"] > 1e9
        (tmp_path / "folder").mkdir()
        assert await r.link.list_folder() == [{"name": "folder", "size": 0, "folder": True}]
        with pytest.raises(GuestRefused, match="nowhere"):
            await r.link.list_folder("nowhere")
        for method, path, body in (
            ("GET", "/v1/nothing", None),
            ("GET", "/", None),
            ("POST", "/v1/clock", {"time": "x"}),
            ("POST", "/v1/clock", [1]),
            ("PUT", "/v1/secret", {"secret": "short"}),
            ("POST", "/v1/transfers/../x", None),
            ("POST", "/v1/clock", {"time": "x" * 1_000_000}),
        ):
            with pytest.raises(GuestRefused):
                await r.link.http(method, path, body=body)
        await r.link.replace_secret(b"another-secret-of-some-characters")
        r.proxy.cut_all()
        await sleep(reactor, 0)
        assert (await r.link.status())["agent"] == "vmwrapper"


@pytest_twisted.ensureDeferred
async def test_what_waits_for_a_paused_guest_ends_with_the_link(tmp_path: Path) -> None:
    small, big = tmp_path / "small", tmp_path / "big"
    small.write_bytes(b"x")
    with big.open("wb") as file:
        file.truncate(8 * 1024 * 1024)
    async with rig(tmp_path) as r:
        r.link.start()
        await r.link.wait_up(LIMIT_S)
        os.kill(r.agent.transport.pid, signal.SIGSTOP)
        r.link.pause()
        files = HttpTransfer(r.link)
        waiting: list[Deferred[Any]] = [
            start(r.link.status()),
            start(files.put(small, "there")),
            start(files.put(big, "there too")),
            start(files.get("there", tmp_path / "here")),
        ]
        await sleep(reactor, 0.1)  # their requests are on their way
        assert not any(one.called for one in waiting)
        await r.link.stop()
        for one in waiting:
            with pytest.raises(LinkDown):
                await with_limit(reactor, LIMIT_S, "the end of a request", one)
        with pytest.raises(LinkEnded):
            await r.link.dial_http()


@pytest_twisted.ensureDeferred
async def test_strangers_cost_little_and_do_not_keep_the_host_out(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.link.status()
        before = r.agent.peak_memory()
        strangers = []
        for number in range(300):
            stranger = socket.create_connection(r.agent.address)
            stranger.settimeout(LIMIT_S)
            strangers.append(stranger)
            if number % 3:
                stranger.sendall(b"VMLINK/1 http " + b"0" * 32 + b"\n" if number % 2 else os.urandom(LINE_LIMIT - 60))
        r.link.start()
        await r.house.session(0)
        loud = socket.create_connection(r.agent.address)
        loud.sendall(b"GET / HTTP/1.1\r\n" * 100)
        loud.settimeout(LIMIT_S)
        assert loud.recv(100) == b"DENIED\n"
        for stranger in [*strangers, loud]:
            stranger.close()
        assert r.agent.peak_memory() - before < 8_000_000


@pytest_twisted.ensureDeferred
async def test_who_does_not_read_is_not_sent_more(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.link.start()
        session = await r.house.session(0)
        before = r.agent.peak_memory()
        session.transport.pauseProducing()
        session.transport.write(b"flood\n")  # 64 MB come back, or rather do not
        await sleep(reactor, 0.5)
        assert sum(len(end.heard) for end in r.house.sessions) < 1000
        assert r.proxy.to_host.seen < 16_000_000  # what fits into the buffers between
        session.transport.resumeProducing()
        await r.house.session(0)
        # The agent program itself holds what it wrote; the link adds little to it.
        assert r.agent.peak_memory() - before < 200_000_000


@pytest_twisted.ensureDeferred
async def test_stomp_from_the_guests_client_to_the_embedded_broker_and_back() -> None:
    """StompClient behind LinkServer, EmbeddedBroker behind GuestLink; then another broker on another port."""
    heard: list[str] = []
    agent = StompClient(reactor, name="agent")
    agent.subscribe("/topic/cmd_requests", lambda _headers, body: heard.append(body))
    server = LinkServer(
        reactor,
        Secret(SECRET),
        Path("/nonexistent"),
        lambda login, passcode: agent.connect("127.0.0.1", server.stomp_port, login, passcode),
        lambda _: None,
        interface="127.0.0.1",
        port=0,
        stomp_port=0,
    )
    server.start()
    broker = EmbeddedBroker(reactor, login="in", passcode="first")
    at = ("127.0.0.1", broker.listen(), "in", "first")
    host = StompClient(reactor, name="host", reconnect=False)
    link = GuestLink(
        reactor, name="g", address=("127.0.0.1", server.port), secret=SECRET, broker=lambda: OuterBroker(reactor, *at)
    )

    async def until_heard(word: str) -> None:
        # A word that is sent before the other one listens is lost, as in a topic; so it is repeated, as words are.
        while word not in heard:
            if host.connected:
                host.send(StompMessage("/topic/cmd_requests", {}, word)).addErrback(lambda _: None)
            await sleep(reactor, 0.05)

    try:
        link.start()
        host.connect(*at)
        await with_limit(reactor, LIMIT_S, "the first word", until_heard("one"))
        await broker.close()
        broker = EmbeddedBroker(reactor, login="in", passcode="second")
        at = ("127.0.0.1", broker.listen(), "in", "second")
        link.broker_changed()
        host.connect(*at)
        await with_limit(reactor, LIMIT_S, "the second word", until_heard("two"))
    finally:
        await link.stop()
        await host.close()
        await agent.close()
        await server.stop()
        await broker.close()


@pytest_twisted.ensureDeferred
async def test_a_handshake_in_single_bytes_and_a_broken_offer(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        received: list[bytes] = []
        event = Event()

        class Slow(Protocol):
            transport: Any = None

            def connectionMade(self) -> None:
                self.shake = HostHandshake(SECRET, Mode.STOMP)
                for byte in self.shake.opening:
                    self.transport.write(bytes([byte]))

            def dataReceived(self, data: bytes) -> None:
                step = self.shake.receive(data)
                self.transport.write(step.send)
                if step.outcome is not None:
                    self.transport.write(json.dumps({"login": 1}).encode() + b"\n")

            def connectionLost(self, reason: object = None) -> None:
                received.append(b"lost")
                event.set()

        from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol

        await connectProtocol(TCP4ClientEndpoint(reactor, *r.agent.address), Slow())
        await with_limit(reactor, LIMIT_S, "the end of a carrier with a bad offer", event.wait())
        r.link.start()
        await r.house.session(0)
