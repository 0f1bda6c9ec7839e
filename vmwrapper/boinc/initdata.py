"""init_data.xml: what the client tells an application at its start. Pure; `read` alone opens the file.

Facts: lib/app_ipc.cpp (write_init_data_file, parse_init_data_file). What the client writes is no XML: paths and names
stand there as they are, bytes of any encoding, and the project's preferences are whatever the project wrote. So it is
read as the client's own reader does, on bytes: preferences are passed over as a whole, and of each field that is wanted
the first one counts, wherever it stands. A path ends at its own end tag, so one with a `<` is whole here.

A file without its end tag is half written: InitDataError, as ERR_XML_PARSE in BOINC. Both runtimes use this reader.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from vmwrapper import cvalues
from vmwrapper.boinc.runtime import BoincError, InitData

MAX_BYTES = 16 * 1024 * 1024
"""It holds the project's preferences, which are some kilobytes as a rule."""
DEFAULT_CHECKPOINT_PERIOD_S = 300.0
"""api/boinc_api.cpp, min_checkpoint_period: 0 means this."""

_BEGIN = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<app_init_data(?:\s[^>]*)?>")
_END = b"</app_init_data>"
_SECTIONS = ("host_info", "global_preferences", "proxy_info")
"""Elements with fields of their own."""


class InitDataError(BoincError):
    """init_data.xml is there and cannot be understood; `str` says why."""


def read(path: Path) -> InitData | None:
    """The file's content; None when there is no such file. Raises InitDataError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InitDataError(f"{path.name}: cannot be read: {error.strerror}") from error
    return parse(content, path.name)


def parse(content: bytes, source: str = "init_data.xml") -> InitData:
    """Raises InitDataError when the file is not whole; a value that makes no sense has its default."""
    if len(content) > MAX_BYTES:
        raise InitDataError(f"{source}: larger than {MAX_BYTES} bytes")
    content = content.partition(b"\0")[0]
    begin = _BEGIN.match(content)
    if begin is None:
        raise InitDataError(f"{source}: does not begin with <app_init_data>")
    _, rest = _cut(content[begin.end() :], "project_preferences")
    rest, end, _ = rest.partition(_END)
    if not end:
        raise InitDataError(f"{source}: has no end tag: it is only half written")
    sections = {}
    for name in _SECTIONS:
        sections[name], rest = _cut(rest, name)
    return _init_data(_Fields(rest), _Fields(sections["global_preferences"]))


def _span(data: bytes, name: str) -> tuple[int, int, int, int] | None:
    """Where the first such element begins, its content begins, its content ends, and it ends.

    It ends at its first end tag, whatever is in between.
    """
    tag = name.encode("ascii")
    begin = re.search(rb"<%b(?:\s[^>]*)?>" % tag, data)
    end = data.find(b"</%b>" % tag, begin.end()) if begin else -1
    return (begin.start(), begin.end(), end, end + len(tag) + 3) if begin and end >= 0 else None


def _cut(data: bytes, name: str) -> tuple[bytes, bytes]:
    """The element's content, and the data without the element."""
    found = _span(data, name)
    return (data[found[1] : found[2]], data[: found[0]] + data[found[3] :]) if found else (b"", data)


class _Fields:
    """The fields of one level."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def raw(self, name: str) -> bytes:
        """The text of the first such field; empty when there is none."""
        found = _span(self._data, name)
        return self._data[found[1] : found[2]].strip(cvalues.BLANKS) if found else b""

    def text(self, name: str) -> str:
        """A path or a name: its bytes, as os.fsdecode gives them."""
        return cvalues.unescape(self.raw(name)).decode("utf-8", "surrogateescape")

    def texts(self, name: str) -> tuple[str, ...]:
        found = re.findall(rb"<%b>(.*?)</%b>" % (name.encode(), name.encode()), self._data, re.DOTALL)
        return tuple(cvalues.unescape(one.strip(cvalues.BLANKS)).decode("utf-8", "surrogateescape") for one in found)

    def number(self, name: str, default: float) -> float:
        number = cvalues.double(self.raw(name))
        return number if number is not None and math.isfinite(number) else default

    def positive(self, name: str, default: float) -> float:
        number = self.number(name, default)
        return number if number > 0 else default

    def integer(self, name: str, default: int) -> int:
        number = cvalues.integer(self.raw(name))
        return default if number is None else number

    def flag(self, name: str) -> bool:
        return bool(cvalues.boolean(self.raw(name))) or b"<%b/>" % name.encode() in self._data


def _init_data(top: _Fields, prefs: _Fields) -> InitData:
    default = InitData()
    folder = top.text("project_dir")
    project_dir = Path(folder) if folder else None
    period = top.number("checkpoint_period", default.checkpoint_period)
    return InitData(
        project_dir=project_dir,
        result_name=top.text("result_name"),
        project_url=top.text("master_url") or (project_dir.name if project_dir else ""),
        slot=top.integer("slot", default.slot),
        client_pid=max(top.integer("client_pid", default.client_pid), 0),
        ncpus=top.positive("ncpus", default.ncpus),
        wu_cpu_time=top.number("wu_cpu_time", default.wu_cpu_time),
        starting_elapsed_time=top.number("starting_elapsed_time", default.starting_elapsed_time),
        checkpoint_period=period if period >= 1 else DEFAULT_CHECKPOINT_PERIOD_S,
        rsc_fpops_est=top.number("rsc_fpops_est", default.rsc_fpops_est),
        rsc_memory_bound=top.number("rsc_memory_bound", default.rsc_memory_bound),
        rsc_disk_bound=top.number("rsc_disk_bound", default.rsc_disk_bound),
        gpu_device_num=top.integer("gpu_device_num", default.gpu_device_num),
        no_priority_change=top.flag("no_priority_change"),
        process_priority=top.integer("process_priority", default.process_priority),
        app_files=top.texts("app_file"),
        cpu_usage_limit=prefs.positive("cpu_usage_limit", default.cpu_usage_limit),
        app_version=top.integer("app_version", default.app_version),
        plan_class=top.text("plan_class"),
        shm_key=top.integer("shm_key", default.shm_key),
        comm_obj_name=top.text("comm_obj_name"),
    )
