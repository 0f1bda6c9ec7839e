"""HostMain's contract with the wrapper: held by the real one and by the scripted one that tests put in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hostmain_contract import HostMainContract
from tests.support.hostmains import EMBEDDED, RunningHost

PROGRAMS = {"real": "tests.support.hypervisor", "scripted": "tests.support.fake_hostmain"}


@pytest.fixture(params=PROGRAMS)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningHost]:
    host = RunningHost(tmp_path, EMBEDDED, program=PROGRAMS[request.param])
    try:
        host.ready()
        yield host
    finally:
        host.close()


class TestHostMain(HostMainContract):
    """Each statement for both."""
