"""The parts of HostMain, connected in one place (`HostMain._build`), and their life.

Order of the start: XML-RPC first, so that a VM can be started without waiting for the broker; then both others
at once. What a start does not need at once (the broker's and the STOMP client's modules, the link to a guest) is
imported after XML-RPC listens: the caller's first requests come in meanwhile. Ends at `shutdown` (XML-RPC), when it is
told to `quit`, and when the wrapper's lifeline ends; the VMs that it has started are saved before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from vmcontrol.api.api import Api
from vmcontrol.api.faults import to_fault
from vmcontrol.api.server import XmlRpcServer
from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import LimitReached, with_limit
from vmcontrol.common.slotfiles import PORTS, VM_FOLDER
from vmcontrol.common.threads import in_thread
from vmcontrol.guests.conversation import Conversation
from vmcontrol.guests.endings import Endings
from vmcontrol.guests.vms import Machines
from vmcontrol.hostmain.config import BrokerKind, FileWay, HostConfig
from vmcontrol.hostmain.lifeline import Lifeline, StatusPipe
from vmcontrol.hostmain.ports import Ports
from vmcontrol.hypervisors.interface import Hypervisor
from vmcontrol.protocol.vmends import VmEnd
from vmcontrol.transfer.chirp import ChirpPrograms
from vmcontrol.transfer.parts import sweep_parts

if TYPE_CHECKING:
    from vmcontrol.broker.embedded import EmbeddedBroker
    from vmcontrol.link.dialler import Broker

log = logging.getLogger("vmcontrol.hostmain")  # also when it is __main__

SAVE_LIMIT_S = 20.0
"""Seconds that VMs may take to be saved when the lifeline ends or TERM comes."""
SHUTDOWN_LIMIT_S = 37.0
"""The same at `shutdown`; the wrapper waits 45 s, and the client kills it after 60."""
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
        self._broker_of_links: Broker | None = None
        self._embedded: EmbeddedBroker | None = None
        self._ending = False
        self._opening: Deferred[object] | None = None
        self._build()

    def _build(self) -> None:
        """Connect the parts. Nothing is opened here."""
        config = self._config
        self.status = StatusPipe(config.status_fd)
        self._ports = Ports(self._reactor, config.slot / PORTS, patient=config.door_fd is not None)
        self.conversation = Conversation(
            self._reactor,
            grace_s=config.vm_gc_grace_s,
            on_broker=self._broker_said,
            on_guest=lambda guest, id: self.machines.guest_changed(guest, id),  # noqa: PLW0108 (machines come next)
            fetch=lambda guest, result: self.machines.output_texts(guest, result),  # noqa: PLW0108
        )
        self.machines = Machines(
            self._reactor,
            conversation=self.conversation,
            secret_file=config.secret_file,
            broker=self._offered_broker,
            password=config.broker.passcode if config.broker.named else "",
            chirp=ChirpPrograms(config.chirp_path) if config.file_way is FileWay.CHIRP else None,
            slot=config.slot,
            standalone=config.standalone,
            disk_bound=config.disk_bound,
        )
        self._endings = Endings(self._reactor, self.machines)
        self.api = Api(
            machines=self.machines,
            conversation=self.conversation,
            slot=config.slot,
            broker_kind=config.broker.kind.value,
            end_vms=lambda save: self._end_vms(save=save, limit_s=SHUTDOWN_LIMIT_S),
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
        """Open everything. A hypervisor that fails is told to each caller.

        Without a door a port in use raises CannotListenError.
        """
        self.lifeline.start()
        eventloop.start_logged(in_thread(self._reactor, sweep_parts, self._config.slot, time.time()), "sweeping")
        door = self._config.door_fd
        if door is not None:
            self.server.open_door(door)
        self._say_xmlrpc(self._ports.open("xmlrpc", "XML-RPC", self.server.listen, self._say_xmlrpc))
        self._opening = eventloop.start_logged(self._start_hypervisor(), "opening the hypervisor")
        self._start_broker()
        self._ports.write()
        self._join_broker()

    def _say_xmlrpc(self, port: int) -> None:
        host = self._config.xmlrpc_host
        if port:
            log.info("XML-RPC at http://%s:%d/RPC2", host, port)
        self.status.tell({"event": "xmlrpc", "host": host, "port": port, "door": self._config.door_fd is not None})

    def _say_broker(self, port: int | None) -> None:
        self.status.tell({"event": "broker", "port": port or None})

    def _start_broker(self) -> None:
        """Make the embedded broker, if it is ours to run, with a port if one is wanted."""
        broker = self._config.broker
        if broker.kind is BrokerKind.EXTERNAL:
            self._ports.known("broker", broker.port)
            self._say_broker(broker.port)
            return
        from vmcontrol.broker.embedded import EmbeddedBroker

        self._embedded = EmbeddedBroker(
            self._reactor, host=broker.host, port=broker.port, login=broker.login, passcode=broker.passcode
        )
        if broker.has_port:
            self._say_broker(self._ports.open("broker", "the broker", self._embedded.listen, self._say_broker))
        else:
            self._ports.known("broker", None)
            self._say_broker(None)

    def _join_broker(self) -> None:
        """Connect the conversation: in the process, or over STOMP, and again whenever that is lost."""
        if self._embedded is not None:
            from vmcontrol.broker.inprocess import InProcessClient

            joining = InProcessClient(self._embedded, name="HostMain")
            self._broker_of_links = self._embedded
            self.conversation.use(joining)
            joining.join()
            return
        from vmcontrol.common.ownbroker import JobsPrograms
        from vmcontrol.link.outerbroker import OuterBroker
        from vmcontrol.stomp.client import StompClient

        broker = self._config.broker
        address = broker.host, broker.port, broker.login, broker.passcode
        programs = JobsPrograms() if broker.is_jobs and not self._config.standalone else None
        self._broker_of_links = OuterBroker(self._reactor, *address, programs=programs)
        client = StompClient(self._reactor, name="HostMain", reconnect=True, programs=programs)
        self.conversation.use(client)
        client.connect(*address)

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
        self.status.tell({"event": "hypervisor-open", "name": hypervisor.name})
        self.machines.opened(hypervisor)

    def _hypervisor_is(self, text: str) -> None:
        """Which hypervisor is used, and why."""
        log.info("hypervisor: %s", text)
        self.status.tell({"event": "hypervisor", "detail": text})

    def _offered_broker(self) -> Broker | None:
        """What agents are told of the broker: nothing before we have subscribed there, or their HELLO would be lost."""
        return self._broker_of_links if self.conversation.connected else None

    def _broker_said(self, connected: bool, reason: str) -> None:
        if connected:
            log.info("the broker is connected")
            self.status.tell({"event": "broker-connected"})
            self.machines.broker_changed()
        else:
            log.warning("the broker is lost: %s", reason)
            self.status.tell({"event": "broker-lost", "detail": reason})

    async def _end_vms(self, *, save: bool, limit_s: float) -> list[VmEnd]:
        """What became of each, also told over the status pipe: who asked may not be there for the answer."""
        ends = await self._endings.end(save=save, limit_s=limit_s)
        if ends:
            self.status.tell({"event": "vms-ended", "vms": [end.to_struct() for end in ends]})
        return ends

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
            await self._end_vms(save=True, limit_s=SAVE_LIMIT_S)
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
        self._ports.close()
        log.info("ended")
