"""BOINC's own runtime: ctypes bindings to libboinc_api and libboinc (Debian: libboinc-app7, libboinc7).

libboinc runs a timer thread, keeps its state in globals and works in the current directory, so there is one of these
in a process, and its slot is the current directory. What the library does badly or only in C++ is done on the level of
files and channels, where the protocol is (see `base`):

- boinc_finish and boinc_temporary_exit sleep or call exit(): the files are written by us.
- Uploads take a std::string, whose layout is the compiler's.
- boinc_resolve_filename and boinc_send_trickle_up follow whatever link lies in the slot:
  vmwrapper.context.logical_names resolves, and the message is written by us.
- 7.20 never sets network_suspended. Its boinc_report_app_status drops want_network, and the form with more in it has
  C++ names that change with the version: the status message is written by us.
- Loading it changes floating-point arithmetic: put back.
- boinc_init would put stderr.txt in place of fd 2, and take over SIGSEGV and others: prevented, given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int, create_string_buffer
from pathlib import Path
from typing import Any

from vmcontrol.common import slotfiles
from vmwrapper.boinc import files
from vmwrapper.boinc.base import RuntimeBase
from vmwrapper.boinc.channels import HAVE_NEW_TRICKLE_UP, Channel, read_heartbeat
from vmwrapper.boinc.lockfile import WAIT_S
from vmwrapper.boinc.runtime import BoincError, InitData, Status

VERSIONS = ("7", "8")
"""Sonames whose BOINC_OPTIONS and BOINC_STATUS are laid out as below."""
PATH_BYTES = 4096
FENV_BYTES = 512
"""More than fenv_t has on any processor (28 bytes on x86-64)."""

log = logging.getLogger(__name__)


class _Options(ctypes.Structure):
    """BOINC_OPTIONS (api/boinc_api.h)."""

    _fields_ = [
        ("normal_thread_priority", c_int),
        ("main_program", c_int),
        ("check_heartbeat", c_int),
        ("handle_process_control", c_int),
        ("send_status_msgs", c_int),
        ("direct_process_action", c_int),
        ("multi_thread", c_int),
        ("multi_process", c_int),
    ]


class _Status(ctypes.Structure):
    """BOINC_STATUS; version 8 has ca_state where version 7 has padding."""

    _fields_ = [
        ("no_heartbeat", c_int),
        ("suspended", c_int),
        ("quit_request", c_int),
        ("reread_init_data_file", c_int),
        ("abort_request", c_int),
        ("working_set_size", c_double),
        ("max_working_set_size", c_double),
        ("network_suspended", c_int),
        ("ca_state", c_int),
    ]


class LibraryMissing(BoincError):  # noqa: N818
    """libboinc_api or libboinc is not installed, or lacks what a wrapper needs."""


class _Library:
    """The functions, typed."""

    def __init__(self) -> None:
        self.boinc, self.api, self.path = load_libraries()
        for library, name, result, *arguments in (
            (self.boinc, "boinc_init_diagnostics", c_int, c_int),
            (self.api, "boinc_init_options", c_int, POINTER(_Options)),
            (self.api, "boinc_get_status", c_int, POINTER(_Status)),
            (self.api, "boinc_is_standalone", c_int),
            (self.api, "boinc_parse_init_data_file", c_int),
            (self.api, "boinc_time_to_checkpoint", c_int),
            (self.api, "boinc_checkpoint_completed", c_int),
            (self.api, "boinc_end_critical_section", None),
            (self.api, "boinc_receive_trickle_down", c_int, c_char_p, c_int),
            (self.api, "boinc_web_graphics_url", None, c_char_p),
            (self.api, "boinc_remote_desktop_addr", None, c_char_p),
        ):
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise LibraryMissing(f"{self.path} has no {name}") from error
            function.restype, function.argtypes = result, list(arguments)
        self.status = _Status.in_dll(self.api, "boinc_status")
        self.disable_timer_thread = c_bool.in_dll(self.api, "boinc_disable_timer_thread")
        self.error_text = getattr(self.boinc, "_Z11boincerrori", None)  # C++, and so perhaps not there
        if self.error_text is not None:
            self.error_text.restype, self.error_text.argtypes = c_char_p, [c_int]

    @property
    def version(self) -> str:
        text = c_char_p.in_dll(self.api, "api_version").value or b""
        return text.decode("ascii", "replace").removeprefix("API_VERSION_")


class LibraryRuntime(RuntimeBase):
    """A `vmwrapper.boinc.runtime.Runtime`. Raises LibraryMissing when there is no usable library."""

    _initialised = False

    def __init__(self, folder: Path, *, lock_wait_s: float = WAIT_S) -> None:
        super().__init__(folder, lock_wait_s=lock_wait_s)
        self._library = _Library()
        self._api = self._library.api
        self.description = f"BOINC runtime {self._library.version} ({self._library.path})"
        self._begun = False
        self._heartbeat, self._network_off = "", False

    def init(self) -> None:
        if LibraryRuntime._initialised:
            raise BoincError("boinc_init_options: only once in a process")
        if not self._folder.samefile(Path()):
            raise BoincError("boinc_init_options: the slot must be the current directory")
        has_client = (
            self._begin()
        )  # waits for the lock better than the library, which sleeps 35 s and then calls exit()
        LibraryRuntime._initialised = True
        handlers = _python_handlers()
        self._library.boinc.boinc_init_diagnostics(0)  # 0: leaves fd 2 alone
        options = _Options(main_program=1, check_heartbeat=1, handle_process_control=1)
        with contextlib.nullcontext() if has_client else _silenced():
            error = self._api.boinc_init_options(byref(options))
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)  # 10 SIGALRM a second, for CPU time that a wrapper does not report
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if error:
            self.close()
            raise self._error("boinc_init_options", error)
        self._begun = True
        if self._api.boinc_is_standalone():
            self._channels = None

    def understands_init_data(self) -> bool:
        """Whether the library can read the init_data.xml that is there; with one that it cannot, it is deaf."""
        if not (self._folder / slotfiles.INIT_DATA).exists():
            return True
        with _silenced():
            return bool(self._api.boinc_parse_init_data_file() == 0)

    def reread_init_data(self) -> InitData:
        data = super().reread_init_data()
        if self._channels is not None:
            self._api.boinc_parse_init_data_file()  # the library's own copy has the checkpoint period
        return data

    def get_status(self) -> Status:
        status = _Status()
        self._api.boinc_get_status(byref(status))
        if status.reread_init_data_file:
            self._library.status.reread_init_data_file = 0
        self._send_next_trickle_up()
        self._send_news()
        return Status(
            no_heartbeat=bool(status.no_heartbeat),
            suspended=bool(status.suspended),
            quit_request=bool(status.quit_request),
            abort_request=bool(status.abort_request),
            network_suspended=bool(status.network_suspended) or self._network_suspended(),
            reread_init_data_file=bool(status.reread_init_data_file),
        )

    def _network_suspended(self) -> bool:
        """As the last heartbeat said; its text stays in the channel after the library took it."""
        if self._channels is None:
            return False
        text = self._channels.text(Channel.HEARTBEAT)
        if text != self._heartbeat:  # the same for hours, and asked for ten times a second
            self._heartbeat = text
            self._network_off = read_heartbeat(text).network_suspended
        return self._network_off

    def time_to_checkpoint(self) -> bool:
        return bool(self._api.boinc_time_to_checkpoint())

    def checkpoint_completed(self) -> None:
        self._api.boinc_checkpoint_completed()

    def end_critical_section(self) -> None:
        self._api.boinc_end_critical_section()

    def receive_trickle_down(self) -> Path | None:
        buffer = create_string_buffer(PATH_BYTES)
        if not self._api.boinc_receive_trickle_down(buffer, PATH_BYTES):
            return None
        return self._unseen_trickle_down()

    def upload_file(self, logical: str) -> None:
        super().upload_file(logical)
        self._api.boinc_receive_trickle_down(create_string_buffer(PATH_BYTES), PATH_BYTES)  # listen for the answer

    def web_graphics_url(self, url: str) -> None:
        self._api.boinc_web_graphics_url(_bytes(url))

    def remote_desktop_addr(self, address: str) -> None:
        self._api.boinc_remote_desktop_addr(_bytes(address))

    def deliver(self) -> None:
        if files.trickle_up_waits(self._folder):
            self._news.add(HAVE_NEW_TRICKLE_UP)
        super().deliver()

    def close(self) -> None:
        if self._begun:
            self._library.disable_timer_thread.value = True
        super().close()

    def _error(self, function: str, number: int) -> BoincError:
        text = (self._library.error_text(number) or b"").decode("ascii", "replace") if self._library.error_text else ""
        return BoincError(f"{function}: {text or 'error'} ({number})")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """The library complains on fd 2 of what is no fault: there is no client, or we can do without it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _python_handlers() -> dict[signal.Signals, Any]:
    """The handlers that libboinc replaces, as they are now."""
    names = ("SIGILL", "SIGABRT", "SIGBUS", "SIGSEGV", "SIGSYS", "SIGPIPE")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {number: handler for number, handler in handlers.items() if handler is not None}


