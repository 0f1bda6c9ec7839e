"""Calls of VBoxManage: limits, trace, calls that do not end, which program. VBoxManage is played by a script."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import pytest_twisted

from tests.support.limits import after
from vmcontrol.common import virtualbox
from vmcontrol.common.eventloop import Event, start, the_reactor
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError
from vmcontrol.hypervisors.virtualbox import vboxmanage
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage

NO_SERVICE = "VBoxManage: error: Failed to create the VirtualBox object!"


def played(folder: Path, script: str) -> VBoxManage:
    program = folder / "VBoxManage"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return VBoxManage(the_reactor(), folder / "trace.txt", program=str(program))


def ended(pid: int) -> bool:
    """Within 5 s: it was killed, and the kernel takes its time on a busy computer."""
    deadline = after(5)
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
    return False


@pytest_twisted.ensureDeferred
async def test_an_answer_is_given_without_the_scripts_warning_and_traced_whole(tmp_path: Path) -> None:
    vbox = played(
        tmp_path, 'printf "WARNING: The character device\\n\\t does not exist\\n7.2.22\\n"; echo odd >&2; exit 3'
    )
    answer = await vbox.ask("startvm", "two words")
    assert (answer.status, answer.stdout, answer.stderr) == (3, "7.2.22", "odd\n")
    trace = (tmp_path / "trace.txt").read_text()
    assert "VBoxManage startvm 'two words'" in trace
    assert "status 3" in trace
    assert "out| WARNING" in trace
    assert "err| odd" in trace
    assert vbox.calls == 1


@pytest_twisted.ensureDeferred
async def test_a_call_that_hangs_is_killed_at_its_limit_and_is_a_fault_that_passes(tmp_path: Path) -> None:
    vbox = played(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    began = time.monotonic()
    with pytest.raises(HostProblem) as caught:
        await vbox.ask("controlvm", "x", "pause", limit_s=0.4, done=Event())
    assert time.monotonic() - began < 2
    assert caught.value.key == "virtualbox-hung"
    assert caught.value.delay_s
    assert ended(int((tmp_path / "pid").read_text()))
    assert "killed" in (tmp_path / "trace.txt").read_text()


@pytest_twisted.ensureDeferred
async def test_a_question_that_hangs_twice_costs_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vboxmanage, "ASK_AGAIN_S", 0.1)
    began = time.monotonic()
    with pytest.raises(HostProblem):
        await played(tmp_path, "exec sleep 60").ask("showvminfo", "x", limit_s=0.5)
    assert time.monotonic() - began < 2


@pytest_twisted.ensureDeferred
async def test_a_hanging_call_blocks_no_other(tmp_path: Path) -> None:
    vbox = played(tmp_path, '[ "$1" = startvm ] && exec sleep 60; echo there')
    hanging = start(vbox.ask("startvm", "x", limit_s=1.0))
    hanging.addErrback(lambda failure: failure.trap(HostProblem))
    began = time.monotonic()
    assert (await vbox.ask("list", "vms")).stdout == "there"
    assert time.monotonic() - began < 0.9
    await hanging


@pytest_twisted.ensureDeferred
async def test_a_question_that_stands_still_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vboxmanage, "ASK_AGAIN_S", 0.1)
    vbox = played(tmp_path, f"[ -e {tmp_path}/second ] && echo answer || {{ touch {tmp_path}/second; exec sleep 60; }}")
    began = time.monotonic()
    assert (await vbox.ask("showvminfo", "x")).stdout == "answer"
    assert time.monotonic() - began < 5


@pytest_twisted.ensureDeferred
async def test_a_call_whose_effect_is_there_is_ended(tmp_path: Path) -> None:
    vbox = played(tmp_path, "exec sleep 60")
    done = Event()
    done.set()
    began = time.monotonic()
    assert (await vbox.ask("controlvm", "x", "pause", done=done)).status == 0
    assert time.monotonic() - began < 5


@pytest_twisted.ensureDeferred
async def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    words = "VBoxManage: error: The machine is already locked by a session (or being locked or unlocked)"
    count = f"n=$(cat {tmp_path}/n 2>/dev/null); echo x$n > {tmp_path}/n"
    script = f'{count}; [ "$n" = xx ] || {{ echo "{words}" >&2; exit 1; }}'
    assert await played(tmp_path, script).do("it", "modifyvm", "x") == ""
    assert (tmp_path / "n").read_text() == "xxx\n"


@pytest_twisted.ensureDeferred
async def test_a_lock_that_stays_is_a_problem_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vboxmanage, "LOCKED_LIMIT_S", 0.2)
    vbox = played(
        tmp_path, 'echo "The machine is already locked by a session (or being locked or unlocked)" >&2; exit 1'
    )
    with pytest.raises(HostProblem) as caught:
        await vbox.do("deleting one", "unregistervm", "x")
    assert caught.value.key == "vm-locked"
    assert vbox.calls > 1


@pytest_twisted.ensureDeferred
async def test_an_order_to_a_service_that_is_not_there_yet_is_given_again(tmp_path: Path) -> None:
    count = f"echo x >> {tmp_path}/count; [ $(wc -l < {tmp_path}/count) -gt 3 ]"
    vbox = played(tmp_path, f'{count} && echo fine || {{ echo "{NO_SERVICE}" >&2; exit 1; }}')
    assert await vbox.do("it", "controlvm", "x", "pause") == "fine"
    assert vbox.calls == 4


@pytest_twisted.ensureDeferred
async def test_a_service_that_never_starts_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vboxmanage, "NOT_THERE_LIMIT_S", 1.0)
    vbox = played(tmp_path, f'echo "{NO_SERVICE}" >&2; exit 1')
    with pytest.raises(HostProblem) as caught:
        await vbox.do("it", "list", "vms")
    assert caught.value.key == "service-broken"
    calls = vbox.calls
    assert calls >= 3
    with pytest.raises(HostProblem):
        await vbox.do("it", "list", "vms")
    assert vbox.calls <= calls + 2


@pytest.mark.parametrize("said", ['name=\\"one\\"\\ngroups=', "error: Details: code NS_ERROR_CALL_FAILED (0x800706be)"])
@pytest_twisted.ensureDeferred
async def test_a_question_is_asked_again_when_the_service_goes_away_in_the_middle(tmp_path: Path, said: str) -> None:
    vbox = played(
        tmp_path, f'echo x >> {tmp_path}/count; [ $(wc -l < {tmp_path}/count) -gt 2 ] || {{ printf "{said}"; exit 1; }}'
    )
    assert (await vbox.ask("showvminfo", "one")).status == 0
    assert vbox.calls == 3


@pytest_twisted.ensureDeferred
async def test_half_an_answer_for_ever_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vboxmanage, "BROKE_OFF_LIMIT_S", 0.5)
    assert (await played(tmp_path, "echo half; exit 1").ask("showvminfo", "one")).status == 1


@pytest.mark.parametrize(
    "said", ["Could not find a registered machine named x", "object functionality is limited", "permission denied"]
)
@pytest_twisted.ensureDeferred
async def test_a_question_that_was_answered_is_not_asked_again(tmp_path: Path, said: str) -> None:
    vbox = played(tmp_path, f"echo '{said}' >&2; exit 1")
    assert (await vbox.ask("showvminfo", "x")).status == 1
    assert vbox.calls == 1


@pytest_twisted.ensureDeferred
async def test_an_order_is_never_given_twice_because_of_half_an_answer(tmp_path: Path) -> None:
    vbox = played(tmp_path, "echo NS_ERROR_CALL_FAILED >&2; exit 1")
    assert (await vbox.ask("controlvm", "x", "pause")).status == 1
    assert vbox.calls == 1


@pytest_twisted.ensureDeferred
async def test_other_failures_are_not_repeated(tmp_path: Path) -> None:
    vbox = played(tmp_path, "echo 'VBoxManage: error: no such thing' >&2; exit 1")
    with pytest.raises(HypervisorError, match="it: no such thing"):
        await vbox.do("it", "modifyvm", "x")
    assert vbox.calls == 1


@pytest_twisted.ensureDeferred
async def test_output_that_is_no_text_is_survived(tmp_path: Path) -> None:
    answer = await played(tmp_path, 'printf "\\377\\376 a\\n"').ask("list", "vms")
    assert answer.stdout.endswith(" a")


@pytest_twisted.ensureDeferred
async def test_the_trace_is_bounded_and_holds_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vboxmanage, "TRACE_LIMIT", 4000)
    monkeypatch.setattr(vboxmanage, "TRACE_KEPT", 2000)
    vbox = played(tmp_path, "echo " + "x" * 500)
    for _ in range(8):
        await vbox.ask("setextradata", "x", "key", "string:token=00ff00ff;interface=08:00:27:00:00:02")
    trace = tmp_path / "trace.txt"
    assert trace.stat().st_size < 5000
    assert "00ff" not in trace.read_text()
    assert "token=..." in trace.read_text()
    assert trace.stat().st_mode & 0o077 == 0


@pytest_twisted.ensureDeferred
async def test_no_virtualbox(tmp_path: Path) -> None:
    vbox = VBoxManage(the_reactor(), None, program=str(tmp_path / "none"))
    with pytest.raises(HostProblem) as caught:
        await vbox.ask("list", "vms")
    assert caught.value.key == "virtualbox-missing"
    assert caught.value.delay_s is None


def test_which_program_is_called(tmp_path: Path) -> None:
    program = tmp_path / "VBoxManage"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert virtualbox.program({virtualbox.PROGRAM_VARIABLE: str(program)}) == str(program)
    assert virtualbox.program({virtualbox.PROGRAM_VARIABLE: str(tmp_path / "other")}) is None
    places = list(virtualbox._candidates({}, "linux"))
    assert places[0] == "/usr/lib/virtualbox/VBoxManage", "the program before Debian's script on the PATH"
    assert places[-1] == "VBoxManage"
    windows = list(virtualbox._candidates({"VBOX_MSI_INSTALL_PATH": "D:\\VBox"}, "win32"))
    assert windows[0].endswith("VBoxManage.exe")
    assert windows[0].startswith("D:\\VBox")
