"""The real BOINC client, for tests: without a network or a project server, in a folder and on a port of its own.

A hand-made client_state.xml gives it jobs whose files are there already, so it starts them within two seconds. A client
that the user of this computer runs is never touched: it has another folder and another port.

    with BoincClient(tmp_path, [Job("one", main_program=script, files=[JobFile("in", b"...")])]) as client:
        client.wait_for(lambda: client.result("one").is_running, "started")
        (client.slot("one") / "x").read_text()

With `attach` it is attached to a project that runs on this computer instead (`loopback_project`), gets its jobs from
there, and checks the signatures of their files.

Needs Debian's package boinc-client (boinc and boinccmd).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar
from xml.sax.saxutils import escape

import psutil
from lxml import etree

from tests.support.limits import after
from tests.support.owned import owned

BOINC = shutil.which("boinc")
BOINCCMD = shutil.which("boinccmd")
AVAILABLE = BOINC is not None and BOINCCMD is not None
WHY_NOT = "package boinc-client is not installed"

MASTER_URL = "http://127.0.0.1/vmwrapper_test/"
PROJECT_FOLDER = "127.0.0.1_vmwrapper_test"
PLATFORM = "x86_64-pc-linux-gnu"
PASSWORD = "only-for-this-test"
START_LIMIT_S = 30.0
QUIT_LIMIT_S = 60.0
LOOK_EVERY_S = 0.05

T = TypeVar("T")

RESULT_COMPUTE_ERROR = 3
RESULT_FILES_UPLOADED = 5
RESULT_ABORTED = 6
TASK_EXECUTING = 1
TASK_SUSPENDED = 9


@dataclass(frozen=True)
class JobFile:
    """A file of a job. name: logical name, under which it is linked into the slot; copied: into the slot instead."""

    name: str
    content: bytes | Path
    copied: bool = False
    executable: bool = False


@dataclass(frozen=True)
class Job:
    """One job: an app version and a result of its own, both called `name`."""

    name: str
    main_program: bytes | Path
    """An executable, a script with #! as a rule."""
    command_line: str = ""
    files: Sequence[JobFile] = ()
    outputs: Sequence[str] = ()
    """Logical names of output files, linked to files in the project's folder, see `BoincClient.output`."""
    avg_ncpus: float = 1.0
    memory_bound: float = 1e8
    """Bytes (rsc_memory_bound); the client starts only as many jobs as fit into its memory together."""
    disk_bound: float = 1e11


@dataclass(frozen=True)
class Result:
    """What the client says of a job (GUI RPC get_results)."""

    name: str
    state: int
    exit_status: int
    ready_to_report: bool
    is_running: bool
    """It has a process, which may be suspended."""
    task_state: int
    fraction_done: float
    current_cpu_time: float
    checkpoint_cpu_time: float
    wait_reason: str
    """Of a temporary exit; "" when there was none."""
    slot: int | None
    pid: int
    raw: etree._Element = field(repr=False)

    @property
    def text(self) -> str:
        return etree.tostring(self.raw, encoding="unicode")


