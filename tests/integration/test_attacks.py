"""Every attack of the bench, for a second each, on one HostMain: memory, latency and log judged over the whole run.

`python -m bench.attack` measures each by itself and longer. Times have a margin for loaded computers.
"""

from __future__ import annotations

import threading
from pathlib import Path

from tests.integration.attacks import PORT, Measured, attack_wrapper, begin, measured, victim
from tests.integration.hostile_agent import ATTACKS
from vmcontrol.parts import PREFIX

EACH_S = 0.8
USS_BYTES = 64_000_000
LOG_BYTES_PER_S = 20_000
STALL_S, QUIT_S = 3.0, 10.0
"""Aims: 0.5 s and 5 s."""


def holds(got: Measured) -> None:
    assert got.uss_bytes < USS_BYTES
    assert got.stall_s < STALL_S
    assert got.log_bytes_per_s < LOG_BYTES_PER_S
    assert got.quit_s < QUIT_S
    assert got.refused == 0
    assert "Traceback" not in got.log, got.log[-20_000:]
    assert "Unhandled" not in got.log, got.log[-20_000:]


def test_a_guest_that_attacks_costs_little_and_stops_nobody(tmp_path: Path) -> None:
    with victim(tmp_path) as host:
        holds(measured(host, EACH_S, [lambda name=name: begin(tmp_path, name) for name in ATTACKS]))  # type: ignore[misc]
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith(PREFIX)], "copies that failed leave nothing"
    assert sum(path.stat().st_size for path in left) < 5_000_000


def test_another_account_at_the_port_costs_little_and_stops_nobody(tmp_path: Path) -> None:
    over = threading.Event()
    with victim(tmp_path) as host:
        try:
            floods = [threading.Thread(target=attack, args=(host.port, over), daemon=True) for attack in PORT.values()]
            holds(measured(host, EACH_S, [flood.start for flood in floods]))
        finally:
            over.set()


def test_the_whole_wrapper_holds_the_bounds_below_a_guest_that_attacks(tmp_path: Path) -> None:
    attacks = ("results", "details", "large listings", "odd answers", "nested JSON", "HELLO and BYE")
    holds(attack_wrapper(attacks, tmp_path, 1.5))
