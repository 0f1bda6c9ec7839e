"""When a process began: with its pid that names it, and no later process that gets the same pid.

On Linux the kernel counts the ticks from the boot to the start of a process; with the boot's id that number names one
moment for ever. psutil's create_time() is that number plus the time of the boot, and Linux computes the time of the
boot anew from the clock each time it is asked: after the clock was set, every process seems to have begun at another
time. Elsewhere there is only psutil's time.

Owns nothing: whoever writes a process down writes `Birth.to_json` with its pid.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vmcontrol.common import proctable

if TYPE_CHECKING:
    import psutil  # else imported where it is used: a plain host job on Linux never does

_IS_LINUX: bool = sys.platform.startswith("linux")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SAME_S = 0.02
"""Seconds that two of psutil's times of one process may differ: the kernel counts in hundredths."""
_MAX_PID = 1 << 30
"""Above every system's: Linux' is 2^22, Windows counts in fours."""


@dataclass(frozen=True, slots=True)
class Birth:
    """When a process began. Either ticks with a boot's id, or a time."""

    ticks: int = 0
    """Clock ticks from the boot to its start (proc(5), /proc/PID/stat, field 22)."""
    boot: str = ""
    """Id of that boot; "": `ticks` is not known."""
    time_s: float = 0.0
    """Seconds since the epoch, as psutil gives it; 0: not known."""

    def to_json(self, time_field: str = "start_time") -> dict[str, object]:
        """Fields of a JSON object. time_field: what a time is called in that file."""
        if self.boot:
            return {"start_ticks": self.ticks, "boot": self.boot}
        return {time_field: self.time_s}

    @classmethod
    def from_json(cls, value: dict[str, Any], time_field: str = "start_time") -> Self:
        """Read strictly what `to_json` wrote, or an older version, which knew times only. Raises ValueError."""
        if "boot" in value:
            ticks, boot = value.get("start_ticks"), value["boot"]
            if type(ticks) is not int or not 0 <= ticks < 1 << 63 or not isinstance(boot, str) or not boot:
                raise ValueError("start_ticks and boot do not say when a process began")
            return cls(ticks, boot)
        time_s = value.get(time_field)
        if not isinstance(time_s, int | float) or isinstance(time_s, bool) or not 0 <= time_s < math.inf:
            raise ValueError(f"{time_field} does not say when a process began")
        return cls(time_s=float(time_s))


UNKNOWN = Birth()
"""Of a process that was gone before it could be looked at: no process has it."""


def of(pid: int) -> Birth:
    """When this process began; UNKNOWN when there is none."""
    if boot := _boot_id():
        entry = proctable.look_at(pid)
        return UNKNOWN if entry is None else Birth(int(entry.began), boot)
    import psutil

    try:
        return Birth(time_s=psutil.Process(pid).create_time())
    except (psutil.Error, OSError):
        return UNKNOWN


def find(pid: int, birth: Birth) -> psutil.Process | None:
    """The process with this pid and birth, if it still runs; not its zombie. Raises nothing."""
    if birth == UNKNOWN or not 0 < pid < _MAX_PID:
        return None
    import psutil

    try:
        found = psutil.Process(pid)
        same = birth == of(pid) if birth.boot else abs(found.create_time() - birth.time_s) < _SAME_S
        return found if same and found.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError):
        return None


def pid_of(value: object) -> int:
    """A pid that was written down. Raises ValueError for what can be none."""
    if type(value) is not int or not 0 < value < _MAX_PID:
        raise ValueError(f"{str(value)[:40]} is no pid")
    return value


def _boot_id() -> str:
    """ "" where the system does not tell."""
    if not _IS_LINUX:
        return ""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
