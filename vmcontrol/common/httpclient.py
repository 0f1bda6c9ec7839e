"""Parts of Twisted's HTTP client that the wrapper's calls and HostMain's requests to agents have in common."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.web.iweb import IAgentEndpointFactory, IBodyProducer
from zope.interface import implementer


@implementer(IAgentEndpointFactory)
class OneEndpoint:
    """The same endpoint for every URL."""

    def __init__(self, endpoint: Any) -> None:
        self._endpoint = endpoint

    def endpointForURI(self, uri: object) -> Any:  # noqa: N802, ARG002 (Twisted's name)
        return self._endpoint


@implementer(IBodyProducer)
class BytesBody:
    """A request's body that is in memory, given to the connection at once."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.length = len(content)

    def startProducing(self, consumer: Any) -> Deferred[None]:  # noqa: N802
        consumer.write(self._content)
        return succeed(None)

    def pauseProducing(self) -> None: ...  # noqa: N802
    def resumeProducing(self) -> None: ...  # noqa: N802
    def stopProducing(self) -> None: ...  # noqa: N802


def why_failed(error: Exception) -> str:
    """Why a request failed. Twisted wraps what happened to a connection in lists of Failures."""
    reasons = getattr(error, "reasons", None)
    if reasons:
        inner = reasons[0].value
        return "the connection was closed" if isinstance(inner, ConnectionDone) else why_failed(inner)
    return str(error) or type(error).__name__
