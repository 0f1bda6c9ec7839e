"""Calls of VBoxManage: one process each, with a time limit, everything it said kept in a trace file.

Owns the trace file (`vboxmanage_trace.txt` in the slot, bounded). Knows which program to call; understands none of its
answers but whether they are failures (problems.py).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import FailureGroup, race
from twisted.python.failure import Failure

from vmcontrol.common import virtualbox
from vmcontrol.common.eventloop import Event, LimitReached, sleep, start
from vmcontrol.hypervisors.common import boundedlog, tool
from vmcontrol.hypervisors.common.tool import ToolResult
from vmcontrol.hypervisors.virtualbox import problems
from vmcontrol.hypervisors.virtualbox.output import without_warnings

log = logging.getLogger(__name__)

TRACE_LIMIT, TRACE_KEPT = 1024 * 1024, 512 * 1024
"""Bytes."""
OUTPUT_TRACED = 4000
"""Characters of each stream that go into the trace."""

CALL_LIMIT_S = 60.0
"""A call takes 0.03 to 0.1 s; the first one starts VirtualBox's service, on a slow disk in a minute's time."""
QUESTIONS = frozenset({"showvminfo", "list", "--version"})
ASK_AGAIN_S, AFTER_EFFECT_S = 1.0, 0.4
"""See VBoxManage._run."""
BROKE_OFF_LIMIT_S, BROKE_OFF_WAIT_S = 10.0, 0.2
"""A service that is ending or has just been started answers nothing, or half. How long questions are asked again."""
NOT_THERE_LIMIT_S = 5.0
"""A service that is ending keeps a new one from starting, half a second on a busy computer. No call has begun then, so
orders too are given again."""
LOCKED_LIMIT_S = 10.0
"""VirtualBox lets a VM's lock go a moment after the call that held it, a moment more after its process has ended."""
LOCKED_FIRST_WAIT_S, LOCKED_LONGEST_WAIT_S = 0.05, 1.0

_SECRET = re.compile(r"(token|secret)=[0-9A-Fa-f]+")


