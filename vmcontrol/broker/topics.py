"""Who listens to which topic, and a message in the form each listener reads. Pure: no sockets, no time.

A message is encoded once per version of STOMP, not once per subscriber: what differs between subscribers
(`subscription`, `ack`) stands in a few bytes before the part that all share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from vmcontrol.broker.frames import CannotEncode, Frame, Version, encode_head, encode_headers

S = TypeVar("S")

SHARED_JOIN_BYTES = 64 * 1024
"""Bodies up to this size are joined with their header (fewer writes); larger ones are not copied."""

_OURS = frozenset({"subscription", "message-id", "ack", "receipt", "transaction", "content-length"})
"""Headers of a SEND that are the broker's to set, or meant for it alone."""


@dataclass(frozen=True, slots=True)
class Subscription(Generic[S]):
    """One client's wish for one topic. `id` is None for a 1.0 client that gave none."""

    session: S
    destination: str
    id: str | None
    ack: str


class Listener(Protocol):
    """Who subscribes."""

    def deliver(self, message: Message, subscription: Subscription[Any]) -> None: ...


class DuplicateSubscription(Exception):  # noqa: N818
    """The client has a subscription of that id already."""


class Topics(Generic[S]):
    """Exact names to subscribers. A name without subscribers costs nothing."""

    def __init__(self) -> None:
        self._topics: dict[str, dict[tuple[S, str | None], Subscription[S]]] = {}
        self._by_session: dict[S, dict[tuple[str, str] | tuple[str], Subscription[S]]] = {}

    def subscribe(self, subscription: Subscription[S]) -> None:
        """Raises DuplicateSubscription; repeating one without an id (1.0) changes nothing."""
        own = self._by_session.setdefault(subscription.session, {})
        key = self._key(subscription.id, subscription.destination)
        if key in own:
            if subscription.id is None:
                return
            raise DuplicateSubscription(subscription.id)
        own[key] = subscription
        topic = self._topics.setdefault(subscription.destination, {})
        topic[subscription.session, subscription.id] = subscription

    def unsubscribe(self, session: S, id: str | None, destination: str) -> bool:
        """False when there was none."""
        subscription = self._by_session.get(session, {}).pop(self._key(id, destination), None)
        if subscription is None:
            return False
        self._forget(subscription)
        return True

    def drop(self, session: S) -> None:
        """A client is gone."""
        for subscription in self._by_session.pop(session, {}).values():
            self._forget(subscription)

    def count(self, session: S) -> int:
        return len(self._by_session.get(session, ()))

    def subscribers(self, destination: str) -> tuple[Subscription[S], ...]:
        return tuple(self._topics.get(destination, {}).values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._topics)

    def _forget(self, subscription: Subscription[S]) -> None:
        topic = self._topics[subscription.destination]
        del topic[subscription.session, subscription.id]
        if not topic:
            del self._topics[subscription.destination]

    @staticmethod
    def _key(id: str | None, destination: str) -> tuple[str, str] | tuple[str]:
        return (id,) if id is not None else ("", destination)


class Message:
    """What one SEND gives its topic's subscribers."""

    def __init__(self, destination: str, headers: Mapping[str, str], body: bytes, message_id: str) -> None:
        kept = {name: value for name, value in headers.items() if name not in _OURS}
        self._id = message_id
        self._frame = Frame("MESSAGE", {**kept, "destination": destination, "message-id": message_id}, body)
        self._shared: dict[Version, tuple[bytes, ...] | CannotEncode] = {}

    @property
    def headers(self) -> Mapping[str, str]:
        return self._frame.headers

    @property
    def body(self) -> bytes:
        return self._frame.body

    def pieces(self, version: Version, subscription: Subscription[S]) -> tuple[bytes, ...]:
        """The frame's bytes for one subscriber, in parts that most share. Raises CannotEncode."""
        own = {} if subscription.id is None else {"subscription": subscription.id}
        if version is Version.V1_2 and subscription.ack != "auto":
            own["ack"] = self._id
        prefix = "\n".join(["MESSAGE", *encode_headers(own, version, "MESSAGE"), ""]).encode()
        return (prefix, *self._shared_pieces(version))

    def _shared_pieces(self, version: Version) -> tuple[bytes, ...]:
        shared = self._shared.get(version)
        if shared is None:
            try:
                head = encode_head(self._frame, version).removeprefix(b"MESSAGE\n")
            except CannotEncode as error:
                shared = error
            else:
                body = self._frame.body
                small = len(body) <= SHARED_JOIN_BYTES
                shared = (head + body + b"\0",) if small else (head, body, b"\0")
            self._shared[version] = shared
        if isinstance(shared, CannotEncode):
            raise shared
        return shared
