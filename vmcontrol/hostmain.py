"""HostMain, the agent on the host: `python -m vmcontrol.hostmain HostConfig.cfg`.

Connects its parts in one place (`HostMain.build`), starts them, and ends them. Order: XML-RPC first, so that a VM can
be started without waiting for the broker; then broker and hypervisor side by side. Ends at `shutdown` (XML-RPC), at
TERM and INT, and when the wrapper's lifeline ends; the VMs that it has started are saved before.

Exit status: 0 ended as asked; 1 a port in use, or an error of ours; 2 wrong arguments or configuration (the
wrapper starts it again after 1, not after 2).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.python.failure import Failure

from vmcontrol import __version__, eventloop
from vmcontrol.api import Api
from vmcontrol.api2009 import VM_FOLDER, to_fault
from vmcontrol.atomicfile import write_atomically
from vmcontrol.broker.embedded import EmbeddedBroker
from vmcontrol.chirptransfer import ChirpPrograms
from vmcontrol.config import PORTS_FILE, BrokerKind, ConfigError, FileWay, HostConfig, read_config
from vmcontrol.conversation import Conversation
from vmcontrol.eventloop import LimitReached, with_limit
from vmcontrol.hypervisors.interface import Hypervisor
from vmcontrol.lifeline import Lifeline, StatusPipe
from vmcontrol.link.dialler import Broker
from vmcontrol.machines import Machines
from vmcontrol.xmlrpc import XmlRpcServer

log = logging.getLogger("vmcontrol.hostmain")  # also when it is __main__

SAVE_LIMIT_S = 20.0
"""Seconds that VMs may take to be saved when the lifeline ends or TERM comes."""
CLOSE_LIMIT_S = 10.0
"""Seconds for each of our parts to end."""

OpenHypervisor = Callable[[str, Any, Path], Any]
"""choose.open_hypervisor: kind, reactor, folder of the VMs -> awaitable Hypervisor."""


async def _chosen(kind: str, reactor: Any, folder: Path, told: Callable[[str], None]) -> Hypervisor:
    from vmcontrol.hypervisors.choose import open_hypervisor  # late: XML-RPC answers before drivers are loaded

    return await open_hypervisor(kind, reactor, folder, told)


class HostMain:
    """All parts of one HostMain and their life."""

    def __init__(self, reactor: Any, config: HostConfig, *, open_hypervisor: OpenHypervisor | None = None) -> None:
        self._reactor = reactor
        self._config = config
        self._open_hypervisor = open_hypervisor
        self._broker_port = config.broker.port
        self._embedded: EmbeddedBroker | None = None
        self._ending = False
        self._opening: Deferred[object] | None = None
        self._build()

    def _build(self) -> None:
        """Connect the parts. Nothing is opened here."""
        config = self._config
        self.status = StatusPipe(config.status_fd)
        self.conversation = Conversation(self._reactor, grace_s=config.vm_gc_grace_s, on_broker=self._broker_said)
        self.machines = Machines(
            self._reactor,
            conversation=self.conversation,
            secret_file=config.secret_file,
            broker=self._offered_broker,
            password=config.broker.passcode if config.broker.named else "",
            chirp=ChirpPrograms(config.chirp_path) if config.file_way is FileWay.CHIRP else None,
        )
        self.api = Api(
            machines=self.machines,
            conversation=self.conversation,
            slot=config.slot,
            secret_file=config.secret_file,
            broker_kind=config.broker.kind.value,
            on_shutdown=self._shutdown,
        )
        self.server = XmlRpcServer(
            self._reactor,
            methods=self.api.methods(),
            to_fault=to_fault,
            secret=config.xmlrpc_secret,
            host=config.xmlrpc_host,
            port=config.xmlrpc_port,
        )
        self.lifeline = Lifeline(self._reactor, config.lifeline_fd, lambda: self._end("the wrapper is gone", save=True))

    def start(self) -> None:
        """Open everything. A port in use raises CannotListenError; a hypervisor that fails is told to each caller."""
        self.lifeline.start()
        xmlrpc_port = self.server.listen()
        log.info("XML-RPC at http://%s:%d/RPC2", self._config.xmlrpc_host, xmlrpc_port)
        self.status.tell({"event": "xmlrpc", "host": self._config.xmlrpc_host, "port": xmlrpc_port})
        self._opening = eventloop.start_logged(self._start_hypervisor(), "opening the hypervisor")
        broker = self._config.broker
        if broker.kind is BrokerKind.EMBEDDED:
            self._embedded = EmbeddedBroker(
                self._reactor, host=broker.host, port=broker.port, login=broker.login, passcode=broker.passcode
            )
            self._broker_port = self._embedded.listen()
        self.status.tell({"event": "broker", "port": self._broker_port})
        ports = {"xmlrpc": xmlrpc_port, "broker": self._broker_port}
        write_atomically(self._config.slot / PORTS_FILE, json.dumps(ports).encode() + b"\n")
        self.conversation.connect(broker.host, self._broker_port, broker.login, broker.passcode)

    async def _start_hypervisor(self) -> None:
        try:
            which = self._config.hypervisor.value, self._reactor, self._config.slot / VM_FOLDER
            if self._open_hypervisor is not None:
                hypervisor: Hypervisor = await self._open_hypervisor(*which)
            else:
                hypervisor = await _chosen(*which, self._hypervisor_is)
        except Exception as error:  # noqa: BLE001 (whatever it is, each caller that needs a VM is told)
            log.error("the hypervisor cannot be used: %s", error)
            self.machines.failed(error)
            return
        self.machines.opened(hypervisor)

    def _hypervisor_is(self, text: str) -> None:
        """Which hypervisor is used, and why."""
        log.info("hypervisor: %s", text)
        self.status.tell({"event": "hypervisor", "detail": text})

    def _offered_broker(self) -> Broker | None:
        """What agents are told of the broker: nothing before we have subscribed there, or their HELLO would be lost."""
        if not self.conversation.connected:
            return None
        broker = self._config.broker
        return broker.host, self._broker_port, broker.login, broker.passcode

    def _broker_said(self, connected: bool, reason: str) -> None:
        if connected:
            log.info("the broker is connected")
            self.status.tell({"event": "broker-connected"})
            self.machines.broker_changed()
        else:
            log.warning("the broker is lost: %s", reason)
            self.status.tell({"event": "broker-lost", "detail": reason})

    def _shutdown(self) -> None:
        """`shutdown` is about to answer: end when the answer is on its way. It has dealt with the VMs."""
        self._reactor.callLater(0, self._end, "shutdown was asked for", save=False)

    def quit(self, why: str) -> None:
        """TERM or INT."""
        self._end(why, save=True)

    def _end(self, why: str, *, save: bool) -> None:
        """Save the VMs or leave them as they are, end everything, stop the reactor."""
        if self._ending:
            return
        self._ending = True
        log.info("ending: %s", why)
        eventloop.start_logged(self._finish(save=save), "ending").addBoth(lambda _: self._reactor.stop())

    async def _finish(self, *, save: bool) -> None:
        if save:
            await self.machines.end_ours(save=True, limit_s=SAVE_LIMIT_S)
        self.lifeline.stop()
        if self._opening is not None:
            self._opening.cancel()
        parts: list[tuple[str, Callable[[], Any]]] = [
            ("XML-RPC", self.server.close),
            ("links and hypervisor", self.machines.close),
            ("the broker's connection", self.conversation.close),
        ]
        if self._embedded is not None:
            parts.append(("the broker", self._embedded.close))
        for what, close in parts:
            try:
                await with_limit(self._reactor, CLOSE_LIMIT_S, what, close())
            except LimitReached as error:
                log.warning("%s", error)
            except Exception:
                log.exception("ending %s", what)
        self.status.close()
        (self._config.slot / PORTS_FILE).unlink(missing_ok=True)
        log.info("ended")


def set_up_logging() -> None:
    """Time-stamped lines on stderr; what Twisted reports (errors nobody took care of) among them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s [%(process)d] %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(os.environ.get("VMWRAPPER_LOG_LEVEL", "INFO").upper())
    from twisted.python.log import PythonLoggingObserver

    PythonLoggingObserver().start()
    logging.getLogger("twisted").setLevel(logging.WARNING)


