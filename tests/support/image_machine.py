"""A guest image in QEMU, as bare as possible: for tests of what is in the image, not of our driver."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.limits import after

SECRET = "c0ffee" * 10
DISKS = {
    "virtio-blk": ["-device", "virtio-blk-pci,drive=disk"],
    "virtio-scsi": ["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"],
    "ahci": ["-device", "ich9-ahci,id=sata", "-device", "ide-hd,drive=disk,bus=sata.0"],
    "ide": ["-device", "ide-hd,drive=disk"],
    # Not VirtualBox's LsiLogic (mptspi), which QEMU has not, but two of its three drivers. No disk without a name.
    "mptsas": ["-device", "mptsas1068", "-device", "scsi-hd,drive=disk,wwn=0x5000c50015ea71aa"],
    "lsi53c895a": ["-device", "lsi53c895a", "-device", "scsi-hd,drive=disk"],
}


class Machine:
    """A running guest. Its console is read while something is waited for."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self.console = ""

    def wait_for(self, pattern: str, limit_s: float = 60.0) -> re.Match[str]:
        """Until the console has shown `pattern`. Fails with the whole console."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        end = after(limit_s)
        while not (found := re.search(pattern, self.console)):
            left = end - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise AssertionError(f"no {pattern!r} within {limit_s:g} s on the console:\n{self.console}")
            data = self.process.stdout.read1(65536)  # type: ignore[attr-defined]
            if not data:
                raise AssertionError(f"QEMU ended before {pattern!r}; the console:\n{self.console}")
            self.console += data.decode(errors="replace")
        return found

    def connect(self, limit_s: float = 30.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=limit_s)

    def shell(self, command: str) -> tuple[int, str]:
        """Status and output of a command, by image_shell."""
        with self.connect() as connection, connection.makefile("rwb") as stream:
            stream.write(command.encode() + b"\n")
            stream.flush()
            output = b""
            while not (ended := re.search(rb"\nSTATUS (\d+)\n\Z", output)):
                data = stream.readline()
                assert data, f"the guest hung up after {output!r}"
                output += data
            return int(ended[1]), output[: ended.start()].decode()


@contextlib.contextmanager
def running(
    image: Path,
    folder: Path,
    *,
    disk: str = "virtio-blk",
    nic: str = "virtio-net-pci",
    machine: str = "q35",
    memory_mb: int = 256,
    more: tuple[str, ...] = (),
) -> Iterator[Machine]:
    """Boot the image, pure emulation, and end it for certain."""
    overlay = folder / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", image.resolve(), "-F", "vdi", overlay], check=True, timeout=30
    )
    secret = folder / "secret"
    secret.write_text(f"secret={SECRET}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *("nice", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-accel", "tcg", "-M", machine),
        *("-m", str(memory_mb), "-display", "none", "-vga", "none", "-serial", "stdio"),
        *("-drive", f"id=disk,if=none,file={overlay},format=qcow2", *DISKS[disk]),
        *("-netdev", f"user,id=agent,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:4616"),
        *("-device", f"{nic},netdev=agent,romfile="),
        *("-device", "virtio-rng-pci", "-smbios", f"type=11,path={secret}"),
        *more,
    ]
    with (folder / "qemu.err").open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
    try:
        yield Machine(process, port)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
