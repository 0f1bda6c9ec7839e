"""`vmwrapper licenses`: the licences of the program and of everything that is shipped inside the frozen executable.

The texts are collected when the executable is built (packaging/collect_licenses.py). Not frozen, nothing is shipped
inside: our own licence and those that the installed dependencies declare are named.
"""

from __future__ import annotations

import base64
import importlib
import zlib
from importlib import metadata

OURS = "vmwrapper: LGPL-3.0-or-later (files COPYING.LESSER and COPYING)"


def text() -> str:
    """All of it."""
    try:
        packed = importlib.import_module("frozen_licenses").PACKED
    except ImportError:
        return "".join(f"{line}\n" for line in [OURS, *_dependencies()])
    return zlib.decompress(base64.b85decode(packed)).decode()


def _dependencies() -> list[str]:
    lines = []
    for name in ("lxml", "Twisted", "stomp.py", "netifaces-plus", "psutil"):
        try:
            about = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        declared = about["License-Expression"] or about["License"] or "see its own files"
        lines.append(f"{about['Name']} {about['Version']}: {declared.splitlines()[0]}")
    return lines
