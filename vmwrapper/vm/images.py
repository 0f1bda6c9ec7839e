"""The images and container disks of a job's VMs, ready for use: what was shipped compressed is unpacked, in a thread.

Owns no file: `vmwrapper.vm.shipped_image` does the work. The reactor never waits for it, so the client is obeyed while
a disk is unpacked.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from twisted.internet.defer import CancelledError

from vmcontrol.common.eventloop import Event
from vmwrapper.context.background import Gate, in_background
from vmwrapper.context.context import JobContext
from vmwrapper.context.logical_names import LinkRefused
from vmwrapper.errors import DISK_DELAY_S, BadInput, TemporaryExit
from vmwrapper.job.filenames import DESCRIPTION_SUFFIX
from vmwrapper.paths import is_file
from vmwrapper.vm import shipped_image
from vmwrapper.vm.shipped_image import BadShippedImage, Description

log = logging.getLogger(__name__)


class SharedImages:
    """For one job."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._unpacking: tuple[str, float] | None = None
        """The logical name of what is being unpacked, and how much of it is, 0 to 1."""

    @property
    def progress(self) -> str:
        """What is being unpacked and how far it is, for people; empty when nothing is."""
        if self._unpacking is None:
            return ""
        logical, part = self._unpacking
        container = f"container's disk {logical}"
        what = container if self._element(logical) == "container" else "image of the virtual machine"
        return f"unpacking the {what}, {part:.0%}"

    async def ready(self, logical: str) -> Path:
        """Where the image or container's disk with this logical name can be used; unpacked first if it is compressed.

        Raises BadInput, TemporaryExit.
        """
        try:
            path = self._context.names.source(logical)
            physical = Path(os.path.realpath(path))
        except LinkRefused as refused:
            raise self._bad(logical, f"it {refused.why}") from refused
        if not is_file(physical):
            return path  # as below; a pipe would make us wait for ever
        try:
            kind = shipped_image.packing(physical)
        except OSError:
            return path  # it is for HostMain to say what is wrong with it
        if kind is None:
            self._sweep(physical.parent)
            return path
        folder = self._folder(physical.parent)
        description = self._description(logical)
        try:
            image = await self._unpacked(logical, physical, description, folder)
        except shipped_image.NotShared as other:
            log.warning("%s: the image is unpacked for this task alone", other)
            folder = self._context.slot_folder
            image = await self._unpacked(logical, physical, description, folder)
        if folder == physical.parent:  # another folder has no compressed files, so all in it would seem unneeded
            self._sweep(folder)
        return image

    def _description(self, logical: str) -> Description:
        name = f"{logical}{DESCRIPTION_SUFFIX}"
        try:
            return shipped_image.read(self._context.names.source(name), name)
        except LinkRefused as refused:
            raise self._bad(name, f"it {refused.why}") from refused
        except BadShippedImage as error:
            raise self._bad(logical, f"{error} (vmwrapper package makes it)") from error

    def _bad(self, logical: str, text: str) -> BadInput:
        return BadInput(f"{self._context.source}: <{self._element(logical)}>: {logical}: {text}")

    def _element(self, logical: str) -> str:
        """That of the job file which names it."""
        name = logical.removesuffix(DESCRIPTION_SUFFIX)
        tasks = (task.guest for task in self._context.job.tasks if task.guest is not None)
        return "container" if any(guest.container in (logical, name) for guest in tasks) else "image"

    def _folder(self, beside: Path) -> Path:
        """Beside the compressed file, where all slots find it. A folder that cannot be written: our own slot."""
        return beside if os.access(beside, os.W_OK | os.X_OK) else self._context.slot_folder

    async def _unpacked(self, logical: str, packed: Path, description: Description, folder: Path) -> Path:
        context = self._context
        began = context.reactor.seconds()
        while True:
            await context.control.may_work()
            try:
                image = await self._in_thread(logical, packed, description, folder)
            except shipped_image.GivenUp:
                log.info("suspended for long: unpacking of %s is given up for now", logical)
            except BadShippedImage as error:
                hint = "" if packed.parent == context.slot_folder else "; resetting the project fetches it again"
                raise self._bad(logical, f"{error}{hint}") from error
            except shipped_image.NotShared as other:
                if folder != context.slot_folder:
                    raise
                raise TemporaryExit(str(other), fault="disk", delay_s=DISK_DELAY_S) from other
            except OSError as error:
                raise self._disk_trouble(logical, description, error) from error
            else:
                seconds = context.reactor.seconds() - began
                log.info("%s %s: %s, ready after %.2f s", self._element(logical), logical, image.name, seconds)
                context.timeline.mark(self._element(logical))
                return image

    async def _in_thread(self, logical: str, packed: Path, description: Description, folder: Path) -> Path:
        """Returns when the thread has ended, also when cancelled: it removes what it has half written."""
        ended = Event()

        def tell(fraction: float) -> None:
            self._unpacking = logical, fraction

        def work(gate: Gate) -> Path:
            try:
                return shipped_image.unpack(packed, description, folder, gate, tell)
            finally:
                self._context.reactor.callFromThread(ended.set)

        try:
            return await in_background(self._context.reactor, self._context.control, work)
        except CancelledError:
            await ended.wait()
            raise
        finally:
            self._unpacking = None

    def _sweep(self, folder: Path) -> None:
        for name in shipped_image.sweep(folder):
            log.info("removed %s, an unpacked image that nothing needs any more", name)

    def _disk_trouble(self, logical: str, description: Description, error: OSError) -> TemporaryExit:
        element = self._element(logical)
        if error.errno in shipped_image.NO_ROOM:
            whose = "The virtual machine's disk image" if element == "image" else f"The container's disk {logical}"
            what = (
                f"{whose} needs {description.stored / 1e6:.0f} MB once unpacked, and BOINC's disk"
                " is too full: free some space"
            )
        else:
            what = f"The {element} {logical} cannot be unpacked ({error.strerror})"
        return TemporaryExit(what, fault="disk", delay_s=DISK_DELAY_S)