def main(
    arguments: list[str] | None = None,
    environment: Mapping[str, str] = os.environ,
    *,
    open_hypervisor: OpenHypervisor | None = None,
) -> int:
    """Run HostMain; the exit status. `open_hypervisor` in place of choosing one is for tests."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["-h"], ["--help"]):
        sys.stdout.write("usage: python -m vmcontrol.hostmain HostConfig.cfg\n")
        return 0
    if len(arguments) != 1:
        sys.stderr.write("HostMain: usage: python -m vmcontrol.hostmain HostConfig.cfg\n")
        return 2
    set_up_logging()
    log.info("HostMain %s, process %d", __version__, os.getpid())
    try:
        config = read_config(Path(arguments[0]), environment, Path.cwd())
    except ConfigError as error:
        sys.stderr.write(f"HostMain: {error}\n")
        return 2
    for warning in config.warnings:
        log.warning("%s", warning)
    return run(eventloop.the_reactor(), config, open_hypervisor=open_hypervisor)


def run(reactor: Any, config: HostConfig, *, open_hypervisor: OpenHypervisor | None = None) -> int:
    """Run until the end; the exit status."""
    failed: list[str] = []

    def begin() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # after Twisted has installed its own
            signal.signal(number, lambda n, _: reactor.callFromThread(host.quit, signal.Signals(n).name))
        try:
            host.start()
        except CannotListenError as error:
            failed.append(f"cannot listen on {error.interface}:{error.port}: {error.socketError}")
            host.quit("a port is in use")
        except OSError as error:
            failed.append(str(error))
            host.quit("a file could not be written")
        except Exception:  # noqa: BLE001 (reported; a HostMain that did not start must not stay)
            failed.append(Failure().getTraceback())
            host.quit("it could not be started")

    host = HostMain(reactor, config, open_hypervisor=open_hypervisor)
    reactor.callWhenRunning(begin)
    reactor.run()
    for text in failed:
        sys.stderr.write(f"HostMain: {text}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
