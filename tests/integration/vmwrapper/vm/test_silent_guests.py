"""Guests that fall silent, through the whole wrapper, with the scripted HostMain: to what they go back, and how often.

The limit of silence is half a second here; which silence counts is HostMain's to say
(tests/unit/vmcontrol/guests/test_silence.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import THREE, calls, guest, runs
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot
from vmwrapper.vm.checkpoints import has_room

SHORT = "<boot_timeout>1</boot_timeout>"
PERIODIC = f"{SHORT}<minimum_checkpoint_interval>0</minimum_checkpoint_interval>"
TRACE = "<copy_file_from_VM>trace</copy_file_from_VM>"


@pytest.fixture
def slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestSlot]:
    monkeypatch.setenv("VMWRAPPER_TEST_SILENCE_S", "0.5")
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    slot.write("worker", "the application", executable=True)
    yield slot
    slot.clean()


def run_under_client(slot: TestSlot) -> int:
    with (slot.folder / "stderr.txt").open("ab") as stderr:
        return slot.start(stderr=stderr).wait(60)


def story(slot: TestSlot) -> str:
    text = slot.text("stderr.txt")
    assert "Traceback" not in text, text
    return text


def test_a_guest_that_falls_silent_goes_back_to_its_snapshot_and_on(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(hush=["waitCommand", 3])
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert slot.plan_is_used_up()
    assert slot.text("out2") == "a\nb\nc\n"
    assert [task for task, _ in dict.fromkeys(runs(slot))] == sorted(task for task, _ in dict.fromkeys(runs(slot)))
    assert "the guest has given no sign of life for" in story(slot)


def test_the_next_task_begins_and_a_result_is_forgotten_when_the_guest_has_answered_after_the_snapshot(
    slot: TestSlot,
) -> None:
    slot.job(HOST_MAIN_TASK, *THREE[:2])
    assert slot.run("job.xml") == 0
    wanted = ("pingGuest", "saveSnapshot", "acknowledgeResult", "deleteSnapshot", "deleteVM")
    assert [call for call in calls(slot) if call in wanted] == [
        "pingGuest", "saveSnapshot", "pingGuest", "acknowledgeResult", "acknowledgeResult", "deleteVM",
    ]  # fmt: skip


@pytest.mark.parametrize("calls_before", [1, 2])
def test_a_guest_that_dies_around_a_snapshot_between_tasks_costs_no_task(slot: TestSlot, calls_before: int) -> None:
    """Before it none is taken; after it what it holds is a task that is done, once it has answered."""
    slot.job(HOST_MAIN_TASK, THREE[0], THREE[1], THREE[2])
    slot.plan(hush=["pingGuest", calls_before])
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert slot.plan_is_used_up()
    assert slot.text("out2") == "a\nb\nc\n"
    assert runs(slot) == [("0", 1), *([("0", 2)] if calls_before == 1 else []), ("1", 1), ("2", 1)]
    story(slot)


def test_a_guest_that_is_always_silent_rests_twice_and_has_failed_the_third_time(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("hush=99 sleep=60", more=SHORT))
    slot.write("guest_console.log", "of another time: Kernel panic - not syncing: old\n")
    for _ in range(2):
        assert slot.run("job.xml") == 75, slot.text("stderr.txt")
        assert "does not go on, not even from the beginning: the guest has given no sign of life" in story(slot)
    with (slot.folder / "guest_console.log").open("a") as console:
        console.write("left over\n")
    process = slot.start("job.xml")
    slot.wait_for("fake_runs.txt", " 4\n")
    with (slot.folder / "guest_console.log").open("a") as console:
        console.write("[   9.1] Kernel panic - not syncing: sysrq triggered crash\n")
    assert process.wait(30) == 208
    assert runs(slot) == [("0", n) for n in range(1, 5)], "twice in the first run, then once"
    assert "given up after 2 tries: The virtual machine does not go on" in story(slot)
    assert "the guest's kernel panicked: Kernel panic - not syncing: sysrq triggered crash" in story(slot)
    assert "[guest console] [   9.1] Kernel panic" in story(slot)
    assert "syncing: old" not in story(slot)


def test_a_dead_snapshot_does_not_take_the_place_of_one_that_lives(slot: TestSlot) -> None:
    """The guest dies while its second snapshot is taken. Back to that one, which leads nowhere; then the one before."""
    client = PlayedClient(slot)
    slot.job(
        HOST_MAIN_TASK,
        guest("append=trace:a", more=SHORT),
        guest("append=trace:b sleep=3", more=PERIODIC + TRACE),
    )
    slot.plan(hush=["saveSnapshot", 2])
    assert run_under_client(slot) == 0, slot.text("stderr.txt")
    assert slot.plan_is_used_up()
    assert slot.text("trace") == "a\nb\n"
    assert "snapshot vmwrapper_2 leads there again: back to the state before it" in story(slot)
    assert runs(slot) == [("0", 1), ("1", 1), ("1", 2)]
    del client


def test_where_two_snapshots_do_not_fit_the_older_one_goes_after_the_guest_has_answered(slot: TestSlot) -> None:
    client = PlayedClient(slot, more="<rsc_disk_bound>1</rsc_disk_bound>\n")
    slot.job(HOST_MAIN_TASK, guest("append=trace:a"), guest("append=trace:b"), guest("append=trace:c"))
    assert run_under_client(slot) == 0, slot.text("stderr.txt")
    wanted = ("pingGuest", "saveSnapshot", "deleteSnapshot", "acknowledgeResult")
    assert [call for call in calls(slot) if call in wanted][:9] == [
        "pingGuest", "saveSnapshot", "pingGuest", "acknowledgeResult",
        "pingGuest", "deleteSnapshot", "saveSnapshot", "pingGuest", "acknowledgeResult",
    ]  # fmt: skip
    assert "there is no room for two snapshots" in story(slot)
    del client


@pytest.mark.parametrize(
    ("used", "size", "free", "bound", "fits"),
    [(0, 10, 10, 0, True), (0, 11, 10, 0, False), (90, 10, 99, 100, True), (91, 10, 99, 100, False)],
)
def test_room_is_what_disk_and_bound_leave(used: int, size: int, free: int, bound: float, fits: bool) -> None:
    assert has_room(used, size, free, bound) is fits


def test_a_dead_first_snapshot_leads_back_to_the_beginning(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("append=trace:a", more=SHORT), guest("append=trace:b", more=SHORT + TRACE))
    slot.plan(hush=["saveSnapshot", 1])
    assert slot.run("job.xml", limit_s=60) == 0, slot.text("stderr.txt")
    assert slot.text("trace") == "a\nb\n"
    assert "has no snapshot: made anew" in story(slot)
    assert runs(slot) == [("0", 1), ("0", 2), ("1", 1)]


@pytest.mark.parametrize("kind", ["snapshot", "saved state"])
def test_after_a_restart_a_dead_state_is_tried_once(slot: TestSlot, kind: str) -> None:
    client = PlayedClient(slot)
    slot.job(
        HOST_MAIN_TASK,
        guest("append=trace:a", more=SHORT),
        guest("append=trace:b sleep=3", more=PERIODIC + TRACE),
    )
    slot.plan(hush=["saveSnapshot", 2], kill=["pingGuest", 4], lifeline="die" if kind == "snapshot" else "save")
    assert run_under_client(slot) == -9
    restores = calls(slot).count("restoreSnapshot")
    assert run_under_client(slot) == 0, slot.text("stderr.txt")
    assert slot.text("trace") == "a\nb\n"
    assert calls(slot).count("restoreSnapshot") - restores == 2, "the newer one, then the older one"
    story(slot)
    del client


def test_what_is_between_two_restarts_is_never_the_dead_state_that_was_given_up(slot: TestSlot) -> None:
    """The wrapper is killed when it has just decided to go back: HostMain saves the dead guest, nobody resumes it."""
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(hush=["waitCommand", 3], kill=["powerOff", 1], lifeline="save")
    assert slot.run("job.xml") == -9
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert slot.text("out2") == "a\nb\nc\n"
    assert "its saved state is resumed" not in story(slot)


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [("", 0, "the task counts as done"), ("<copy_file_from_VM>out</copy_file_from_VM>", 195, "and with it out")],
)
def test_a_time_limit_that_the_guest_cannot_be_told_of_ends_the_vm(
    slot: TestSlot, more: str, status: int, words: str
) -> None:
    slot.job(HOST_MAIN_TASK, guest("hush=9 sleep=60", more=f"<time_limit>0.1</time_limit>{more}", stdout="stdout"))
    assert slot.run("job.xml") == status, slot.text("stderr.txt")
    assert "could not be ended" in story(slot)
    assert words in story(slot)
    assert json.loads(slot.text("fake_world.json")) == {}
    slot.assert_nothing_runs()


def test_boot_and_copying_in_are_no_part_of_the_time_limit(slot: TestSlot) -> None:
    slot.plan(slow={"start": 1.5, "putFile": 1.0})
    slot.job(
        HOST_MAIN_TASK, guest("sleep=0.5 make=out", more="<time_limit>2</time_limit>" + TRACE.replace("trace", "out"))
    )
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert "made by" in slot.text("out")
    assert "has run for its time_limit" not in story(slot)


def test_what_left_the_slot_is_not_sent_again_after_a_rollback_nor_after_a_crash(slot: TestSlot) -> None:
    """The guest goes back to its beginning and writes the same message again; the client has the upload already."""
    client = PlayedClient(slot)
    slot.job(
        HOST_MAIN_TASK,
        guest(
            "sleep=600 early=news:half_way early=part:a_part",
            more=f"{SHORT}<trickle_trigger_file>news</trickle_trigger_file>",
        ),
        "<intermediate_upload_file>part</intermediate_upload_file>",
    )
    with (slot.folder / "stderr.txt").open("ab") as stderr:
        process = slot.start(stderr=stderr)
        slot.wait_for("stderr.txt", "upload of part asked for", 40)
        assert story(slot).count("trickle-up message news") == 1
        process.kill()
        process.wait()
        (slot.folder / "boinc_ufr_part").unlink()  # as the client does
        (slot.folder / "fake_calls.txt").unlink()
        slot.plan(hush=["listFiles", 2])
        process = slot.start(stderr=stderr)
        slot.wait_for("stderr.txt", "news is not sent again", 60)
        client.say("<abort/>")
        assert process.wait(20) == 194
    assert slot.plan_is_used_up()
    assert "made anew" in story(slot)
    assert story(slot).count("trickle-up message news") == 1
    assert story(slot).count("upload of part asked for") == 1
    assert not (slot.folder / "boinc_ufr_part").exists()


def test_an_agent_that_was_killed_is_told_by_name(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(agent_dies=["waitCommand", 3])
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert "the guest calls the running command unknown: the guest has rebooted, or its agent was killed" in story(slot)
    assert "while it should run" not in story(slot)
