"""The requests that getCmdDetails still knows. Owns their texts, up to two bounds."""

from __future__ import annotations

import json
import time
from collections import OrderedDict

from vmcontrol.api.arguments import BadArgument
from vmcontrol.protocol import messages

DETAILS_LIMIT, DETAILS_CHARACTERS = 1000, 4 * 1024 * 1024
"""Requests, and their size together."""


class Details:
    """By the id of the command; the oldest go."""

    def __init__(self) -> None:
        self._details: OrderedDict[str, str] = OrderedDict()

    def get(self, id: str) -> str:
        """JSON text; null for one that is not known."""
        return self._details.get(id, "null")

    def keep(self, run: messages.CommandRun, args: object, env: object, path: object) -> None:
        """Keep a request, args, env and path as they came. Raises BadArgument if it cannot be sent."""
        try:
            messages.encode(run)
        except ValueError as error:
            raise BadArgument(str(error)) from error
        values = (time.time(), run.to, run.command, args, env, path, run.stdin)
        keys = ("timestamp", "to", "cmd", "args", "env", "path", "fileForStdin")
        self._details[run.id] = json.dumps(dict(zip(keys, values, strict=True)), default=str)
        while len(self._details) > DETAILS_LIMIT or sum(map(len, self._details.values())) > DETAILS_CHARACTERS:
            self._details.popitem(last=False)
