"""Snapshots of a VirtualBox VM: names that can be, and which one is meant."""

from __future__ import annotations

import pytest

from vmcontrol.hypervisors.common.vm import check_snapshot_name
from vmcontrol.hypervisors.interface import HypervisorError, SnapshotNotFound
from vmcontrol.hypervisors.virtualbox import output
from vmcontrol.hypervisors.virtualbox.output import Facts
from vmcontrol.hypervisors.virtualbox.vm import find_snapshot

TEXT = """name="one"
UUID="0a1b2c3d-0000-0000-0000-000000000001"
VMState="poweroff"
SnapshotName="a"
SnapshotUUID="0a1b2c3d-0000-0000-0000-00000000000a"
SnapshotName-1="b"
SnapshotUUID-1="0a1b2c3d-0000-0000-0000-00000000000b"
SnapshotName-1-1="a"
SnapshotUUID-1-1="0a1b2c3d-0000-0000-0000-00000000000c"
CurrentSnapshotUUID="0a1b2c3d-0000-0000-0000-00000000000b"
"""


def facts(text: str = TEXT) -> Facts:
    found = output.facts(text)
    assert found is not None
    return found


def test_the_newest_of_a_name_is_meant_and_without_a_name_the_current_one() -> None:
    assert find_snapshot(facts(), "a").uuid.endswith("c")
    assert find_snapshot(facts(), None).uuid.endswith("b")


@pytest.mark.parametrize("name", ["c", None])
def test_a_snapshot_that_is_not_there(name: str | None) -> None:
    with pytest.raises(SnapshotNotFound, match="one has no snapshot"):
        find_snapshot(facts("\n".join(TEXT.splitlines()[:3])), name)


def test_names() -> None:
    for name in ("vmwrapper_1", "é" * 100, "with blank"):
        check_snapshot_name(name, refused=("-", "{"))
    for name in ("", "é" * 101, "two\nlines", "--delete", "{0a1b2c3d}"):
        with pytest.raises(HypervisorError):
            check_snapshot_name(name, refused=("-", "{"))
