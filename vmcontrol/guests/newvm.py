"""What a new VM of the slot is made of: its settings, and where its files are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vmcontrol.common.slotfiles import GUEST_CONSOLE, VM_FOLDER
from vmcontrol.hypervisors.interface import HypervisorError, VmSpec
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.protocol.vm import PortForward, VmSettings


class BadSpec(HypervisorError):  # noqa: N818
    """A VM like this cannot be described: a name that is none, an image that is not there."""


def new_vm(  # noqa: PLR0917 (of one caller)
    slot: Path, name: str, image: str, settings: VmSettings, secret_file: Path, needed: Sequence[PortForward]
) -> VmSpec:
    """The spec. image, disks: files, relative to the slot. needed: forwards beside those of the settings.

    Raises BadSpec.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise BadSpec(f"name: {name!r} cannot be the name of a VM")
    path = slot / image
    if not path.is_file():
        raise BadSpec(f"image: {path} is no file")
    disks = [slot / disk for disk in settings.disks]
    for disk in disks:
        if not disk.is_file():
            raise BadSpec(f"disks: {disk} is no file")
    asked = {forward.guest_port for forward in settings.port_forwards}
    forwards = (*settings.port_forwards, *(one for one in needed if one.guest_port not in asked))
    return VmSpec(
        name=name,
        image=path,
        folder=slot / VM_FOLDER / name,
        agent_port=AGENT_PORT,
        secret_file=secret_file,
        console_log=slot / GUEST_CONSOLE,
        **vars(replace(settings, port_forwards=forwards, disks=tuple(map(str, disks)))),
    )
