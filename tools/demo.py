#!/usr/bin/env python3
"""Lay out a slot as the VmApps page shows, run the worker example in it, and show what came out.

`./demo` calls this after the set-up. The slot holds what a BOINC client would put there: links to the files of the
project for what is only read, a copy of `in` (it has <copy_file/> on the page). Outputs are plain files, so that they
can be looked at in the slot itself.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "worker"
SHOWN = 2000
"""Characters of a result that are shown."""


def main() -> int:
    options = _parser().parse_args()
    if options.slot is not None:
        slot = options.slot.resolve()
        slot.mkdir(parents=True, exist_ok=True)
        return run(slot, options, keep=True)
    with tempfile.TemporaryDirectory(prefix="vmwrapper-demo-") as folder:
        slot = Path(folder) / "slots" / "0"
        slot.mkdir(parents=True)
        return run(slot, options, keep=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./demo", description="Run the worker example of the VmApps page in a real virtual machine."
    )
    parser.add_argument(
        "--slot",
        type=Path,
        metavar="DIR",
        help="use DIR as the slot and leave it there; the same command again goes on where an interrupted one stopped",
    )
    parser.add_argument("--hypervisor", choices=("auto", "qemu", "virtualbox"), default="auto")
    parser.add_argument("--broker", choices=("embedded", "activemq"), default="embedded")
    return parser


def run(slot: Path, options: argparse.Namespace, *, keep: bool) -> int:
    """The whole demonstration in `slot`; its exit status is the wrapper's."""
    lay_out(slot, broker=options.broker, hypervisor=options.hypervisor)
    print(f"demo: the slot is {slot}", flush=True)
    # Ctrl-C goes to the whole foreground group; the wrapper saves the VM then, and we wait for it.
    signal.signal(signal.SIGINT, lambda *_: None)  # a handler, not SIG_IGN: the wrapper must not inherit that
    wrapper = subprocess.Popen([sys.executable, "-m", "vmwrapper", "job.xml"], cwd=slot)
    status = wrapper.wait()
    if status == 0:
        show_results(slot)
    elif keep:
        print(f"demo: the wrapper ended with status {status}; stderr.txt in the slot tells why", flush=True)
    return status if status >= 0 else 128 - status


def lay_out(slot: Path, *, broker: str, hypervisor: str) -> None:
    """Fill the slot. What is there already is replaced, but for results and state of an earlier run."""
    from guest.image.cache import guest_image  # --help must not need it

    print("demo: the guest image (made from Debian's packages the first time, about half a minute)", flush=True)
    image = guest_image(ROOT / ".cache" / "guest-image")
    suffix = "" if broker == "embedded" else "-activemq"
    link(slot / "job.xml", EXAMPLE / f"job{suffix}.xml")
    link(slot / "worker.py", EXAMPLE / "worker.py")
    link(slot / "stdin_worker", EXAMPLE / "stdin_worker")
    link(slot / "guest.vdi", image)
    shutil.copyfile(EXAMPLE / "in", slot / "in")
    config = (EXAMPLE / f"HostConfig{suffix}.cfg").read_text()
    (slot / "HostConfig.cfg").write_text(config.replace("hypervisor = auto", f"hypervisor = {hypervisor}"))
    if broker == "activemq":
        shutil.copytree(ROOT / "examples" / "activemq", slot / "activemq", dirs_exist_ok=True)


def link(place: Path, target: Path) -> None:
    """A soft link as BOINC makes it: a small file that names the physical one (lib/filesys, boinc_make_soft_link)."""
    place.write_text(f"<soft_link>{target}</soft_link>\n")


def show_results(slot: Path) -> None:
    for name in ("out", "stdout_worker", "stderr_worker"):
        text = (slot / name).read_text(errors="backslashreplace")
        print(f"--- {name}\n{text[:SHOWN].rstrip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
