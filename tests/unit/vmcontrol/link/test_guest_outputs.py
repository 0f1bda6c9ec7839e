"""vmcontrol.guests.outputs: what is made of an output that the guest does not give."""

from __future__ import annotations

from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import DeferredSemaphore

from vmcontrol.common.eventloop import Event, start
from vmcontrol.guests.outputs import output_texts
from vmcontrol.link.dialler import OUTPUTS_AT_ONCE, GuestLink
from vmcontrol.link.errors import GuestRefused, LinkDown

RESULT = {"stdout_path": "out", "stdout_size": 5}


class Link:
    """A link whose agent answers each request by a status, once it may."""

    name = "guest"

    def __init__(self, status: int) -> None:
        self.outputs = DeferredSemaphore(OUTPUTS_AT_ONCE)
        self.requests = self
        self.may_answer = Event()
        self.asked = 0
        self._status = status

    async def send(self, *_: object, **__: object) -> Any:
        self.asked += 1
        await self.may_answer.wait()
        raise GuestRefused(self._status, {}, "guest: out")


def texts(link: Link) -> Any:
    return start(output_texts(cast(GuestLink, link), RESULT))


@pytest_twisted.ensureDeferred
async def test_an_output_that_is_gone_is_empty_and_trouble_of_the_agents_is_not() -> None:
    for status, expected in ((404, {"out": "", "err": ""}), (500, None)):
        link = Link(status)
        link.may_answer.set()
        if expected is None:
            with pytest.raises(LinkDown):
                await texts(link)
        else:
            assert await texts(link) == expected


@pytest_twisted.ensureDeferred
async def test_few_are_asked_for_at_once_however_many_commands_have_ended() -> None:
    link = Link(404)
    waiting = [texts(link) for _ in range(30)]
    assert link.asked == OUTPUTS_AT_ONCE
    link.may_answer.set()
    for one in waiting:
        assert await one == {"out": "", "err": ""}
    assert link.asked == 30
