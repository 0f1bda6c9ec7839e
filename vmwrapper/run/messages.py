"""What goes between the project and the running task: trickle messages both ways, and files that are uploaded early.

    up      a trickle with CPU time and fraction done at each snapshot; what the guest's program wrote into a
            trickle_trigger_file; intermediate_upload_file as soon as it is there and quiet
    down    each trickle-down file of the slot goes into the guest (a host task finds it in the slot)

Looks once a second at the slot and every GUEST_LOOK_S into the guest. What goes to the project goes once, whatever the
guest goes back to; what goes into the guest, at least once (`vmwrapper.vm.sent`, in `vmwrapper_messages.json`). Nothing
here ever stops the job. (Trickles by time: `vmwrapper.run.trickles`.)

A program may replace a trigger file when it finds it empty: an empty one is put over what was taken.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.eventloop import is_over, start_logged
from vmcontrol.common.slotfiles import MESSAGES
from vmwrapper.boinc.runtime import BoincError, UploadStatus
from vmwrapper.context.context import JobContext
from vmwrapper.paths import make_folder_for
from vmwrapper.run import trickle_text
from vmwrapper.vm.sent import Life, SentRecord
from vmwrapper.vm.trouble import HostMainError, MissingFile

if TYPE_CHECKING:
    from vmwrapper.vm.hostmain import HostMainClient
    from vmwrapper.vm.session import GuestSession
    from vmwrapper.vm.task import GuestTask

GUEST_LOOK_S = 5.0
QUIET_S = 3.0
"""A file that nobody has written to for so long is taken for complete."""
SNAPSHOT_VARIETY = "cpu_time"
"""As BOINC's wrapper names its trickles by time."""

log = logging.getLogger(__name__)


