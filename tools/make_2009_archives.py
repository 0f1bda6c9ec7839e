#!/usr/bin/env python3
"""The example of the VmApps page, literally: its three archives, and a slot laid out as the page's table shows.

    tools/make_2009_archives.py PROJECT                               the project's files
    tools/make_2009_archives.py PROJECT --slot SLOT                   and a slot with links to them
    tools/make_2009_archives.py PROJECT --slot SLOT --hypervisor QEMU and in it a virtual machine "CernVM"
    cd SLOT && vmwrapper job.xml

| archive | holds | from |
| --- | --- | --- |
| cctools-2_5_2-i686-linux-2.6.tar | chirp, chirp_get, chirp_put, chirp_server | Debian's coop-computing-tools |
| apache-activemq-5.2.0.tar | ActiveMQ; bin/activemq runs in the foreground without arguments | Debian's activemq |
| boincvm.tar | HostMain, VMMain and their configuration files | this project |

Names are the page's, versions are what they are. Where the page's table and templates differ from its job.xml (`stdin`,
`stdin_worker`), the job.xml's names count. "CernVM" is a VM that exists already: with VirtualBox it is the volunteer's
own, whose VMConfig.cfg names this computer's broker; with QEMU it is made here, in the slot's folder of VMs.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "examples" / "vmapps-page"
WORKER = ROOT / "examples" / "worker"
BROKER = ROOT / "examples" / "activemq"
ACTIVEMQ_HOME = Path("/usr/share/activemq")

CCTOOLS, ACTIVEMQ, BOINCVM = "cctools-2_5_2-i686-linux-2.6", "apache-activemq-5.2.0", "boincvm"
CHIRP_PROGRAMS = ("chirp", "chirp_get", "chirp_put", "chirp_server")
PORT = 61613
VM = "CernVM"
HOST_BEHIND_NAT = "10.0.3.2"
"""This computer, as a guest sees it on the network that QEMU grants it."""
HOST_ON_THE_FIRST_CARD = "10.0.2.2"
"""Where forwarded connections come from."""
CHIRP_PORT = 9094

SLOT_FILES = {
    "job.xml": "job_1.12.xml",
    "stdin_worker": "stdin",
    "worker.py": "worker_1.13_i686-pc-linux-gnu.py",
    "boincvm.tar": "boincvm_0.01.tar",
    f"{ACTIVEMQ}.tar": f"{ACTIVEMQ}.tar",
    f"{CCTOOLS}.tar": f"{CCTOOLS}.tar",
    "stdout_worker": "worker_nodelete_1",
    "stderr_worker": "worker_nodelete_2",
}
"""Logical name -> physical name in the project's folder; soft links in the slot. (`in` and `out` have copy_file.)"""


class Missing(Exception):  # noqa: N818
    """Something has to be installed first; `str` says what."""


def main() -> int:
    parser = argparse.ArgumentParser(description="The VmApps page's example: archives, project folder, slot.")
    parser.add_argument("project", type=Path, help="folder for the project's files")
    parser.add_argument("--slot", type=Path, help="folder to lay out as the client would")
    parser.add_argument("--hypervisor", choices=("VirtualBox", "QEMU"), default="VirtualBox")
    options = parser.parse_args()
    try:
        make_project(options.project, hypervisor=options.hypervisor)
        if options.slot is not None:
            lay_out(options.slot, options.project)
            if options.hypervisor == "QEMU":
                make_existing_vm(options.slot.resolve())
    except Missing as error:
        print(f"make_2009_archives: {error}", file=sys.stderr)
        return 1
    return 0


