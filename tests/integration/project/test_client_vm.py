"""A job in a virtual machine under the real client: suspended, resumed, stopped in every way, started again, aborted.

Both BOINC runtimes go through the same story side by side, each as a job of one client with a VM of its own.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.integration.vmwrapper.boinc.test_boinc_runtime import have_library
from tests.support import boinc_client, limits
from tests.support.boinc_client import BoincClient
from tests.support.client_vm import (
    PAUSED,
    RUNNING,
    Curve,
    Messages,
    end_program,
    executions,
    job,
    processes_in,
    qemu_of,
    task,
    times_of,
    wait_gone,
    wrapper_of,
)
from tests.support.limits import after

pytestmark = [
    pytest.mark.timeout(600),  # four VMs under emulation, perhaps on two busy processors
    pytest.mark.boinc,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(not boinc_client.AVAILABLE, reason=boinc_client.WHY_NOT),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
]

KINDS = ["python", *(["library"] if have_library() else [])]
SUSPEND_LIMIT_S = 0.4
QUIT_LIMIT_S = 5.0
RESTART_LIMIT_S = 3.0
ABORT_LIMIT_S = 3.0
END_LIMIT_S = 1.0
LONGER_THAN_THE_TEST = 6000
"""Ticks of ticker.py, ten minutes; where its end is looked at, the test ends it."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from guest.image.cache import guest_image

    copy = tmp_path_factory.mktemp("image") / "guest.vdi"
    shutil.copyfile(guest_image(Path(__file__).parents[3] / ".cache" / "guest-image"), copy)
    return copy


class Story:
    """One client, and what was seen of its jobs."""

    def __init__(self, client: BoincClient, names: list[str]) -> None:
        self.client = client
        self.names = names
        self.curves = {name: Curve(client, name) for name in names}
        self.slots: dict[str, Path] = {}
        self.messages: dict[str, Messages] = {}
        self.measured: dict[str, list[float]] = {}

    def look(self) -> None:
        for curve in self.curves.values():
            curve.look()

    def wait_started(self) -> None:
        """Until each job has a process; their slots are known then."""
        for name in self.names:
            self.client.wait_for(partial(self.is_running, name), f"{name} started", 60)
            self.slots[name] = self.client.slot(name)

    def wait_running(self, limit_s: float = 240) -> None:
        """Until each job's command runs in its guest and its fraction done rises."""
        seen = {}
        self.wait_started()
        for name in self.names:  # before that the client shows an estimate of its own as fraction done
            self.client.wait_for(partial(self.has_begun, name), f"{name} runs in its guest", limit_s)
        for name in self.names:
            seen[name] = self.client.result(name).fraction_done

            # What a client that was killed shows before our first report is from its own file, and may be old.
            self.client.wait_for(partial(self.goes_on, name, seen[name]), f"{name} goes on", limit_s)
            self.curves[name].look()

    def is_running(self, name: str) -> bool:
        return self.client.result(name).is_running

    def has_begun(self, name: str) -> bool:
        console = self.slots[name] / "guest_console.log"
        return console.exists() and bool(executions(console.read_text(errors="replace")))

    def goes_on(self, name: str, seen: float) -> bool:
        return self.client.result(name).fraction_done > seen

    def ran(self, name: str, count: int = 1, after: float = 0.0) -> bool:
        return len([at for at in times_of(self.slots[name], RUNNING) if at > after]) >= count

    def watch(self) -> None:
        for messages in self.messages.values():
            messages.close()
        self.messages = {name: Messages(self.slots[name]) for name in self.names}

    def measure(self, what: str, seconds: float, limit_s: float) -> None:
        """The limits are those of a computer with nothing else to do; with other load all takes longer."""
        self.measured.setdefault(what, []).append(round(seconds, 2))
        load = limits.factor()
        assert seconds <= limit_s * load, f"{what}: {seconds:.2f} s at {load:.1f} times the load"

    def story_of(self, name: str) -> str:
        slot = self.slots[name]
        return "".join(
            f"--- {file}\n{(slot / file).read_text(errors='replace')}"
            for file in ("stderr.txt", "stderr_HostMain")
            if (slot / file).exists()
        )

    def assert_saved(self, name: str) -> None:
        """Nothing runs, nothing says that the job is done, and its VM is saved."""
        slot = self.slots[name]
        left = processes_in(slot)
        assert not left, left
        assert not (slot / "boinc_finish_called").exists()
        checkpoint = json.loads((slot / "vmwrapper_checkpoint.json").read_text())
        assert checkpoint["vms"][0]["saved_state_expected"] is True, self.story_of(name)
        assert list((slot / "vm").glob("*/saved.state")), self.story_of(name)

    def measure_restart(self) -> None:
        """From the wrapper's start to the VM that runs on."""
        for name, slot in self.slots.items():
            began = wrapper_of(slot).create_time()
            self.client.wait_for(partial(self.ran, name, 1, began), f"{name} runs again", 60)
            # All of them start in the same second, on two processors as a rule.
            limit = RESTART_LIMIT_S * len(self.slots)
            self.measure("restart", next(at for at in times_of(slot, RUNNING) if at > began) - began, limit)


