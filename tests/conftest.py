"""For all tests: hypothesis judges what a function does; how long it takes on a busy computer is pytest-timeout's."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("vmwrapper", deadline=None)
settings.load_profile("vmwrapper")
