"""How much of a target's modules its inputs reach: python -m tests.fuzz.coverage TARGET [FOLDER]

Runs the target on its seeds, on BROKEN inputs made of them, always the same ones, and on what a fuzzer has found:
FOLDER has it in `corpus`, as tests/fuzz/run_atheris.py leaves it. Prints `MODULE PERCENT lines LINES-NOT-REACHED` for
each of the target's modules.
"""

from __future__ import annotations

import importlib
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import coverage

BROKEN = 1000


def broken(seeds: Sequence[bytes]) -> Iterator[bytes]:
    """Seeds with pieces cut out, doubled, or replaced: BROKEN of them, the same in every run."""
    choose = random.Random(2009)
    for _ in range(BROKEN):
        data = choose.choice(seeds)
        for _ in range(choose.randint(1, 3)):
            at = choose.randint(0, len(data))
            end = choose.randint(at, min(len(data), at + 20))
            put = choose.choice([b"", data[at:end] * 2, choose.randbytes(choose.randint(0, 12))])
            data = data[:at] + put + data[end:]
        yield data


def main() -> None:
    name, folders = sys.argv[1], [Path(word) for word in sys.argv[2:]]
    measured = coverage.Coverage(data_file=None, branch=False)
    measured.start()
    from tests.fuzz import targets  # what is imported before it is measured counts as not reached

    logging.disable()
    seeds = targets.seeds(name)
    found = [path.read_bytes() for folder in folders for path in sorted((folder / "corpus").glob("*"))]
    for data in [*seeds, *broken(seeds), *found]:
        targets.TARGETS[name](data)
    measured.stop()
    for module in targets.MODULES[name]:
        _, statements, _, missing, text = measured.analysis2(importlib.import_module(module))
        reached = 100 * (len(statements) - len(missing)) / max(1, len(statements))
        print(f"{module} {reached:.0f} lines {text or 'none'}")


if __name__ == "__main__":
    main()
