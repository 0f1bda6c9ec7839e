"""A target under atheris (guided by coverage): python -m tests.fuzz.run_atheris TARGET FOLDER [libFuzzer's options]

FOLDER gets the seeds, what it finds, and the input that broke something. Ends with status 0 when nothing broke. An
input may cost 64 MB of memory at most.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmcontrol", "vmwrapper", "guest", "tests.fuzz"]):
    from tests.fuzz import targets

COST_KB = 64 * 1000


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
        targets.TARGETS[name](seed)
    target = targets.TARGETS[name]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def once(data: bytes) -> None:
        nonlocal peak
        target(data)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now - peak > COST_KB:
            raise MemoryError(f"this input took the peak of memory from {peak} to {now} KB")
        peak = now

    atheris.Setup([sys.argv[0], *sys.argv[3:], f"-artifact_prefix={folder}/", str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
