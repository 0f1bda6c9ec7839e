"""Command ids on disk, for guests whose disk outlives a cold boot (link of 2009; DESIGN "The link of 2009").

Owns one file, a JSON object {id: {"attempt", "inline", "legacy", "result"}}, replaced atomically before a command is
started and after it has ended. A command that stands there without a result after the agent's start was lost with
the boot or with the agent (its keeper ends it then).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from guest.commands import Remembered
from vmcontrol.atomicfile import write_atomically

log = logging.getLogger(__name__)

SIZE_LIMIT = 16 * 1024 * 1024
"""Bytes of a journal that are read. A result takes about 6 KiB there, and results are forgotten when they are safe."""


class Journal:
    """The journal at `path`. Reading never fails: a damaged one is put aside and reported. Writing raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}

    def load(self) -> list[Remembered]:
        """What was known before this start."""
        try:
            with self._path.open("rb") as file:
                raw = file.read(SIZE_LIMIT + 1)
        except FileNotFoundError:
            return []
        except OSError as error:
            log.error("journal %s: %s", self._path, error.strerror)
            return []
        try:
            remembered = parse(raw)
        except ValueError as error:
            aside = self._path.with_name(self._path.name + ".damaged")
            log.error("journal %s is damaged (%s); put aside as %s", self._path, error, aside.name)
            self._path.replace(aside)
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


def _entry(old: Remembered) -> dict[str, Any]:
    result = None if old.body is None else dict(old.body)
    return {"attempt": old.attempt, "inline": old.inline, "legacy": old.legacy, "result": result}


def parse(raw: bytes) -> list[Remembered]:
    """The journal's content. Raises ValueError."""
    if len(raw) > SIZE_LIMIT:
        raise ValueError(f"larger than {SIZE_LIMIT} bytes")
    try:
        entries = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(entries, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 (what is wrong is the file)
    remembered = []
    for id, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("attempt"), int):
            raise ValueError(f"entry {id[:40]!r} has no attempt")  # noqa: TRY004
        body = entry.get("result")
        if body is not None and not isinstance(body, dict):
            raise ValueError(f"entry {id[:40]!r} has a result that is no object")
        inline, legacy = bool(entry.get("inline", True)), bool(entry.get("legacy", False))
        remembered.append(Remembered(id, entry["attempt"], body, inline, legacy))
    return remembered
