"""What VirtualBox remembers of this slot's VMs, put right: registered anew, or forgotten together with their media.

Owns no file: it removes a VM's folder when what made it was cut off, and calls VirtualBox. Never deletes by VirtualBox
(`unregistervm --delete`), never forgets what may be another's. What VirtualBox.xml says of them: registry.py.
docs/internals/drivers/virtualbox.md, "Stale worlds".
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from vmcontrol.common.virtualbox import home
from vmcontrol.hypervisors.common.folder import VM_NAME
from vmcontrol.hypervisors.interface import HypervisorError, VmNotFound
from vmcontrol.hypervisors.virtualbox import output, problems
from vmcontrol.hypervisors.virtualbox.files import VmFiles
from vmcontrol.hypervisors.virtualbox.media import base_name
from vmcontrol.hypervisors.virtualbox.output import Listed
from vmcontrol.hypervisors.virtualbox.registry import (
    is_another_slots,
    is_ours,
    is_same_folder,
    move_here,
    settings_files,
    vanished_media,
)
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage

log = logging.getLogger(__name__)


class Registration:
    """The VMs that VirtualBox knows. All methods raise HypervisorErrors when VirtualBox does not answer."""

    def __init__(self, vbox: VBoxManage, folder: Path) -> None:
        """folder: holds one folder a VM (<slot>/vm)."""
        self._vbox = vbox
        self._folder = folder

    async def listed(self) -> list[Listed]:
        """All VMs of this account, but those of other slots: they are theirs alone, and may be called as ours."""
        found = output.vm_list(await self._vbox.do("asking for the virtual machines", "list", "vms"))
        places = settings_files(home()) if found else {}
        return [one for one in found if one.uuid not in places or not is_another_slots(places[one.uuid], self._folder)]

    def is_here(self, uuid: str, files: VmFiles) -> bool:
        """Whether VirtualBox knows the VM by the settings in this slot, not by those in a place that it was moved or
        copied from."""
        settings = settings_files(home()).get(uuid)
        return settings is None or is_same_folder(settings.parent, files.folder)

    async def unregister(self, uuid: str, files: VmFiles) -> None:
        """VirtualBox forgets VM and media.

        Never with --delete: that would go for a base with no other children as well.
        """
        answer = await self._vbox.ask("unregistervm", uuid)
        if answer.status != 0 and problems.is_locked(answer.text):
            await self._vbox.do(f"unregistering {files.folder.name}", "unregistervm", uuid)
        elif answer.status != 0:
            error = problems.explain(f"unregistering {files.folder.name}", answer.text)
            if not isinstance(error, VmNotFound):  # what stays of it is forgotten at a later create
                log.warning("%s", error)
        for base in (files.folder / base_name(uuid), *files.further(uuid)):
            if base.exists():
                answer = await self._vbox.ask("closemedium", "disk", str(base))
                if answer.status != 0:
                    await self._close_media_below(files.folder)
                    return

    async def register_anew(self, name: str, uuid: str, files: VmFiles | None) -> None:
        """A VM of ours that VirtualBox does not know, or cannot read: register it anew, from its older settings if the
        newest are damaged (a power loss). files: None for one that is not ours. Raises HypervisorError when that does
        not help."""
        if files is None:
            raise HypervisorError(f"VirtualBox cannot use {name}: its files are missing or damaged")
        log.warning("%s: VirtualBox does not know it here, or cannot read it; registering it anew", name)
        await self._forget_elsewhere(name, uuid, files)
        for settings in (files.settings, files.previous_settings):
            move_here(settings, files.folder)
        texts = []
        for settings in (files.settings, files.previous_settings):
            if not settings.is_file():
                continue
            if settings is files.previous_settings:
                shutil.copyfile(settings, files.settings)
            answer = await self._vbox.ask("registervm", str(files.settings))
            if answer.status == 0:
                listed = await self.listed()
                if any(one.uuid == uuid and one.accessible for one in listed):
                    log.info("%s: registered anew from %s", name, settings.name)
                    return
                await self._vbox.ask("unregistervm", uuid)
            texts.append(answer.text)
        raise HypervisorError(f"VirtualBox cannot use {name} any more: {' '.join(texts) or 'its settings are gone'}")

    async def _forget_elsewhere(self, name: str, uuid: str, files: VmFiles) -> None:
        """VirtualBox forgets the VM wherever it knows it, and its disks there; it knows one VM of a UUID.

        The files stay as they are: the original of a copy is registered again when its slot needs it. Raises
        HostProblem `vm-in-use` when that runs now.
        """
        settings = settings_files(home()).get(uuid, files.settings)
        elsewhere = not is_same_folder(settings.parent, files.folder)
        answer = await self._vbox.ask("unregistervm", uuid)
        if answer.status != 0 and problems.is_locked(answer.text):
            if elsewhere and settings.is_file():
                raise problems.in_use(name)
            await self._vbox.ask("controlvm", uuid, "poweroff")
            await self._vbox.do(f"unregistering {name}", "unregistervm", uuid)
        if elsewhere:
            log.info("%s: VirtualBox knew it in %s", name, settings.parent)
            await self._close_media_below(settings.parent)

    async def forget_vanished(self, listed: list[Listed]) -> None:
        """Unregister VMs and disks of ours whose files are gone: of this slot, and of slots that are gone too."""
        vanished = [one.uuid for one in listed if not one.accessible]
        if vanished:
            places = settings_files(home())
            for uuid in vanished:
                if uuid in places and is_ours(places[uuid], self._folder):
                    log.warning("VirtualBox remembers %s, whose files are gone; forgetting it", places[uuid])
                    await self._vbox.ask("unregistervm", uuid)

        for disk in vanished_media(home(), self._folder):
            answer = await self._vbox.ask("closemedium", "disk", str(disk))
            if answer.status != 0:
                log.info("VirtualBox remembers %s, which is gone, until its service ends", disk)
                break

    async def forget_left_over(self, listed: Listed) -> bool:
        """Whether this VM was one of ours, whose files are gone while VirtualBox remembers it. Then it is forgotten."""
        if not VM_NAME.fullmatch(listed.name):
            return False
        answer = await self._vbox.ask("showvminfo", listed.uuid, "--machinereadable")
        facts = output.facts(answer.stdout)
        files = VmFiles(self._folder / listed.name)
        if facts is None or Path(facts.settings_file) != files.settings:
            return False
        log.warning("%s: VirtualBox remembers it, but what we knew of it is gone; forgetting it", listed.name)
        await self._vbox.ask("controlvm", listed.uuid, "poweroff")
        await self.unregister(listed.uuid, files)
        return True

    async def clear(self, files: VmFiles, listed: list[Listed]) -> None:
        """Remove what a create or delete that was cut off left in a VM's folder, and in VirtualBox's memory of it."""
        if not files.folder.is_dir():
            return
        log.info("%s: removing what is left of an earlier virtual machine", files.folder)
        known = None
        try:
            known = files.load()
        except HypervisorError as error:
            log.warning("%s", error)
            for one in listed:  # its settings say then whose it is
                if one.name == files.folder.name:
                    await self.forget_left_over(one)
        if known is not None and any(one.uuid == known.uuid for one in listed):
            await self._vbox.ask("controlvm", known.uuid, "poweroff")
            await self.unregister(known.uuid, files)
        await self._close_media_below(files.folder)
        files.remove()

    async def undo(self, files: VmFiles) -> None:
        """After a create that failed. What cannot be undone now is found by the next one."""
        try:
            known = files.load()
            if known is not None:
                await self.unregister(known.uuid, files)
        except HypervisorError as error:
            log.warning("%s", error)
            return
        files.remove()

    async def _close_media_below(self, folder: Path) -> None:
        """VirtualBox forgets media that lie in a folder, children before parents.

        For what an interrupted snapshot leaves: a difference that no VM uses, and that keeps its parents known.
        """
        said = await self._vbox.ask("list", "hdds")
        for place in reversed(output.media(said.stdout)):
            if Path(place).is_relative_to(folder):
                answer = await self._vbox.ask("closemedium", "disk", place)
                if answer.status != 0:
                    # Seen with 7.2.22: what a snapshot leaves that the end of the VM's process cut off counts as used.
                    log.info("%s: VirtualBox remembers it until its service ends; it is in nobody's way", place)
                    return