def make_project(project: Path, *, hypervisor: str) -> None:
    """Everything that the server would send, under the physical names."""
    project.mkdir(parents=True, exist_ok=True)
    make_cctools(project / SLOT_FILES[f"{CCTOOLS}.tar"])
    make_activemq(project / SLOT_FILES[f"{ACTIVEMQ}.tar"])
    make_boincvm(project / SLOT_FILES["boincvm.tar"], hypervisor=hypervisor)
    shutil.copy(PAGE / "job.xml", project / SLOT_FILES["job.xml"])
    shutil.copy(WORKER / "worker.py", project / SLOT_FILES["worker.py"])
    shutil.copy(WORKER / "stdin_worker", project / SLOT_FILES["stdin_worker"])
    shutil.copy(WORKER / "in", project / "in")


def lay_out(slot: Path, project: Path) -> None:
    """The page's table: soft links as BOINC makes them, and a copy of `in`."""
    slot.mkdir(parents=True, exist_ok=True)
    for logical, physical in SLOT_FILES.items():
        (slot / logical).write_text(f"<soft_link>{(project / physical).resolve()}</soft_link>\n")
    shutil.copy(project / "in", slot / "in")


# The archives -------------------------------------------------------------------------------------------------------


class Archive:
    """A tar whose bytes depend on what is in it, not on when and by whom it was made."""

    def __init__(self, path: Path, top: str) -> None:
        self._tar = tarfile.open(path, "w")  # noqa: SIM115 (closed by __exit__)
        self._top = top

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def put(self, name: str, content: bytes | str, *, executable: bool = False) -> None:
        data = content.encode() if isinstance(content, str) else content
        entry = tarfile.TarInfo(f"{self._top}/{name}")
        entry.size, entry.mode = len(data), 0o755 if executable else 0o644
        self._tar.addfile(entry, io.BytesIO(data))

    def copy(self, name: str, source: Path) -> None:
        self.put(name, source.read_bytes(), executable=bool(source.stat().st_mode & 0o100))


def make_cctools(path: Path) -> None:
    with Archive(path, CCTOOLS) as archive:
        for name, program in chirp_programs():
            archive.copy(f"bin/{name}", program)


def chirp_programs() -> Iterator[tuple[str, Path]]:
    for name in CHIRP_PROGRAMS:
        found = shutil.which(name)
        if found is None:
            raise Missing(f"{name} is not installed; Debian's package coop-computing-tools has it")
        yield name, Path(found)


def make_activemq(path: Path) -> None:
    if not (ACTIVEMQ_HOME / "bin" / "activemq.jar").exists():
        raise Missing(f"there is no ActiveMQ in {ACTIVEMQ_HOME}; Debian's package activemq has it")
    with Archive(path, ACTIVEMQ) as archive:
        archive.copy("bin/activemq", PAGE / "activemq")
        archive.put("conf/activemq.xml", activemq_xml())
        for name in ("run_activemq", "log4j.properties"):
            archive.copy(f"conf/{name}", BROKER / name)
        for jar in sorted(ACTIVEMQ_HOME.rglob("*.jar")):
            if jar.exists():  # some are links to packages that are only suggested
                archive.copy(str(jar.relative_to(ACTIVEMQ_HOME)), jar)


def activemq_xml() -> str:
    """The example's configuration without users, on the port of 2009."""
    text = (BROKER / "activemq.xml").read_text()
    text, users = re.subn(r"\n *<plugins>.*?</plugins>", "", text, flags=re.DOTALL)
    text, ports = re.subn(r"\$\{vmwrapper\.port\}", str(PORT), text)
    if (users, ports) != (1, 1):
        raise Missing(f"{BROKER / 'activemq.xml'} is not as expected: {users} lists of plugins, {ports} ports")
    return text


def make_boincvm(path: Path, *, hypervisor: str) -> None:
    with Archive(path, BOINCVM) as archive:
        config = (PAGE / "HostConfig.cfg").read_text()
        archive.put("HostConfig.cfg", config.replace("hypervisor=VirtualBox", f"hypervisor={hypervisor}"))
        for name in ("HostMain.py", "VMMain.py", "VMConfig.cfg"):
            archive.copy(name, PAGE / name)
        for name in ("COPYING", "COPYING.LESSER"):
            archive.copy(name, ROOT / name)
        for package in ("vmcontrol", "guest"):
            for source in sorted((ROOT / package).rglob("*.py")):
                if (ROOT / "guest" / "image") not in source.parents:
                    archive.copy(str(source.relative_to(ROOT)), source)


