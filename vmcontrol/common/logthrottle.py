"""Bounds on what is written into a log: what a guest, another account or a BOINC client can bring about, they can bring
about a thousand times a second, for weeks.

    LogThrottle     for lines of one kind, at the place that logs them: silent when they come as a flood
    LogLimit        for a whole log, a filter of its handlers

LogLimit writes lines of one kind (the same logger and text) until they come too fast, those about one guest (their
first argument) likewise, and all together until the log has LOG_BYTES, for the whole life of a job. How many were left
out stands in the next line of the kind. A line that ends a run (`extra=LAST`) is always written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

LOG_BYTES = 4 * 1024 * 1024
"""Of the log: with the wrapper's lines, the guest's console and VBoxManage's trace it stays below 16 MiB."""
ERRORS_BYTES = 256 * 1024
"""More, for errors alone."""
LAST = {"last": True}
LINE_BYTES, TRACEBACK_BYTES = 60, 4000
"""What a line has beside its message; what a traceback may add."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Lines at once, and seconds for one more."""

    burst: int
    every_s: float


OF_A_KIND = Rate(500, 5.0)
OF_A_SUBJECT = Rate(100, 10.0)
"""Of a kind and about the same guest, VM or file."""
SUBJECTS, KINDS = 512, 512
"""Counts that are kept; the one that was not used for longest goes."""


@dataclass(slots=True)
class Bucket:
    """What is left of a rate."""

    rate: Rate
    filled_at: float
    left: float = field(init=False)
    left_out: int = 0

    def __post_init__(self) -> None:
        self.left = float(self.rate.burst)

    def take(self, now: float) -> bool:
        """Whether there is one more; counted if not."""
        self.left = min(self.rate.burst, self.left + (now - self.filled_at) / self.rate.every_s)
        self.filled_at = now
        if self.left < 1:
            self.left_out += 1
            return False
        self.left -= 1
        return True


MANY = 8
"""Lines..."""
WINDOW_S = 20.0
"""...within so many seconds are a flood..."""
CALM_S = 60.0
"""...which is over when there was none for so long."""


class LogThrottle:
    """Lines of one kind, written until they come as a flood; the last of them says that the next ones are left out.

    A BOINC client that limits the processor's time, say, suspends and resumes its tasks every second, for days.
    """

    def __init__(
        self,
        log: logging.Logger,
        seconds: Callable[[], float],
        last: str = "there are many: the next ones are not noted",
    ) -> None:
        """seconds: a clock that only goes forward. last: at the end of the last line."""
        self._log = log
        self._seconds = seconds
        self._last = last
        self._times: deque[float] = deque(maxlen=MANY)
        self._silent = False

    def write(self, level: int, text: str, *arguments: object) -> None:
        """As Logger.log."""
        now = self._seconds()
        if self._times and now - self._times[-1] > CALM_S:
            self._silent = False
        self._times.append(now)
        if self._silent:
            return
        self._silent = len(self._times) == MANY and now - self._times[0] <= WINDOW_S
        self._log.log(level, f"{text} ({self._last})" if self._silent else text, *arguments)

    def warning(self, text: str, *arguments: object) -> None:
        """As Logger.warning."""
        self.write(logging.WARNING, text, *arguments)


class LogLimit(logging.Filter):
    """To be added to each handler of one log.

    already: bytes that earlier runs of the job have written. file: what the log is, if others write there too, and a
    regular file; its size counts then. most: bytes of the log.
    """

    def __init__(
        self,
        already: int = 0,
        *,
        file: int | None = None,
        most: int = LOG_BYTES,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._most = most
        self._written = already
        self._file = file
        self._seconds = seconds
        self._kinds: OrderedDict[object, Bucket] = OrderedDict()
        self._subjects: OrderedDict[object, Bucket] = OrderedDict()
        self._full = False

    def filter(self, record: logging.LogRecord) -> bool:
        decided: bool | None = getattr(record, "is_kept", None)
        if decided is None:  # one decision for all handlers
            decided = record.is_kept = self._keeps(record)
            if decided:
                self._written += LINE_BYTES + len(record.getMessage()) + (TRACEBACK_BYTES if record.exc_info else 0)
        return decided

    @property
    def size(self) -> int:
        """Bytes of the log."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                status = os.fstat(self._file)
                if stat.S_ISREG(status.st_mode):
                    return status.st_size
        return self._written

    def _keeps(self, record: logging.LogRecord) -> bool:
        if getattr(record, "last", False):
            return True
        if self.size >= self._most + (min(ERRORS_BYTES, self._most // 4) if record.levelno >= logging.ERROR else 0):
            return self._say_once(record)
        if record.levelno <= logging.DEBUG:
            return True  # somebody asked for all
        now = self._seconds()
        kind = (record.name, record.msg if isinstance(record.msg, str) else type(record.msg))
        first = record.args[0] if isinstance(record.args, tuple) and record.args else None
        bucket = _bucket(self._kinds, kind, OF_A_KIND, KINDS, now)
        if isinstance(first, str):
            about = _bucket(self._subjects, (kind, first[:100]), OF_A_SUBJECT, SUBJECTS, now)
            if not about.take(now):
                bucket.left_out += 1
                return False
        if not bucket.take(now):
            return False
        if bucket.left_out:
            record.msg = f"{record.getMessage()} ({bucket.left_out} lines of this kind were left out before)"
            record.args = ()
            bucket.left_out = 0
        return True

    def _say_once(self, record: logging.LogRecord) -> bool:
        said, self._full = self._full, True
        if not said:
            record.msg, record.args, record.exc_info = "this log is full: the rest is left out", (), None
        return not said


def _bucket(known: OrderedDict[object, Bucket], key: object, rate: Rate, most: int, now: float) -> Bucket:
    bucket = known.get(key)
    if bucket is None:
        bucket = known[key] = Bucket(rate, now)
        if len(known) > most:
            known.popitem(last=False)
    known.move_to_end(key)
    return bucket
