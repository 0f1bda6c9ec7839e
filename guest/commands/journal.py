"""Command ids on disk, for guests whose disk outlives a cold boot (link of protocol 1).

Owns one file, a JSON object {id: {"attempt", "inline", "legacy", "result"}}, replaced atomically before a command is
started and after it has ended. A command that stands there without a result after the agent's start was lost with
the boot or with the agent (its supervisor ends it then).
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guest.commands.outputtext import TAIL_BYTES
from guest.commands.runner import ERROR_LIMIT
from guest.commands.table import KNOWN_LIMIT, Remembered
from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.protocol.text import HEADER_LIMIT, unfit_for_header

log = logging.getLogger(__name__)

PATH_BYTES = 4096
"""Of the longest path (PATH_MAX of Linux)."""
ENTRY_LIMIT = 6 * HEADER_LIMIT + 12 * (ERROR_LIMIT + 256) + 5 * TAIL_BYTES + 12 * PATH_BYTES + 4096
"""Bytes of an entry, about 6 KiB mostly. At worst the id stands there twice with three bytes for each of its own, each
character of the error takes twelve, each byte of the tail five, each byte of the two paths six; then numbers."""
SIZE_LIMIT = KNOWN_LIMIT * ENTRY_LIMIT
"""Bytes of a journal that are read: as many as the agent itself can have written, as lost commands must be known."""


class Journal:
    """The journal at `path`. Reading never fails: a damaged one is put aside and reported. Writing raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}

    def load(self) -> list[Remembered]:
        """What was known before this start."""
        try:
            remembered = parse(jsonfile.read_file(self._path, SIZE_LIMIT))
        except FileNotFoundError:
            return []
        except OSError as error:
            log.error("journal %s: %s", self._path, error.strerror)
            return []
        except ValueError as error:
            aside = self._path.with_name(self._path.name + ".damaged")
            log.error("journal %s is damaged (%s); put aside as %s", self._path, error, aside.name)
            try:
                self._path.replace(aside)
            except OSError as why_not:
                log.error("journal %s: it stays: %s", self._path, why_not.strerror)
            return []
        self._entries = {old.id: _entry(old) for old in remembered}
        return remembered

    def remember(self, entry: Remembered) -> None:
        """Durable when it returns."""
        self._entries[entry.id] = _entry(entry)
        self._write()

    def erase(self, id: str) -> None:
        """Durable when it returns."""
        if self._entries.pop(id, None) is not None:
            self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(self._entries).encode(), mode=0o600)


@dataclass(frozen=True, slots=True)
class _Entry:
    attempt: int
    inline: bool = True
    legacy: bool = False
    result: dict[str, Any] | None = None


def _entry(old: Remembered) -> dict[str, Any]:
    return asdict(_Entry(old.attempt, old.inline, old.legacy, None if old.body is None else dict(old.body)))


def parse(raw: bytes) -> list[Remembered]:
    """The journal's content. Raises ValueError.

    A result with a number that cannot be sent is no damage: the other commands are known all the same.
    """
    entries = jsonfile.typed(dict[str, _Entry], jsonfile.parse(raw, finite=False))
    for id in entries:
        if unfit_for_header(id):  # it could never be sent to anybody
            raise ValueError(f"{id[:40]!r} is no id of a command")
    return [Remembered(id, one.attempt, one.result, one.inline, one.legacy) for id, one in entries.items()]
