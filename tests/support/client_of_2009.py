"""A client of HostMain as VMwrapper.py of 2009 was one: the same calls in the same order, with the same argument forms.

Only its fixed sleeps are shorter. It speaks to http://localhost:8080/RPC2 and knows none of the newer methods.
"""

from __future__ import annotations

import time
import xmlrpc.client
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.limits import after

SERVER = "http://localhost:8080/RPC2"
PAUSE_S = 0.2
LIMIT_S = 120.0


class GivenUpError(AssertionError):
    """It would have given up here, with this exit code."""


@dataclass
class Task:
    """A guest task of job.xml, as far as it used it."""

    virtualmachine: str
    application: str
    app_path: str
    """Its physical name, as boinc_resolve_filename told it."""
    copy_files_to_vm: dict[str, str]
    """Logical -> physical name."""
    input_path: str
    copy_files_from_vm: tuple[str, ...]
    command_line: str
    image_path: str = ""


class VmWrapper2009:
    """One run of one guest task."""

    def __init__(self, task: Task, server: Any = None) -> None:
        self._task = task
        self._vmmanage: Any = server or xmlrpc.client.ServerProxy(SERVER)
        self._id: str | None = None

    def wait_for_hostmain(self) -> list[str]:
        """listAvailableVMs until it answers."""

        def answer() -> list[str] | None:
            try:
                return list(self._vmmanage.listAvailableVMs())
            except OSError:
                return None

        vms: list[str] = self._until(answer, "HostMain")
        return vms

    def run_vm(self) -> None:
        """From nothing to a command that runs."""
        task, host = self._task, self._vmmanage
        if task.virtualmachine not in host.listAvailableVMs():
            host.createVM(task.virtualmachine, task.image_path)
        if host.getState(task.virtualmachine) != "Saved":
            try:
                host.restoreSnapshot(task.virtualmachine)
            except xmlrpc.client.Fault as fault:  # it went on
                _only_minus_one(fault)
        if task.virtualmachine not in host.listRunningVMs():
            host.start(task.virtualmachine)
        self._until(lambda: task.virtualmachine in host.listRunningVMs(), "the VM to run")
        self._until(self._ping, "the VM to connect to the broker")
        copies = {task.application: task.app_path, **task.copy_files_to_vm} if task.app_path else task.copy_files_to_vm
        for name, path in copies.items():
            [out, err, status] = host.cpFileToVM(task.virtualmachine, path, name)
            if status:
                raise GivenUpError(f"4: {name}: {out}{err}")
        self._id = self._until(self._run_cmd, "the command to be sent")

    def cpu_time(self) -> float:
        """Uptime minus idle time, read by a command in the guest."""
        cmdid = self._vmmanage.runCmd(self._task.virtualmachine, "cat", ["/proc/uptime"])
        self._until(lambda: cmdid in self._vmmanage.listFinishedCmds(), "the CPU time")
        up, idle = map(float, self._vmmanage.getCmdResults(cmdid)["out"].split())
        return up - idle

    def finish(self, stdout: Path, stderr: Path, *, save: bool = True) -> dict[str, Any]:
        """Until the command ended: its results, written and copied; the VM saved."""
        host, task = self._vmmanage, self._task
        self._until(lambda: self._id in host.listFinishedCmds(), "the command to end")
        results: dict[str, Any] = host.getCmdResults(self._id)
        stdout.write_text(results["out"])
        stderr.write_text(results["err"])
        results["cpu"] = results["resources"]["ru_stime"] + results["resources"]["ru_utime"]
        for name in task.copy_files_from_vm:
            [out, err, status] = host.cpFileFromVM(task.virtualmachine, name, str(stdout.parent / name))
            if status:
                raise GivenUpError(f"4: {name}: {out}{err}")
        if save:
            host.saveState(task.virtualmachine)
        return results

    def _ping(self) -> bool:
        try:
            return bool(self._vmmanage.ping(self._task.virtualmachine))
        except xmlrpc.client.Fault as fault:
            _only_minus_one(fault)
            return False

    def _run_cmd(self) -> str | None:
        task = self._task
        line = task.command_line + " "  # its own command line, of which there is none
        try:
            id = self._vmmanage.runCmd(task.virtualmachine, task.application, [line], "{}", "None", task.input_path)
        except xmlrpc.client.Fault:
            return None
        return str(id)

    def _until(self, look: Callable[[], Any], what: str) -> Any:
        deadline = after(LIMIT_S)
        while not (value := look()) and value != []:
            if time.monotonic() > deadline:
                raise GivenUpError(f"5: it took too long for {what}")
            time.sleep(PAUSE_S)
        return value


def _only_minus_one(fault: xmlrpc.client.Fault) -> None:
    """The one fault code of 2009."""
    if fault.faultCode != -1:
        raise fault