class BoincClient:
    """A running client. `with` starts it, and ends it with everything it started, whatever happens."""

    def __init__(
        self,
        folder: Path,
        jobs: Iterable[Job] = (),
        *,
        attach: tuple[str, str] | None = None,
        checkpoint_period_s: float = 60.0,
        preferences: str = "",
        leave_in_memory: bool = True,
    ) -> None:
        """attach: master URL and account key of a project; jobs come from there, and results are named as there."""
        self.folder = folder
        self._attach = attach
        self.master_url = attach[0] if attach else MASTER_URL
        self.project_folder = re.sub(r"[^A-Za-z0-9._-]", "_", self.master_url.removeprefix("http://").rstrip("/"))
        self.jobs = {job.name: job for job in jobs}
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._descendants: list[psutil.Process] = []
        self._write_files(checkpoint_period_s, preferences, leave_in_memory=leave_in_memory)

    # --- life

    def __enter__(self) -> BoincClient:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start the client, or start it again after `quit`; returns when it answers."""
        assert BOINC is not None
        self._port = _free_port()
        log = (self.folder / "client.log").open("ab")
        with log:
            command = [
                *(BOINC, "--dir", str(self.folder), "--allow_multiple_clients", "--no_gpus", "--insecure"),
                *("--gui_rpc_port", str(self._port), "--no_priority_change", "--no_info_fetch"),
                *(("--attach_project", *self._attach) if self._attach and not self._is_attached() else ()),
            ]
            self._process = subprocess.Popen(
                owned(command, "TERM"),  # its tasks end with it
                cwd=self.folder,
                env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait_for(self._answers, "the client answers", START_LIMIT_S)

    def quit(self) -> None:
        """Ask the client to end, as a shutdown of the computer does; returns when it has ended."""
        self._remember_descendants()
        self.rpc("<quit/>")
        assert self._process is not None
        self._process.wait(QUIT_LIMIT_S)
        self._process = None

    def kill(self) -> None:
        """End the client and everything it started, at once. Harmless when repeated."""
        self._remember_descendants()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for process in self._descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._descendants, timeout=10)
        self._descendants = []

    def kill_alone(self) -> None:
        """kill -9 of the client; what it started finds out by itself, and is ended by `kill` if need be."""
        self._remember_descendants()
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def terminate_group(self, number: signal.Signals = signal.SIGTERM) -> None:
        """As systemd stops the service: a signal to the client and all its descendants at the same time."""
        self._remember_descendants()
        assert self._process is not None
        for process in [*self._descendants, psutil.Process(self._process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        self._process.wait(QUIT_LIMIT_S)
        self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # --- what it says

    def result(self, name: str) -> Result:
        """Raises KeyError when the client does not know the job."""
        for element in self.rpc("<get_results/>").iter("result"):
            if element.findtext("name") == name:
                return _result(element)
        raise KeyError(name)

    def slot(self, name: str) -> Path:
        """The slot directory of a job that was started."""
        slot = self.result(name).slot
        if slot is None:
            raise KeyError(f"{name} has no slot")
        return self.folder / "slots" / str(slot)

    def output(self, name: str, logical: str) -> Path:
        """Where an output file of a job is, also after its end (nothing is uploaded)."""
        return self.folder / "projects" / self.project_folder / f"{name}_0_{logical}"

    def boinccmd(self, *words: str) -> str:
        """What boinccmd prints."""
        assert BOINCCMD is not None
        done = subprocess.run(
            [BOINCCMD, "--host", f"localhost:{self._port}", "--passwd", PASSWORD, *words],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self) -> str:
        return (self.folder / "client.log").read_text(errors="replace")

    def stderr_of(self, name: str) -> str:
        """stderr.txt as it goes back to the project: of a job that has ended, from client_state.xml."""
        state = etree.fromstring((self.folder / "client_state.xml").read_bytes(), etree.XMLParser(recover=True))
        for element in state.iter("result"):
            if element.findtext("name") == name:
                return element.findtext("stderr_out") or ""
        raise KeyError(name)

    # --- what it is told

    def suspend(self, name: str) -> None:
        self._operate("suspend_result", name)

    def resume(self, name: str) -> None:
        self._operate("resume_result", name)

    def abort(self, name: str) -> None:
        self._operate("abort_result", name)

    def update(self) -> None:
        """The client calls its project's scheduler, as the button Update makes it."""
        reply = self.rpc(f"<project_update><project_url>{self.master_url}</project_url></project_update>")
        assert reply.find("success") is not None, etree.tostring(reply)

    def retry_transfer(self, name: str) -> None:
        """Of a file, now; else the client waits for minutes after a transfer that failed. KeyError: there is none."""
        reply = self.rpc(
            f"<retry_file_transfer><project_url>{self.master_url}</project_url>"
            f"<filename>{escape(name)}</filename></retry_file_transfer>"
        )
        if reply.find("success") is None:
            raise KeyError(name)

    def reread_preferences(self) -> None:
        """global_prefs_override.xml has changed."""
        self.rpc("<read_global_prefs_override/>")

    def set_run_mode(self, mode: str, seconds: float = 0) -> None:
        """mode: always, auto or never; for a while when seconds are given. Also wakes up postponed jobs."""
        self.rpc(f"<set_run_mode><{mode}/><duration>{seconds}</duration></set_run_mode>")

    def rpc(self, request: str) -> etree._Element:
        """One GUI RPC (https://github.com/BOINC/boinc/wiki/GuiRpcProtocol): the element boinc_gui_rpc_reply."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=30) as connection:
            nonce = _exchange(connection, "<auth1/>").findtext("nonce") or ""
            proof = hashlib.md5((nonce + PASSWORD).encode()).hexdigest()
            answer = _exchange(connection, f"<auth2><nonce_hash>{proof}</nonce_hash></auth2>")
            assert answer.find("authorized") is not None
            return _exchange(connection, request)

    def wait_for(self, condition: Callable[[], T], what: str, limit_s: float = 30.0) -> T:
        """What condition gives as soon as it is true. The client polls its tasks once a second and tells nobody."""
        deadline = after(limit_s)
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {limit_s:g} s: {what}\n--- the client's log\n{self.log()}")
            time.sleep(LOOK_EVERY_S)
        return found

    # --- inside

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            self.rpc("<exchange_versions/>")
        except (OSError, etree.XMLSyntaxError):
            return False
        return True

    def _is_attached(self) -> bool:
        return (self.folder / f"account_{self.project_folder}.xml").exists()

    def _operate(self, operation: str, name: str) -> None:
        reply = self.rpc(
            f"<{operation}><project_url>{self.master_url}</project_url><name>{escape(name)}</name></{operation}>"
        )
        assert reply.find("success") is not None, etree.tostring(reply)

    def _remember_descendants(self) -> None:
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._descendants += psutil.Process(self._process.pid).children(recursive=True)

    def _write_files(self, checkpoint_period_s: float, preferences: str, *, leave_in_memory: bool) -> None:
        project = self.folder / "projects" / self.project_folder
        (project.parent if self._attach else project).mkdir(parents=True)
        (self.folder / "gui_rpc_auth.cfg").write_text(PASSWORD)
        if self._attach is None:
            (self.folder / f"account_{self.project_folder}.xml").write_text(
                f"<account>\n<master_url>{MASTER_URL}</master_url>\n<authenticator>x</authenticator>\n</account>\n"
            )
        network = (
            "<report_results_immediately>1</report_results_immediately><dont_contact_ref_site>1</dont_contact_ref_site>"
            if self._attach
            else "<unsigned_apps_ok>1</unsigned_apps_ok>"
        )
        (self.folder / "cc_config.xml").write_text(
            "<cc_config>\n<log_flags><task>1</task><task_debug>1</task_debug>"
            "<sched_op_debug>1</sched_op_debug><trickle_debug>1</trickle_debug></log_flags>\n<options>\n"
            f"{network}\n<ncpus>64</ncpus>\n<skip_cpu_benchmarks>1</skip_cpu_benchmarks>\n"
            "<no_priority_change>1</no_priority_change>\n<no_gpus>1</no_gpus>\n</options>\n</cc_config>\n"
        )
        (self.folder / "global_prefs_override.xml").write_text(
            "<global_preferences>\n<suspend_cpu_usage>0</suspend_cpu_usage>\n<cpu_usage_limit>100</cpu_usage_limit>\n"
            "<run_on_batteries>1</run_on_batteries>\n<run_if_user_active>1</run_if_user_active>\n"
            f"<leave_apps_in_memory>{int(leave_in_memory)}</leave_apps_in_memory>\n"
            f"<disk_interval>{checkpoint_period_s}</disk_interval>\n<max_ncpus_pct>100</max_ncpus_pct>\n"
            "<disk_max_used_pct>100</disk_max_used_pct>\n<disk_min_free_gb>0</disk_min_free_gb>\n"
            "<disk_max_used_gb>0</disk_max_used_gb>\n<ram_max_used_busy_pct>100</ram_max_used_busy_pct>\n"
            f"<ram_max_used_idle_pct>100</ram_max_used_idle_pct>\n{preferences}</global_preferences>\n"
        )
        parts = [] if self._attach else [_project_state()]
        parts += [self._job_state(job, project) for job in self.jobs.values()]
        (self.folder / "client_state.xml").write_text(
            f"<client_state>\n{''.join(parts)}<platform_name>{PLATFORM}</platform_name>\n"
            "<core_client_major_version>7</core_client_major_version>\n"
            "<core_client_minor_version>20</core_client_minor_version>\n"
            "<core_client_release>5</core_client_release>\n<new_version_check_time>4e9</new_version_check_time>\n"
            "</client_state>\n"
        )

    def _job_state(self, job: Job, project: Path) -> str:
        name = escape(job.name)
        main = f"{job.name}_main"
        elements = [f"<app><name>{name}</name><user_friendly_name>{name}</user_friendly_name></app>\n"]
        elements.append(_file_state(project, main, job.main_program, executable=True))
        references = f"<file_ref><file_name>{escape(main)}</file_name><main_program/></file_ref>\n"
        for file in job.files:
            physical = f"{job.name}_{file.name}".replace("/", "_")
            elements.append(_file_state(project, physical, file.content, executable=file.executable))
            references += _file_reference(physical, file.name, copied=file.copied)
        elements.append(
            f"<app_version><app_name>{name}</app_name><version_num>100</version_num><platform>{PLATFORM}</platform>"
            f"<avg_ncpus>{job.avg_ncpus}</avg_ncpus><flops>1e9</flops><api_version>7.20.5</api_version>\n"
            f"{references}</app_version>\n"
            f"<workunit><name>{name}</name><app_name>{name}</app_name><version_num>100</version_num>"
            f"<command_line>{escape(job.command_line)}</command_line>"
            "<rsc_fpops_est>1e12</rsc_fpops_est><rsc_fpops_bound>1e18</rsc_fpops_bound>"
            f"<rsc_memory_bound>{job.memory_bound}</rsc_memory_bound>"
            f"<rsc_disk_bound>{job.disk_bound}</rsc_disk_bound></workunit>\n"
        )
        outputs = ""
        for output in job.outputs:
            physical = self.output(job.name, output).name
            elements.append(
                f"<file><name>{escape(physical)}</name><nbytes>0</nbytes><max_nbytes>1e10</max_nbytes><status>0</status>"
                "<generated_locally/><sticky/></file>\n"
            )
            outputs += _file_reference(physical, output, copied=False)
        elements.append(
            f"<result><name>{name}</name><wu_name>{name}</wu_name><version_num>100</version_num>"
            f"<platform>{PLATFORM}</platform><state>2</state><report_deadline>4e9</report_deadline>"
            f"<received_time>1</received_time>\n{outputs}</result>\n"
        )
        return "".join(elements)


def _project_state() -> str:
    return (
        f"<project><master_url>{MASTER_URL}</master_url><project_name>test</project_name>"
        "<user_name>test</user_name><host_venue></host_venue><hostid>1</hostid><userid>1</userid>"
        "<dont_request_more_work/></project>\n"
    )


def _file_state(project: Path, name: str, content: bytes | Path, *, executable: bool) -> str:
    path = project / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        os.link(content, path) if _same_device(content, project) else shutil.copyfile(content, path)
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    size = path.stat().st_size
    return (
        f"<file><name>{escape(name)}</name><nbytes>{size}</nbytes><max_nbytes>{size}</max_nbytes><status>1</status>"
        f"{'<executable/>' if executable else ''}</file>\n"
    )


def _same_device(path: Path, folder: Path) -> bool:
    return path.stat().st_dev == folder.stat().st_dev


def _file_reference(physical: str, logical: str, *, copied: bool) -> str:
    return (
        f"<file_ref><file_name>{escape(physical)}</file_name><open_name>{escape(logical)}</open_name>"
        f"{'<copy_file/>' if copied else ''}</file_ref>\n"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exchange(connection: socket.socket, request: str) -> etree._Element:
    connection.sendall(f"<boinc_gui_rpc_request>\n{request}\n</boinc_gui_rpc_request>\n\003".encode())
    answer = b""
    while not answer.endswith(b"\003"):
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError("the client closed the connection")
        answer += piece
    return etree.fromstring(answer[:-1], etree.XMLParser(recover=True))


def _result(element: etree._Element) -> Result:
    task = element.find("active_task")

    def number(parent: etree._Element | None, name: str) -> float:
        return float((parent.findtext(name) if parent is not None else None) or 0)

    return Result(
        name=element.findtext("name") or "",
        state=int(number(element, "state")),
        exit_status=int(number(element, "exit_status")),
        ready_to_report=element.find("ready_to_report") is not None,
        is_running=task is not None and number(task, "pid") > 0,
        task_state=int(number(task, "active_task_state")),
        fraction_done=number(task, "fraction_done"),
        current_cpu_time=number(task, "current_cpu_time"),
        checkpoint_cpu_time=number(task, "checkpoint_cpu_time"),
        wait_reason=element.findtext("scheduler_wait_reason") or "",
        slot=None if task is None else int(number(task, "slot")),
        pid=int(number(task, "pid")),
        raw=element,
    )
