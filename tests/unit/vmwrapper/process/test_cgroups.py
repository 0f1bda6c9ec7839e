"""Moving a tree into a control group: a look at the system's processes can miss those that fork all the time."""

from __future__ import annotations

from pathlib import Path

from vmwrapper.process.cgroups import Group


def test_a_tree_is_in_when_several_looks_find_nothing_new(tmp_path: Path) -> None:
    looks = iter([[10], [], [], [11], [11], [], [11]])
    moved: list[str] = []

    def members() -> list[int]:
        procs = tmp_path / "cgroup.procs"
        if procs.exists():
            moved.append(procs.read_text())
            procs.unlink()
        return next(looks)

    assert Group(tmp_path).take_in(members)
    assert moved == ["10", "11"]
    assert list(looks) == []


def test_a_program_that_has_ended_is_not_taken_in(tmp_path: Path) -> None:
    assert not Group(tmp_path).take_in(lambda: [])
    assert not (tmp_path / "cgroup.procs").exists()
