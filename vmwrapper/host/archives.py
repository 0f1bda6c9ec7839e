"""zip_output: output files of the slot packed into one. File work in pieces, with a gate between them."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from vmcontrol.common.atomicfile import replacing
from vmwrapper.host.zip_names import RawName
from vmwrapper.job import names
from vmwrapper.job.patterns import compile_pattern

PIECE = 1 << 20
"""Bytes between two gates."""
TEMPORARY_PREFIX = f"{names.TEMPORARY_PREFIX}zip."

Gate = Callable[[], None]


def pack(archive: Path, folder: Path, chosen: Iterable[str], gate: Gate) -> None:
    """Write an archive of files of `folder`, durable: under its name there is never a half one. Raises OSError."""
    for left in archive.parent.glob(f"{TEMPORARY_PREFIX}*"):
        left.unlink(missing_ok=True)
    with (
        replacing(archive, prefix=TEMPORARY_PREFIX) as out,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as opened,
    ):
        for name in chosen:
            gate()
            _add(opened, folder / name, name, gate)


def choose(folder: Path, patterns: Iterable[str], initial: Collection[str], archive: str) -> list[str]:
    """Names of the files that go into the output archive, sorted: those of the slot itself that were not there before
    the first task, whose name a pattern finds, without folders and without the files that client and wrapper keep."""
    compiled = [compile_pattern(pattern) for pattern in patterns]
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name not in initial
        and entry.name != archive
        and not names.is_kept_by_us(entry.name)
        and entry.is_file()
        and _found(compiled, entry.name)
    )


def _found(patterns: Iterable[re.Pattern[bytes]], name: str) -> bool:
    encoded = os.fsencode(name)
    return any(pattern.search(encoded) for pattern in patterns)


def _add(opened: zipfile.ZipFile, path: Path, name: str, gate: Gate) -> None:
    information = RawName.from_file(path, name, strict_timestamps=False)
    information.compress_type = zipfile.ZIP_DEFLATED
    with path.open("rb") as source, opened.open(information, "w", force_zip64=True) as out:
        while piece := source.read(PIECE):
            gate()
            out.write(piece)
