"""What has left the slot for the project, and what the guest has got of it: no rollback of a guest repeats it.

Pure but for the file. A guest that went back to an older snapshot does again what it did since, and writes the same
message into its trickle_trigger_file: that one is not sent again. A message is known by file and content; each of
several equal ones counts. They are written down before they are sent: a crash at that moment loses one, repeats none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import write_atomically

SENT_LIMIT = 2000
"""Messages of the guest that are remembered, the newest."""
SIZE_LIMIT = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Life:
    """A guest's command, from one rollback to the next."""

    command: str
    rollbacks: int
    went_back_to: int
    """Number of the snapshot of the last rollback; 0: it was made anew."""
    snapshot: int
    """Number of the newest snapshot now, one that is being taken included."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A message of the guest that was sent."""

    digest: str
    """Of file name and content."""
    snapshot: int
    """Number of the newest snapshot when it was gone from the guest."""
    due: bool = True
    """The guest may still have it, or write it again."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """The file."""

    delivered: tuple[str, ...] = ()
    to: tuple[str, int] = ("", 0)
    uploads: tuple[str, ...] = ()
    sent: tuple[tuple[str, int, bool], ...] = ()


def _read(path: Path) -> _Kept:
    """Lost, or of an older version: what was sent may be sent again."""
    try:
        return jsonfile.typed(_Kept, jsonfile.load(path, SIZE_LIMIT))
    except FileNotFoundError:
        return _Kept()
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read: %s", path.name, error)
        return _Kept()


class SentRecord:
    """Of one slot."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = _read(path)
        self._sent = [Sent(*row) for row in kept.sent]
        self._uploads, self._delivered = set(kept.uploads), set(kept.delivered)
        self._life = kept.to

    def guest_is(self, life: Life) -> None:
        """Note which life the guest is in, before anything is sent to it: it may have gone back since."""
        seen, self._life = self._life, (life.command, life.rollbacks)
        if seen[1] != life.rollbacks:
            self._delivered.clear()  # its state may be one of before
            self._sent = [replace(one, due=one.due or one.snapshot >= life.went_back_to) for one in self._sent]

    # --- to the project

    def is_sent(self, name: str, content: bytes) -> bool:
        """Whether this message was sent in an earlier life, or before a crash, and not seen since."""
        return any(one.digest == _digest(name, content) and one.due for one in self._sent)

    def sends(self, name: str, content: bytes, life: Life) -> None:
        """Note a message that is about to be sent. Durable on return. Raises OSError."""
        self._sent = [*self._sent, Sent(_digest(name, content), life.snapshot)][-SENT_LIMIT:]
        self._write()

    def is_gone(self, name: str, content: bytes, life: Life) -> None:
        """Note that the guest does not have it any more. Raises OSError."""
        for index, one in enumerate(self._sent):
            if one.digest == _digest(name, content) and one.due:
                self._sent[index] = replace(one, snapshot=max(one.snapshot, life.snapshot), due=False)
                self._write()
                return

    def is_uploaded(self, name: str) -> bool:
        """Whether its upload was requested."""
        return name in self._uploads

    def uploads(self, name: str) -> None:
        """Note an upload that is about to be requested. Durable on return. Raises OSError."""
        self._uploads.add(name)
        self._write()

    # --- to the guest

    def is_delivered(self, name: str) -> bool:
        """Whether the guest, in this life, has a trickle-down."""
        return name in self._delivered

    def delivers(self, name: str) -> None:
        """Note that the guest has it. Raises OSError."""
        self._delivered.add(name)
        self._write()

    def _write(self) -> None:
        value = {
            "delivered": sorted(self._delivered),
            "to": list(self._life),
            "uploads": sorted(self._uploads),
            "sent": [[one.digest, one.snapshot, one.due] for one in self._sent],
        }
        write_atomically(self._path, json.dumps(value).encode())


def _digest(name: str, content: bytes) -> str:
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:32]