class Messages:
    """All messages of one run. Call `look` once a second."""

    def __init__(self, context: JobContext, session: GuestSession | None) -> None:
        self._context = context
        self._runtime = context.runtime
        self._names = context.names
        self._session = session
        self._uploads = tuple(context.job.intermediate_upload_files)
        self._with_snapshots = bool(context.options.trickle_s or context.job.trickle_up_period_s)
        self._snapshots_seen = context.ledger.now.snapshots_made
        self._trickles_down: list[str] = []
        self._sizes: dict[str, int] = {}
        self._looked_at = float("-inf")
        self._looking: Deferred[object] | None = None
        self._record = SentRecord(context.slot.file(MESSAGES))

    def look(self) -> None:
        """What has come, and what is to go."""
        self._tell_of_snapshots()
        self._collect_trickles_down()
        for name in self._uploads:
            self._look_at_upload(name)
        guest = self._session.running_task() if self._session is not None else None
        now = self._context.reactor.seconds()
        due = now - self._looked_at >= GUEST_LOOK_S
        if guest is not None and is_over(self._looking) and (due or self._undelivered(guest)):
            self._looked_at = now
            self._looking = start_logged(self._look_into(guest), "messages of the guest")

    # --- up

    def _tell_of_snapshots(self) -> None:
        count = self._context.ledger.now.snapshots_made
        if count > self._snapshots_seen and self._with_snapshots:
            cpu_time_s, fraction = self._context.accounts.cpu_time_s, self._context.ledger.fraction()
            self._send(
                SNAPSHOT_VARIETY,
                f"<cpu_time>{cpu_time_s:f}</cpu_time>\n<fraction_done>{fraction:f}</fraction_done>\n",
            )
        self._snapshots_seen = count

    def _send(self, variety: str, text: str) -> None:
        try:
            self._runtime.send_trickle_up(variety, text)
        except BoincError as error:
            log.warning("no trickle-up message: %s", error)
        else:
            log.info("trickle-up message %s, %d characters", variety, len(text))

    def _look_at_upload(self, name: str) -> None:
        if not self._record.is_uploaded(name):
            if self._is_quiet(name):
                try:
                    self._record.uploads(name)
                except OSError as error:
                    log.warning("%s is not uploaded yet: %s cannot be written: %s", name, MESSAGES, error)
                    return
                try:
                    self._runtime.upload_file(name)
                except BoincError as error:
                    log.warning("%s", error)
                    self._uploads = tuple(one for one in self._uploads if one != name)  # its status is refused, too
                else:
                    log.info("upload of %s asked for", name)
            return
        status = self._runtime.upload_status(name)
        if status is not UploadStatus.NOT_READY:
            log.info("upload of %s: %s", name, status.name.lower())
            self._uploads = tuple(one for one in self._uploads if one != name)

    def _is_quiet(self, logical: str) -> bool:
        try:
            return time.time() - self._names.source(logical).stat().st_mtime >= QUIET_S
        except OSError:
            return False

    # --- down

    def _collect_trickles_down(self) -> None:
        while (found := self._runtime.receive_trickle_down()) is not None:
            log.info("trickle-down message %s", found.name)
            self._trickles_down.append(found.name)

    def _undelivered(self, guest: GuestTask) -> list[str]:
        self._record.guest_is(guest.life)
        return [name for name in self._trickles_down if not self._record.is_delivered(name)]

    # --- the guest

    async def _look_into(self, guest: GuestTask) -> None:
        try:
            hostmain = await guest.hostmain()
            for name in self._undelivered(guest):
                await hostmain.put_file(guest.vm, str(self._context.slot.file(name)), name)
                self._record.delivers(name)
            wanted = [*guest.trigger_files, *(name for name in self._uploads if not self._record.is_uploaded(name))]
            if wanted:
                await self._look_at_files(hostmain, guest, wanted)
        except HostMainError as error:
            log.debug("messages of the guest: %s", error)
        except OSError as error:
            log.warning("%s cannot be written: %s", MESSAGES, error)

    async def _look_at_files(self, hostmain: HostMainClient, guest: GuestTask, wanted: Sequence[str]) -> None:
        listings: dict[str, dict[str, int]] = {}
        for name in dict.fromkeys(wanted):
            folder, base = str(PurePosixPath(name).parent), PurePosixPath(name).name
            if folder not in listings:
                listings[folder] = await hostmain.file_sizes(guest.vm, "" if folder == "." else folder)
            size = listings[folder].get(base, 0)
            quiet, self._sizes[name] = self._sizes.get(name) == size, size
            if not size:
                continue
            if name in guest.trigger_files:
                await self._take_trigger(hostmain, guest, name)
            elif quiet:
                await self._fetch(hostmain, guest, name)

    async def _fetch(self, hostmain: HostMainClient, guest: GuestTask, name: str) -> None:
        """A file of the guest that is to be uploaded early, into the slot."""
        try:
            local = self._names.target(name)
            make_folder_for(local, self._context.slot_folder)
        except OSError as error:
            log.warning("intermediate_upload_file %s: %s", name, error)
            return
        await hostmain.get_file(guest.vm, name, str(local))

    def _pass_on(self, name: str, content: bytes, life: Life) -> None:
        """What a guest has written into a trigger file. Raises OSError when it cannot be written down before."""
        if self._record.is_sent(name, content):
            log.info("%s is not sent again: the guest went back to a state before it was", name)
            return
        self._record.sends(name, content, life)
        self._send(trickle_text.variety(PurePosixPath(name).name), trickle_text.harmless(content))

    async def _take_trigger(self, hostmain: HostMainClient, guest: GuestTask, name: str) -> None:
        """Its text is sent and an empty file put over it. One that is too large is never fetched, and emptied too."""
        local = self._context.slot.file(f".{MESSAGES}.trigger")
        try:
            try:
                await hostmain.get_file(guest.vm, name, str(local), most=trickle_text.TEXT_LIMIT)
            except MissingFile as refused:
                if not refused.reason:
                    return
                log.warning("trickle_trigger_file %s is not sent: it %s", name, refused.reason)
                content = b""
            else:
                content = jsonfile.read_file(local, trickle_text.TEXT_LIMIT)
                self._pass_on(name, content, guest.life)
            write_atomically(local, b"")
            await hostmain.put_file(guest.vm, str(local), name)
            if content:
                self._record.is_gone(name, content, guest.life)
        except (OSError, ValueError) as error:
            log.warning("trickle_trigger_file %s: %s", name, error)
        finally:
            with contextlib.suppress(OSError):
                local.unlink(missing_ok=True)
