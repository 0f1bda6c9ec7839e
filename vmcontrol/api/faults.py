"""The XML-RPC fault that a caller sees for an error (docs/reference/xml-rpc.md, "Faults")."""

from __future__ import annotations

import errno
import json
import logging
import xmlrpc.client
from collections.abc import Mapping

from vmcontrol.api.arguments import BadArgument
from vmcontrol.common.eventloop import LimitReached
from vmcontrol.guests.commands import NotPossible
from vmcontrol.guests.repeater import NoAnswer
from vmcontrol.guests.vms import GuestSilent
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError, SpecRefused
from vmcontrol.link.errors import LinkError
from vmcontrol.protocol.text import BadMessage
from vmcontrol.transfer.interface import FileMissing, FileUnusable, LocalFileMissing, TransferError

log = logging.getLogger(__name__)

ERROR, TROUBLE, MISSING, SILENT, REFUSED = -1, 1, 2, 3, 4
"""Fault codes: the original's for all; the computer's trouble; a missing file; a silent guest; what can never be."""
_DISK_FULL = ("disk-full", "the disk of this computer is full; free some space in BOINC's data folder", 600)
_NO_FILES = ("no-files", "this computer has too many files open; it will be tried again", 60)
TROUBLES: Mapping[int, tuple[str, str, int]] = {
    errno.ENOSPC: _DISK_FULL,
    getattr(errno, "EDQUOT", errno.ENOSPC): _DISK_FULL,
    errno.EMFILE: _NO_FILES,
    errno.ENFILE: _NO_FILES,
    errno.ENOMEM: ("no-memory", "this computer has not enough free memory; it will be tried again", 300),
    errno.EROFS: ("read-only", "BOINC's data folder cannot be written", 3600),
}
"""The computer's trouble as the system tells it: key, reason for the volunteer, seconds until a new try makes sense."""


def to_fault(error: Exception) -> xmlrpc.client.Fault:
    """The fault that a caller sees for an error."""
    cause = error.__cause__
    if isinstance(error, TransferError) and isinstance(cause, OSError) and cause.errno in TROUBLES:
        error = cause  # our disk, or what else this computer has not enough of
    match error:
        case HostProblem():
            trouble = {"key": error.key, "reason": error.reason, "delay_s": error.delay_s}
            return xmlrpc.client.Fault(TROUBLE, json.dumps(trouble))
        case FileMissing() | FileUnusable() | LocalFileMissing():
            return xmlrpc.client.Fault(MISSING, json.dumps(_missing(error)))
        case OSError(errno=int(number)) if number in TROUBLES:
            key, reason, delay_s = TROUBLES[number]
            where = f"{error.filename}: " if error.filename else ""
            trouble = {"key": key, "reason": f"{reason} ({where}{error.strerror})", "delay_s": delay_s}
            return xmlrpc.client.Fault(TROUBLE, json.dumps(trouble))
        case SpecRefused() | GuestSilent() | NoAnswer() | LinkError():
            return xmlrpc.client.Fault(REFUSED if isinstance(error, SpecRefused) else SILENT, str(error))
        case BadArgument() | NotPossible() | HypervisorError() | TransferError() | LimitReached() | BadMessage():
            return xmlrpc.client.Fault(ERROR, str(error))
    log.warning("an XML-RPC call failed: %s: %s", type(error).__name__, error, exc_info=error)
    return xmlrpc.client.Fault(ERROR, str(error) or type(error).__name__)


def _missing(error: FileMissing | FileUnusable | LocalFileMissing) -> dict[str, object]:
    """The text of fault 2, as an object."""
    value: dict[str, object] = {"path": str(error.path), "listing": []}
    if isinstance(error, FileMissing):
        value["listing"] = [entry.name + ("/" if entry.folder else "") for entry in error.listing]
    elif isinstance(error, FileUnusable):
        value["reason"] = error.reason
    return value
