"""For all tests: hypothesis judges what a function does; how long it takes on a busy computer is pytest-timeout's."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("vmwrapper", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmwrapper")
