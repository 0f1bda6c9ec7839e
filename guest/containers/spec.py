"""What a container is: the agent's request, checked, and the OCI configuration that is made of it. Pure.

The request comes from the agent, who is not root and may be anybody's by now: nothing of it reaches the configuration
but values of known types within bounds, each in its place of a fixed template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from guest.containers import seccomp
from vmcontrol.protocol.container import ContainerRun
from vmcontrol.protocol.text import BadMessage, bounded_json

FIRST_ID, IDS, VM_ID = 100_000, 65_536, 1000
"""Container ids are FIRST_ID and up in the guest; that of the container's own user is VM_ID, the agent's."""
REQUEST_LIMIT = 4 * 1024 * 1024
"""Bytes of a request."""
MOST_PROCESSES = 4096
"""Processes and threads of a container."""

CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
        *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
)
"""Docker's default ones."""
MASKED = (
    *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware"),
    *("/sys/devices/virtual/powercap",),
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Request:
    """A container to run, as the agent asks for it."""

    container: ContainerRun
    arguments: tuple[str, ...]
    """argv; argv[0] is searched in the container's PATH."""
    environment: tuple[tuple[str, str], ...]


def read_request(raw: bytes) -> Request:
    """Raises BadMessage."""
    if len(raw) > REQUEST_LIMIT:
        raise BadMessage(f"a request of {len(raw)} bytes; {REQUEST_LIMIT} are read")
    try:
        value = bounded_json(raw)
    except ValueError as error:
        raise BadMessage(f"the request is no JSON: {error}") from error
    if not isinstance(value, dict) or value.keys() != {"container", "arguments", "environment"}:
        raise BadMessage("the request is not a container, arguments and an environment")
    arguments, environment = value["arguments"], value["environment"]
    if not isinstance(arguments, list) or not arguments or not all(_is_text(text) for text in arguments):
        raise BadMessage("the arguments are no list of texts without NUL characters")
    if not arguments[0]:
        raise BadMessage("there is nothing to run")
    if not isinstance(environment, dict) or not all(
        _is_text(name) and _is_text(text) for name, text in environment.items()
    ):
        raise BadMessage("the environment is no object of texts without NUL characters")
    if any(not name or "=" in name for name in environment):
        raise BadMessage("the environment has a name that cannot be one")
    return Request(ContainerRun.from_json(value["container"]), tuple(arguments), tuple(environment.items()))


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def guest_id(own: int, user: int) -> int:
    """The id in the guest of `own` in a container whose user has the id `user`."""
    return VM_ID if own == user else FIRST_ID + own


def id_map(user: int) -> list[dict[str, int]]:
    """A user namespace's map: `user` is the agent's, all others are shifted."""
    ranges = ((0, FIRST_ID, user), (user, VM_ID, 1), (user + 1, FIRST_ID + 1 + user, IDS - 1 - user))
    return [{"containerID": first, "hostID": host, "size": size} for first, host, size in ranges if size]


def configuration(request: Request, *, root: str, work: str, etc: str, cgroup: str, masked: tuple[str, ...]) -> Any:
    """OCI's config.json. root, work: mounted file systems; etc: folder of resolv.conf, hosts, hostname.

    masked: further paths in the container that it must not see.
    """
    run = request.container
    environment = {"PATH": PATH, "HOME": "/root" if run.uid == 0 else "/", **dict(request.environment)}
    none = ["nosuid", "noexec", "nodev"]
    effective = list(CAPABILITIES) if run.uid == 0 else []
    mounts = [
        _mount("/proc", "proc", "proc", none),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        ),
        _mount("/dev/shm", "tmpfs", "shm", [*none, "mode=1777", "size=65536k"]),  # noqa: S108 (in the container)
        _mount("/dev/mqueue", "mqueue", "mqueue", none),
        _mount("/sys", "sysfs", "sysfs", [*none, "ro"]),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*none, "ro"]),
        *(_mount(f"/etc/{name}", "bind", f"{etc}/{name}", ["bind", "ro", "nosuid", "nodev"]) for name in ETC),
        _mount(run.workdir, "bind", work, ["bind", "rw", "nosuid", "nodev"]),
    ]
    return {
        "ociVersion": "1.0.2",
        "hostname": HOSTNAME,
        "root": {"path": root, "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": run.uid, "gid": run.gid, "additionalGids": list(run.groups), "umask": 0o022},
            "args": list(request.arguments),
            "env": [f"{name}={text}" for name, text in environment.items()],
            "cwd": run.workdir,
            "capabilities": {
                "bounding": list(CAPABILITIES),
                "effective": effective,
                "permitted": effective,
                "inheritable": [],
                "ambient": [],
            },
            "oomScoreAdj": 1000,
            "noNewPrivileges": False,
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": name} for name in NAMESPACES],
            "uidMappings": id_map(run.uid),
            "gidMappings": id_map(run.gid),
            "cgroupsPath": cgroup,
            "resources": {"devices": [{"allow": False, "access": "rwm"}], "pids": {"limit": MOST_PROCESSES}},
            "maskedPaths": [*MASKED, *masked],
            "readonlyPaths": list(READ_ONLY),
            "seccomp": seccomp.profile(),
        },
    }


NAMESPACES = ("user", "pid", "ipc", "uts", "mount", "cgroup", "network")
HOSTNAME = "container"
ETC = ("resolv.conf", "hosts", "hostname")


def _mount(destination: str, kind: str, source: str, options: list[str]) -> dict[str, object]:
    return {"destination": destination, "type": kind, "source": source, "options": options}
