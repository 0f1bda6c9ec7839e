"""How much of a target's modules its inputs reach: python -m tests.fuzz.coverage TARGET FOLDER

FOLDER: with `corpus`, as tests/fuzz/run_atheris.py leaves it. Runs the target on its seeds and on all that was found,
and prints `MODULE PERCENT lines LINES-NOT-REACHED` for each of its modules.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import coverage


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    measured = coverage.Coverage(data_file=None, branch=False)
    measured.start()
    from tests.fuzz import targets  # what is imported before it is measured counts as not reached

    logging.disable()
    inputs = [*targets.seeds(name), *(path.read_bytes() for path in sorted((folder / "corpus").glob("*")))]
    for data in inputs:
        targets.TARGETS[name](data)
    measured.stop()
    for module in targets.MODULES[name]:
        _, statements, _, missing, text = measured.analysis2(importlib.import_module(module))
        reached = 100 * (len(statements) - len(missing)) / max(1, len(statements))
        print(f"{module} {reached:.0f} lines {text or 'none'}")


if __name__ == "__main__":
    main()