def load_libraries() -> tuple[ctypes.CDLL, ctypes.CDLL, str]:
    """libboinc, libboinc_api, and where the second is from. Raises LibraryMissing."""
    if sys.platform == "win32":
        raise LibraryMissing("libboinc_api is not used on Windows")
    failure: OSError | None = None
    for folder in _folders():
        for version in VERSIONS:
            path = f"{folder}libboinc_api.so.{version}"
            try:
                with _float_arithmetic_kept():
                    boinc = ctypes.CDLL(f"{folder}libboinc.so.{version}", mode=ctypes.RTLD_GLOBAL)
                    return boinc, ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL), path
            except OSError as error:
                failure = failure or error
    raise LibraryMissing(f"libboinc_api cannot be loaded: {failure}")


@contextlib.contextmanager
def _float_arithmetic_kept() -> Iterator[None]:
    """Debian's libboinc is built with -ffast-math: loading it makes the thread round the smallest numbers to zero."""
    try:
        libm = ctypes.CDLL("libm.so.6")
        save, restore = libm.fegetenv, libm.fesetenv
    except (OSError, AttributeError):  # not glibc
        yield
        return
    environment = create_string_buffer(FENV_BYTES)
    save(environment)
    try:
        yield
    finally:
        restore(environment)


def _folders() -> Iterator[str]:
    """The frozen executable carries the libraries; then where the system looks."""
    bundle = getattr(sys, "_MEIPASS", None)
    if bundle:
        yield f"{bundle}/"
    yield ""