@pytest.fixture
def story(tmp_path: Path, image: Path) -> Iterator[Story]:
    jobs = [job(f"{kind}_vm", image, [task(LONGER_THAN_THE_TEST, interval_s=6)], kind=kind) for kind in KINDS]
    with BoincClient(tmp_path, jobs, checkpoint_period_s=2.0) as client:
        story = Story(client, [one.name for one in jobs])
        yield story
        for messages in story.messages.values():
            messages.close()
    print("measured, seconds:", story.measured)


def timed_end(story: Story, what: str, limit_s: float, cause: str, act: object) -> None:
    """`act` ends the wrappers; from the message (or, where there is none, the act) to the end of each is measured."""
    wrappers = {name: wrapper_of(slot) for name, slot in story.slots.items()}
    qemus = [qemu_of(slot) for slot in story.slots.values()]
    story.watch()
    gone: dict[str, float] = {}
    threads = [
        threading.Thread(target=lambda n=name, p=process: gone.__setitem__(n, wait_gone(p, 30)))
        for name, process in wrappers.items()
    ]
    for thread in threads:
        thread.start()
    began = time.time()
    act()  # type: ignore[operator]
    for thread in threads:
        thread.join()
    for name in story.names:
        since = story.messages[name].time_of(cause) if cause else began
        story.measure(what, gone[name] - since, limit_s)
    assert not any(qemu.is_running() and qemu.status() != psutil.STATUS_ZOMBIE for qemu in qemus), "the wrapper is last"


def test_a_job_in_a_vm_through_its_life(story: Story) -> None:
    client = story.client
    story.wait_running()
    suspend_and_resume(story)
    limit_the_processors(story)

    timed_end(story, "quit", QUIT_LIMIT_S, "<quit/>", client.quit)
    for name in story.names:
        story.assert_saved(name)
    with contextlib.ExitStack() as taken:
        for slot in story.slots.values():
            occupy_old_ports(slot, taken)
        client.start()
        story.wait_running()
    story.measure_restart()

    client.wait_for(lambda: look_at_checkpoint(story), "checkpoints", 120)

    client.kill_alone()
    # the wrapper looks every 10 s whether the client is there (api/boinc_api.cpp, HEARTBEAT)
    for name, slot in story.slots.items():
        end = after(60)
        while processes_in(slot):
            assert time.monotonic() < end, story.story_of(name)
            time.sleep(0.05)
        story.assert_saved(name)
    client.start()
    story.wait_running()
    story.measure_restart()

    timed_end(story, "TERM to all", QUIT_LIMIT_S, "", client.terminate_group)
    for name in story.names:
        story.assert_saved(name)
    client.start()
    story.wait_running()
    story.measure_restart()

    for name in story.names:
        slot = story.slots[name]
        assert executions((slot / "guest_console.log").read_text(errors="replace")) == [("0", 1)], "once"
        assert "rollback" not in (slot / "stderr.txt").read_text()
        story.curves[name].assert_monotone()
        assert max(point[2] for point in story.curves[name].points) < 1
    abort_one(story, story.names[0])
    if len(story.names) > 1:
        finish_one(story, story.names[1])