class VBoxManage:
    """The command line of one VirtualBox home (VBOX_USER_HOME of this process's environment)."""

    def __init__(self, reactor: Any, trace: Path | None, *, program: str | None = None) -> None:
        """program: None looks for it. trace: None keeps none."""
        self.reactor = reactor
        self.program = program or virtualbox.program()
        self.calls = 0
        """How many there have been: tests and bench count them."""
        self._unreachable = False
        """The service was asked for in vain, for long."""
        self._trace_file = trace
        if trace is not None:
            self._trace(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} calls {self.program or 'nothing'}")

    async def ask(self, *argv: str, limit_s: float = CALL_LIMIT_S, done: Event | None = None) -> ToolResult:
        """Call it; any exit status is an answer, and its stdout has no warnings of scripts. Raises HostProblem: not
        installed, or no answer within the limit.

        done: set when what is asked for has happened; then the call need not have ended.
        """
        began = self.reactor.seconds()
        answer = await self._ask_once(argv, limit_s, done)
        while answer.status != 0 and problems.never_began(answer.text):
            if self.reactor.seconds() - began > (BROKE_OFF_WAIT_S if self._unreachable else NOT_THERE_LIMIT_S):
                self._unreachable = True  # a service that cannot be started costs this once, not with each call
                return answer
            log.info("VirtualBox's service was not there; asking again")
            await sleep(self.reactor, BROKE_OFF_WAIT_S)
            answer = await self._ask_once(argv, limit_s, done)
        self._unreachable = False
        while (
            answer.status != 0
            and argv[0] in QUESTIONS
            and problems.broke_off(answer.text)
            and self.reactor.seconds() - began < BROKE_OFF_LIMIT_S
        ):
            log.info("VirtualBox broke off in the middle of an answer; asking again")
            await sleep(self.reactor, BROKE_OFF_WAIT_S)
            answer = await self._ask_once(argv, limit_s, done)
        return answer

    async def _ask_once(self, argv: Sequence[str], limit_s: float, done: Event | None) -> ToolResult:
        if self.program is None:
            raise problems.not_installed()
        self.calls += 1
        began = time.monotonic()
        try:
            result = await self._run(argv, limit_s, done)
        except tool.ToolMissing as error:
            self._trace_call(argv, began, f"cannot be started: {error}")
            raise problems.not_installed(str(error)) from error
        except LimitReached as error:
            self._trace_call(argv, began, f"no answer within {limit_s:g} s: killed")
            raise problems.hung(" ".join(argv[:2]), limit_s) from error
        except BaseException:
            self._trace_call(argv, began, "given up: killed")
            raise
        self._trace_call(argv, began, f"status {result.status}", out=result.stdout, err=result.stderr)
        return replace(result, stdout=without_warnings(result.stdout))

    async def _run(self, argv: Sequence[str], limit_s: float, done: Event | None) -> ToolResult:
        """About one call in 400 has done its work and then stands still for 10 s before it exits (seen with 7.2.22: its
        main thread waits for another one that has ended). So a question is asked a second time when it takes long, and
        a call whose effect is there is ended."""
        assert self.program is not None  # noqa: S101 (the caller looked)
        command = [self.program, *argv]
        first = start(tool.run(self.reactor, command, limit_s=limit_s))
        if argv[0] in QUESTIONS:
            second = start(self._again(command, limit_s))
        elif done is not None:
            second = start(self._effect(done))
        else:
            return await first
        failed: list[Failure] = []

        def give_up(failure: Failure) -> Failure:
            failed.append(failure)
            second.cancel()  # the limit is that of both
            return failure

        first.addErrback(give_up)
        try:
            _, result = await race([first, second])
        except FailureGroup:
            failed[0].raiseException()
            raise  # not reached
        return result

    async def _again(self, command: Sequence[str], limit_s: float) -> ToolResult:
        await sleep(self.reactor, ASK_AGAIN_S)
        return await tool.run(self.reactor, command, limit_s=limit_s)

    async def _effect(self, done: Event) -> ToolResult:
        await done.wait()
        await sleep(self.reactor, AFTER_EFFECT_S)
        return ToolResult(0, "", "its effect is there, but the call does not end")

    async def do(self, what: str, *argv: str, limit_s: float = CALL_LIMIT_S, done: Event | None = None) -> str:
        """Call it and expect success: stdout. A VM that is locked for a moment is waited for.

        Raises what problems.explain returns; `what` says what was tried.
        """
        began, wait = self.reactor.seconds(), LOCKED_FIRST_WAIT_S
        while True:
            answer = await self.ask(*argv, limit_s=limit_s, done=done)
            if answer.status == 0:
                return answer.stdout
            if not problems.is_locked(answer.text) or self.reactor.seconds() - began > LOCKED_LIMIT_S:
                raise problems.explain(what, answer.text)
            await sleep(self.reactor, wait)
            wait = min(2 * wait, LOCKED_LONGEST_WAIT_S)

    def _trace_call(self, argv: Sequence[str], began: float, outcome: str, *, out: str = "", err: str = "") -> None:
        took = time.monotonic() - began
        quoted = " ".join(repr(word) if not word or set(word) & set(" '\"\n") else word for word in argv)
        lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} VBoxManage {quoted}", f"  {outcome}, {took:.3f} s"]
        for name, text in (("out", out), ("err", err)):
            shown = text if len(text) <= OUTPUT_TRACED else text[:OUTPUT_TRACED] + "\n[...]"
            lines += [f"  {name}| {line}" for line in shown.splitlines()]
        self._trace("\n".join(lines))

    def _trace(self, text: str) -> None:
        if self._trace_file is None:
            return
        said = _SECRET.sub(r"\1=...", text) + "\n"
        try:
            boundedlog.append(
                self._trace_file, said.encode("utf-8", "backslashreplace"), TRACE_LIMIT, TRACE_KEPT, mode=0o600
            )
        except (OSError, ValueError) as error:
            log.debug("the trace of VBoxManage cannot be written: %s", error)
