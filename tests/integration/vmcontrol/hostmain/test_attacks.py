"""Every attack of the bench, for a second each, on one HostMain: memory, latency and log judged over the whole run.

`python -m bench.attack` measures each by itself and longer. Times have a margin for loaded computers.
"""

from __future__ import annotations

import json
import threading
import xmlrpc.client
from pathlib import Path

import pytest

from tests.support.attacks import PORT, Measured, attack_wrapper, begin, measured, victim
from tests.support.hostile_agent import ATTACKS
from tests.support.hostmains import running_hostmain
from vmcontrol.transfer.parts import PREFIX

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


def test_a_file_beyond_the_jobs_disk_bound_is_not_copied(tmp_path: Path) -> None:
    with running_hostmain(tmp_path, environment={"VMWRAPPER_DISK_BOUND": "5000000"}) as host:
        host.vm()
        home = host.home()
        (home / "small").write_bytes(b"x" * 1_000_000)
        with (home / "large").open("wb") as file:
            file.truncate(6_000_000)  # takes no place itself: the guest's disk is elsewhere
        with pytest.raises(xmlrpc.client.Fault, match="has 6000000 bytes") as caught:
            host.api.getFile("vm", "large", "here")
        assert caught.value.faultCode == 2
        assert "disk bound of 5000000 bytes" in json.loads(caught.value.faultString)["reason"]
        assert not (tmp_path / "here").exists()
        assert not list(tmp_path.glob(f"{PREFIX}*"))
        assert host.api.getFile("vm", "small", "here")["size"] == 1_000_000
