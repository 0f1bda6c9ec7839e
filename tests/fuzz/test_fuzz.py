"""Fuzzing for a bounded time: FUZZ_SECONDS for each target (default 3), with atheris where it can be had.

FUZZ_SECONDS=600 .venv/bin/python -m pytest tests/fuzz
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, seeds
from tests.support.limits import stretched

pytestmark = pytest.mark.slow

SECONDS = int(os.environ.get("FUZZ_SECONDS", "3"))
LONGEST = 64 * 1024
FLOOR = {
    ("frames", "vmcontrol.broker.frames"): 92,
    ("words", "vmcontrol.protocol.messages"): 90,
    ("words", "vmcontrol.protocol.text"): 81,
    ("literals", "vmcontrol.protocol.text"): 53,
    ("xmlrpc", "vmcontrol.api.arguments"): 93,
    ("job", "vmwrapper.job.elements"): 94,
    ("job", "vmwrapper.job.parse"): 82,
    ("initdata", "vmwrapper.boinc.initdata"): 86,
    ("checkpoint", "vmwrapper.state.checkpoint"): 73,
    ("checkpoint", "vmcontrol.common.jsonfile"): 66,
    ("links", "vmwrapper.state.links"): 53,
    ("links", "vmcontrol.common.jsonfile"): 59,
    ("kept", "vmcontrol.common.jsonfile"): 63,
    ("image", "vmcontrol.hypervisors.common.diskimage"): 90,
    ("image", "vmcontrol.common.imagenote"): 83,
    ("archive", "vmwrapper.host.unpacking"): 86,
    ("archive", "vmwrapper.host.zip_names"): 72,
    ("vbox", "vmcontrol.hypervisors.virtualbox.output"): 92,
    ("smbios", "guest.agent.smbios"): 77,
    ("handshake", "vmcontrol.protocol.handshake"): 90,
    ("http", "vmcontrol.link.guesthttp"): 87,
    ("broker", "vmcontrol.broker.session"): 85,
    ("broker", "vmcontrol.broker.rights"): 94,
}
"""Percent of a module's lines that a target has to reach with its seeds and the broken inputs of coverage.py, two below
what it reaches: what parses is all looked at, what is left opens files or says what the system refuses."""


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_good_input(name: str) -> None:
    for seed in seeds(name):
        TARGETS[name](seed)


@st.composite
def broken(draw: st.DrawFn, name: str) -> bytes:
    """Good input with pieces cut out, doubled, or replaced."""
    data = draw(st.sampled_from(seeds(name)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + 20)))
        data = data[:at] + draw(st.binary(max_size=12) | st.just(data[at:end] * 2) | st.just(b"")) + data[end:]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_broken_input(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=100, deadline=None)
    @given(broken(name) | st.binary(max_size=300))
    def once(data: bytes) -> None:
        target(data)

    once()


@example(b"CMD_TABLE", b"[" * 100_000)
@example(b"CMD_RESULT", b'{"x":' * 50_000)
@given(st.sampled_from([b"CMD_RUN", b"CMD_STATE", b"CMD_TABLE", b"CMD_RESULT"]), st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_after_a_word(word: bytes, rest: bytes) -> None:
    TARGETS["words"](b"to:*\nfrom:52:54:00:12:34:56\ncmd-id:c\ntoken:t\ncmd:x\n\n" + word + b" " + rest)


@pytest.mark.timeout(SECONDS * 2 + 120)
@pytest.mark.parametrize("name", TARGETS)
def test_atheris(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("NOT TESTED: atheris has no wheel for this system or Python; hypothesis alone has looked")
    options = [f"-max_total_time={SECONDS}", f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=0", "-seed=2009"]
    command = [sys.executable, "-m", "tests.fuzz.run_atheris", name, str(tmp_path), *options, "-print_final_stats=1"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=stretched(SECONDS + 100),
        check=False,
    )
    found = [path.read_bytes() for path in tmp_path.iterdir() if path.is_file()]
    assert done.returncode == 0, f"{name}: {found[:1]}\n{done.stderr[-4000:]}"
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert runs is not None, done.stderr[-2000:]
    assert int(runs[1]) > len(seeds(name)), "it fuzzed nothing"
    print(f"{name}: {runs[1]} inputs in {SECONDS} s")
    for module, (percent, lines) in _reached(name, str(tmp_path)).items():
        print(f"{name}: {percent} % of {module}; not lines {lines}")


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_reaches_its_modules(name: str) -> None:
    """By inputs that are the same on every computer: how much a fuzzer finds in its time is the computer's speed."""
    reached = _reached(name)
    assert reached
    for module, (percent, lines) in reached.items():
        assert percent >= FLOOR[name, module], f"{module}: {percent} %, not lines {lines}"


def _reached(name: str, *folder: str) -> dict[str, tuple[int, str]]:
    """For each module of the target: percent of its lines that the inputs reached, and the lines that they did not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.coverage", name, *folder],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=stretched(100), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split(" ", 3) for line in done.stdout.splitlines()]
    return {module: (int(percent), lines) for module, percent, _, lines in rows}
