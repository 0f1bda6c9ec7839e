"""HostMain, the agent on the host: `python -m vmcontrol.hostmain [HostConfig.cfg]`.

The program: arguments, log, signals, and how it ends; its parts are in `vmcontrol.hostmain.app`. TERM and INT save the
VMs that it has started.

Exit status: 0 ended as asked; 1 an error of ours; 2 wrong arguments or configuration; 3 something of this computer that
may pass (a port in use, another HostMain in the slot, a full disk). The wrapper starts it again after 1, and for some
time after 3.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vmcontrol import __version__
from vmcontrol.common import frozen, umask
from vmcontrol.common.loglines import readable
from vmcontrol.common.logthrottle import LogLimit

if TYPE_CHECKING:
    from vmcontrol.hostmain.app import OpenHypervisor
    from vmcontrol.hostmain.config import HostConfig

MAY_PASS = 3
"""Exit status: it could not begin for something of this computer that may pass by itself."""

log = logging.getLogger("vmcontrol.hostmain")  # also when it is __main__


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record))


def set_up_logging(level: str, most: int | None = None) -> None:
    """Time-stamped lines on stderr; what Twisted reports (errors nobody took care of) among them.

    most: bytes that this HostMain may write there; None: stderr is a log of HostMain's own. Raises ValueError for a
    level that is none.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s [%(process)d] %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(LogLimit(file=2) if most is None else LogLimit(most=most))
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers[:] = [handler]
    from twisted.python.log import PythonLoggingObserver

    PythonLoggingObserver().start()
    logging.getLogger("twisted").setLevel(logging.WARNING)


def main(
    arguments: list[str] | None = None,
    environment: Mapping[str, str] = os.environ,
    *,
    open_hypervisor: OpenHypervisor | None = None,
) -> int:
    """Run HostMain; the exit status. `open_hypervisor` in place of choosing one is for tests."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["-h"], ["--help"]):
        sys.stdout.write("usage: python -m vmcontrol.hostmain [HostConfig.cfg]\n")
        return 0
    if len(arguments) > 1:
        sys.stderr.write("HostMain: usage: python -m vmcontrol.hostmain [HostConfig.cfg]\n")
        return 2
    umask.tighten()
    gc.disable()  # as the wrapper does while it imports: nothing of it is garbage
    level = environment.get("VMWRAPPER_LOG_LEVEL") or "INFO"
    most = environment.get("VMWRAPPER_LOG_BYTES", "")
    try:
        set_up_logging(level, int(most) if most.isascii() and most.isdigit() else None)
    except ValueError:
        sys.stderr.write(f"HostMain: VMWRAPPER_LOG_LEVEL: {level!r:.80} is none of DEBUG, INFO, WARNING, ERROR\n")
        return 2
    from vmcontrol.common import eventloop
    from vmcontrol.common.slotfiles import VM_FOLDER
    from vmcontrol.hostmain.config import SECRETS, ConfigError, read_config
    from vmcontrol.hostmain.slotlock import SlotTaken, slot_lock

    log.info("HostMain %s, process %d", __version__, os.getpid())
    try:
        config = read_config(Path(arguments[0]) if arguments else None, environment, Path.cwd())
    except ConfigError as error:
        sys.stderr.write(f"HostMain: {error}\n")
        return 2
    for name in SECRETS:
        os.environ.pop(name, None)  # not for the hypervisor's programs, which get a copy of our environment
    for warning in config.warnings:
        log.warning("%s", warning)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(slot_lock(config.slot / VM_FOLDER))
        except (SlotTaken, OSError) as error:
            sys.stderr.write(f"HostMain: {error}\n")
            return MAY_PASS
        return run(eventloop.the_reactor(), config, open_hypervisor=open_hypervisor)


def run(reactor: Any, config: HostConfig, *, open_hypervisor: OpenHypervisor | None = None) -> int:
    """Run until the end; the exit status."""
    from twisted.internet.error import CannotListenError
    from twisted.python.failure import Failure

    from vmcontrol.hostmain.app import HostMain

    gc.freeze()
    gc.enable()
    failed: list[str] = []
    status = 0

    def begin() -> None:
        nonlocal status
        for number in (signal.SIGTERM, signal.SIGINT):  # after Twisted has installed its own
            signal.signal(number, lambda n, _: reactor.callFromThread(host.quit, signal.Signals(n).name))
        try:
            host.start()
        except CannotListenError as error:
            status = MAY_PASS
            failed.append(f"cannot listen on {error.interface}:{error.port}: {error.socketError}")
            host.quit("a port is in use")
        except OSError as error:
            status = MAY_PASS
            failed.append(str(error))
            host.quit("a file could not be written")
        except Exception:  # noqa: BLE001 (reported; a HostMain that did not start must not stay)
            status = 1
            failed.append(Failure().getTraceback())
            host.quit("it could not be started")

    host = HostMain(reactor, config, open_hypervisor=open_hypervisor)
    reactor.callWhenRunning(begin)
    reactor.run()
    for text in failed:
        sys.stderr.write(f"HostMain: {text}\n")
    return status


def leave(status: int) -> NoReturn:
    """End the process. All is closed and written by now; taking the interpreter down would cost another 0.06 s."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or its disk is full
            stream.flush()
    frozen.end()
    os._exit(status)


def program() -> NoReturn:
    """The whole process."""
    leave(main())
