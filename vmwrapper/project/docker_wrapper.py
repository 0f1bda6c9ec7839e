"""docker_wrapper's job.toml into a job.xml. Pure: bytes in, text out.

What docker_wrapper knows: samples/docker_wrapper of BOINC/boinc. Every key of the file is expressed, told in a note, or
a fault that says what to do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from vmwrapper.project import docker_options

MAX_BYTES = 64 * 1024
"""Of a job.toml: a real one has a few lines."""
MAX_ITEMS = 1000
"""Of a list in it."""
DEFAULT_WORKDIR = "/app"
DEFAULT_CONTAINER = "container.vdi"

_GPU = "a virtual machine has no GPU: keep docker_wrapper for this app version"
_NO_FOLDERS = "a container sees no folder of the host: list the files with --input and --output"
_FAULTS = {
    "project_dir_mount": _NO_FOLDERS,
    "slot_dir_mount": _NO_FOLDERS,
    "mount": _NO_FOLDERS,
    "copy_to_container": "list the files with --input",
    "copy_from_container": "list the files with --output, relative to the working folder",
    "web_graphics_guest_port": "no port of the host leads into a container: the job has to do without graphics",
    "portmap": "no port of the host leads into a container: exchange files instead",
    "build_args": "the image is made once, by the project: give them to docker build, and remove them here",
}
_NOTES = {"verbose": "stderr.txt always says what happens"}
_UNFIT = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|^ | $")
"""What an element of job.xml cannot hold as it is: control characters, blanks at its ends."""


class ConvertError(Exception):
    """The file cannot be converted; `lines` say why, each for itself."""

    def __init__(self, *lines: str) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


@dataclass(frozen=True, slots=True)
class Converted:
    """A job file, and what its author should know of it."""

    job_xml: str
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Reading:
    """The file while it is read."""

    table: dict[str, object]
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self, key: str) -> str | None:
        """The string of a key, taken out of the table; None: it is not there, empty, or none (a fault)."""
        value = self.table.pop(key, None)
        if value is None or isinstance(value, str):
            return value or None
        self.faults.append(f"{key}: expected a string")
        return None

    def words(self, key: str) -> list[str]:
        """The words of a key that is a string, or a list of strings with any words each."""
        value = self.table.pop(key, None)
        given: list[object] = value if isinstance(value, list) else [] if value is None else [value]
        parts = [part for part in given if isinstance(part, str)]
        if len(given) > MAX_ITEMS or len(parts) < len(given):
            self.faults.append(f"{key}: expected a string, or a list of at most {MAX_ITEMS} strings")
            return []
        try:
            return [word for part in parts for word in docker_options.split(part)]
        except ValueError as error:
            self.faults.append(f"{key}: {str(error).lower()}")
            return []


def convert(content: bytes, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Converted:
    """The job.xml that does what a job.toml says. inputs, outputs: logical names. Raises ConvertError."""
    reading = _Reading(_parsed(content))
    workdir = reading.text("workdir") or DEFAULT_WORKDIR
    image = reading.text("image_name")
    options = docker_options.read(reading.words("create_args"))
    reading.faults += options.faults
    reading.notes += options.notes
    if not workdir.startswith("/"):
        reading.faults.append(f"workdir: {workdir[:100]!r} is not absolute")
    if options.workdir not in (None, workdir):
        reading.faults.append("create_args: --workdir is not the workdir of the file: they have to be the same here")
    if reading.table.pop("use_gpu", False) is not False:
        reading.faults.append(f"use_gpu: {_GPU}")
    for key, value in reading.table.items():
        if key in _NOTES:
            reading.notes.append(f"{key} is left out: {_NOTES[key]}")
        elif value not in ("", [], {}):
            reading.faults.append(f"{key[:100]!r}: {_FAULTS.get(key, 'unknown; job.xml has nothing for it')}")
    container = _container_name(image)
    elements = [("container", container), ("container_workdir", workdir)]
    elements += [] if options.entrypoint is None else [("application", options.entrypoint)]
    elements += [("setenv", text) for text in options.environment]
    elements += [("copy_file_to_VM", name) for name in inputs] + [("copy_file_from_VM", name) for name in outputs]
    elements += [] if options.memory_mb is None else [("memory_size_mb", str(options.memory_mb))]
    elements += [] if options.cpus is None else [("cpus", str(options.cpus))]
    reading.faults += [
        f"{name}: {text[:100]!r} has a control character or a blank at an end: job.xml cannot say it"
        for name, text in elements
        if _UNFIT.search(text)
    ]
    if reading.faults:
        raise ConvertError(*reading.faults)
    return Converted(_job_xml(elements), (*reading.notes, *_standing_notes(container, image, inputs, outputs, options)))


def _parsed(content: bytes) -> dict[str, object]:
    if len(content) > MAX_BYTES:
        raise ConvertError(f"larger than {MAX_BYTES} bytes: that is no job.toml")
    try:
        return tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise ConvertError("not UTF-8") from None
    except RecursionError:
        raise ConvertError("nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, and a number of too many digits
        raise ConvertError(f"no TOML: {str(error)[:300]}") from None


def _container_name(image: str | None) -> str:
    """The logical name of the container's disk, by the image's."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", (image or "").rpartition("/")[2].partition("@")[0].partition(":")[0])
    name = name.lstrip(".-")[:100]
    return f"{name}.vdi" if name else DEFAULT_CONTAINER


def _standing_notes(
    container: str,
    image: str | None,
    inputs: Sequence[str],
    outputs: Sequence[str],
    options: docker_options.Options,
) -> list[str]:
    notes = [f"{container} is the disk of the container{f' made of {image}' if image else ''}: it goes beside job.xml"]
    if not inputs and not outputs:
        notes.append("no --input and no --output: docker_wrapper mounts the slot, here files have to be listed")
    notes.append("docker_wrapper gives its arguments in the variable ARGS; here they are appended to the command")
    notes.append("a container has no network here, while one of docker_wrapper has")
    if options.memory_mb is None:
        notes.append("memory_size_mb is not given: the virtual machine has 512 MiB, the container what is left of it")
    else:
        notes.append(
            f"memory_size_mb has {docker_options.GUEST_MEMORY_MB} MiB more than --memory, for the guest itself"
        )
    return notes


def _job_xml(elements: list[tuple[str, str]]) -> str:
    lines = [f"        <{name}>{escape(text)}</{name}>\n" for name, text in elements]
    return "<job_desc>\n    <task>\n" + "".join(lines) + "    </task>\n</job_desc>\n"
