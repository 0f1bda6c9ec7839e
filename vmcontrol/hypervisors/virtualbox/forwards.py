"""Port forwards of a VM of ours: which ports of this host they use, and the rules that make VirtualBox open them.

A forward keeps its port as long as nobody else has it; one that job.xml names is never replaced. Owns nothing: what a
forward uses is in the VM's Definition, which the caller stores.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import replace

from vmcontrol.hypervisors.common.problems import MINUTES_5
from vmcontrol.hypervisors.interface import HostProblem, VmSpec
from vmcontrol.hypervisors.virtualbox.files import Definition, HostForward
from vmcontrol.hypervisors.virtualbox.output import Forward
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage

AGENT_RULE = "agent"


def of_spec(spec: VmSpec) -> tuple[HostForward, ...]:
    """The forwards of a new VM: the agent's, then those that the spec asks for."""
    forwards = [HostForward(AGENT_RULE, spec.agent_port, 0, free_port())] if spec.agent_port else []
    for number, forward in enumerate(spec.port_forwards, start=1):
        used = forward.host_port or free_port()
        forwards.append(HostForward(f"port{number}", forward.guest_port, forward.host_port, used, forward.remote))
    return tuple(forwards)


def addresses(forwards: Sequence[HostForward]) -> tuple[tuple[str, int] | None, dict[int, int]]:
    """Where on this host the agent answers, and guest port -> host port of the others."""
    agent = next((("127.0.0.1", forward.used) for forward in forwards if forward.name == AGENT_RULE), None)
    return agent, {forward.guest_port: forward.used for forward in forwards if forward.name != AGENT_RULE}


def difference(known: Sequence[Forward], wanted: Sequence[HostForward]) -> tuple[list[str], list[str]]:
    """What makes the rules that VirtualBox has to those that are wanted: names to drop, then rules to add."""
    there = {(one.name, one.host_port, one.guest_port) for one in known}
    keys = {(forward.name, forward.used, forward.guest_port): forward for forward in wanted}
    drop = [name for name, *rest in there if (name, *rest) not in keys]
    return drop, [forward.rule for key, forward in keys.items() if key not in there]


def refused(forwards: Sequence[HostForward], log_text: str) -> list[str]:
    """Names of forwards that VirtualBox could not open, as its log says; the VM runs without them."""
    return [
        forward.name
        for forward in forwards
        if re.search(rf"NAT: failed to .*redirect.*:{forward.used}\b", log_text, re.IGNORECASE)
    ]


async def move(vbox: VBoxManage, definition: Definition, names: Sequence[str]) -> tuple[HostForward, ...]:
    """Other ports for forwards of a live VM whose port somebody took between our look and VirtualBox's.

    All forwards of the VM, as they are then. Raises HostProblem `port-taken` for one that has to be on a certain
    port, or what VBoxManage.do raises.
    """
    option, forwards = f"natpf{definition.agent_nic}", []
    for forward in definition.forwards:
        if forward.name in names:
            if forward.wanted:
                raise _port_taken(forward.wanted)
            forward = replace(forward, used=free_port())  # noqa: PLW2901
            for argv in (("delete", forward.name), (forward.rule,)):
                await vbox.do(f"ports of {definition.name}", "controlvm", definition.uuid, option, *argv)
        forwards.append(forward)
    return tuple(forwards)


def with_free_port(forward: HostForward) -> HostForward:
    """The forward with a port that can be had. Raises HostProblem when a certain one was wanted and is taken."""
    if forward.used and _is_free(forward.used, remote=forward.remote):
        return forward
    if forward.wanted:
        raise _port_taken(forward.wanted)
    return replace(forward, used=free_port())


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int, *, remote: bool) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a closed listener left is no obstacle
        try:
            probe.bind(("" if remote else "127.0.0.1", port))
        except OSError:
            return False
    return True


def _port_taken(port: int) -> HostProblem:
    return HostProblem(
        f"another program uses the network port {port} that this job needs; it will be tried again",
        key="port-taken",
        delay_s=MINUTES_5,
    )
