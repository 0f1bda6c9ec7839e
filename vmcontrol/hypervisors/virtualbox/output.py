"""What VBoxManage and VirtualBox's log say, parsed. Pure: text in, values out; nothing here raises for odd text.

Only `--machinereadable` forms and `list vms` are read, and lines of VBox.log that have been the same since 4.x.
Everything may be preceded by warnings (Debian's script prints five lines on stdout when a kernel module is missing).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from vmcontrol.protocol.vm import VmState

_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
T = TypeVar("T")
INACCESSIBLE = "<inaccessible>"


def without_warnings(text: str) -> str:
    """stdout without the lines that warn: `WARNING: ...` with its continuation lines, and `Warning: ...`."""
    kept, warning = [], False
    for line in text.splitlines():
        if line.startswith(("WARNING: ", "Warning: ", "VBoxManage: warning: ")):
            warning = line.startswith("WARNING: ")
        elif not (warning and line.startswith((" ", "\t"))):
            warning = False
            kept.append(line)
    return "\n".join(kept)


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Of VirtualBox."""

    major: int
    minor: int
    build: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.build}"


def version(text: str) -> Version | None:
    """From `--version`: 7.2.22_Debianr175245, 6.1.38r153438."""
    match = re.search(r"^(\d+)\.(\d+)\.(\d+)\S*\s*\Z", text.strip(), re.MULTILINE | re.ASCII)
    return Version(*(int(part[:9]) for part in match.groups())) if match else None


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of `list vms`."""

    name: str
    uuid: str

    @property
    def accessible(self) -> bool:
        return self.name != INACCESSIBLE


def vm_list(text: str) -> list[Listed]:
    """From `list vms` and `list runningvms`. A name may hold quotes and braces."""
    return [
        Listed(match[1], match[2].lower())
        for line in text.splitlines()
        if (match := re.fullmatch(rf'"(.*)" \{{({_UUID})\}}', line.strip()))
    ]


_PAIR = re.compile(r'(?:"(?P<quoted>[^"]+)"|(?P<plain>[^"=\s][^"=]*))=(?P<value>.*)')


def pairs(text: str) -> dict[str, str]:
    """From a `--machinereadable` form: key="value" or key=value or "key"="value". A value may go over several lines."""
    found: dict[str, str] = {}
    lines = iter(text.splitlines())
    for line in lines:
        match = _PAIR.fullmatch(line)
        if match is None:
            continue
        value = match["value"]
        if value.startswith('"'):
            value = _quoted(value, lines)
        found.setdefault(match["quoted"] or match["plain"], value)
    return found


def _quoted(value: str, more: Iterator[str]) -> str:
    while not _closed(value):
        following = next(more, None)
        if following is None:
            break
        value += "\n" + following
    inner = value[1:-1] if _closed(value) else value[1:]
    return inner.replace('\\"', '"')


def _closed(value: str) -> bool:
    return len(value) >= 2 and value.endswith('"') and not value.endswith('\\"')


_STATES = {
    "poweroff": VmState.POWERED_OFF,
    "powered off": VmState.POWERED_OFF,
    "saved": VmState.SAVED,
    "aborted-saved": VmState.SAVED,  # since 7.0: it died while it was being restored; the saved state is still there
    "teleported": VmState.POWERED_OFF,
    "aborted": VmState.ABORTED,
    "running": VmState.RUNNING,
    "livesnapshotting": VmState.RUNNING,
    "onlinesnapshotting": VmState.RUNNING,
    "deletingsnapshotlive": VmState.RUNNING,
    "deletingsnapshotonline": VmState.RUNNING,
    "paused": VmState.PAUSED,
    "deletingsnapshotlivepaused": VmState.PAUSED,
    "deletingsnapshotpaused": VmState.PAUSED,
    "gurumeditation": VmState.STUCK,
    "stuck": VmState.STUCK,
    "starting": VmState.STARTING,
    "stopping": VmState.STOPPING,
    "saving": VmState.SAVING,
    "restoring": VmState.RESTORING,
    "restoringsnapshot": VmState.POWERED_OFF,
    "deletingsnapshot": VmState.POWERED_OFF,
    "snapshotting": VmState.POWERED_OFF,
    "settingup": VmState.POWERED_OFF,
}


def state(word: str) -> VmState | None:
    """Of the key VMState, or as VBox.log has it; None for a word that is not known."""
    return _STATES.get(word.lower())


@dataclass(frozen=True, slots=True)
class Snapshot:
    name: str
    uuid: str


@dataclass(frozen=True, slots=True)
class Forward:
    """A rule of a NAT interface."""

    name: str
    host_port: int
    guest_port: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What `showvminfo --machinereadable` says of one VM, as far as it is used."""

    uuid: str
    name: str
    state: VmState | None
    state_word: str
    settings_file: str
    log_folder: str
    macs: Mapping[int, str]
    """NIC number -> MAC, upper case with colons."""
    cables: Mapping[int, bool]
    nics: Mapping[int, str]
    """NIC number -> nat, hostonly, ...; those that are there."""
    forwards: tuple[Forward, ...]
    snapshots: tuple[Snapshot, ...]
    """Oldest first where the tree has no branches."""
    current_snapshot: str | None
    """Its UUID."""
    disks: tuple[str, ...]
    """Paths of attached media."""
    remote_desktop_port: int

    @property
    def current_snapshot_name(self) -> str | None:
        return next((one.name for one in self.snapshots if one.uuid == self.current_snapshot), None)


