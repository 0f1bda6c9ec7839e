"""Print what part of each room's lines the tests reached: `python -m tools.coverage_rooms COVERAGE.JSON`.

Counts what ran in the tests' own processes. The programs that tests start (a wrapper under the client, HostMain, the
agent in a guest) are not measured: that would slow down what the tests time.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path, PurePath


def by_room(report: dict[str, dict[str, dict[str, int]]]) -> dict[str, tuple[int, int]]:
    """Lines that were reached and lines in all, by room, from coverage's JSON report (`files`)."""
    reached: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for name, file in report.items():
        room = str(PurePath(name).parent)
        reached[room] += file["summary"]["covered_lines"]
        lines[room] += file["summary"]["num_statements"]
    return {room: (reached[room], lines[room]) for room in sorted(lines) if lines[room]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.coverage_rooms", description="Coverage of each room.")
    parser.add_argument("report", type=Path, help="what `coverage json` wrote")
    rooms = by_room(json.loads(parser.parse_args().report.read_text())["files"])
    print("coverage, lines reached in the tests' own processes:")
    for room, (reached, lines) in rooms.items():
        print(f"{100 * reached // lines:5} %  {room} ({lines})")
    print(f"{100 * sum(r for r, _ in rooms.values()) // sum(n for _, n in rooms.values()):5} %  in all")


if __name__ == "__main__":
    main()
