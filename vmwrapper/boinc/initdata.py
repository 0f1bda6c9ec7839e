"""init_data.xml: what the client tells an application at its start. Pure; `read` alone opens the file.

Facts: lib/app_ipc.cpp (write_init_data_file, parse_init_data_file). The client writes names and preferences without
escaping them, so a file that is no strict XML but complete is read as far as it can be. A file without its end tag is
half written: InitDataError, as ERR_XML_PARSE in BOINC.
"""

from __future__ import annotations

import math
from pathlib import Path

from lxml import etree

from vmwrapper.boinc.api import BoincError, InitData

MAX_BYTES = 16 * 1024 * 1024
"""It holds the project's preferences, which are some kilobytes as a rule."""
DEFAULT_CHECKPOINT_PERIOD_S = 300.0
"""api/boinc_api.cpp, min_checkpoint_period: 0 means this."""

_END = b"</app_init_data>"


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
    if _END not in content:
        raise InitDataError(f"{source}: has no end tag: it is only half written")
    return _init_data(_root_of(content, source))


def _root_of(content: bytes, source: str) -> etree._Element:
    root: etree._Element | None = None
    for recover in (False, True):
        parser = etree.XMLParser(
            resolve_entities=False,
            no_network=True,
            load_dtd=False,
            huge_tree=False,
            recover=recover,
            remove_comments=True,
        )
        try:
            root = etree.fromstring(content, parser)
        except (etree.XMLSyntaxError, ValueError):
            continue
        if root is not None:
            break
    if root is None or root.tag != "app_init_data":
        raise InitDataError(f"{source}: does not begin with <app_init_data>")
    return root


def _init_data(root: etree._Element) -> InitData:
    default = InitData()
    project_dir = _path(root, "project_dir")
    preferences = root.find("project_preferences")
    period = _number(root, "checkpoint_period", default.checkpoint_period)
    return InitData(
        project_dir=project_dir,
        boinc_dir=_path(root, "boinc_dir"),
        app_name=_text(root, "app_name"),
        wu_name=_text(root, "wu_name"),
        result_name=_text(root, "result_name"),
        project_url=_text(root, "master_url") or (project_dir.name if project_dir else ""),
        slot=_integer(root, "slot", default.slot),
        client_pid=max(_integer(root, "client_pid", default.client_pid), 0),
        ncpus=_positive(root, "ncpus", default.ncpus),
        wu_cpu_time=_number(root, "wu_cpu_time", default.wu_cpu_time),
        starting_elapsed_time=_number(root, "starting_elapsed_time", default.starting_elapsed_time),
        checkpoint_period=period if period >= 1 else DEFAULT_CHECKPOINT_PERIOD_S,
        rsc_fpops_est=_number(root, "rsc_fpops_est", default.rsc_fpops_est),
        rsc_memory_bound=_number(root, "rsc_memory_bound", default.rsc_memory_bound),
        rsc_disk_bound=_number(root, "rsc_disk_bound", default.rsc_disk_bound),
        gpu_device_num=_integer(root, "gpu_device_num", default.gpu_device_num),
        no_priority_change=_integer(root, "no_priority_change", 0) != 0,
        process_priority=_integer(root, "process_priority", default.process_priority),
        app_files=tuple((element.text or "").strip() for element in root.findall("app_file")),
        vbox_version=_text(root, "host_info/virtualbox_version"),
        cpu_usage_limit=_positive(root, "global_preferences/cpu_usage_limit", default.cpu_usage_limit),
        host_virtualbox_disabled=_number(root, "host_info/p_vm_extensions_disabled", 0) != 0
        or _number(root, "vm_extensions_disabled", 0) != 0,
        raw_preferences="" if preferences is None else etree.tostring(preferences, encoding="unicode", with_tail=False),
        app_version=_integer(root, "app_version", default.app_version),
        plan_class=_text(root, "plan_class"),
        client_version=(
            _integer(root, "major_version", 0),
            _integer(root, "minor_version", 0),
            _integer(root, "release", 0),
        ),
        shm_key=_integer(root, "shm_key", default.shm_key),
        comm_obj_name=_text(root, "comm_obj_name"),
    )


def _text(root: etree._Element, name: str) -> str:
    return (root.findtext(name) or "").strip()


def _path(root: etree._Element, name: str) -> Path | None:
    text = _text(root, name)
    return Path(text) if text else None


def _number(root: etree._Element, name: str, default: float) -> float:
    try:
        number = float(_text(root, name))
    except ValueError:
        return default
    return number if math.isfinite(number) else default


def _positive(root: etree._Element, name: str, default: float) -> float:
    number = _number(root, name, default)
    return number if number > 0 else default


def _integer(root: etree._Element, name: str, default: int) -> int:
    return int(_number(root, name, default))