def facts(text: str) -> Facts | None:
    """From `showvminfo --machinereadable`; None when that is not what the text is."""
    found = pairs(text)
    uuid = found.get("UUID", "")
    if "VMState" not in found or not re.fullmatch(_UUID, uuid):
        return None
    word = found["VMState"]
    return Facts(
        uuid=uuid.lower(),
        name=found.get("name", ""),
        state=state(word),
        state_word=word,
        settings_file=found.get("CfgFile", ""),
        log_folder=found.get("LogFldr", ""),
        macs=_numbered(found, "macaddress", mac),
        cables=_numbered(found, "cableconnected", lambda value: value == "on"),
        nics={number: kind for number, kind in _numbered(found, "nic", str).items() if kind != "none"},
        forwards=tuple(_forwards(found)),
        snapshots=tuple(_snapshots(found)),
        current_snapshot=found.get("CurrentSnapshotUUID", "").lower() or None,
        disks=tuple(value for key, value in found.items() if re.fullmatch(r".+-\d+-\d+", key) and "/" in value),
        remote_desktop_port=_number(found.get("vrdeport", "")),
    )


def mac(plain: str) -> str:
    """080027AABBCC -> 08:00:27:AA:BB:CC; another text as it is."""
    if not re.fullmatch(r"[0-9A-Fa-f]{12}", plain):
        return plain
    return ":".join(plain[i : i + 2] for i in range(0, 12, 2)).upper()


def _numbered(found: Mapping[str, str], prefix: str, convert: Callable[[str], T]) -> dict[int, T]:
    """Keys such as macaddress1; the number -> the converted value."""
    return {
        int(key[len(prefix) :]): convert(value)
        for key, value in found.items()
        if key.startswith(prefix) and re.fullmatch(r"[1-9]\d?", key[len(prefix) :], re.ASCII)
    }


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0


def _forwards(found: Mapping[str, str]) -> Iterator[Forward]:
    for key, value in found.items():
        if key.startswith("Forwarding("):
            parts = value.split(",")
            if len(parts) == 6 and parts[1] == "tcp":
                yield Forward(parts[0], _number(parts[3]), _number(parts[5]))


def _snapshots(found: Mapping[str, str]) -> Iterator[Snapshot]:
    for key, value in found.items():
        if match := re.fullmatch(r"SnapshotName((?:-\d+)*)", key, re.ASCII):
            yield Snapshot(value, found.get(f"SnapshotUUID{match[1]}", "").lower())


_LOG_STATE = re.compile(r"^\S+ Console: Machine state changed to '([A-Za-z]+)'", re.MULTILINE)
_LOG_PROCESS = re.compile(r"^\S+ Process ID: (\d{1,9})\s*$", re.MULTILINE | re.ASCII)


def log_state(text: str) -> VmState | None:
    """The last state in a piece of VBox.log; None when there is none."""
    words = _LOG_STATE.findall(text)
    return state(words[-1]) if words else None


def log_process(text: str) -> int | None:
    """The process that wrote this VBox.log."""
    match = _LOG_PROCESS.search(text)
    return int(match[1]) if match else None


def log_ends_in_order(text: str) -> bool:
    """Whether VBox.log ends with a VM that was switched off, by its guest or by somebody, and not of a crash.

    A VM process whose VirtualBox service has died pulls its own plug.
    """
    if "VBoxSVC became unavailable" in text:
        return False
    return re.search(r"^\S+ Changing the VM state from '\w+' to 'POWERING_OFF(_LS)?'", text, re.MULTILINE) is not None


def log_trouble(text: str) -> str:
    """The last lines of VBox.log with a reason why a guest does not go on; empty if there is none."""
    found = re.findall(
        r"^\S+ (.*(?:!!|VERR_|Guru Meditation|fatal error|Fatal error|runtime error|Runtime error).*)$",
        text,
        re.MULTILINE,
    )
    return " / ".join(line.strip() for line in found[-3:])[:500]


def runtime_error(text: str) -> str:
    """VirtualBox's words for what made it pause the VM by itself; empty when it did not, or the VM went on since.

    A run-time error that is not fatal, such as a full disk (src/VBox/Devices/Storage/DrvVD.cpp), suspends the VM.
    """
    error = ""
    for line in text.splitlines():
        if match := re.match(r"\S+ (?:Console: )?VM runtime error: fatal=false,? (.*)", line):
            error = match[1].strip()[:500]
        elif re.match(r"\S+ Console: Machine state changed to 'Running'", line):
            error = ""
    return error


def max_cpus(text: str) -> int | None:
    """How many processors a VM can have, from `list systemproperties`; None: it does not say."""
    match = re.search(r"^Maximum guest CPU count:\s+(\d+)\s*$", text, re.MULTILINE)
    return int(match[1]) if match and int(match[1]) > 0 else None


def media(text: str) -> list[str]:
    """Paths, from `list hdds`: parents before their children."""
    return [match.strip() for match in re.findall(r"^Location:[ \t]+(\S.*)$", text, re.MULTILINE)]


def host_only_adapters(text: str) -> list[str]:
    """Names, from `list hostonlyifs`."""
    return [match.strip() for match in re.findall(r"^Name:\s+(.+)$", text, re.MULTILINE)]
