"""For all tests: hypothesis, time limits that are stretched by load, and the order in which files are given out.

hypothesis judges what a function does; how long it takes on a busy computer is pytest-timeout's.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.support import limits

settings.register_profile("vmwrapper", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmwrapper")

_USED = "largest factor"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Stretch the test's own limit (the marker `timeout`, or the one of pyproject.toml)."""
    marker = item.get_closest_marker("timeout")
    limit_s = float(marker.args[0] if marker else item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(limits.stretched(limit_s)), append=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give out the files with long tests first, so that none of them begins when the other workers have finished."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # a worker of xdist
    if output is not None:
        output[_USED] = limits.used


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    limits.used = max(limits.used, getattr(node, "workeroutput", {}).get(_USED, 1.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"time limits were stretched by the load up to {limits.used:.1f} times")
