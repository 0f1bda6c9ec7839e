"""Setting the guest's clock, which stands still while the VM is paused or saved.

The agent is no root, so a helper of root does it (`start-agent` of guest/image/files): it reads lines from a FIFO that
only the agent's group may write, and obeys one kind of line:

    SET <seconds since 1970, with or without a fraction>\n

Lines are below PIPE_BUF, so two writers never mix. The helper answers nothing: the clock itself is the answer, and
`set_and_see` looks at it. Without a helper, and if this process may (root), the clock is set directly. A FIFO that
nobody reads is an error at once.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from pathlib import Path

from vmcontrol.common import eventloop

log = logging.getLogger(__name__)

EARLIEST, LATEST = 1_000_000_000.0, 32_503_680_000.0
"""Times (2001 to 3000) outside of which a request is nonsense."""

SLACK_S = 0.05
"""A smaller difference is left alone: the way here takes about as long."""

SEE_LIMIT_S, LOOK_S, TOLERANCE_S = 5.0, 0.01, 0.5
"""For the helper to be given the processor; between two looks at the clock; what counts as set."""


class ClockError(Exception):
    """The clock could not be set; `str` says why."""


def set_clock(unix_time: float, helper: Path = Path("/run/vmwrapper/clock")) -> float:
    """Ask for the clock to be set to `unix_time` (s); answers by how much it was wrong (s). Raises ClockError."""
    if not EARLIEST <= unix_time <= LATEST:
        raise ClockError(f"{unix_time!r} is no time to set a clock to")
    wrong_by = unix_time - time.time()
    if abs(wrong_by) < SLACK_S:
        return wrong_by
    log.info("clock: %+.3f s", wrong_by)
    try:
        fd = os.open(helper, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        return _set_directly(unix_time, wrong_by, f"{helper}: {error.strerror}")
    try:
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise ClockError(f"{helper} is no FIFO")
        os.write(fd, f"SET {unix_time:.6f}\n".encode("ascii"))
    except OSError as error:
        raise ClockError(f"{helper}: {error.strerror}") from error
    finally:
        os.close(fd)
    return wrong_by


async def set_and_see(reactor: eventloop.Clock, unix_time: float, helper: Path) -> None:
    """Set the clock to `unix_time` and return when it shows that. Raises ClockError, at most SEE_LIMIT_S later."""
    since = reactor.seconds()
    set_clock(unix_time, helper)
    while abs(unix_time + reactor.seconds() - since - time.time()) > TOLERANCE_S:
        if reactor.seconds() - since > SEE_LIMIT_S:
            raise ClockError(f"{helper} took the time but the clock does not show it")
        await eventloop.sleep(reactor, LOOK_S)


def _set_directly(unix_time: float, wrong_by: float, why_not: str) -> float:
    try:
        time.clock_settime(time.CLOCK_REALTIME, unix_time)
    except (OSError, AttributeError) as error:
        raise ClockError(f"no clock helper ({why_not}) and not allowed to set the clock") from error
    return wrong_by
