"""tools/coverage_rooms.py: lines of modules are added up for each room."""

from __future__ import annotations

from tools.coverage_rooms import by_room


def file(covered: int, statements: int) -> dict[str, dict[str, int]]:
    return {"summary": {"covered_lines": covered, "num_statements": statements}}


def test_rooms_are_folders() -> None:
    report = {
        "vmwrapper/__init__.py": file(0, 0),
        "vmwrapper/run/a.py": file(1, 4),
        "vmwrapper/run/b.py": file(5, 6),
        "vmcontrol/hypervisors/qemu/vm.py": file(3, 3),
    }
    assert by_room(report) == {"vmcontrol/hypervisors/qemu": (3, 3), "vmwrapper/run": (6, 10)}
