"""The options of `docker create` in docker_wrapper's create_args: into what job.xml can say. Pure.

An option is expressed, is told to be without effect (a note), or is a fault that says what to do. None is dropped in
silence.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field

GUEST_MEMORY_MB = 128
"""MiB that the guest's own system needs beside the container (the project's guest image)."""

_GPU = "a virtual machine has no GPU: keep docker_wrapper for this app version, or a GPU application for the host"
_IN_IMAGE = "job.xml cannot say it: write {} in the Dockerfile and make the image again"
_FILES = "a container sees no folder of the host: list files with --input and --output"
_ISOLATION = "a container here has Docker's default rights, no more and no fewer: it has to do with them"

_FAULTS = {
    "--user": _IN_IMAGE.format("USER"),
    "--stop-signal": _IN_IMAGE.format("STOPSIGNAL"),
    "--volume": _FILES,
    "--mount": _FILES,
    "--volumes-from": _FILES,
    "--tmpfs": _FILES,
    "--env-file": "give each variable with -e NAME=VALUE",
    "--gpus": _GPU,
    "--device": _GPU,
    "--runtime": _GPU,
    "--privileged": _ISOLATION,
    "--cap-add": _ISOLATION,
    "--cap-drop": _ISOLATION,
    "--security-opt": _ISOLATION,
    "--pid": _ISOLATION,
    "--ipc": _ISOLATION,
    "--userns": _ISOLATION,
    "--ulimit": "set the limit in the container's own program",
    "--publish": "no port of the host leads into a container: remove it, and exchange files instead",
    "--platform": "containers here are linux/amd64: leave it out and make the image for that",
}
_NOTES = {
    "--name": "containers have no names here",
    "--hostname": "the container keeps the guest's host name",
    "--rm": "what a task leaves goes with it anyway",
    "--init": "what a task leaves running is ended anyway",
    "--interactive": "stdin is the task's stdin_filename",
    "--tty": "a task has no terminal",
    "--label": "labels have no meaning here",
    "--pull": "nothing is pulled: the volunteer's computer needs no registry",
    "--restart": "a task goes on from its snapshot",
    "--shm-size": "shared memory is bounded by the guest's memory",
    "--memory-swap": "the guest has no swap",
    "--read-only": "what a task writes outside its folder goes with the task",
    "--log-driver": "stdout and stderr are those of the task",
}
_SHORT = {
    "-m": "--memory",
    "-e": "--env",
    "-w": "--workdir",
    "-u": "--user",
    "-v": "--volume",
    "-p": "--publish",
    "-h": "--hostname",
    "-i": "--interactive",
    "-t": "--tty",
    "-l": "--label",
    "--net": "--network",
}
_FLAGS = {"--privileged", "--rm", "--init", "--interactive", "--tty", "--read-only"}
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"([0-9]{1,15})([bkmg]?)b?", re.IGNORECASE | re.ASCII)
_CPUS = re.compile(r"[0-9]{1,3}(\.[0-9]{1,9})?", re.ASCII)


@dataclass(slots=True)
class Options:
    """What create_args say, in the words of job.xml; None: nothing."""

    memory_mb: int | None = None
    cpus: int | None = None
    environment: list[str] = field(default_factory=list)
    """NAME=VALUE each."""
    workdir: str | None = None
    entrypoint: str | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(words: list[str]) -> Options:
    """What the words of create_args mean."""
    options = Options()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            options.faults.append(f"create_args: {word!r} is no option of docker create")
            continue
        name, value, has_value = _name_and_value(word)
        if name in _FLAGS and has_value and not word.startswith("--"):  # -it
            rest.insert(0, f"-{value}")
        if name not in _FLAGS and not has_value:
            if not rest:
                options.faults.append(f"create_args: {word} needs a value")
                break
            value = rest.pop(0)
        _take(name, value, options)
    return options


def split(text: str) -> list[str]:
    """The words of a create_args string, as a shell makes them. Raises ValueError (a quote that is not closed)."""
    return shlex.split(text)


def _name_and_value(word: str) -> tuple[str, str, bool]:
    name, equals, value = word.partition("=")
    if word.startswith("--"):
        return _SHORT.get(name, name), value, bool(equals)
    short, rest = word[:2], word[2:]
    return _SHORT.get(short, short), rest.removeprefix("="), bool(rest)


def _take(name: str, value: str, options: Options) -> None:
    fault = None
    if name == "--memory":
        fault = _take_memory(value, options)
    elif name == "--cpus":
        fault = _take_cpus(value, options)
    elif name == "--env":
        if "=" in value[1:]:
            options.environment.append(value)
        else:
            fault = "the volunteer's variables are not passed on: give it as NAME=VALUE"
    elif name == "--workdir":
        options.workdir = value
    elif name == "--entrypoint":
        options.entrypoint = value
        fault = None if value else "an empty entrypoint cannot be said: make the image without ENTRYPOINT"
    elif name == "--network":
        if value != "none":
            fault = "a container has no network here: remove it if the job does without"
    elif name in _NOTES:
        options.notes.append(f"create_args: {name} is left out: {_NOTES[name]}")
    else:
        fault = _FAULTS.get(name, "job.xml has nothing for it: remove it if the job does without")
    if fault is not None:
        options.faults.append(f"create_args: {name}: {fault}")


def _take_memory(value: str, options: Options) -> str | None:
    found = _SIZE.fullmatch(value)
    size = int(found[1]) * _UNITS[found[2].lower()] if found else 0
    mib = math.ceil(size / (1 << 20)) + GUEST_MEMORY_MB
    if not size or mib > 1 << 20:
        return f"{value[:100]!r} is no size as 512m or 2g"
    options.memory_mb = mib
    return None


def _take_cpus(value: str, options: Options) -> str | None:
    number = math.ceil(float(value)) if _CPUS.fullmatch(value) else 0
    if not 1 <= number <= 255:
        return f"{value[:100]!r} is no number of processors up to 255"
    if number != float(value):
        options.notes.append(f"create_args: --cpus {value} becomes {number}: a virtual machine has whole processors")
    options.cpus = number
    return None