def occupy_old_ports(slot: Path, taken: contextlib.ExitStack) -> None:
    """Somebody else listens now where this slot's HostMain, broker and VM did."""
    words = (slot / "stderr_HostMain").read_text()
    ports = {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", words)}
    assert ports, "that of the VM: HostMain and its broker have none any more"
    for port in ports:
        listener = taken.enter_context(socket.socket())
        with contextlib.suppress(OSError):  # it may be somebody's already
            listener.bind(("127.0.0.1", port))
            listener.listen()


def test_four_jobs_at_once_and_a_long_pause(tmp_path: Path, image: Path) -> None:
    """One of them is suspended for so long that its broker gives its guest up."""
    names = [f"job{number}" for number in range(4)]
    sleeper, others = names[0], names[1:]
    ticks = dict.fromkeys(others, 60) | {sleeper: LONGER_THAN_THE_TEST}
    jobs = [
        job(name, image, [task(ticks[name], interval_s=600)], kind=KINDS[i % len(KINDS)], outputs=("out", "stdout_out"))
        for i, name in enumerate(names)
    ]
    with BoincClient(tmp_path, jobs) as client:
        story = Story(client, names)
        story.wait_started()
        assert len(set(story.slots.values())) == 4
        client.wait_for(partial(story.has_begun, sleeper), f"{sleeper} runs in its guest", 240)
        client.suspend(sleeper)
        slot = story.slots[sleeper]
        client.wait_for(partial(times_of, slot, PAUSED), "paused", 60)
        paused = time.time()
        for name in others:
            client.wait_for(lambda name=name: client.result(name).ready_to_report, f"{name} finished", 240)  # type: ignore[misc]
        client.wait_for(lambda: times_of(slot, " is dropped: "), "the broker gives the guest up", 60)
        client.resume(sleeper)
        client.wait_for(lambda: times_of(slot, RUNNING)[-1] > paused, "resumed", 60)
        pause_s = time.time() - paused
        end_program(slot)
        client.wait_for(lambda: client.result(sleeper).ready_to_report, f"{sleeper} finished", 120)
        for name in names:
            assert client.result(name).state == boinc_client.RESULT_FILES_UPLOADED, client.stderr_of(name)
            assert client.output(name, "out").read_text() == "out\n"
            assert "rollback" not in client.stderr_of(name)
        ended = client.output(sleeper, "stdout_out")
        # The program's own clock at its end, and when its output came to the host.
        assert abs(float(ended.read_text()) - ended.stat().st_mtime) < pause_s / 3, "the guest's clock is right again"
        assert len(list((tmp_path / "slots").glob("*/vm"))) == 0


def look_at_checkpoint(story: Story) -> bool:
    story.look()
    kept = [json.loads((slot / "vmwrapper_checkpoint.json").read_text()) for slot in story.slots.values()]
    proven = [any(one["proven"] for vm in value["vms"] for one in vm["snapshots"]) for value in kept]
    return all(proven) and all(curve.points[-1][1] > 0 for curve in story.curves.values())


def suspend_and_resume(story: Story) -> None:
    client = story.client
    story.watch()
    for name in story.names:
        client.suspend(name)
    for name, slot in story.slots.items():
        asked = story.messages[name].time_of("<suspend/>")
        client.wait_for(partial(times_of, slot, PAUSED), f"{name} paused", 20)
        story.measure("suspend", times_of(slot, PAUSED)[0] - asked, SUSPEND_LIMIT_S)
    cpu = {name: qemu_of(slot).cpu_times() for name, slot in story.slots.items()}
    time.sleep(1.5)
    for name, slot in story.slots.items():
        now = qemu_of(slot).cpu_times()
        assert now.user + now.system - cpu[name].user - cpu[name].system < 0.2, "a paused VM uses no processor"
    for name in story.names:
        client.resume(name)
    for name, slot in story.slots.items():
        asked = story.messages[name].time_of("<resume/>")
        client.wait_for(partial(story.ran, name, 2), f"{name} resumed", 20)
        story.measure("resume", times_of(slot, RUNNING)[-1] - asked, SUSPEND_LIMIT_S)
    story.wait_running()


def limit_the_processors(story: Story) -> None:
    """For an application that is not VirtualBox's the client itself does it: the VM stands half of each second."""
    paused = {name: len(times_of(slot, PAUSED)) for name, slot in story.slots.items()}
    override = story.client.folder / "global_prefs_override.xml"
    full = override.read_text()
    override.write_text(full.replace("<cpu_usage_limit>100<", "<cpu_usage_limit>50<"))
    story.client.reread_preferences()
    for name, slot in story.slots.items():
        story.client.wait_for(lambda n=name, s=slot: len(times_of(s, PAUSED)) >= paused[n] + 2, f"{name} is limited")  # type: ignore[misc]
        assert "preferences have changed: 50 %" in (slot / "stderr.txt").read_text()
    override.write_text(full)
    story.client.reread_preferences()
    for slot in story.slots.values():
        story.client.wait_for(
            lambda s=slot: "preferences have changed: 100 %" in (s / "stderr.txt").read_text(),  # type: ignore[misc]
            "no limit any more",
        )
    story.wait_running()


def abort_one(story: Story, name: str) -> None:
    slot = story.slots[name]
    wrapper, messages = wrapper_of(slot), Messages(slot)
    gone: list[float] = []
    thread = threading.Thread(target=lambda: gone.append(wait_gone(wrapper, 20)))
    thread.start()
    story.client.abort(name)
    thread.join()
    story.measure("abort", gone[0] - messages.time_of("<abort/>"), ABORT_LIMIT_S)
    messages.close()
    story.client.wait_for(lambda: story.client.result(name).state == boinc_client.RESULT_ABORTED, "aborted")
    assert not processes_in(slot)
    assert not (slot / "vm").exists()


def finish_one(story: Story, name: str) -> None:
    """To its end; from the end of the program, as the guest's console tells it, to the end of the wrapper."""
    slot, curve, client = story.slots[name], story.curves[name], story.client
    gone: list[float] = []
    wrapper = wrapper_of(slot)
    thread = threading.Thread(target=lambda: gone.append(wait_gone(wrapper, 60)))
    thread.start()
    end_program(slot)
    console, ended = "", 0.0
    while thread.is_alive():
        with contextlib.suppress(FileNotFoundError):
            console = (slot / "guest_console.log").read_text(errors="replace")
        if not ended and "ended: exit status 0" in console:
            ended = time.time()
        if not ended:
            curve.look()
        time.sleep(0.02)
    assert ended, "the end of the program was not seen"
    story.measure("end of work to exit", gone[0] - ended, END_LIMIT_S)
    client.wait_for(lambda: client.result(name).ready_to_report, f"{name} finished")
    assert client.result(name).state == boinc_client.RESULT_FILES_UPLOADED, client.stderr_of(name)
    assert client.output(name, "out").read_text() == "out\n"
    assert executions(console) == [("0", 1)]
    curve.assert_monotone()
