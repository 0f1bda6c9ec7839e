"""Files by Chirp with a server in a real guest, behind NAT, through HostMain and its QEMU driver."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest.image import build, chirp
from guest.image.cache import guest_image
from tests.support.hostmains import RunningHost
from tests.support.limits import after

CACHE = Path(__file__).parents[4] / ".cache" / "guest-image"
CONFIG = "[Broker]\ntype = embedded\n[Host]\nfile_transfer = chirp\n[Hypervisor]\nhypervisor = QEMU\n"
BOOT_LIMIT_S = 250.0
log = logging.getLogger(__name__)
SIZE = 48_000_000
"""Takes an emulated guest some seconds."""

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("qemu-system-x86_64", "chirp_server", "chirp_put"))),
        reason="QEMU or coop-computing-tools cannot be had (tools/setup check installs them)",
    ),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    slot = tmp_path_factory.mktemp("slot")
    files = tmp_path_factory.mktemp("chirp")
    try:
        chirp.collect(files)
        image = guest_image(CACHE, build.Options(files=files))
    except build.FAILURES as error:
        pytest.skip(f"no guest image with Chirp: {error}")
    host = RunningHost(slot, CONFIG, program="vmcontrol.hostmain")
    try:
        host.ready()
        assert host.api.defineVM("vm", str(image), {"memory_mb": 256}) is True
        assert host.api.start("vm") is True
        assert host.api.waitGuest("vm", BOOT_LIMIT_S) is True, host.log()
        yield host
        host.api.deleteVM("vm")
    finally:
        host.close()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_there_and_back_and_what_is_missing(host: RunningHost) -> None:
    source = host.slot / "a program"
    source.write_bytes(b"#!/bin/sh\nid -u; echo $1 >'out put'\n")
    source.chmod(0o755)
    assert host.api.cpFileToVM("vm", "a program", "work/a program") == ["", "", 0]
    (host.slot / "empty").touch()
    assert host.api.putFile("vm", "empty", "empty")["size"] == 0
    assert host.api.getFile("vm", "empty", "back")["size"] == 0
    request = {"id": "c1", "command": "work/a program", "arguments": ["12345"]}
    host.api.runCommand("vm", request)
    result = host.finished("c1")["result"]
    assert result["exit_status"] == 0, result
    host.api.getFile("vm", result["stdout_path"], "stdout")
    assert (host.slot / "stdout").read_text().strip() not in {"", "0"}  # the agent's user, whose the server is too
    assert host.api.cpFileFromVM("vm", "out put", "result") == ["", "", 0]
    assert (host.slot / "result").read_text() == "12345\n"
    _, said, status = host.api.cpFileFromVM("vm", "nothing", "back")
    assert status == 1
    assert "out put" in said
    _, said, status = host.api.cpFileFromVM("vm", "../../etc/passwd", "back")
    assert (status, "outside" in said) == (1, True)


def test_a_pause_in_the_middle_breaks_no_copy(host: RunningHost) -> None:
    source = host.slot / "large"
    source.write_bytes(os.urandom(SIZE))
    answers: list[Any] = []
    copying = threading.Thread(target=lambda: answers.append(host.connect(host.port).putFile("vm", "large", "large")))
    copying.start()
    deadline = after(60)
    while not any(b"chirp_put" in words for words in _command_lines()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    host.api.pause("vm")
    time.sleep(3)
    assert not answers
    host.api.unpause("vm")
    copying.join(120)
    assert answers[0]["sha256"] == digest(source)
    assert host.api.getFile("vm", "large", "back")["sha256"] == digest(source)


@pytest.mark.optin
@pytest.mark.timeout(1800)
def test_a_gigabyte(host: RunningHost) -> None:
    """Its outcome stands in docs/results/transfer.md."""
    source, back = host.slot / "gigabyte", host.slot / "gigabyte back"
    try:
        with source.open("wb") as out:
            for _ in range(1000):
                out.write(os.urandom(1000) * 1000)
        before = _peak_kb(host)
        sent = host.api.putFile("vm", "gigabyte", "a gigabyte")
        fetched = host.api.getFile("vm", "a gigabyte", "gigabyte back")
        assert sent["size"] == fetched["size"] == 1_000_000_000
        with source.open("rb") as one, back.open("rb") as other:
            assert hashlib.file_digest(one, "sha256").digest() == hashlib.file_digest(other, "sha256").digest()
        assert _peak_kb(host) - before < 24 * 1024
        log.info("1 GB by Chirp: %.0f s there, %.0f s back", sent["seconds"], fetched["seconds"])
    finally:
        source.unlink()
        back.unlink(missing_ok=True)


def _peak_kb(host: RunningHost) -> int:
    status = Path(f"/proc/{host.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def _command_lines() -> Iterator[bytes]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield (folder / "cmdline").read_bytes()
