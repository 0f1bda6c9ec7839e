"""A ping that is not answered is repeated, more and more rarely."""

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from tests.support.conversations import a_conversation
from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import LimitReached
from vmcontrol.protocol.messages import Message

MAC = "02:C0:00:00:00:01"


def test_pings_become_rarer_so_that_a_slow_broker_does_not_get_slower() -> None:
    clock = Clock()
    conversation = a_conversation(clock)
    sent: list[float] = []

    def send(_message: Message) -> Deferred[None]:
        sent.append(clock.seconds())
        return succeed(None)

    conversation.send = send  # type: ignore[method-assign, assignment]
    waiting = eventloop.start(conversation.ping(MAC, 60.0))
    clock.pump([0.5] * 130)
    assert sent == [0, 1, 3, 7, 15, 31, 47]
    failures: list[object] = []
    waiting.addErrback(lambda failure: failures.append(failure.check(LimitReached)))
    assert failures == [LimitReached]
    assert not clock.getDelayedCalls()
