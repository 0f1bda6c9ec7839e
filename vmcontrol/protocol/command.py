"""What is known of a command in a guest: one form for agent, HostMain and wrapper. Pure.

STOMP carries it as CMD_STATE and in CMD_TABLE (vmcontrol.protocol.messages), XML-RPC as the struct of `to_struct`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vmcontrol.protocol.text import MOST_INT32, MOST_INT64, finite_number, text_field, whole_field


class CommandState(StrEnum):
    """What an agent knows of a command."""

    UNKNOWN = "unknown"
    RUNNING = "running"
    FINISHED = "finished"
    """Its result is kept until it is forgotten."""
    REFUSED = "refused"
    """A lower attempt than the one that the agent has seen, or nonsense; `detail` says what."""
    LOST = "lost"
    """Started before the guest was booted anew, and its end was never seen (link of protocol 1 only)."""


@dataclass(frozen=True, slots=True)
class CommandStatus:
    """CMD_STATE: the answer to CMD_RUN, CMD_QUERY and CMD_CANCEL, and sent by itself when something changes.

    HostMain's own for its callers has a version and, when the command has ended, the result.
    """

    id: str
    sender: str
    """Guest id. Not in the struct: callers name the VM."""
    state: CommandState
    attempt: int = 0
    pid: int | None = None
    fraction_done: float | None = None
    cpu_time_s: float = 0.0
    """Of the command's whole process tree, ended children included."""
    memory_bytes: int = 0
    detail: str = ""
    version: int = 0
    """HostMain's: grows with each change. 0: nothing was heard yet."""
    result: Mapping[str, Any] | None = None
    """HostMain's: the body of CMD_RESULT, when it is here."""

    def to_struct(self) -> dict[str, object]:
        """The answer of runCommand, waitCommand, queryCommand and cancelCommand; an item of listCommands."""
        return {
            "id": self.id,
            "version": self.version,
            "state": self.state.value,
            "attempt": self.attempt,
            "pid": self.pid,
            "fraction_done": self.fraction_done,
            "cpu_time": self.cpu_time_s,
            "memory": self.memory_bytes,
            "detail": self.detail,
            "result": {} if self.result is None else self.result,
        }

    @classmethod
    def from_struct(cls, value: Mapping[str, Any]) -> CommandStatus:
        """Raises KeyError, ValueError."""
        return cls(
            id=value["id"],
            sender="",
            state=CommandState(value["state"]),
            attempt=value["attempt"],
            pid=value["pid"],
            fraction_done=value["fraction_done"],
            cpu_time_s=value["cpu_time"],
            memory_bytes=int(value["memory"]),
            detail=value["detail"],
            version=value["version"],
            result=value["result"] or None,
        )


def status_to_json(status: CommandStatus) -> dict[str, Any]:
    """As CMD_STATE and CMD_TABLE have it."""
    return {
        "state": status.state.value,
        "attempt": status.attempt,
        "pid": status.pid,
        "fraction-done": status.fraction_done,
        "cpu-time": status.cpu_time_s,
        "memory": status.memory_bytes,
        "detail": status.detail,
    }


def status_from_json(id: str, sender: str, value: Mapping[str, Any]) -> CommandStatus:
    """Raises BadMessage, KeyError, ValueError."""
    fraction = value.get("fraction-done")
    return CommandStatus(
        id=id,
        sender=sender,
        state=CommandState(value["state"]),
        attempt=whole_field(value, "attempt", 0, MOST_INT32),
        pid=None if value.get("pid") is None else whole_field(value, "pid", 0, MOST_INT32),
        fraction_done=None if fraction is None else finite_number(fraction, "fraction-done"),
        cpu_time_s=finite_number(value.get("cpu-time", 0.0), "cpu-time"),
        memory_bytes=whole_field(value, "memory", 0, MOST_INT64),
        detail=text_field(value, "detail"),
    )
