"""The VirtualBox driver against real VirtualBox: the contract of all drivers, and what is VirtualBox's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_twisted

from tests.integration.hypervisor_contract import HypervisorContract
from tests.integration.virtualbox_world import VirtualBoxWorld, a_world

pytestmark = pytest.mark.virtualbox


@pytest_twisted.async_yield_fixture
async def world(tmp_path: Path) -> AsyncIterator[VirtualBoxWorld]:
    async for world in a_world(tmp_path):
        yield world


class TestVirtualBox(HypervisorContract):
    """The contract."""
