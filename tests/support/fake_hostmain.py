"""A HostMain that speaks the contract to the wrapper and has no hypervisor: its VMs are entries of a file in the slot.

Started by the wrapper in place of `vmcontrol.hostmain` (tests/support/drive_wrapper.py). Its world survives
kill -9, as a hypervisor's would. `fake_plan.json` tells it what to do wrong:

    {"kill": ["runCommand", 1, "before"]}    kill -9 the wrapper at the first runCommand, before or after doing it
    {"die": ["waitCommand", 1]}              die itself there, its VMs with it
    {"faults": [["start", 1, "text"]]}       the next call of a method answers with this fault, once
    {"lifeline": "die"}                      do not save when the wrapper is gone
    {"vm_dies": ["waitCommand", 1]}          the VM is gone at that call
    {"agent_dies": ["getFile", 1]}           its agent is: the next one knows no command and has no output of any
    {"hush": ["waitCommand", 1]}             its guest falls silent: what asks it fails, its snapshots are silent
    {"slow": {"putFile": 60}}                each call of a method takes so many seconds; others go on meanwhile
    {"late": 60}                             it says after so many seconds where it listens
    {"cannot_begin": 2}                      it ends at its next starts: a port is in use
    {"lacks": ["getFile", 2]}                so many calls of a method find the disk full
    {"full": 2}                              the disk is full now: its VMs are Stuck, and so many tries to go on fail
    {"gone": 9}                              so many requests are not answered from now on
    {"unsaved": ["disk-full", "text"]}       at its end no VM can be saved, for this reason

What was used is taken out of the plan. A command is data: its arguments are the steps that it takes; `hush=N` makes the
guest fall silent when one of the first N attempts begins.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from xmlrpc.client import Fault
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

from vmcontrol.common import containerdisk
from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.vm import VmInfo, VmState

WORLD, PLAN, CALLS, RUNS = (
    Path("fake_world.json"),
    Path("fake_plan.json"),
    Path("fake_calls.txt"),
    Path("fake_runs.txt"),
)
LIVE = ("Running", "Paused", "Stuck")
changed = threading.Condition()


def read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def take_from_plan(what: str) -> int:
    """A number of the plan, which is used up with that; 0: it is not there."""
    plan = read_json(PLAN, {})
    value = plan.pop(what, 0)
    if value:
        PLAN.write_text(json.dumps(plan))
    return int(value)


class World:
    """The VMs: state, disk, memory (the agent's table), snapshots."""

    def __init__(self) -> None:
        self.vms: dict[str, dict[str, Any]] = read_json(WORLD, {})
        for vm in self.vms.values():  # a QEMU dies with its HostMain
            if vm["state"] in LIVE:
                vm["state"] = "Aborted"
        self.counts: dict[str, int] = {}

    def save(self) -> None:
        temporary = WORLD.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")  # a killed one may still write
        temporary.write_text(json.dumps(self.vms, indent=1))
        temporary.replace(WORLD)

    def vm(self, name: str) -> dict[str, Any]:
        if name not in self.vms:
            raise Fault(-1, f"No VM by the name/id {name} found")
        return self.vms[name]

    def live(self, name: str) -> dict[str, Any]:
        vm = self.vm(name)
        if vm["state"] not in LIVE:
            raise Fault(3, f"{name} is {vm['state']}")
        return vm

    def awake(self, name: str) -> dict[str, Any]:
        """A VM whose guest can be asked."""
        vm = self.live(name)
        if vm.get("hushed") is not None:
            raise Fault(3, f"the agent in {name} has not been heard within 20 s")
        return vm

    def advance(self) -> None:
        """Commands of running VMs go on."""
        if full := take_from_plan("full"):
            for vm in self.vms.values():
                vm["state"], vm["held"] = "Stuck", full + 1
        now = time.monotonic()
        for vm in self.vms.values():
            last, vm["at"] = vm.get("at", now), now
            if vm["state"] != "Running" or vm.get("hushed") is not None:
                continue
            for command in vm["table"].values():
                if command["state"] == "running":
                    command["left"] -= max(0.0, now - last)
                    if command["left"] <= 0:
                        self.finish(vm, command)

    def finish(self, vm: dict[str, Any], command: dict[str, Any]) -> None:
        files, steps, result = vm["files"], command["request"]["arguments"], {"exit_status": 0, "signal": None}
        for step in steps:
            word, _, value = step.partition("=")
            if word == "make":
                files[value] = f"made by {command['id']}\n"
            elif word == "copy":
                source, _, target = value.partition(":")
                files[target] = files.get(source, "nothing")
            elif word == "folder":  # under the name of a file
                files[value] = None
            elif word == "append":
                name, _, text = value.partition(":")
                files[name] = files.get(name, "") + text + "\n"
            elif word == "exit":
                result["exit_status"] = int(value)
            elif word == "oom":
                result |= {"exit_status": None, "signal": 9, "out_of_memory": True}
            elif word == "killed" and command["attempt"] <= int(value):
                result |= {"exit_status": None, "signal": 9}
        name = command["id"]
        files[f".{name}.out"], files[f".{name}.err"] = f"stdout of {steps}\n", "first line\nlast words\n"
        command["state"] = "finished"
        command["version"] += 1
        command["result"] = {
            "cmd-id": name, "attempt": command["attempt"], "out": "", "err": "", "finished": True,
            "stdout_path": f".{name}.out", "stderr_path": f".{name}.err", "stderr_tail": files[f".{name}.err"],
            "cpu_time_s": 1.5, "out_of_memory": False, "error": "", **result,
        }  # fmt: skip

    # --- the API

    def do_listAvailableVMs(self) -> list[str]:
        return list(self.vms)

    def do_getLimits(self) -> dict[str, int]:
        return {"max_cpus": 64, "min_memory_mb": 16, "max_memory_mb": 1024 * 1024}

    def do_defineVM(self, name: str, image: str, settings: dict[str, Any]) -> bool:
        if name in self.vms:
            return False
        assert Path(image).is_file()
        assert settings["memory_mb"] > 0
        if settings["cpus"] > 64:
            raise Fault(4, f"{name}: {settings['cpus']} processors are more than this one takes: at most 64")
        self.vms[name] = {"state": "PoweredOff", "files": {}, "table": {}, "snapshots": {}, "saved": None}
        self.vms[name]["cpus"] = settings["cpus"]
        self.vms[name]["disks"] = [containerdisk.read(Path(disk)).id for disk in settings["disks"]]
        self.vms[name]["desktop"] = "127.0.0.1:5999" if settings["remote_desktop"] else None
        return True

    def do_deleteVM(self, name: str) -> bool:
        self.vms.pop(name, None)
        return True

    def do_takeVM(self, name: str) -> bool:
        self.vm(name).setdefault("found", self.vm(name)["state"])
        return True

    def do_releaseVM(self, name: str) -> bool:
        vm = self.vm(name)
        found = vm.pop("found", None)
        if found is not None:
            vm["snapshots"] = {n: s for n, s in vm["snapshots"].items() if not n.startswith("vmwrapper_")}
            if found in ("PoweredOff", "Aborted"):
                self.do_powerOff(name)
            elif vm["state"] in LIVE:
                self.do_saveState(name)
        return True

    def do_getVMInfo(self, name: str) -> dict[str, Any]:
        vm = self.vm(name)
        stuck = vm["state"] == VmState.STUCK
        return VmInfo(
            name,
            VmState(vm["state"]),
            "52:54:00:00:00:01",
            trouble="the disk of this computer is full; free some space" if stuck else "",
            resumable=stuck,
            unusable=vm.get("unusable", ""),
            snapshots=tuple(vm["snapshots"]),
            remote_desktop_address=vm.get("desktop"),
            vm_is_descendant=True,
        ).to_struct()

    def do_getState(self, name: str) -> str:
        return str(self.vm(name)["state"])

    def do_start(self, name: str) -> bool:
        vm = self.vm(name)
        if vm["state"] == "Saved":
            (vm["table"], hushed), vm["saved"] = vm["saved"], None
            vm["hushed"] = time.monotonic() if hushed else None
        else:
            vm["table"], vm["hushed"] = {}, None
        vm["state"] = "Running"
        return True

    def do_pause(self, name: str) -> bool:
        if self.live(name)["state"] != "Stuck":
            self.live(name)["state"] = "Paused"
        return True

    def do_unpause(self, name: str) -> bool:
        vm = self.live(name)
        vm["held"] = max(0, vm.get("held", 0) - 1)
        vm["state"] = "Stuck" if vm["held"] else "Running"
        return True

    def do_saveState(self, name: str) -> bool:
        vm = self.live(name)
        vm["state"], vm["saved"], vm["table"] = "Saved", [vm["table"], vm.get("hushed") is not None], {}
        return True

    def do_powerOff(self, name: str) -> bool:
        vm = self.vm(name)
        vm["state"], vm["saved"], vm["table"] = "PoweredOff", None, {}
        return True

    def do_saveSnapshot(self, name: str, snapshot: str, _description: str = "") -> bool:
        vm = self.live(name)
        assert snapshot not in vm["snapshots"]
        vm["snapshots"][snapshot] = copy.deepcopy([vm["files"], [vm["table"], vm.get("hushed") is not None]])
        return True

    def do_restoreSnapshot(self, name: str, snapshot: str = "") -> bool:
        vm = self.vm(name)
        assert vm["state"] not in LIVE
        vm["files"], vm["saved"] = copy.deepcopy(vm["snapshots"][snapshot])
        vm["state"] = "Saved"
        return True

    def do_deleteSnapshot(self, name: str, snapshot: str) -> bool:
        self.vm(name)["snapshots"].pop(snapshot, None)
        return True

    def do_waitVM(self, name: str, states: list[str], timeout: float) -> str:
        return str(self.poll(timeout, lambda: self.vm(name)["state"], lambda state: state in states))

    def do_waitGuest(self, name: str, timeout: float) -> bool:
        return bool(self.poll(timeout, lambda: self.hears(name), bool))

    def hears(self, name: str) -> bool:
        vm = self.vm(name)
        return vm["state"] == "Running" and vm.get("hushed") is None

    def do_pingGuest(self, name: str, timeout: float, _anew: bool = False) -> bool:
        return bool(self.poll(timeout, lambda: self.hears(name), bool))

    def do_waitSilent(self, name: str, silent: float, timeout: float) -> float:
        def seconds() -> float:
            since = self.vm(name).get("hushed")
            return 0.0 if since is None else time.monotonic() - since

        return float(self.poll(timeout, seconds, lambda value: value >= silent))

    def do_getGuestUptime(self, name: str) -> float:
        return float(self.awake(name).get("uptime", -1.0))

    def view(self, name: str, id: str) -> dict[str, Any]:
        command = self.live(name)["table"].get(id)
        if command is None:
            return CommandStatus(id, "", CommandState.UNKNOWN).to_struct()
        return CommandStatus(
            id,
            "",
            CommandState(command["state"]),
            attempt=command["attempt"],
            pid=7,
            fraction_done=None if "silent" in command["request"]["arguments"] else 0.5,
            cpu_time_s=0.1,
            version=command["version"],
            result=command["result"],
        ).to_struct()

    def do_runCommand(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        vm, id = self.awake(name), request["id"]
        known = vm["table"].get(id)
        if known is not None and known["attempt"] >= request["attempt"]:
            return self.view(name, id)
        program = request["command"]
        container = request.get("container")
        assert not program.startswith("./") or program[2:] in vm["files"], f"{program} was not copied in"
        left = next((float(a.partition("=")[2]) for a in request["arguments"] if a.startswith("sleep=")), 0.0)
        vm["table"][id] = {"id": id, "state": "running", "attempt": request["attempt"], "version": 1, "left": left,
                           "request": request, "result": None}  # fmt: skip
        for step in request["arguments"]:
            if step.startswith("hush=") and request["attempt"] <= int(step.removeprefix("hush=")):
                vm["hushed"] = time.monotonic()
            if step.startswith("early="):  # written when the program begins, not when it ends
                file, _, text = step.removeprefix("early=").partition(":")
                text = "x" * int(text[1:]) if text.startswith("@") else text
                vm["files"][file] = text
        if container and container["disk"] not in vm["disks"]:
            self.finish(vm, vm["table"][id])
            error = "not-started: no disk of this virtual machine holds the container"
            vm["table"][id]["result"] |= {"exit_status": None, "error": error}
        with RUNS.open("a") as runs:
            runs.write(f"{id} {request['attempt']}\n")
        return self.view(name, id)

    def do_waitCommand(self, name: str, id: str, version: int, timeout: float) -> dict[str, Any]:
        seen: dict[str, Any] = self.poll(timeout, lambda: self.view(name, id), lambda view: view["version"] != version)
        return seen

    def do_queryCommand(self, name: str, id: str) -> dict[str, Any]:
        self.awake(name)
        return self.view(name, id)

    def do_listCommands(self, name: str) -> list[dict[str, Any]]:
        return [self.view(name, id) for id in self.awake(name)["table"]]

    def do_cancelCommand(self, name: str, id: str, _grace: float) -> dict[str, Any]:
        vm = self.awake(name)
        command = vm["table"][id]
        if command["state"] == "running":
            self.finish(vm, command)
            command["result"] |= {"exit_status": None, "signal": 15}
        return self.view(name, id)

    def do_acknowledgeResult(self, name: str, id: str) -> bool:
        self.awake(name)["table"].pop(id, None)
        return True

    def do_putFile(self, name: str, local: str, remote: str) -> dict[str, Any]:
        text = Path(local).read_text()
        self.awake(name)["files"][remote] = text
        return {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest(), "seconds": 0.0}

    def do_getFile(self, name: str, remote: str, local: str, most: int = 2**31) -> dict[str, Any]:
        files = self.awake(name)["files"]
        if remote not in files:
            raise Fault(2, json.dumps({"path": remote, "listing": sorted(files)}))
        if files[remote] is None:
            raise Fault(2, json.dumps({"path": remote, "listing": [], "reason": "is no regular file"}))
        if len(files[remote]) > most:
            raise Fault(2, json.dumps({"path": remote, "listing": [], "reason": f"has {len(files[remote])} bytes"}))
        if Path(local).is_symlink():  # as the real one: it is replaced, not followed
            Path(local).unlink()
        Path(local).write_text(files[remote])
        return {"size": len(files[remote]), "sha256": "", "seconds": 0.0}

    def do_listFiles(self, name: str, folder: str = "") -> list[dict[str, Any]]:
        files = {Path(one): text for one, text in self.awake(name)["files"].items()}
        return [
            {"name": one.name, "size": len(text), "folder": False}
            for one, text in files.items()
            if one.parent == Path(folder)
        ]

    def do_setCpuCap(self, name: str, percent: int) -> bool:
        self.vm(name)["share"] = percent
        return True

    def do_setNetwork(self, name: str, connected: bool) -> bool:
        self.vm(name)["network"] = connected
        return True

    def do_getPerformanceData(self, _name: str) -> dict[str, float]:
        return {"cpu_time_s": 2.0}

    def do_shutdown(self, save: bool) -> list[dict[str, str]]:
        threading.Timer(0.05, os._exit, [0]).start()
        return self.end(save)

    def end(self, save: bool) -> list[dict[str, str]]:
        ends = []
        unsaved = read_json(PLAN, {}).get("unsaved")
        for name, vm in self.vms.items():
            if vm["state"] in LIVE:
                _ = self.do_powerOff(name) if unsaved or not save else self.do_saveState(name)
                ends.append({"name": name, "outcome": "saved" if save else "off", "reason": "", "key": ""})
                if unsaved:
                    ends[-1] |= {"outcome": "failed", "key": unsaved[0], "reason": unsaved[1]}
        return ends

    def poll(self, timeout: float, look: Any, good: Any) -> Any:
        end = time.monotonic() + timeout
        while True:
            self.advance()
            value = look()
            if good(value) or time.monotonic() >= end:
                return value
            changed.wait(0.02)

    # --- wrong on purpose

    def call(self, method: str, params: tuple[Any, ...]) -> Any:
        with changed:
            self.counts[method] = self.counts.get(method, 0) + 1
            with CALLS.open("a") as calls:
                calls.write(" ".join([method, *(str(p) for p in params if isinstance(p, str | bool))]) + "\n")
            plan = read_json(PLAN, {})
            self.misbehave(plan, method, "before")
            for fault in plan.get("faults", []):
                if fault[0] == method:
                    plan["faults"].remove(fault)
                    PLAN.write_text(json.dumps(plan))
                    raise Fault(fault[1], fault[2])
            if (lacks := plan.get("lacks")) and lacks[0] == method and lacks[1] > 0:
                PLAN.write_text(json.dumps({**plan, "lacks": [method, lacks[1] - 1]}))
                raise Fault(1, json.dumps({"key": "disk-full", "reason": "the disk is full", "delay_s": 600}))
            slow_until = time.monotonic() + plan.get("slow", {}).get(method, 0)
            while (left := slow_until - time.monotonic()) > 0:
                changed.wait(left)
            self.advance()
            try:
                value = getattr(self, f"do_{method}")(*params)
            finally:
                self.save()
                changed.notify_all()
            self.misbehave(plan, method, "after")
            return value

    def misbehave(self, plan: dict[str, Any], method: str, when: str) -> None:
        for what in ("kill", "die", "vm_dies", "agent_dies", "hush"):
            at = plan.get(what)
            if at and at[0] == method and self.counts[method] == at[1] and (at[2:] or ["before"])[0] == when:
                del plan[what]
                PLAN.write_text(json.dumps(plan))
                if what == "kill":
                    os.kill(os.getppid(), signal.SIGKILL)
                    if plan.get("lifeline") == "die":
                        os._exit(1)
                    time.sleep(60)  # the lifeline's thread ends this process
                elif what == "die":
                    os._exit(1)
                elif what == "hush":
                    for vm in self.vms.values():
                        vm["hushed"] = time.monotonic()
                elif what == "agent_dies":
                    for vm in self.vms.values():
                        files = {
                            name: text for name, text in vm["files"].items() if not name.endswith((".out", ".err"))
                        }
                        vm["table"], vm["files"] = {}, files
                else:
                    for vm in self.vms.values():
                        if vm["state"] in LIVE:
                            vm["state"], vm["table"] = "Aborted", {}


class Server(ThreadingMixIn, SimpleXMLRPCServer):
    daemon_threads = True


class Handler(SimpleXMLRPCRequestHandler):
    gone = 0

    def do_POST(self) -> None:
        secret = os.environ["VMWRAPPER_XMLRPC_SECRET"]
        wanted = "Basic " + base64.b64encode(f"vmwrapper:{secret}".encode()).decode()
        if self.headers.get("Authorization") != wanted:
            self.send_error(401)
            return
        with changed:
            Handler.gone += take_from_plan("gone")
            if Handler.gone:
                Handler.gone -= 1
                self.close_connection = True
                return
        super().do_POST()


def tell(event: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the wrapper is gone
        os.write(int(os.environ["VMWRAPPER_STATUS_FD"]), (json.dumps(event) + "\n").encode())


def watch_lifeline(world: World, server: Server) -> None:
    os.read(int(os.environ["VMWRAPPER_LIFELINE_FD"]), 1)
    server.socket.close()
    if read_json(PLAN, {}).get("lifeline") != "die":
        world.advance()
        tell({"event": "vms-ended", "vms": world.end(True)})
        world.save()
    os._exit(0)


def main() -> None:
    assert Path(sys.argv[1]).is_file(), "the configuration file"
    plan = read_json(PLAN, {})
    if plan.get("cannot_begin", 0) > 0:
        PLAN.write_text(json.dumps({**plan, "cannot_begin": plan["cannot_begin"] - 1}))
        sys.stderr.write("HostMain: cannot listen on 127.0.0.1:61613: Address already in use\n")
        os._exit(3)
    assert Path(os.environ["VMWRAPPER_SECRET_FILE"]).stat().st_mode & 0o777 == 0o600
    world = World()
    server = Server(("127.0.0.1", 0), requestHandler=Handler, logRequests=False, allow_none=True)
    server._dispatch = world.call  # type: ignore[assignment]
    threading.Thread(target=watch_lifeline, args=(world, server), daemon=True).start()
    time.sleep(read_json(PLAN, {}).get("late", 0))
    for event in (
        {"event": "xmlrpc", "host": "127.0.0.1", "port": server.server_address[1]},
        {"event": "broker-connected"},
    ):
        tell(event)
    server.serve_forever()


if __name__ == "__main__":
    main()
