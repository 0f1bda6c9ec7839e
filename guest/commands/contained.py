"""The agent's end of a command in a container: its keeper, a child of the root helper, is the supervisor."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure

from guest.commands import launch, progress
from guest.commands.supervised import Owner, SupervisedCommand
from guest.containers.client import ContainerHelper


class ContainedCommand(SupervisedCommand):
    """As a command with a supervisor, but that the supervisor is reached over a socket of its own."""

    def __init__(self, runner: Owner) -> None:
        super().__init__(runner)
        self._control: Any = None
        self._helper: ContainerHelper | None = None
        self._reactor: Any = None
        self._fraction: tuple[str, list[str]] | None = None

    def open(self, reactor: Any, helper: ContainerHelper | None) -> None:
        """Raises OSError."""
        if helper is None:
            raise OSError("this guest image runs no containers (it has no crun or no helper for it)")
        self._reactor, self._helper = reactor, helper

    def say(self, message: dict[str, Any]) -> None:
        if "cancel" in message:
            if self._control is not None and self._control.transport is not None:
                self._control.transport.write(json.dumps(message).encode() + b"\n")
            return
        run, helper = self.run, self._helper
        if run is None or run.container is None or helper is None:
            return
        fds: list[int] = []
        if message["fraction_done_file"]:
            self._fraction = (message["fraction_done_file"], message["places"])
        try:
            streams = {name: message[name] for name in ("stdin", "stdout", "stderr", "places")}
            folder = message["folder"]
            if not os.path.isdir(folder):  # noqa: PTH112
                raise launch.LaunchError(launch.FOLDER_MISSING, f"{folder} is no folder")
            launch.open_streams(streams["stdin"], streams["stdout"], streams["stderr"], streams["places"], fds)
            fds.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            request = {
                "container": run.container.to_json(),
                "arguments": [run.command, *run.arguments],
                "environment": dict(run.environment),
            }
            control = helper.run(json.dumps(request).encode(), fds)
        except launch.LaunchError as error:
            self._end({"failed": error.code, "detail": str(error)})
            return
        except OSError as error:
            self._end({"failed": launch.NOT_STARTED, "detail": f"the container: {error.strerror or error}"})
            return
        finally:
            for fd in fds:
                os.close(fd)
        self._control = _Control(self)
        self._reactor.adoptStreamConnection(
            control.fileno(), control.family, Factory.forProtocol(lambda: self._control)
        )
        control.close()

    def _end(self, last: dict[str, Any]) -> None:
        self._last = last
        self._reactor.callLater(0, self._runner.supervisor_ended, self, last)

    def let_go(self) -> None:
        """End of file: the keeper kills the container and goes."""
        with contextlib.suppress(AttributeError):
            self._control.transport.loseWriteConnection()

    def kill(self) -> None:
        """For one that does not obey: the helper's children end when nobody is at the other end."""
        with contextlib.suppress(AttributeError):
            self._control.transport.abortConnection()

    def line(self, message: Mapping[str, Any]) -> None:
        if "ended" in message or "failed" in message:
            self._last = message
            return
        if "started" in message:
            self.pid = int(message["started"])
        if "sample" in message:
            fraction = None
            if self._fraction is not None:
                path = launch.find_file(*self._fraction)
                fraction = None if path is None else progress.read_fraction(path)
            message = {"sample": {**message["sample"], "fraction_done": fraction}}
        self._runner.supervisor_said(self, message)

    def gone_away(self) -> None:
        self._runner.supervisor_ended(self, self._last)


class _Control(Protocol):
    def __init__(self, command: ContainedCommand) -> None:
        self._command = command
        self._buffer = b""

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._command.line(json.loads(line))

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802, ARG002
        self._command.gone_away()
