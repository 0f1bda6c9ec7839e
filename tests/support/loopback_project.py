"""A BOINC project on 127.0.0.1, for tests with the real client: scheduler, downloads, uploads, trickles. No tests here.

What a project's server does is done here as it does it: an app version is a folder for `bin/update_versions` (with
version.xml), signed with the project's key; work is made from an input and an output template as by `bin/create_work`;
each result goes to the first client that asks.

    with LoopbackProject(tmp_path / "project") as project:
        project.add_app_version("worker", folder)
        project.add_work("one", "worker", input_template=WU, output_template=RESULT, inputs={"one_in": b"..."})
        with BoincClient(tmp_path / "client", attach=(project.url, project.account_key)) as client:
            assert project.report_of("one_0").exit_status == 0
            assert project.uploaded("one_0_0").read_bytes() == b"..."

The client calls when it has something to say; `client.update()` makes it call at once. What came is kept in
`requests`, `downloads`, `uploads`, `trickles` and `reports`, in the order in which it came.

What a real server does and this one does not: it knows one computer, decides nothing by platform or resources, and
validates nothing.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from xml.sax.saxutils import escape

from lxml import etree

from tests.support.boinc_client import PLATFORM
from tests.support.code_signing import SigningKey, md5_of
from tests.support.limits import after

ACCOUNT_KEY = "0123456789abcdef0123456789abcdef"
API_VERSION = "7.20.5"
"""Of an app version whose version.xml has none: without one the client does not use shared memory of today's form."""
PIECE = 1 << 16
UPLOAD_HANDLER = "file_upload_handler"
"""The client takes a URL with this word in it for one to upload to (client/client_types.cpp)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """A result that the client has reported as over."""

    name: str
    exit_status: int
    state: int
    """5: files uploaded, 3: error while computing, 6: aborted (lib/common_defs.h)."""
    cpu_time: float
    stderr: str
    """All text of the element stderr_out: the client's own words, and stderr.txt."""
    raw: etree._Element = field(repr=False)


@dataclass(frozen=True)
class Trickle:
    """A trickle-up message."""

    result: str
    variety: str
    text: str


@dataclass(frozen=True)
class Upload:
    """A file, or the rest of one, that the client uploaded; `at`: seconds since the epoch."""

    name: str
    offset: int
    at: float


@dataclass
class _Work:
    """A workunit with its only result; `xml` is what the scheduler sends of both."""

    app: str
    xml: str
    sent: bool = False


