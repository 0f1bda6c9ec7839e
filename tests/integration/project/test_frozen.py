"""The frozen executables as programs: their two processes, their environment, what they leave, and what is inside."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.agenthost import GUEST_ID, AgentProcess, ScriptedHost
from tests.support.brokers import running_broker
from tests.support.frozen_programs import UNPACKED, frozen_programs, second_process, unpacked
from tests.support.limits import after
from tests.support.slots import PlayedClient, TestSlot, is_frozen
from tools import build_frozen
from vmcontrol.protocol.messages import CommandList, CommandTable

pytestmark = pytest.mark.slow

SIZE_LIMIT_BYTES = 40e6
NEEDS_GLIBC = (2, 36)
"""Debian 12's: the executables are made of its Python."""


@pytest.fixture(scope="module")
def vmwrapper() -> str:
    return str(frozen_programs() / "vmwrapper")


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    folder = tmp_path / "slot"
    folder.mkdir()
    (tmp_path / "tmp").mkdir()
    slot = TestSlot(folder)
    yield slot
    slot.clean()


def task(script: str, more: str = "") -> str:
    script = script.replace("&", "&amp;").replace("<", "&lt;")
    return f"<task><application>sh</application><command_line>-c '{script}'</command_line>{more}</task>"


def start(slot: TestSlot, vmwrapper: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    temporary = str(slot.folder.parent / "tmp")
    return slot.start(*words, program=[vmwrapper], VMWRAPPER_BOINC_RUNTIME="auto", TMPDIR=temporary, **environment)


@pytest.mark.parametrize("library_path", ["", "/nowhere:/else"])
def test_a_task_sees_the_environment_that_the_client_gave(slot: TestSlot, vmwrapper: str, library_path: str) -> None:
    slot.job(task("env > env; ls > list; exit 0"))
    given = {"LD_LIBRARY_PATH": library_path} if library_path else {}
    assert start(slot, vmwrapper, "job.xml", A_MARK="of the client", **given).wait(30) == 0
    seen = dict(line.split("=", 1) for line in slot.text("env").splitlines() if "=" in line)
    assert seen["A_MARK"] == "of the client"
    assert seen.get("LD_LIBRARY_PATH", "") == (library_path or os.environ.get("LD_LIBRARY_PATH", ""))
    assert not [name for name in seen if "PYI" in name or "MEI" in name or name.startswith("VMWRAPPER_A")]
    assert "libboinc_api.so.7)" in slot.text("stderr.txt"), "BOINC's own runtime, from inside"
    assert "_MEI" in slot.text("list"), "unpacked into the slot"
    assert unpacked(slot.folder) == []
    assert not any((slot.folder.parent / "tmp").iterdir())


def test_names_of_files_are_utf8_whatever_the_locale_is(slot: TestSlot, vmwrapper: str) -> None:
    slot.job(task("exit 0", "<stdout_filename>größe_中</stdout_filename>"))
    not_utf8 = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert start(slot, vmwrapper, "job.xml", **not_utf8).wait(30) == 0, slot.text("stderr.txt")
    assert (slot.folder / "größe_中").exists(), "pytest runs in a locale with UTF-8, or Python takes it for that"


def test_exit_statuses_and_signals_pass_through_both_processes(slot: TestSlot, vmwrapper: str) -> None:
    slot.job(task("exit 3"))
    assert start(slot, vmwrapper, "job.xml").wait(30) == 195
    (slot.folder / "boinc_finish_called").unlink()
    slot.job(task("echo > started; sleep 300"))
    process = start(slot, vmwrapper, "job.xml")
    slot.wait_for("started")
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    (slot.folder / "started").unlink()
    process = start(slot, vmwrapper, "job.xml")
    slot.wait_for("started")
    os.killpg(process.pid, signal.SIGTERM)  # both processes and the task, as systemd does; the first passes it on again
    assert process.wait(10) == -signal.SIGTERM
    assert not (slot.folder / "boinc_finish_called").exists()
    slot.assert_nothing_runs(1)
    assert unpacked(slot.folder) == []


def test_quit_and_abort_under_a_client(slot: TestSlot, vmwrapper: str) -> None:
    client = PlayedClient(slot)
    slot.job(task("echo > started; sleep 300"))
    process = start(slot, vmwrapper)
    slot.wait_for("started")
    assert second_process(process.pid).ppid() == process.pid
    client.say("<quit/>")
    assert process.wait(10) == 0
    (slot.folder / "started").unlink()
    process = start(slot, vmwrapper)
    slot.wait_for("started")
    client.say("<abort/>")
    assert process.wait(10) == 194
    slot.assert_nothing_runs(1)
    assert unpacked(slot.folder) == []


def test_the_second_process_dies_with_the_first_and_the_next_start_cleans_up(slot: TestSlot, vmwrapper: str) -> None:
    slot.job(task("test -e again && exit 0; echo > again; sleep 300"))
    process = start(slot, vmwrapper, "job.xml")
    slot.wait_for("again")
    second = second_process(process.pid)
    process.kill()  # what the client does: it knows this pid only
    process.wait()
    psutil.wait_procs([second], timeout=5)
    assert not second.is_running() or second.status() == psutil.STATUS_ZOMBIE
    (stale,) = unpacked(slot.folder)
    assert not any((slot.folder.parent / "tmp").iterdir())
    assert start(slot, vmwrapper, "job.xml").wait(30) == 0
    assert unpacked(slot.folder) == []
    assert f"removed {stale}" in slot.text("stderr.txt")
    slot.assert_nothing_runs(1)


def test_the_first_process_ends_as_the_second_was_killed(slot: TestSlot, vmwrapper: str) -> None:
    slot.job(task("echo > started; sleep 300"))
    process = start(slot, vmwrapper, "job.xml")
    slot.wait_for("started")
    second_process(process.pid).kill()
    assert process.wait(10) == -signal.SIGKILL
    assert unpacked(slot.folder) == []


def test_a_start_is_killed_at_any_moment(slot: TestSlot, vmwrapper: str) -> None:
    """Nothing runs on, whenever the first process is killed: while it unpacks, while the second starts, later."""
    slot.job(task("sleep 300"))
    for tenths in (0.5, 2, 4):
        process = start(slot, vmwrapper, "job.xml")
        time.sleep(tenths / 10)
        process.kill()
        process.wait()
    end = after(10)
    while any(found.name() != "sleep" for found in slot.leftovers()):
        assert time.monotonic() < end
        time.sleep(0.05)
    slot.job(task("true"))
    assert start(slot, vmwrapper, "job.xml").wait(30) == 0
    assert unpacked(slot.folder) == []
    slot.assert_nothing_runs(1)


def run(program: str, *words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *words], cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def test_check_licenses_and_hostmain_by_name(slot: TestSlot, vmwrapper: str) -> None:
    slot.job(task("true"))
    assert run(vmwrapper, "check", "job.xml", folder=slot.folder).returncode == 0
    slot.write("bad.xml", "<job_desc><tusk/></job_desc>")
    assert run(vmwrapper, "check", "bad.xml", folder=slot.folder).returncode == 206
    text = run(vmwrapper, "licenses", folder=slot.folder).stdout
    parts = re.findall(r"^={100}\n(.+)\n={100}$", text, re.MULTILINE)
    for part in ("vmwrapper: COPYING.LESSER", "Twisted", "lxml", "stomp.py", "psutil", "netifaces", "pyinstaller",
                 "Debian package libpython3.11", "Debian package libboinc-app7", "Debian package libssl3"):  # fmt: skip
        assert any(name.startswith(part) for name in parts), (part, parts)
    assert "GNU LESSER GENERAL PUBLIC LICENSE" in text
    (slot.folder / "HostMain").symlink_to(vmwrapper)
    done = run("./HostMain", "none.cfg", folder=slot.folder)
    assert (done.returncode, "none.cfg" in done.stderr) == (2, True), done.stderr
    assert run(vmwrapper, "HostMain", folder=slot.folder).stderr.count("vmcontrol.hostmain") == 0, "a word says nothing"
    assert unpacked(slot.folder) == []


def test_vmmain_runs_a_command_without_python(tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "guest").mkdir()
    with running_broker("embedded", tmp_path / "broker") as broker:
        agent = AgentProcess(tmp_path / "guest", broker)
        agent.program = [str(frozen_programs() / "vmmain")]
        agent.start()
        try:
            host = ScriptedHost(broker)
            wait_for_agent(host, agent)
            host.run("one", "sh", "-c", "env; exit 7")
            result = host.result("one")
            assert result["exit_status"] == 7, result
            assert "MARK=the agent" in result["out"]
            assert "_PYI" not in result["out"]
            assert "LD_LIBRARY_PATH=" not in result["out"]
            host.close()
            assert agent.stop() == 0
        finally:
            agent.kill()


def wait_for_agent(host: ScriptedHost, agent: AgentProcess) -> None:
    end = after(30)
    while True:
        host.send(CommandList(GUEST_ID, "up"))
        try:
            host.expect(CommandTable, lambda table: table.token == "up", limit_s=1)
        except TimeoutError:
            assert time.monotonic() < end, agent.log.read_text()
        else:
            return


def test_size_and_the_oldest_c_library(vmwrapper: str, tmp_path: Path) -> None:
    """What the unpacked libraries ask of the system decides on which systems the executables run."""
    for name in ("vmwrapper", "vmmain"):
        assert (frozen_programs() / name).stat().st_size < SIZE_LIMIT_BYTES
    slot = TestSlot(tmp_path)
    slot.job(task("cp -r _MEI* copy; rm -rf copy/base_library.zip"))
    assert start_and_wait(slot, vmwrapper) == 0
    needed = set()
    for path in (tmp_path / "copy").rglob("*.so*"):
        text = subprocess.run(["objdump", "-T", str(path)], capture_output=True, text=True).stdout
        needed |= {tuple(map(int, number.split("."))) for number in re.findall(r"GLIBC_(\d+\.\d+)", text)}
    print("newest symbol of the C library:", max(needed))
    assert (2, 17) < max(needed) <= NEEDS_GLIBC


def start_and_wait(slot: TestSlot, vmwrapper: str) -> int:
    (slot.folder.parent / "tmp").mkdir(exist_ok=True)
    return start(slot, vmwrapper, "job.xml").wait(30)


def test_a_second_build_gives_the_same_bytes(tmp_path: Path) -> None:
    """PyInstaller's work is made anew; the environment with the packages is the same one."""
    first = frozen_programs()
    build_frozen.build(tmp_path, python=build_frozen.default_python(), again=True)
    keys = [json.loads((folder / "build.json").read_text())["key"] for folder in (first, tmp_path)]
    assert keys[0] == keys[1], "somebody changed the sources meanwhile"
    for name in build_frozen.PROGRAMS:
        assert filecmp.cmp(first / name, tmp_path / name, shallow=False), name


WITHOUT_LIBBOINC = 'for f in /usr/lib/*/libboinc_api.so.7; do mount --bind /dev/null "$f"; done; exec "$0"'
"""On a volunteer's computer there is none either."""


@pytest.mark.optin
@pytest.mark.skipif(os.geteuid() != 0, reason="hides this computer's libboinc from the program, which root alone may")
def test_a_build_without_libboinc_reports_by_itself(tmp_path: Path, slot: TestSlot) -> None:
    build_frozen.build(tmp_path / "dist", python=build_frozen.default_python(), libboinc=False)
    client = PlayedClient(slot)
    slot.job(task("echo > started; until test -e go; do sleep 0.02; done"))
    with slot.write("told", "").open("wb") as told:
        program = ["unshare", "--mount", "sh", "-c", WITHOUT_LIBBOINC, str(tmp_path / "dist" / "vmwrapper")]
        process = slot.start(program=program, VMWRAPPER_BOINC_RUNTIME="auto", stderr=told)
        slot.wait_for("started")
        assert not list(slot.folder.glob(f"{UNPACKED}/libboinc*"))
        client.say("<suspend/>")
        shell = next(one for one in slot.leftovers() if one.name() == "sh")
        end = after(5)
        while shell.status() != psutil.STATUS_STOPPED and not is_frozen(shell.pid):
            assert time.monotonic() < end
            time.sleep(0.01)
        client.say("<resume/>")
        (slot.folder / "go").touch()
        assert process.wait(30) == 0
    assert "BOINC runtime in Python" in slot.text("told"), slot.text("told")
    assert unpacked(slot.folder) == []
    assert slot.text("boinc_finish_called").startswith("0")


@pytest.mark.optin
@pytest.mark.qemu
def test_a_guest_image_with_the_frozen_agent(tmp_path: Path) -> None:
    """The image's own agent is not used: a job's files, clock and command go through vmmain."""
    from guest.image.build import Options
    from guest.image.cache import guest_image

    root = Path(__file__).parents[3]
    files = tmp_path / "files"
    (files / "usr/lib/vmwrapper").mkdir(parents=True)
    shutil.copy(frozen_programs() / "vmmain", files / "usr/lib/vmwrapper/vmmain")
    (files / "etc/vmwrapper").mkdir(parents=True)
    (files / "etc/vmwrapper/agent").write_text("/usr/lib/vmwrapper/vmmain /etc/vmwrapper/VMConfig.cfg\n")
    image = guest_image(root / ".cache" / "guest-image", Options(files=files))
    slot = TestSlot(tmp_path / "slot")
    slot.folder.mkdir()
    try:
        shutil.copy(root / "examples" / "worker" / "HostConfig.cfg", slot.folder / "HostConfig.cfg")
        shutil.copy(image, slot.folder / "guest.vdi")
        slot.write("in", "input")
        slot.job(
            "<VMmanage_task><application>HostMain</application><command_line>./HostConfig.cfg</command_line>"
            "<stderr_filename>stderr_HostMain</stderr_filename></VMmanage_task>",
            "<task><virtualmachine>one</virtualmachine><image>guest.vdi</image><memory_size_mb>256</memory_size_mb>"
            "<application>sh</application><app_pathVM>/bin</app_pathVM><copy_file_to_VM>in</copy_file_to_VM>"
            "<command_line>-c 'readlink /proc/$PPID/exe; cat in in &gt; out; ls /tmp'</command_line>"
            "<stdout_filename>told</stdout_filename><copy_file_from_VM>out</copy_file_from_VM></task>",
        )
        status = slot.start("job.xml", program=[sys.executable, "-m", "vmwrapper"]).wait(240)
        assert status == 0, slot.text("stderr.txt") + slot.text("stderr_HostMain")
        print(slot.text("stderr.txt"), slot.text("told"))
        assert slot.text("told").splitlines()[0] == "/usr/lib/vmwrapper/vmmain"
        assert slot.text("out") == "inputinput"
        assert "clock" not in slot.text("stderr_HostMain")
    finally:
        slot.clean()
