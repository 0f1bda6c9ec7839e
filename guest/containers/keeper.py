"""A keeper: root's supervisor of one container, a child of the helper. Makes it, watches it, removes every trace of it.

Speaks lines of JSON over the control socket, in the words of guest/commands/supervisor.py. First comes the request
(four bytes of length, JSON), later {"cancel": grace in s}; end of file: kill all, go.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import stat
import time
from pathlib import Path
from typing import Any, NoReturn

from guest.containers import mounts, spec
from vmcontrol.common.supervisor import KILL_LIMIT_S, become_subreaper
from vmcontrol.protocol.text import BadMessage

CRUN = "/usr/bin/crun"
BASE = "/run/vmwrapper/containers"
STORE = "/data/containers"
CGROUPS = "/sys/fs/cgroup/vmwrapper"
AGENTS_STATE = ".vmwrapper"
"""The agent's own folder in its home: no container sees it."""
REQUEST_LIMIT_S = 30.0
SAMPLE_S, LONGEST_SAMPLE_S = 1.0, 5.0


class Failed(Exception):  # noqa: N818 (a result)
    """It was not started: a word of docs/reference/messages.md, and the sentence."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def main(number: int, fds: list[int]) -> NoReturn:
    """Keep one container on stdin, stdout, stderr, folder and control. Does not return."""
    *streams, folder, control_fd = fds
    try:
        control = socket.socket(fileno=control_fd)
        Keeper(number, streams, folder, control).run()
    finally:
        os._exit(0)


class Keeper:
    """One container, from the request to the report of its end."""

    def __init__(self, number: int, streams: list[int], folder: int, control: socket.socket) -> None:
        self._name = str(number)
        self._streams = streams
        self._folder = folder
        self._control = control
        self._base = Path(BASE, self._name)
        self._store = Path(STORE, self._name)
        self._cgroup = Path(CGROUPS, self._name)
        self._task = -1
        self._stop_signal = int(signal.SIGTERM)
        self._kill_at: float | None = None
        self._asked = False
        self._buffer = b""

    def run(self) -> None:
        become_subreaper()
        user = (spec.VM_ID, spec.VM_ID)
        last: dict[str, Any]
        try:
            request = self._request()
            self._stop_signal = request.container.stop_signal
            self._make(request)
            last = {"ended": self._run(self._start())}
        except Failed as error:
            last = {"failed": error.code, "detail": str(error)}
        except (mounts.ContainerError, BadMessage) as error:
            last = {"failed": "not-started", "detail": str(error)}
        except OSError as error:
            last = {"failed": "not-started", "detail": f"the container: {error}"}
        self._remove(*user)
        self._say(last)

    def _request(self) -> spec.Request:
        self._control.settimeout(REQUEST_LIMIT_S)
        length = int.from_bytes(self._exactly(4), "little")
        if length > spec.REQUEST_LIMIT:
            raise BadMessage(f"a request of {length} bytes; {spec.REQUEST_LIMIT} are read")
        return spec.read_request(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            chunk = self._control.recv(min(65536, length - len(data)))
            if not chunk:
                raise BadMessage("the request is cut short")
            data += chunk
        return bytes(data)

    def _make(self, request: spec.Request) -> None:
        """Everything that crun needs. Raises ContainerError, OSError."""
        run = request.container
        if not os.access(CRUN, os.X_OK):
            raise mounts.ContainerError(f"this guest image runs no containers: it has no {CRUN}")
        if run.network:
            raise mounts.ContainerError("this guest image cannot join a container to the network")
        self._task = mounts.same_folder_below_data(self._folder)
        disk = mounts.find_disk(run.disk)
        for name in ("lower", "root", "work", "etc", "empty"):
            self._folder_at(self._base / name, 0o711, 0)
        for name in ("upper", "root-work", "task-work"):
            self._folder_at(self._store / name, 0o755, 0)
        lower, root, work = (str(self._base / name) for name in ("lower", "root", "work"))
        mounts.mount(disk, lower, "squashfs", mounts.MS_RDONLY | mounts.MS_NODEV)
        owner = spec.guest_id(0, run.uid), spec.guest_id(0, run.gid)
        os.chown(self._store / "upper", *owner)
        mounts.overlay(root, lower, str(self._store / "upper"), str(self._store / "root-work"))
        image = os.open(lower, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        below = mounts.open_inside(image, run.workdir)
        empty = str(self._base / "empty")
        mounts.overlay(work, empty if below is None else below, self._task, str(self._store / "task-work"))
        for fd in (image, below):
            if fd is not None:
                os.close(fd)
        for name, text in (
            ("hostname", f"{spec.HOSTNAME}\n"),
            ("hosts", f"127.0.0.1 localhost {spec.HOSTNAME}\n::1 localhost\n"),
            ("resolv.conf", ""),
        ):
            (self._base / "etc" / name).write_text(text, encoding="ascii")
            (self._base / "etc" / name).chmod(0o644)
        (self._base / "etc").chmod(0o755)
        masked = (f"{run.workdir}/{AGENTS_STATE}",)
        configuration = spec.configuration(
            request, root=root, work=work, etc=str(self._base / "etc"), cgroup=f"/vmwrapper/{self._name}", masked=masked
        )
        (self._base / "config.json").write_text(json.dumps(configuration), encoding="utf-8")

    @staticmethod
    def _folder_at(path: Path, mode: int, owner: int) -> None:
        path.mkdir(parents=True)
        for one in (path.parent, path):
            one.chmod(0o711 if one is path.parent else mode)
        os.chown(path, owner, owner)

    def _start(self) -> int:
        """The pid of the container's first process, our child. Raises Failed."""
        log = self._base / "log"
        command = [CRUN, f"--root={self._base}/crun", "--cgroup-manager=cgroupfs", f"--log={log}", "run", "--detach"]
        command += [f"--pid-file={self._base}/pid", f"--bundle={self._base}", self._name]
        streams = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(self._streams)]
        pid = os.posix_spawn(
            CRUN,
            command,
            {"PATH": spec.PATH},
            file_actions=streams,
            setsid=True,
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
        _, status = os.waitpid(pid, 0)
        if status:
            text = log.read_text(errors="replace").strip() if log.exists() else ""
            text = (
                text.splitlines()[-1][-1000:] if text else f"crun ended with status {os.waitstatus_to_exitcode(status)}"
            )
            code = "not-started"
            if "No such file or directory" in text and "executable" in text:
                code = "application-missing"
            elif "Permission denied" in text and "exec" in text:
                code = "application-not-executable"
            raise Failed(code, text)
        return int((self._base / "pid").read_text())

    def _run(self, pid: int) -> dict[str, Any]:
        """Watch the container to its end; the report."""
        started, began = time.time(), time.monotonic()
        self._say({"started": pid})
        self._control.setblocking(False)
        wake = os.pidfd_open(pid)
        poller = select.poll()
        poller.register(wake, select.POLLIN)
        poller.register(self._control, select.POLLIN)
        sample_at, sampled = began + SAMPLE_S, None
        while True:
            now = time.monotonic()
            if self._kill_at is not None and now >= self._kill_at:
                self._kill_cgroup()
            until = sample_at if self._kill_at is None else min(sample_at, max(self._kill_at, now + 0.1))
            ready = {fd for fd, _ in poller.poll(max(0.0, until - now) * 1000 + 1)}
            if wake in ready:
                break
            if self._control.fileno() in ready and not self._obey(pid):
                poller.unregister(self._control)
                self._kill_at = time.monotonic()
            if time.monotonic() >= sample_at:
                sample = {"cpu_time_s": round(self._cpu_s(), 3), "memory_bytes": self._number("memory.current")}
                if sample != sampled:
                    sampled = sample
                    self._say({"sample": sample})
                sample_at = time.monotonic() + min(LONGEST_SAMPLE_S, max(SAMPLE_S, (now - began) / 60))
        _, status = os.waitpid(pid, 0)
        self._kill_cgroup()
        left = self._wait_empty()
        out_of_memory = self._field("memory.events", "oom_kill") > 0
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "exit_status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "cpu_time_s": self._cpu_s(),
            "resources": {name: getattr(used, name) for name in dir(used) if name.startswith("ru_")},
            "peak_memory_bytes": max(self._number("memory.peak"), 0),
            "started": started,
            "ended": time.time(),
            "elapsed_s": time.monotonic() - began,
            "cancelled": self._kill_at is not None,
            "killed_for_memory": out_of_memory and self._kill_at is None,
            "killed_by_kernel": out_of_memory,
            "left": left,
        }

    def _obey(self, pid: int) -> bool:
        """Read what the agent says. False: it is gone."""
        try:
            chunk = self._control.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not chunk:
            return False
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        self._buffer = self._buffer[-4096:]
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                grace_s = float(json.loads(line)["cancel"])
                if not 0 <= grace_s <= 86400:
                    continue
                when = time.monotonic() + grace_s
                self._kill_at = min(when, self._kill_at or when)
                if not self._asked:
                    self._asked = True
                    os.kill(pid, self._stop_signal)
        return True

    # --- the cgroup ---------------------------------------------------------------------------------------------------

    def _number(self, name: str) -> int:
        try:
            return int((self._cgroup / name).read_text())
        except (OSError, ValueError):
            return 0

    def _field(self, name: str, field: str) -> int:
        try:
            return next(
                int(line.split()[1])
                for line in (self._cgroup / name).read_text().splitlines()
                if line.startswith(field + " ")
            )
        except (OSError, ValueError, StopIteration, IndexError):
            return 0

    def _cpu_s(self) -> float:
        return self._field("cpu.stat", "usage_usec") / 1e6

    def _kill_cgroup(self) -> None:
        with contextlib.suppress(OSError):
            (self._cgroup / "cgroup.kill").write_text("1")

    def _wait_empty(self) -> int:
        """Wait for the end of what was killed, and bury it; 1: something is left."""
        limit = time.monotonic() + KILL_LIMIT_S
        while time.monotonic() < limit:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not self._field("cgroup.events", "populated"):
                return 0
            time.sleep(0.01)
        return 1

    def _remove(self, uid: int, gid: int) -> None:
        """Mounts, folders, cgroup; and what others of the container left in the task's folder goes to its user."""
        self._kill_cgroup()
        self._wait_empty()
        for name in ("work", "root", "lower"):
            mounts.unmount(str(self._base / name))
        if self._task >= 0:
            ids = range(spec.FIRST_ID, spec.FIRST_ID + spec.IDS)
            with contextlib.suppress(OSError):
                mounts.give_back(self._task, uid, gid, ids)
        for path in (self._base, self._store):
            remove_tree(str(path))
        with contextlib.suppress(OSError):
            self._cgroup.rmdir()

    def _say(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._control.settimeout(5)
            self._control.sendall(json.dumps(event).encode() + b"\n")
            self._control.setblocking(False)


def kill_all() -> None:
    """Kill every container."""
    with contextlib.suppress(OSError):
        Path(CGROUPS, "cgroup.kill").write_text("1")


def remove_tree(path: str, *, keep_top: bool = False) -> None:
    """Remove what lies there; no link is followed (shutil.rmtree goes by descriptors)."""
    if keep_top:
        for name in os.listdir(path):  # noqa: PTH208
            remove_tree(f"{path}/{name}")
        return
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            Path(path).unlink()
            return
        shutil.rmtree(path, ignore_errors=True)
