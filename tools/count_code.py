#!/usr/bin/env python3
"""Counts the lines of code in the three top folders, room by room: no blanks, no comments, no docstrings.

    tools/count_code.py [--rooms] [FOLDER ...]      (default: vmwrapper vmcontrol guest)

A line counts when a token of the program stands on it; a text that is a statement by itself (a docstring, the
explanation under a constant) is none. Python files only; shell scripts of the guest image are listed apart.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vmwrapper", "vmcontrol", "guest")
_NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
)  # fmt: skip


def code_lines(source: str) -> int:
    """Lines of a module on which code stands. Raises SyntaxError."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - texts)


def count(folder: Path) -> Counter[str]:
    """Lines of code of each room (folder with modules) below `folder`, by its path from the project's root."""
    rooms: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.py")):
        rooms[str(path.parent.relative_to(ROOT))] += code_lines(path.read_text())
    return rooms


def main() -> None:
    parser = argparse.ArgumentParser(description="Count lines of code: no blanks, comments, docstrings.")
    parser.add_argument("--rooms", action="store_true", help="a line for each room")
    parser.add_argument("folder", nargs="*", default=FOLDERS)
    arguments = parser.parse_args()
    total = 0
    for name in arguments.folder:
        rooms = count(ROOT / name)
        total += sum(rooms.values())
        print(f"{sum(rooms.values()):7} {name}")
        if arguments.rooms:
            for room, lines in sorted(rooms.items()):
                print(f"{lines:11}   {room}")
    print(f"{total:7} in all")


if __name__ == "__main__":
    main()