# A virtual machine that exists already ------------------------------------------------------------------------------


def make_existing_vm(slot: Path) -> None:
    """CernVM for the QEMU driver: the project's guest, with VMConfig.cfg and chirp_server as its owner set them up."""
    from guest.image.build import FAILURES, Options
    from guest.image.cache import guest_image
    from vmcontrol.common import eventloop
    from vmcontrol.hypervisors.interface import VmSpec
    from vmcontrol.hypervisors.qemu.driver import QemuHypervisor
    from vmcontrol.protocol.vm import PortForward

    with tempfile.TemporaryDirectory(prefix="vmwrapper-page-") as folder:
        files = Path(folder)
        lay_guest_files(files)
        try:
            image = guest_image(ROOT / ".cache" / "guest-image", Options(files=files))
        except FAILURES as error:
            raise Missing(str(error)) from error
    reactor = eventloop.the_reactor()
    failed: list[str] = []

    async def create() -> None:
        vms = slot / "vm"
        vms.mkdir(exist_ok=True)
        await QemuHypervisor(reactor, vms).create(
            VmSpec(
                name=VM,
                image=image,
                folder=vms / VM,
                memory_mb=256,
                network=True,
                console_log=slot / "guest_console.log",
                port_forwards=(PortForward(CHIRP_PORT),),
            )
        )

    def begin() -> None:
        made = eventloop.start(create())
        made.addErrback(lambda failure: failed.append(failure.getErrorMessage())).addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(begin)
    reactor.run()
    if failed:
        raise Missing(failed[0])


def lay_guest_files(folder: Path) -> None:
    """What the owner of the VM put into it."""
    config = (PAGE / "VMConfig.cfg").read_text()
    config = config.replace("host=192.168.56.1", f"host={HOST_BEHIND_NAT}").replace("=eth1", "=eth0")
    target = folder / "etc" / "vmwrapper" / "VMConfig.cfg"
    target.parent.mkdir(parents=True)
    target.write_text(f"{config}chirp_hosts={HOST_ON_THE_FIRST_CARD}\n")
    # This guest's owner wants it to reach this computer, which the image's own script forbids.
    script = Path("usr/lib/vmwrapper/udhcpc-script")
    lines = (ROOT / "guest/image/files/system" / script).read_text().splitlines(keepends=True)
    allowed = [line for line in lines if "route replace prohibit" not in line]
    if len(allowed) != len(lines) - 1:
        raise Missing(f"{script} of the guest image is not as expected")
    (folder / script).parent.mkdir(parents=True)
    (folder / script).write_text("".join(allowed))
    (folder / script).chmod(0o755)
    programs, libraries = folder / "usr" / "local" / "bin", folder / "usr" / "local" / "lib" / "chirp"
    programs.mkdir(parents=True)
    libraries.mkdir(parents=True)
    server = dict(chirp_programs())["chirp_server"]
    shutil.copy(server, libraries / "chirp_server")
    for library in needed_libraries(server):
        shutil.copy(library, libraries / library.name)
    start = programs / "chirp_server"
    start.write_text(
        '#!/bin/sh\nLD_LIBRARY_PATH=/usr/local/lib/chirp exec /usr/local/lib/chirp/chirp_server "$@"\n', newline="\n"
    )
    start.chmod(0o755)


def needed_libraries(program: Path) -> Iterator[Path]:
    """Shared libraries of a program of this Debian, but for the C library, which the guest has."""
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=30).stdout
    for path in re.findall(r"=> (/\S+)", told):
        if not re.match(r"(libc|libm|libpthread|libdl|librt|ld-linux)[.-]", Path(path).name):
            yield Path(path)


if __name__ == "__main__":
    sys.exit(main())
