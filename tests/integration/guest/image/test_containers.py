"""Containers in the real guest, by its root helper: one boot, a disk made here to the format of container disks."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest.image import build, disk
from guest.image.cache import guest_image
from tests.support.image_machine import Machine, running
from tests.support.real_guests import CACHE, real_image
from vmcontrol.protocol.container import ContainerRun

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

SUPPORT = Path(__file__).parents[3] / "support"
USER = 1001


def container_disk(folder: Path, user: int) -> tuple[Path, str]:
    """A raw disk with busybox, and a file of root's and of the user's in /app; its id.

    Its owners are shifted for a container whose user is `user`.
    """
    root = folder / "root"
    for name in ("bin", "app", "etc", "proc", "dev", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    busybox = next(path for path in (CACHE / "stages").rglob("usr/bin/busybox") if path.is_file())
    shutil.copy(busybox, root / "bin/busybox")
    for name in (
        "sh",
        "cat",
        "id",
        "ls",
        "stat",
        "sleep",
        "touch",
        "env",
        "echo",
        "ip",
        "nc",
        "mount",
        "kill",
        "chown",
    ):
        (root / "bin" / name).symlink_to("busybox")
    (root / "app/own").write_text("of the image\n")
    (root / "app/input").write_text("of the image\n")
    squashfs = folder / "squashfs"
    top = "1000" if user == 0 else "100000"
    owners = ["-force-uid", top, "-force-gid", top, "-p", "/app m 755 1000 1000", "-p", f"/tmp m 1777 {top} {top}"]
    subprocess.run(["mksquashfs", root, squashfs, "-noappend", "-quiet", "-no-progress", *owners], check=True)
    id = hashlib.sha256(squashfs.read_bytes()).hexdigest()
    size = -(-squashfs.stat().st_size // disk.MIB) * disk.MIB
    partition = disk.Partition(squashfs, disk.MIB, size, disk.LINUX)
    header = json.dumps({"id": id}).encode()
    content = bytearray(disk.MIB)
    record = disk.master_boot_record(b"", [partition], signature=0)
    content[: len(record)] = record
    line = b"vmwrapper container 1 %d\n" % len(header) + header
    content[4096 : 4096 + len(line)] = line
    target = folder / "container.raw"
    target.write_bytes(bytes(content) + squashfs.read_bytes().ljust(size, b"\0"))
    return target, id


class Guest:
    def __init__(self, machine: Machine, disk_ids: dict[int, str]) -> None:
        self.machine, self.disks = machine, disk_ids

    def ask(self, *line: object) -> Any:
        with self.machine.connect(120) as connection, connection.makefile("rwb") as stream:
            stream.write(json.dumps(line).encode() + b"\n")
            stream.flush()
            answer = stream.readline()
        assert answer, self.machine.console
        return json.loads(answer)

    def sh(self, command: str) -> str:
        status, output = self.ask("sh", command)
        assert status == 0, output
        return str(output)

    def run(
        self, *arguments: str, uid: int = USER, stdin: str = "", cancel: tuple[float, float] | None = None, **more: Any
    ) -> Any:
        environment = more.pop("environment", {})
        run = ContainerRun(more.pop("disk", self.disks[uid]), "/app", uid, uid, **more)
        request = {"container": run.to_json(), "arguments": arguments, "environment": environment}
        answer = self.ask("run", request, stdin, *(cancel or ()))
        assert answer["events"], (answer, self.sh("dmesg | tail -30"))
        answer["last"] = answer["events"][-1]
        return answer


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    real_image()
    files = tmp_path_factory.mktemp("files")
    module = files / "usr/lib/python3/dist-packages/container_shell.py"
    module.parent.mkdir(parents=True)
    shutil.copy(SUPPORT / "container_shell.py", module)
    (files / "etc/vmwrapper").mkdir(parents=True)
    (files / "etc/vmwrapper/agent").write_text("container_shell\n")
    image = guest_image(CACHE, build.Options(files=files))
    ids: dict[int, str] = {}
    more: tuple[str, ...] = ()
    for user in (USER, 0):
        raw, ids[user] = container_disk(tmp_path_factory.mktemp("disk"), user)
        drive = f"id=container{user},if=none,file={raw},format=raw,readonly=on"
        more += ("-drive", drive, "-device", f"virtio-blk-pci,drive=container{user}")
    with running(image, tmp_path_factory.mktemp("machine"), more=more) as machine:
        machine.wait_for("shell is there")
        yield Guest(machine, ids)


@pytest.mark.parametrize("uid", [USER, 0])
def test_the_containers_user_writes_in_the_tasks_folder(guest: Guest, uid: int) -> None:
    guest.sh("mkdir -p /home/vm/task && cd /home/vm/task && echo of the task >input && rm -f new")
    script = (
        "id -u; cat own input - >new; ls -ln /app/input | { read a b c d e; echo $c; }; echo told >&2; echo $A; exit 7"
    )
    ran = guest.run("sh", "-c", script, uid=uid, stdin="from stdin\n", environment={"A": "a b"})
    ended = ran["last"]["ended"]
    assert (ended["exit_status"], ended["signal"], ended["left"]) == (7, None, 0)
    assert ran["out"].split("\n") == [str(uid), str(uid), "a b", ""]
    assert ran["err"] == "told\n"
    assert guest.sh("cat /home/vm/task/new") == "of the image\nof the task\nfrom stdin\n"
    assert guest.sh("stat -c %u:%g /home/vm/task/new") == "1000:1000\n"
    assert ended["cpu_time_s"] > 0
    assert ended["peak_memory_bytes"] > 0


def test_what_other_users_leave_is_given_back(guest: Guest) -> None:
    ran = guest.run("sh", "-c", "echo x >theirs && chown 33:33 theirs && stat -c %u theirs", uid=0)
    assert ran["out"] == "33\n", ran
    assert guest.sh("stat -c %u:%g /home/vm/task/theirs") == "1000:1000\n"


def test_signals(guest: Guest) -> None:
    ran = guest.run(
        "sh", "-c", "trap 'echo asked; exit 3' USR1; while :; do sleep 0.1; done", stop_signal=10, cancel=(1.0, 20.0)
    )
    assert (ran["out"], ran["last"]["ended"]["exit_status"], ran["last"]["ended"]["cancelled"]) == ("asked\n", 3, True)
    ran = guest.run("sh", "-c", "sleep 1000 & sleep 1000", cancel=(0.5, 0.5))
    assert (ran["last"]["ended"]["signal"], ran["last"]["ended"]["left"]) == (9, 0)


def test_what_cannot_run_is_said(guest: Guest) -> None:
    assert "no disk of this virtual machine holds" in guest.run("sh", disk="0" * 64)["last"]["detail"]
    assert guest.run("nothing-of-that-name")["last"]["failed"] == "application-missing"
    assert "cannot join a container to the network" in guest.run("sh", network=True)["last"]["detail"]


def test_from_inside_nothing_is_reached(guest: Guest) -> None:
    addresses = ("10.0.2.15", "10.0.2.2", "10.0.3.2", "127.0.0.1")
    tries = "; ".join(f"nc -w 2 {address} 4616 </dev/null && echo reached {address}" for address in addresses)
    ran = guest.run(
        "sh",
        "-c",
        f"{tries}; ls /sys/class/net; cat /run/vmwrapper/secret; ls /dev; mount -t tmpfs x /tmp && echo mounted; true",
        uid=0,
    )
    assert ran["last"]["ended"]["exit_status"] == 0, ran
    assert "reached" not in ran["out"]
    assert "mounted" not in ran["out"]
    devices = {"console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm"}
    devices |= {"stderr", "stdin", "stdout", "tty", "urandom", "zero", "lo"}
    assert set(ran["out"].split()) <= devices
    assert guest.sh("id -u") == "1000\n"


def test_a_hostile_agent_is_not_heard(guest: Guest) -> None:
    for message, count in (("run", 5), ("run", 0), ("mount", 5), ("x" * 60, 7), ("run", 4)):
        assert guest.ask("hostile", message, count) is True
    assert guest.run("echo", "still there")["out"] == "still there\n"
    for change in ({"privileged": True}, {"workdir": "/app/../.."}, {"uid": -1}):
        request = {
            "container": ContainerRun(guest.disks[0], "/app").to_json() | change,
            "arguments": ["sh"],
            "environment": {},
        }
        assert guest.ask("run", request, "")["events"][-1]["detail"].startswith("container: ")


def test_nothing_is_left(guest: Guest) -> None:
    guest.run("sh", "-c", "sleep 1000 & echo x >/elsewhere; cat /elsewhere")
    assert (
        guest.sh(
            "ls /run/vmwrapper/containers; ls /sys/fs/cgroup/vmwrapper; ps | grep -c '[s]leep 1000' || true"
        ).split()[-1]
        == "0"
    )
    assert "squashfs" not in guest.sh("mount | grep -v ' / ' || true")


def test_the_agent_runs_one_as_any_command(guest: Guest) -> None:
    container = ContainerRun(guest.disks[USER], "/app", USER, USER).to_json()
    body = guest.ask("agent", container, ["sh", "-c", "echo told >&2; exit 4"], None)
    assert (body["exit_status"], body["error"], body["stderr_tail"]) == (4, "", "told\n"), body
    assert body["out_of_memory"] is False
    body = guest.ask("agent", container, ["sleep", "1000"], 2.0)
    assert (body["signal"], body["cancelled"]) == (9, True), body
    body = guest.ask("agent", container | {"disk": "0" * 64}, ["sh"], None)
    assert body["error"].startswith("not-started: no disk of this virtual machine holds"), body
