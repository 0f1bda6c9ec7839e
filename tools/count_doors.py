#!/usr/bin/env python3
"""Counts what import-linter watches: rooms, modules, imports between them, floors, circles, the longest module.

    python -m tools.count_doors [FOLDER]      (default: this checkout; FOLDER: the top of another one)

A room is a package of the three programs (a program's own modules are one more), an arrow an import from one module to
another of the same program, a floor the longest way down from a module through its imports, a circle a set of modules
that import each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("vmwrapper", "vmcontrol", "guest")


def imports_of(program: str) -> Mapping[str, set[str]]:
    """Module -> modules of the same program that it imports, those in functions and for type checking included."""
    graph = grimp.build_graph(program, cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def circles(imports: Mapping[str, set[str]]) -> Iterator[frozenset[str]]:
    """Each largest set of two modules or more that reach each other."""
    reach = {module: _reached(module, imports) for module in imports}
    groups = {frozenset(other for other in reach[module] if module in reach[other]) for module in imports}
    return (group for group in groups if len(group) > 1)


def floors(imports: Mapping[str, set[str]]) -> int:
    """Modules on the longest way down; a circle is one floor."""
    joined = {module: frozenset({module}) for module in imports}
    joined.update({module: circle for circle in circles(imports) for module in circle})
    below = {
        group: {joined[target] for module in group for target in imports[module]} - {group} for group in joined.values()
    }
    depth: dict[frozenset[str], int] = {}

    def deep(group: frozenset[str]) -> int:
        if group not in depth:
            depth[group] = 1 + max(map(deep, below[group]), default=0)
        return depth[group]

    return max(map(deep, below), default=0)


def _reached(module: str, imports: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for target in imports[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def main() -> None:
    top = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    sys.path.insert(0, str(top))
    print("program     rooms  modules  arrows  floors  circles  longest module")
    for program in PROGRAMS:
        imports = imports_of(program)
        files = sorted((top / program).rglob("*.py"))
        longest = max(files, key=lambda path: len(path.read_text(encoding="utf-8").splitlines()))
        lines = len(longest.read_text(encoding="utf-8").splitlines())
        print(
            f"{program:10} {len({path.parent for path in files}):6} {len(files):8} {sum(map(len, imports.values())):7}"
            f" {floors(imports):7} {len(list(circles(imports))):8}  {longest.relative_to(top)} ({lines})"
        )


if __name__ == "__main__":
    main()
