"""Port forwards of a VirtualBox VM: ports that are free, rules that differ, rules that VirtualBox refused."""

from __future__ import annotations

import socket

import pytest

from vmcontrol.hypervisors.interface import HostProblem
from vmcontrol.hypervisors.virtualbox import forwards as vbox_forwards
from vmcontrol.hypervisors.virtualbox.files import HostForward
from vmcontrol.hypervisors.virtualbox.output import Forward


def test_rules_that_are_there_stay_and_others_are_replaced() -> None:
    known = [Forward("agent", 5000, 4616), Forward("port1", 5001, 80), Forward("stray", 5002, 22)]
    wanted = [HostForward("agent", 4616, 0, 5000), HostForward("port1", 80, 0, 6001, remote=True)]
    drop, add = vbox_forwards.difference(known, wanted)
    assert sorted(drop) == ["port1", "stray"]
    assert add == ["port1,tcp,,6001,,80"]
    assert vbox_forwards.difference(known[:1], wanted[:1]) == ([], [])


def test_the_log_names_the_forwards_that_were_refused() -> None:
    forwards = [HostForward("agent", 4616, 0, 5000), HostForward("port1", 80, 0, 50001)]
    text = "00:00:01.0 NAT: Failed to redirect TCP 127.0.0.1:50001 -> 0.0.0.0:80\n00:00:02.0 NAT: link up\n"
    assert vbox_forwards.refused(forwards, text) == ["port1"], "5000 is another port"
    assert vbox_forwards.refused(forwards, "") == []


@pytest.mark.parametrize("wanted", [False, True])
def test_a_port_that_somebody_took_is_replaced_unless_it_has_to_be_that_one(wanted: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        forward = HostForward("port1", 80, port if wanted else 0, port)
        if wanted:
            with pytest.raises(HostProblem, match=str(port)) as caught:
                vbox_forwards.with_free_port(forward)
            assert caught.value.key == "port-taken"
        else:
            assert vbox_forwards.with_free_port(forward).used not in (0, port)
    assert vbox_forwards.with_free_port(forward) == forward, "free again"
