"""The virtual computer that a QEMU VM runs on, from what is remembered of the VM. Pure: nothing is asked or started.

A saved state or snapshot fits only the hardware it was taken with, so that is remembered (Definition) and comes back.
"""

from __future__ import annotations

from vmcontrol.hypervisors.common import places
from vmcontrol.hypervisors.interface import HostProblem
from vmcontrol.hypervisors.qemu import problems
from vmcontrol.hypervisors.qemu.command import LATEST_MACHINE, Accelerator, Machine
from vmcontrol.hypervisors.qemu.files import Definition, VmFiles


def machine_of(definition: Definition, files: VmFiles) -> Machine:
    return Machine(
        name=definition.name,
        machine=definition.machine or LATEST_MACHINE,
        memory_mb=definition.memory_mb,
        cpus=definition.cpus,
        mac=definition.mac,
        overlay=files.overlay,
        image=places.recall(definition.image, files.slot),
        image_format=definition.image_format,
        agent_port=definition.agent_port,
        secret_file=None if definition.secret_file is None else places.recall(definition.secret_file, files.slot),
        network=definition.network,
        host_only=definition.host_only,
        port_forwards=definition.port_forwards,
    )


def accelerator_to_resume(definition: Definition, chosen: Accelerator) -> Accelerator:
    """The one that the saved state or snapshot needs, which the next start loads. chosen: the one that works here now.

    Raises HostProblem `accelerator-changed`.
    """
    tag = definition.resume_snapshot
    known = (definition.snapshot_hardware or {}).get(tag) if tag is not None else None
    name, cpu = known or (definition.accelerator or chosen.name, definition.cpu or chosen.cpu)
    needed = Accelerator(name, cpu)
    if needed.hardware and needed.name != chosen.name:
        raise HostProblem(
            f"{definition.name} was saved with hardware virtualization ({name}), which does not work now: another"
            " program may use it, or it was switched off",
            key="accelerator-changed",
            delay_s=problems.HOUR,
        )
    return needed
