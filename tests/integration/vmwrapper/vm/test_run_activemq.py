"""The script that starts ActiveMQ: what it writes where, what it says when something is missing, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.brokers import RUN_ACTIVEMQ, free_port, running_broker

OURS = ("VMWRAPPER_SLOT", "VMWRAPPER_BROKER_PORT", "VMWRAPPER_BROKER_LOGIN", "VMWRAPPER_BROKER_PASSCODE")


def run(slot: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        [str(RUN_ACTIVEMQ)], cwd=slot, env={**clean, **environment}, capture_output=True, text=True, timeout=20
    )


def test_it_says_that_java_is_missing(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "dirname", "mkdir", "rm"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    done = run(tmp_path, PATH=str(tools), JAVA_HOME="")
    assert done.returncode == 1
    assert "there is no java" in done.stderr
    assert not (tmp_path / "activemq_data").exists()


@pytest.fixture
def java(tmp_path: Path) -> dict[str, str]:
    """A stand-in, where the script ends before Java would matter, or where it is to show what it is given."""
    home = tmp_path / "java home"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "java").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv\n')
    (home / "bin" / "java").chmod(0o755)
    activemq = tmp_path / "activemq home"
    (activemq / "bin").mkdir(parents=True)
    (activemq / "bin" / "activemq.jar").touch()
    return {"JAVA_HOME": str(home), "ACTIVEMQ_HOME": str(activemq)}


def test_it_says_that_activemq_is_missing(tmp_path: Path, java: dict[str, str]) -> None:
    done = run(tmp_path, **java | {"ACTIVEMQ_HOME": "/nowhere"})
    assert done.returncode == 1
    assert "there is no ActiveMQ (/nowhere/bin/activemq.jar)" in done.stderr


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "123456", "1 2"])
def test_a_port_that_is_none(tmp_path: Path, java: dict[str, str], port: str) -> None:
    done = run(tmp_path, **java, VMWRAPPER_BROKER_PORT=port)
    assert done.returncode == 1
    assert "VMWRAPPER_BROKER_PORT" in done.stderr


@pytest.mark.parametrize("passcode", ["a b", "a\nb", "${x}", "a\\b", "ü", "a#b"])
def test_a_secret_that_a_properties_file_cannot_hold_is_refused_and_not_shown(
    tmp_path: Path, java: dict[str, str], passcode: str
) -> None:
    done = run(tmp_path, **java, VMWRAPPER_BROKER_PASSCODE=passcode)
    assert done.returncode == 1
    assert "login and passcode may have" in done.stderr
    assert passcode not in done.stderr


def test_the_secret_stands_in_one_file_that_only_its_user_can_read(tmp_path: Path, java: dict[str, str]) -> None:
    slot = tmp_path / "a slot"
    slot.mkdir()
    (slot / "activemq_data").mkdir()
    (slot / "activemq_data" / "old").touch()
    done = run(slot, **java, VMWRAPPER_BROKER_PORT="12345", VMWRAPPER_BROKER_PASSCODE="s3cret")
    assert (done.returncode, done.stderr) == (0, "")
    assert "s3cret" not in done.stdout  # arguments and environment of Java
    assert f"-Dactivemq.data={slot}/activemq_data" in done.stdout.splitlines()
    credentials = slot / "activemq_data" / "credentials.properties"
    assert credentials.read_text() == "vmwrapper.port=12345\nvmwrapper.login=vmwrapper\nvmwrapper.passcode=s3cret\n"
    assert credentials.stat().st_mode & 0o777 == 0o600
    assert credentials.parent.stat().st_mode & 0o777 == 0o700
    assert not (slot / "activemq_data" / "old").exists()


def test_by_hand_it_has_a_fixed_port_and_a_known_secret_and_warns(tmp_path: Path, java: dict[str, str]) -> None:
    done = run(tmp_path, **java)
    assert done.returncode == 0
    assert "everybody on this computer can connect" in done.stderr
    assert (tmp_path / "activemq_data" / "credentials.properties").read_text() == (
        "vmwrapper.port=61613\nvmwrapper.login=vmwrapper\nvmwrapper.passcode=vmwrapper\n"
    )


@pytest.mark.broker
def test_the_real_one_listens_on_loopback_only_shows_no_secret_and_ends_at_term(tmp_path: Path) -> None:
    slot = tmp_path / "a slot % with #"
    slot.mkdir()
    with running_broker("activemq", slot, port=free_port()) as broker:
        listening = listening_addresses(broker.pid)
        assert listening == {("127.0.0.1", broker.port)}
        command = Path(f"/proc/{broker.pid}/cmdline").read_bytes()
        assert b"activemq.jar" in command  # the script has become the JVM: nothing stays behind when it is ended
        assert broker.passcode.encode() not in command
        assert sorted(path.name for path in slot.iterdir()) == ["activemq.log", "activemq_data"]
        os.kill(broker.pid, signal.SIGTERM)
        assert os.waitid(os.P_PID, broker.pid, os.WEXITED | os.WNOWAIT) is not None
        with socket.socket() as probe:
            assert probe.connect_ex((broker.host, broker.port)) != 0


def test_who_blocks_term_decides_by_himself_when_it_ends(tmp_path: Path, java: dict[str, str]) -> None:
    (tmp_path / "java home" / "bin" / "java").write_text("#!/bin/sh\nexec grep SigIgn /proc/self/status\n")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        ignored = int(run(tmp_path, **java).stdout.split()[1], 16)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert ignored & (1 << (number - 1))
    assert not int(run(tmp_path, **java).stdout.split()[1], 16) & (1 << (signal.SIGTERM - 1))


def listening_addresses(pid: int) -> set[tuple[str, int]]:
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        target = str(fd.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((readable(address), int(port, 16)))
    return found


def readable(address: str) -> str:
    """From /proc/net/tcp and tcp6: words of four bytes in the processor's order; v4 in v6 as v4."""
    raw = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
    if len(raw) == 16:
        if raw.startswith(bytes(10) + b"\xff\xff"):
            return socket.inet_ntop(socket.AF_INET, raw[12:])
        return socket.inet_ntop(socket.AF_INET6, raw)
    return socket.inet_ntop(socket.AF_INET, raw)