class LoopbackProject:
    """A running project. `with` starts it and ends it. All methods may be called from any thread."""

    def __init__(self, folder: Path, *, name: str = "loopback", key: SigningKey | None = None) -> None:
        self.folder = folder
        self.name = name
        self.key = key or SigningKey()
        self.account_key = ACCOUNT_KEY
        self.requests: list[str] = []
        """Scheduler requests."""
        self.downloads: list[tuple[str, int]] = []
        """Name and first byte of each download that was asked for."""
        self.uploads: list[Upload] = []
        self.trickles: list[Trickle] = []
        self.reports: dict[str, Report] = {}
        self.faults: list[str] = []
        """What went wrong in here while the client was answered."""
        self._files: dict[str, Path] = {}
        self._app_versions: dict[str, list[str]] = {}
        self._work: dict[str, _Work] = {}
        self._trickles_down: list[tuple[str, str]] = []
        self._certificates: dict[str, str] = {}
        self._cuts: dict[str, int] = {}
        self._changed = threading.Condition(threading.RLock())
        for sub in ("upload", "download"):
            (folder / sub).mkdir(parents=True)
        self._server = _Server(self)

    def __enter__(self) -> LoopbackProject:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The master URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    # --- what the project's staff do

    def add_app_version(
        self,
        app: str,
        folder: Path,
        *,
        version_num: int = 100,
        plan_class: str = "",
        signed_by: SigningKey | None = None,
        avg_ncpus: float = 1,
    ) -> None:
        """A folder as it would lie in apps/APP/VERSION/PLATFORM[__PLANCLASS]: files, and version.xml beside them.

        Files are signed with the project's key (or another one, to be wrong), unless FILE.sig lies beside them. A file
        is an executable when its owner may execute it. Raises ValueError where update_versions would refuse the folder.
        """
        described = _parse((folder / "version.xml").read_text()) if (folder / "version.xml").exists() else None
        elements = list(described.iter("file")) if described is not None else []
        by_name = {(one.findtext("physical_name") or "").strip(): one for one in elements}
        names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".sig"]
        names = [name for name in names if name != "version.xml"]
        if missing := set(by_name) - set(names):
            raise ValueError(f"listed in version.xml but not present: {missing}")
        mains = [name for name in names if _flag(by_name.get(name), "main_program") or len(names) == 1]
        if len(mains) != 1:
            raise ValueError(f"not one main program: {mains}")
        infos = references = ""
        for name in names:
            path, element = folder / name, by_name.get(name)
            sig = path.with_name(f"{name}.sig")
            signature = sig.read_text() if sig.exists() else (signed_by or self.key).sign_file(path)
            executable = name in mains or bool(path.stat().st_mode & 0o100)
            infos += (
                f"<file_info>\n    <name>{escape(name)}</name>\n{self._stage(name, path, _flag(element, 'gzip'))}"
                f"{'    <executable/>' + chr(10) if executable else ''}"
                f"    <file_signature>\n{signature}    </file_signature>\n"
                f"    <nbytes>{path.stat().st_size}</nbytes>\n</file_info>\n"
            )
            logical = (element.findtext("logical_name") or "").strip() if element is not None else ""
            references += (
                f"<file_ref>\n    <file_name>{escape(name)}</file_name>\n"
                + (f"    <open_name>{escape(logical)}</open_name>\n" if logical else "")
                + ("    <copy_file/>\n" if _flag(element, "copy_file") else "")
                + ("    <main_program/>\n" if name in mains else "")
                + "</file_ref>\n"
            )
        api = (described.findtext("api_version") or "").strip() if described is not None else ""
        flags = "".join(
            f"<{one}/>\n" for one in ("dont_throttle", "needs_network", "is_wrapper") if _flag(described, one)
        )
        with self._changed:
            self._app_versions.setdefault(app, []).append(
                f"{infos}<app_version>\n<app_name>{escape(app)}</app_name>\n<version_num>{version_num}</version_num>\n"
                f"<platform>{PLATFORM}</platform>\n<plan_class>{plan_class}</plan_class>\n"
                f"<avg_ncpus>{avg_ncpus}</avg_ncpus>\n<flops>1e9</flops>\n"
                f"<api_version>{api or API_VERSION}</api_version>\n"
                f"{references}{flags}</app_version>\n"
            )

    def add_work(
        self,
        name: str,
        app: str,
        *,
        input_template: str,
        output_template: str,
        inputs: Mapping[str, bytes | Path] | None = None,
        command_line: str = "",
        version_num: int = 100,
        plan_class: str = "",
    ) -> str:
        """As bin/create_work: the name of the result, which is sent in the next reply to the client.

        inputs: content by physical name, in the order of the input template's file_info elements. The templates are
        those of a project, worker_wu and worker_result of the page for example.
        """
        result = f"{name}_0"
        workunit = self._workunit(name, app, input_template, dict(inputs or {}), command_line)
        outputs, references = self._outputs(output_template, result)
        xml = (
            f"{workunit}{outputs}<result>\n<name>{result}</name>\n<wu_name>{escape(name)}</wu_name>\n"
            f"<report_deadline>{time.time() + 1e6:.0f}</report_deadline>\n<platform>{PLATFORM}</platform>\n"
            f"<version_num>{version_num}</version_num>\n<plan_class>{plan_class}</plan_class>\n{references}</result>\n"
        )
        with self._changed:
            self._work[result] = _Work(app, xml)
        return result

    def send_trickle_down(self, result: str, text: str) -> None:
        """In the next reply. The client drops it when the result has no process then."""
        with self._changed:
            self._trickles_down.append((result, text))

    def cut_next_download(self, name: str, after: int) -> None:
        """The connection breaks after so many bytes, once."""
        with self._changed:
            self._cuts[name] = after

    # --- what came of it

    def uploaded(self, name: str) -> Path:
        """An uploaded file, by its physical name: RESULT_0 for OUTFILE_0 of the output template."""
        return self.folder / "upload" / name

    def report_of(self, result: str, limit_s: float = 60.0) -> Report:
        """Of a result that is over, or that will be within the limit."""
        self.wait_for(lambda: result in self.reports, f"{result} is reported", limit_s)
        return self.reports[result]

    def wait_for(self, condition: Callable[[], T], what: str, limit_s: float = 60.0) -> T:
        """What condition gives as soon as it is true; looked at whenever something came."""
        deadline = after(limit_s)
        with self._changed:
            while not (found := condition()):
                assert not self.faults, self.faults
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"not within {limit_s:g} s: {what}; reports: {self.reports}")
                self._changed.wait(min(left, 0.2))
            return found

    # --- inside: files

    def _stage(self, name: str, path: Path, gzipped: bool) -> str:
        with self._changed:
            if name in self._files and md5_of(self._files[name]) != md5_of(path):
                raise ValueError(f"files of BOINC are immutable: another {name} was staged")
            self._files[name] = path
        urls = f"    <url>{self.url}download/{escape(name)}</url>\n"
        if gzipped:
            packed = self.folder / "download" / f"{name}.gz"
            with path.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target)
            with self._changed:
                self._files[packed.name] = packed
            urls += f"    <gzipped_url>{self.url}download/{escape(packed.name)}</gzipped_url>\n"
            urls += f"    <gzipped_nbytes>{packed.stat().st_size}</gzipped_nbytes>\n"
        return urls

    def _workunit(self, name: str, app: str, template: str, inputs: dict[str, bytes | Path], command_line: str) -> str:
        tree = _parse(f"<template>{template}</template>")
        infos, names = "", []
        for element in tree.iter("file_info"):
            physical = (element.findtext("physical_name") or "").strip()  # given: the same file in every workunit
            if not physical and not inputs:
                raise ValueError("the template has more input files than were given")
            physical = physical or next(iter(inputs))
            content = inputs.pop(physical) if physical in inputs else self._files[physical]
            path = content if isinstance(content, Path) else self.folder / "download" / physical
            if isinstance(content, bytes):
                path.write_bytes(content)
            names.append(physical)
            infos += (
                f"<file_info>\n    <name>{escape(physical)}</name>\n"
                f"{self._stage(physical, path, element.find('gzip') is not None)}"
                f"    <md5_cksum>{md5_of(path)}</md5_cksum>\n    <nbytes>{path.stat().st_size}</nbytes>\n"
                f"{_others(element, 'number', 'physical_name', 'gzip')}</file_info>\n"
            )
        if inputs:
            raise ValueError("more input files than the template has")
        unit = next(tree.iter("workunit"))
        references = list(unit.iter("file_ref"))
        if len(references) != len(names):
            raise ValueError("the template has not as many file_ref as file_info")
        text = ""
        for physical, element in zip(names, references, strict=True):
            text += (
                f"<file_ref>\n<file_name>{escape(physical)}</file_name>\n{_others(element, 'file_number')}</file_ref>\n"
            )
        line = f"<command_line>{escape(command_line)}</command_line>\n" if command_line else ""
        return (
            f"{infos}<workunit>\n<name>{escape(name)}</name>\n<app_name>{escape(app)}</app_name>\n{line}{text}"
            f"{_others(unit, 'file_ref', *SERVER_ONLY)}</workunit>\n"
        )

    def _outputs(self, template: str, result: str) -> tuple[str, str]:
        """file_info elements and file_ref elements (and what else the template's result has)."""
        text = re.sub(r"<OUTFILE_(\d+)\s*/>", rf"{result}_\1", template).replace(
            "<UPLOAD_URL/>", f"{self.url}{UPLOAD_HANDLER}"
        )
        tree = _parse(f"<template>{text}</template>")
        infos = ""
        for element in tree.iter("file_info"):
            name, limit = (element.findtext("name") or "").strip(), float(element.findtext("max_nbytes") or 0)
            certificate = self.key.sign_text(f"<name>{name}</name><max_nbytes>{limit:.0f}</max_nbytes>")
            self._certificates[name] = certificate
            infos += f"<file_info>\n{_others(element)}<xml_signature>\n{certificate}</xml_signature>\n</file_info>\n"
        return infos, _others(next(tree.iter("result")))

    # --- inside: what the client asks

    def schedule(self, request: str) -> str:
        """A scheduler reply (wiki: RpcProtocol)."""
        tree = _parse(request)
        with self._changed:
            self.requests.append(request)
            reply = (
                f"<scheduler_reply>\n<scheduler_version>720</scheduler_version>\n<master_url>{self.url}</master_url>\n"
                f"<request_delay>0</request_delay>\n<project_name>{escape(self.name)}</project_name>\n"
            )
            if tree.findtext("authenticator") != self.account_key:
                return (
                    f'{reply}<message priority="notice">Invalid or missing account key</message>\n</scheduler_reply>\n'
                )
            reply += "<user_name>tester</user_name>\n<userid>1</userid>\n<hostid>1</hostid>\n"
            if (tree.findtext("code_sign_key") or "").strip() != self.key.public_text.strip():
                reply += f"<code_sign_key>\n{self.key.public_text}</code_sign_key>\n"
            reply += self._take_reports(tree) + self._take_trickles(request)
            reply += self._give_work() + self._give_trickles()
            self._changed.notify_all()
            return f"{reply}</scheduler_reply>\n"

    def _take_reports(self, tree: etree._Element) -> str:
        acknowledged = ""
        for element in tree.findall("result"):
            name = element.findtext("name") or ""
            self.reports[name] = Report(
                name,
                int(element.findtext("exit_status") or 0),
                int(element.findtext("state") or 0),
                float(element.findtext("final_cpu_time") or 0),
                "".join(text for part in element.findall("stderr_out") for text in part.itertext()),
                element,
            )
            acknowledged += f"<result_ack>\n<name>{escape(name)}</name>\n</result_ack>\n"
        return acknowledged

    def _take_trickles(self, request: str) -> str:
        """As text: what an application sends need not be XML (the server's MSG_FROM_HOST_DESC::parse)."""
        found = re.findall(r"<msg_from_host>(.*?)</msg_from_host>", request, re.DOTALL)
        for text in found:
            name = re.search(r"<result_name>(.*?)</result_name>", text)
            variety = re.search(r"<variety>(.*?)</variety>", text)
            assert name, text
            rest = re.sub(r"^.*?</time>\n", "", text, count=1, flags=re.DOTALL)
            rest = re.sub(r"\s*<variety>.*?</variety>\n", "", rest, count=1)
            self.trickles.append(Trickle(name[1], variety[1] if variety else "", rest.rstrip()))
        return "<message_ack/>\n" if found else ""

    def _give_work(self) -> str:
        work = [one for one in self._work.values() if not one.sent]
        if not work:
            return ""
        for one in work:
            one.sent = True
        apps = {one.app: None for one in work}
        return (
            "".join(f"<app>\n<name>{a}</name>\n<user_friendly_name>{a}</user_friendly_name>\n</app>\n" for a in apps)
            + "".join(version for app in apps for version in self._app_versions[app])
            + "".join(one.xml for one in work)
        )

    def _give_trickles(self) -> str:
        down, self._trickles_down = self._trickles_down, []
        return "".join(
            f"<trickle_down>\n<result_name>{name}</result_name>\n<time>{time.time_ns() // 1000 % 2**31}</time>\n"
            f"{text}\n</trickle_down>\n"
            for name, text in down
        )

    def find_download(self, name: str, first: int) -> tuple[Path | None, int | None]:
        """The file, and after how many bytes the connection is to break."""
        with self._changed:
            self.downloads.append((name, first))
            self._changed.notify_all()
            return self._files.get(name), self._cuts.pop(name, None)

    def handle_upload(self, header: str, data: bytes) -> str:
        """Of file_upload_handler: a question for the size, or bytes (wiki: FileUpload)."""
        if asked := re.search(r"<get_file_size>(.*?)</get_file_size>", header):
            path = self.uploaded(asked[1].strip())
            size = path.stat().st_size if path.exists() else 0
            return f"<data_server_reply>\n<status>0</status>\n<file_size>{size}</file_size>\n</data_server_reply>\n"
        name = (_element(header, "name") or "").strip()
        offset, size = int(_element(header, "offset") or 0), int(_element(header, "nbytes") or 0)
        problem = ""
        signature = (_element(header, "xml_signature") or "").split()
        if signature != self._certificates.get(name, "").split() or not signature:
            problem = "invalid signature"
        elif offset + len(data) != size or size > float(_element(header, "max_nbytes") or 0):
            problem = f"wrong size: {len(data)} bytes at {offset} of {size}"
        if not problem:
            path = self.uploaded(name)
            with path.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(data)
            if hashlib.md5(path.read_bytes()).hexdigest() != _element(header, "md5_cksum"):
                problem = "wrong checksum"
        with self._changed:
            if not problem:
                self.uploads.append(Upload(name, offset, time.time()))
            self._changed.notify_all()
        status = f"<status>-1</status>\n<message>{problem}</message>\n" if problem else "<status>0</status>\n"
        return f"<data_server_reply>\n{status}</data_server_reply>\n"


