"""How a run ends for the client: what is written into the slot, and how the process goes.

    Ending                  an exit status, or a signal
    finished                the finish file of a job that is done
    failed                  the same of a job that has failed
    temporary_exit          the file that asks the client for another try
    record_temporary_exit   count it, up to the limit on tries
    leave                   end the process

Owns nothing; `vmwrapper.run.run` decides which end it is.
"""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vmcontrol.common import frozen
from vmcontrol.common.logthrottle import LAST
from vmwrapper.boinc.runtime import BoincError, Runtime
from vmwrapper.errors import JobError, SubTaskFailed, TemporaryExit
from vmwrapper.exit_status import ExitStatus
from vmwrapper.log import OUTCOME, flush
from vmwrapper.options import RunOptions
from vmwrapper.run.cleanup import written
from vmwrapper.slot import Slot
from vmwrapper.state import reserve
from vmwrapper.state.ledger import Ledger

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the process is to end: with a status, or, standalone or at TERM, by a signal."""

    status: int
    by_signal: int | None = None


def finished(runtime: Runtime, options: RunOptions) -> Ending:
    try:
        runtime.finish(0)
    except (OSError, BoincError) as error:
        why = TemporaryExit(f"The finish file cannot be written: {error}", fault="finish-file", delay_s=600)
        return temporary_exit(runtime, options, why)
    return Ending(ExitStatus.DONE)


def failed(runtime: Runtime, error: JobError) -> Ending:
    log.error("%s", error, extra=OUTCOME)
    try:
        runtime.finish(int(error.status), str(error))
    except (OSError, BoincError) as trouble:
        log.error("the finish file cannot be written: %s", trouble)
    return Ending(int(error.status))


def temporary_exit(runtime: Runtime, options: RunOptions, why: TemporaryExit) -> Ending:
    if not options.under_client:
        log.error("temporary exit, try again in %d s: %s", why.delay_s, why.reason, extra=LAST)
        return Ending(ExitStatus.TEMPORARY_STANDALONE)
    log.error("temporary exit for %d s: %s", why.delay_s, why.reason, extra=LAST)
    try:
        reserve.write_with(Slot(Path.cwd()), lambda: runtime.temporary_exit(why.delay_s, why.reason))
    except (OSError, BoincError) as error:
        log.error("the temporary-exit file cannot be written: %s", error)
        return Ending(ExitStatus.STATEFILE_WRITE)
    return Ending(ExitStatus.DONE)


def record_temporary_exit(ledger: Ledger, slot: Slot, why: TemporaryExit) -> TemporaryExit | SubTaskFailed:
    """`why`, with one more of its fault on record; SubTaskFailed when there were enough of them in a row.

    What is not on record is no limit, so a full disk must not keep it off: the reserve is given up for it.
    """
    if not why.counted:
        return why
    count = ledger.now.temporary_exits.get(why.fault, 0) + 1
    if count > why.limit:
        return SubTaskFailed(f"given up after {why.limit} tries: {why.reason}")
    counts = {**ledger.now.temporary_exits, why.fault: count}
    try:
        ledger.commit(temporary_exits=counts)
    except TemporaryExit as trouble:
        log.warning("%s; trying again with the space that was kept back", trouble.reason)
        reserve.give_up(slot)
        written(lambda: ledger.commit(temporary_exits=counts))
        reserve.keep(slot)  # programs still write and VMs are still saved, and the client's file needs it after that
    return why


def leave(ending: Ending) -> NoReturn:
    """End the process as asked for."""
    flush()
    frozen.end()
    if ending.by_signal is not None and os.name == "posix":
        signal.signal(ending.by_signal, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {ending.by_signal})
        os.kill(os.getpid(), ending.by_signal)
    os._exit(ending.status)  # all is written and flushed; Python's own clean-up would only cost time
