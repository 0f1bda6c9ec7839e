"""Errors of the link, apart from the modules that raise them so that these can import each other's users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LinkError(Exception):
    """Something went wrong between HostMain and an agent."""


class LinkDown(LinkError):  # noqa: N818
    """The agent could not be reached, or the connection broke, or it did not answer within the limit."""


class LinkEnded(LinkDown):
    """The link was stopped (its VM is not live any more, or was started anew): no further try can reach the agent."""


class GuestRefused(LinkError):  # noqa: N818
    """The agent answered by an HTTP status of 400 or more. `body` is what it said, to be believed no further than
    a guest may be."""

    def __init__(self, status: int, body: Mapping[str, Any], what: str) -> None:
        reason = body.get("error")
        said = reason[:500] if isinstance(reason, str) and reason else "no reason"
        super().__init__(f"{what}: the guest answered {status}: {said}")
        self.status = status
        self.body = body