SERVER_ONLY = (
    *("min_quorum", "target_nresults", "max_error_results", "max_total_results", "max_success_results"),
    *("delay_bound", "batch", "size_class", "priority"),
)
"""Of a template's workunit: for the server's database, not for the client."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, project: LoopbackProject) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.project = project

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else fails the test that waits for the project."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.project.faults.append(f"{error!r}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/":
            url = f"{self.server.project.url}scheduler"
            self._answer(f'<html><head><link rel="boinc_scheduler" href="{url}"></head></html>\n<!-- {url} -->\n')
        elif self.path.startswith("/download/"):
            self._send_file(self.path.removeprefix("/download/"))
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/scheduler":
            self._answer(self.server.project.schedule(body.decode(errors="replace")))
        elif self.path == f"/{UPLOAD_HANDLER}":
            header, _, data = body.partition(b"<data>\n")
            self._answer(self.server.project.handle_upload(header.decode(), data))
        else:
            self.send_error(404)

    def log_message(self, format: str, *words: Any) -> None:
        pass

    def _answer(self, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path == "/" else "text/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, name: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        path, cut = self.server.project.find_download(name, first)
        if path is None:
            self.send_error(404)
            return
        size = path.stat().st_size
        if first and first >= size:
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(size - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.end_headers()
        with path.open("rb") as file, contextlib.suppress(ConnectionError):
            file.seek(first)
            sent = 0
            while piece := file.read(PIECE if cut is None else min(PIECE, cut - sent)):
                self.wfile.write(piece)
                sent += len(piece)
        self.close_connection = self.close_connection or cut is not None


def _parse(text: str) -> etree._Element:
    return etree.fromstring(text.encode(), etree.XMLParser(recover=True, huge_tree=False))


def _element(text: str, name: str) -> str | None:
    found = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return found[1] if found else None


def _flag(element: etree._Element | None, name: str) -> bool:
    """As get_bool of update_versions."""
    found = element.find(name) if element is not None else None
    return found is not None and (found.text or "1").strip() not in ("", "0")


def _others(element: etree._Element, *without: str) -> str:
    """The children of an element as text, one a line, but for those."""
    return "".join(
        etree.tostring(child, encoding="unicode", with_tail=False) + "\n"
        for child in element
        if child.tag not in without
    )


def folder_of(folder: Path, files: Mapping[str, bytes | Path], version_xml: str, executables: Sequence[str]) -> Path:
    """An app version folder for `add_app_version`, made of these files by physical name (paths: as links to them)."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        if isinstance(content, Path):
            path.hardlink_to(content) if content.stat().st_dev == folder.stat().st_dev else shutil.copyfile(
                content, path
            )
        else:
            path.write_bytes(content)
        if name in executables and not path.is_symlink():
            path.chmod(0o755)
    (folder / "version.xml").write_text(version_xml)
    return folder
