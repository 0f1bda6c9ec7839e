"""Reading of the settings that the host left for this guest in SMBIOS. Parsing is pure: bytes in, settings out.

QEMU puts it into an OEM string (SMBIOS 3.x section 7.12, type 11), VirtualBox into the system's SKU number (type 1) or
an OEM string too. The text is a list of `key=value`, separated by blanks, newlines or semicolons:

    secret=<hex>            what both sides of a dialled connection must know
    token=<hex>             the same, to be used once and then replaced (VirtualBox, where others may see it)
    interface=<name|MAC>    the network card whose MAC is this guest's id

A text of 32 to 256 hexadecimal digits alone is a secret. Other texts that firmware and virtual machines
have there are passed over.
/sys/firmware/dmi/tables/DMI may be read by root only: the guest image's init copies it (or the text) to a file that
the agent may read, by default /run/vmwrapper/secret.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

PLACES = (
    Path("/run/vmwrapper/secret"),
    Path("/sys/firmware/dmi/tables/DMI"),
    Path("/sys/class/dmi/id/product_sku"),
)
"""Looked at in this order, unless the configuration names a file."""

TABLE_LIMIT = 1024 * 1024
"""Bytes of a table that are read; real ones have 1 to 20 KiB, and a type 11 structure is at most 64 KiB."""

_SYSTEM_INFORMATION, _OEM_STRINGS, _END_OF_TABLE = 1, 11, 127
_SKU_OFFSET = 0x19  # SMBIOS 2.4 and later, section 7.2
_SECRET_ALONE = re.compile(r"[0-9A-Fa-f]{32,256}\Z")


@dataclass(frozen=True, slots=True)
class HostSettings:
    """The host's settings; empty where it left none."""

    secret: str = ""
    once: bool = False
    """The secret is a one-time token."""
    interface: str = ""


@dataclass(frozen=True, slots=True)
class Structure:
    """One SMBIOS structure: its type, the formatted bytes (header included), its strings (number 1 first)."""

    type: int
    formatted: bytes
    strings: tuple[bytes, ...]

    def string(self, offset: int) -> bytes:
        """The string whose number stands at `offset` of the formatted bytes; empty if there is none."""
        number = self.formatted[offset] if offset < len(self.formatted) else 0
        return self.strings[number - 1] if 0 < number <= len(self.strings) else b""


def structures(table: bytes) -> Iterator[Structure]:
    """The structures of a DMI table, as far as it can be read; a damaged rest is passed over."""
    at = 0
    while at + 4 <= len(table):
        kind, length = table[at], table[at + 1]
        if length < 4 or at + length > len(table):
            return
        end = table.find(b"\0\0", at + length)
        if end < 0:
            return
        text = table[at + length : end]
        strings = tuple(text.split(b"\0")) if text else ()
        yield Structure(kind, table[at : at + length], strings)
        if kind == _END_OF_TABLE:
            return
        at = end + 2


def texts_of_table(table: bytes) -> list[str]:
    """The texts of a DMI table in which a host may have left something: OEM strings first, then the SKU number."""
    oem: list[str] = []
    sku: list[str] = []
    for structure in structures(table):
        if structure.type == _OEM_STRINGS:
            oem += [string.decode("utf-8", "replace") for string in structure.strings]
        elif structure.type == _SYSTEM_INFORMATION:
            sku.append(structure.string(_SKU_OFFSET).decode("utf-8", "replace"))
    return oem + sku


def settings_of(texts: Iterable[str]) -> HostSettings:
    """The settings in `texts`; the first text that names a key counts."""
    found: dict[str, str] = {}
    for text in texts:
        for setting in re.split(r"[\s;]+", text.strip()):
            key, equals, value = setting.partition("=")
            if equals and key in {"secret", "token", "interface"} and value:
                found.setdefault(key, value)
        if _SECRET_ALONE.match(text.strip()):
            found.setdefault("secret", text.strip())
    secret = found.get("secret", "")
    token = found.get("token", "")
    return HostSettings(secret or token, bool(token and not secret), found.get("interface", ""))


def settings_in(content: bytes) -> HostSettings:
    """The settings in a file's content: a DMI table, or the text itself (which has no NUL)."""
    if b"\0" in content:
        return settings_of(texts_of_table(content))
    return settings_of([content.decode("utf-8", "replace")])


def read(secret_file: Path | None = None) -> HostSettings:
    """Read the settings, from `secret_file` alone if it is given, else from PLACES. Never raises."""
    for place in PLACES if secret_file is None else (secret_file,):
        try:
            with place.open("rb") as file:
                content = file.read(TABLE_LIMIT)
        except OSError as error:
            log.debug("SMBIOS: %s: %s", place, error.strerror)
            continue
        settings = settings_in(content)
        if settings.secret or settings.interface:
            log.info("SMBIOS: settings of the host found in %s", place)
            return settings
    log.warning("SMBIOS: the host left nothing for this guest")
    return HostSettings()
