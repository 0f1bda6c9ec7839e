#!/usr/bin/env python3
"""Lay out a slot as the VmApps page shows, run the worker example in it, and show what came out.

`./demo` calls this after the set-up. The slot holds what a BOINC client would put there: links to the files of the
project for what is only read, a copy of `in` (it has <copy_file/> on the page). Outputs are plain files, so that they
can be looked at in the slot itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "worker"
SHOWN = 2000
"""Characters of a result that are shown."""
INIT_FAILURE = 206
"""Wrong arguments, a slot or an image that cannot be made: vmwrapper/exit_status.py, which --help must not need."""
END_LIMIT_S = 60
"""For the wrapper after a signal, as the BOINC client gives it (client/app_control.cpp, MAX_EXIT_TIME)."""


class Unusable(Exception):  # noqa: N818 (the name says more without "Error")
    """Something that the demonstration needs cannot be had; `str` is the one line."""


class Interrupted(BaseException):
    """A signal asked for the end before the wrapper was started."""


class Signals:
    """INT, TERM and HUP: the end while a slot is laid out, passed on while the wrapper runs. Owns their handlers."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """The first that came."""
        self._noted_only = False
        self._wrapper: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)

    def run(self, command: list[str], folder: Path) -> int:
        """Run the wrapper to its end; its exit status, negative for a signal."""
        self._noted_only = True  # an exception in the middle of Popen would lose a process
        self._wrapper = subprocess.Popen(command, cwd=folder)
        if self.asked is not None:
            self._pass_on(self.asked)
        status = self._wrapper.wait()
        signal.alarm(0)
        return status

    def _on_signal(self, number: int, _frame: object) -> None:
        first = self.asked is None
        if first:
            self.asked = number
        if self._wrapper is not None:
            self._pass_on(number)
        elif first and not self._noted_only:
            raise Interrupted

    def _pass_on(self, number: int) -> None:
        """Ctrl-C reaches the wrapper by itself, too: it takes a second signal for the first."""
        if self._wrapper is not None and self._wrapper.poll() is None:
            signal.signal(signal.SIGALRM, lambda *_: self._kill())
            signal.alarm(END_LIMIT_S)
            self._wrapper.send_signal(number)

    def _kill(self) -> None:
        if self._wrapper is not None:
            self._wrapper.kill()  # HostMain saves the VM then, and ends everything


def main() -> int:
    options = _parser().parse_args()
    signals = Signals()
    try:
        status = _in_slot(options, signals)
    except Unusable as error:
        print(f"demo: {error}", file=sys.stderr)
        status = INIT_FAILURE
    except Interrupted:
        status = INIT_FAILURE
    if signals.asked is not None:
        signal.signal(signals.asked, signal.SIG_DFL)
        os.kill(os.getpid(), signals.asked)
    return status


def _in_slot(options: argparse.Namespace, signals: Signals) -> int:
    if options.slot is not None:
        slot = options.slot.resolve()
        try:
            slot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unusable(f"--slot {options.slot}: cannot be used as a folder: {error.strerror}") from error
        return run(slot, options, signals, keep=True)
    with tempfile.TemporaryDirectory(prefix="vmwrapper-demo-", ignore_cleanup_errors=True) as folder:
        slot = Path(folder) / "slots" / "0"
        slot.mkdir(parents=True)
        return run(slot, options, signals, keep=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(INIT_FAILURE, f"demo: {message} (./demo --help says more)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="./demo", description="Run the worker example of the VmApps page in a real virtual machine.")
    parser.add_argument(
        "--slot",
        type=_folder,
        metavar="DIR",
        help="use DIR as the slot and leave it there; the same command again goes on where an interrupted one stopped",
    )
    parser.add_argument("--hypervisor", choices=("auto", "qemu", "virtualbox"), default="auto")
    parser.add_argument("--broker", choices=("embedded", "activemq"), default="embedded")
    return parser


def _folder(word: str) -> Path:
    if not word or "\0" in word:
        raise argparse.ArgumentTypeError("the name of a folder is expected")
    return Path(word)


def run(slot: Path, options: argparse.Namespace, signals: Signals, *, keep: bool) -> int:
    """The whole demonstration in `slot`; its exit status is the wrapper's. Raises Unusable and Interrupted."""
    try:
        lay_out(slot, broker=options.broker, hypervisor=options.hypervisor)
    except OSError as error:
        raise Unusable(f"the slot {slot} cannot be laid out: {error}") from error
    print(f"demo: the slot is {slot}", flush=True)
    status = signals.run([sys.executable, "-m", "vmwrapper", "job.xml"], slot)
    if status == 0:
        show_results(slot)
    elif signals.asked is not None:
        how = "the same command goes on where it stopped" if keep else "with --slot DIR it could go on where it stopped"
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"demo: interrupted; {how}", flush=True)
    elif keep:
        print(f"demo: the wrapper ended with status {status}; stderr.txt in the slot tells why", flush=True)
    return status if status >= 0 else 128 - status


def lay_out(slot: Path, *, broker: str, hypervisor: str) -> None:
    """Fill the slot. What is there already is replaced, but for results and state of an earlier run.

    Raises Unusable when there is no guest image, OSError when the slot cannot be written.
    """
    from guest.image import build  # --help must not need it
    from guest.image.cache import guest_image

    print("demo: the guest image (made from Debian's packages the first time, about half a minute)", flush=True)
    try:
        image = guest_image(ROOT / ".cache" / "guest-image")
    except build.FAILURES as error:
        raise Unusable(f"the guest image cannot be made: {error}") from error
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
        try:
            with (slot / name).open(errors="backslashreplace") as file:
                text = file.read(SHOWN)
        except OSError as error:  # somebody tidied up a finished slot
            text = f"(cannot be shown: {error.strerror})"
        print(f"--- {name}\n{text.rstrip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
