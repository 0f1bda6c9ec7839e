"""Attacks of guests and of other accounts, and what they cost: `python -m bench.attack [--seconds 10] [--only TEXT]`.

A hostile agent (tests.integration.hostile_agent) over the real link to a real HostMain, while calls are made as a
wrapper and a user of 2009 make them; a guest on the link of protocol 1, which dials the broker; another account at the
XML-RPC port; the agent again below the whole wrapper.
For each attack:

    memory    most USS of HostMain (and the wrapper) above the same job before the attack
    stall     the longest time that HostMain took to answer getStatus
    log       bytes a second, of HostMain's log (and the wrapper's)
    quit      seconds from TERM to the end, under the attack

The bounds are 64 MB, 0.5 s, a whole log of 4 MiB, 5 s (docs/internals/security.md).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support.attacks import (
    DIALLING,
    PORT,
    Measured,
    attack_dialling,
    attack_hostmain,
    attack_port,
    attack_wrapper,
)
from tests.support.hostile_agent import ATTACKS

ON_WRAPPER = ("results", "details", "large listings", "odd answers", "HELLO and BYE", "nested JSON", "endless headers")


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.attack", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each attack")
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    options = parser.parse_args()
    all_of_them: list[tuple[str, str, Callable[[str, Path, float], Measured]]] = [
        *(("a guest", name, attack_hostmain) for name in ATTACKS),
        *(("a guest that dials", name, attack_dialling) for name in DIALLING),
        *(("another account", name, attack_port) for name in PORT),
        *(("the whole wrapper", name, attack_wrapper) for name in ON_WRAPPER),
    ]
    print(f"{'':20}{'':34}{'memory':>10}{'stall':>9}{'log':>12}{'quit':>9}")
    for who, name, attack in all_of_them:
        if options.only in f"{who}: {name}":
            with tempfile.TemporaryDirectory(prefix="attack-") as folder:
                got = attack(name, Path(folder) / "slot", options.seconds)
            stall = f"{got.stall_s:7.2f} s" if got.stall_s else f"{'':9}"
            print(
                f"{who:20}{name:34}{got.uss_bytes / 1e6:7.1f} MB{stall}"
                f"{got.log_bytes_per_s:8.0f} B/s{got.quit_s:7.2f} s"
                + (f"  {got.refused} calls without an answer" if got.refused else ""),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
