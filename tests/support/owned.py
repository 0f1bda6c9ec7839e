"""Programs that tests and benches start and that would outlive them: the kernel ends them with whoever started them.

Their own clean-up does not run when they are killed, by a time limit for example.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def owned(command: Sequence[str], signal: str = "KILL") -> list[str]:
    """The command so that it gets the signal when the thread that starts it ends. Its pid is the program's."""
    return ["setpriv", "--pdeathsig", signal, *command] if shutil.which("setpriv") else list(command)
