"""VMMain, the agent in the guest: `python -m guest.agent VMConfig.cfg`. Reads, connects the parts, runs until TERM.

Starts lean: the host's dialled connection is listened for before the rest is imported, because under emulation imports
are most of the time until the agent is up. Logs to standard error, the guest's console.

Exit status: 0 after TERM or INT (BYE said, commands killed); 2 the configuration cannot be used; 1 anything else.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from guest.agent import config as configuration
from guest.agent import smbios
from guest.agent.secretstore import SecretStore
from vmcontrol.common import eventloop

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from guest.agent.agent import Agent
    from guest.agent.identity import Identity
    from guest.agent.link import DialledLink
    from guest.agent.linkserver import LinkServer
    from guest.commands.runner import Runner
    from guest.files.chirp import ChirpServer

log = logging.getLogger(__name__)

LEAVE_LIMIT_S = 30.0
"""For a clean end; the guest is being shut down, or somebody waits at a terminal."""


WARM_UP_AFTER_S = 0.1
"""After HELLO was queued: time for its way to the socket."""


class StartError(Exception):
    """The agent cannot work here; `str` says why."""


class Main:
    """The parts of one agent, and their order at start and end."""

    def __init__(self, reactor: Any, config: configuration.Config) -> None:
        self.reactor = reactor
        self.config = config
        self._settings = smbios.read(config.secret_file)
        self._identity: Identity | None = None
        self._server: LinkServer | None = None
        self._agent: Agent | None = None
        self._offer: tuple[str, str] | None = None
        self._dialled: DialledLink | None = None
        self._runner: Runner | None = None
        self._chirp: ChirpServer | None = None
        self._left = False

    async def start(self) -> None:
        """Raises StartError and what listening raises."""
        self.config.state_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listen()
        from guest.agent import identity  # late: the host can dial in meanwhile

        self._identity = await identity.wait_for(
            self.reactor,
            named_by_host=self._settings.interface,
            configured=self.config.network_interface,
            ip_needed=self.config.broker is not None,
        )
        log.info("this is %s (%s %s)", self._identity.id, self._identity.interface, self._identity.ip or "no address")
        self._build(self._identity)
        self._serve_chirp()

    async def leave(self) -> None:
        """BYE, commands killed, ports closed."""
        self._left = True
        if self._agent is not None:
            await self._agent.leave()
        if self._server is not None:
            await self._server.stop()
        if self._chirp is not None:
            await self._chirp.stop()

    def _serve_chirp(self) -> None:
        """Files by Chirp too, as in 2009, where its server is installed."""
        program = find_chirp(self.config.chirp_server)
        if program is not None:
            from guest.files.chirp import ChirpServer

            self._chirp = ChirpServer(
                self.reactor,
                program,
                folder=self.config.base_folder,
                state_folder=self.config.state_folder,
                interface=self.config.listen_on,
                port=self.config.chirp_port,
                hosts=self.config.chirp_hosts,
            )
            self._chirp.start()

    def _listen(self) -> None:
        """Take connections that the host dials: the default link, and file transfers on both kinds of link."""
        from guest.agent.linkserver import LinkServer

        secret = SecretStore(self.config.state_folder / "secret.json", self._settings)
        broker = self.config.broker
        if not secret.current and broker is not None:
            secret.current = broker.password.encode()  # what both configuration files of protocol 1 know
        if not secret.current:
            if broker is None:
                raise StartError(
                    "the host left no secret in SMBIOS, and VMConfig.cfg names no [Broker] host: there is no link"
                )
            log.warning("no secret in SMBIOS and no [Broker] password: files are not served")
            return
        self._server = LinkServer(
            self.reactor,
            secret,
            self.config.base_folder,
            self._offered,
            self._set_clock,
            describe=self._describe,
            interface=self.config.listen_on,
            port=self.config.listen_port,
            stomp_port=self.config.stomp_port,
        )
        self._server.start()
        log.info("listening on port %d for the host", self._server.port)

    def _build(self, identity: Identity) -> None:
        """The one place where the parts are connected."""
        from guest.agent import link
        from guest.agent.agent import Agent
        from guest.commands.journal import Journal
        from guest.commands.runner import Runner
        from guest.commands.table import Remembered, Table
        from guest.containers import client

        config = self.config
        remembered: list[Remembered] = []
        journal = None
        if config.broker is not None:
            journal = Journal(config.journal)
            remembered = journal.load()
        table = Table(identity.id, remembered=remembered)
        agent = Agent(
            self.reactor,
            identity,
            table,
            journal=journal,
            beacon_s=config.beacon_interval_s,
            when_up=lambda: self.reactor.callLater(WARM_UP_AFTER_S, self._warm_up),
        )
        runner = Runner(
            self.reactor,
            agent,
            base_folder=config.base_folder,
            working_folder=Path.cwd(),
            state_folder=config.state_folder,
            containers=client.inherited(),
        )
        runner.prepare({(old.id, old.attempt) for old in remembered})
        self._agent, self._runner = agent, runner
        if config.broker is not None:
            dialling = link.BrokerLink(self.reactor, agent, config.broker)
            agent.attach(runner, dialling)
            dialling.open()
            return
        assert self._server is not None  # noqa: S101 (there is no dialled link without it)
        self._dialled = link.DialledLink(self.reactor, agent, self._server.stomp_port)
        agent.attach(runner, self._dialled)
        if self._offer is not None:
            self._dialled.offered(*self._offer)

    def _warm_up(self) -> None:
        """What the first file transfer and the first command need, after HELLO is out and before it is asked for."""
        if self._server is not None and not self._left:
            self._server.warm_up()
        if self._runner is not None:
            self._runner.warm_up()

    def _offered(self, login: str, passcode: str) -> None:
        """The host has dialled in; perhaps before the rest is there."""
        if self._dialled is not None:
            self._dialled.offered(login, passcode)
        elif self.config.broker is None:
            self._offer = (login, passcode)

    def _set_clock(self, unix_time: float) -> Deferred[None]:
        from guest.agent.clock import set_and_see

        return eventloop.start(set_and_see(self.reactor, unix_time, self.config.clock_helper))

    def _describe(self) -> Mapping[str, object]:
        known = self._identity
        return {"id": known.id if known else "", "ip": known.ip if known else ""}


def find_chirp(configured: str) -> str | None:
    """Chirp's server; None: it is off or, when nothing is configured, not installed."""
    if configured.lower() == "none":
        return None
    from guest.commands.launch import find_executable

    found = find_executable(configured or "chirp_server", os.environ.get("PATH", os.defpath))
    if found is None and configured:
        log.error("[VM] chirp_server = %s: there is no such program; files are not served by Chirp", configured)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The program; its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1 or given[0] in {"-h", "--help"}:
        sys.stderr.write("usage: python -m guest.agent VMConfig.cfg\n")
        return 0 if given[:1] in (["-h"], ["--help"]) else 2
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = configuration.load(Path(given[0]))
    except configuration.ConfigError as error:
        log.error("%s", error)
        return 2
    logging.getLogger().setLevel(config.log_level)
    return _run(eventloop.the_reactor(), config)


def _run(reactor: Any, config: configuration.Config) -> int:
    status = 0
    program = Main(reactor, config)

    async def run() -> None:
        nonlocal status
        try:
            await program.start()
        except Exception as error:
            status = 1
            log.error("the agent cannot start: %s", error, exc_info=not isinstance(error, StartError))
            reactor.stop()

    async def end() -> None:
        try:
            await eventloop.with_limit(reactor, LEAVE_LIMIT_S, "the agent's end", program.leave())
        except eventloop.LimitReached as error:
            log.error("%s", error)

    reactor.addSystemEventTrigger("before", "shutdown", lambda: eventloop.start(end()))
    reactor.callWhenRunning(lambda: eventloop.start_logged(run(), "start"))
    reactor.run()  # its own handlers turn TERM and INT into stop
    return status


def program() -> NoReturn:
    """Be VMMain: the status of `main` is the process's."""
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads of a hanging connection do not delay the end
