"""The guest image for those who only want one: built when it is not there, found when it is.

`./demo`, the benchmarks and the tests ask here. Any number of processes may ask at once: one builds, the others wait.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from guest.image import build, tools
from guest.image.build import Options

log = logging.getLogger(__name__)

KEPT = 4
"""Images of other inputs that stay in a cache: a running VM or a slot may still read one."""

NAME = "guest.vdi"


def guest_image(cache: Path, options: Options | None = None) -> Path:
    """The image of the present sources in `cache`: found in some 50 ms, built in seconds when only the agent changed.

    Blocks: for programs that are about to start, not for the reactor. Raises what a build raises (build.FAILURES).
    """
    options = options or Options()
    cache = cache.resolve()
    with build.locked(cache):
        tools.check_tools()
        pins = build.choose_pins(cache, options)
        key = build.image_key(pins, options)
        images = cache / "images"
        image = images / key[:20] / NAME
        if image.exists():
            os.utime(image.parent)
            return image
        log.info("building the guest image in %s", image.parent)
        build.Builder(cache, pins, options).build(image, key)
        build.remove_oldest(images.iterdir(), keep=KEPT + 1)
        return image
