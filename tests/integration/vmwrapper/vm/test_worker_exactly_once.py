"""A guest task through the whole wrapper, against a scripted HostMain: order of calls, crashes, exit statuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slots import HOST_MAIN_TASK, TestSlot


def guest(line: str, *, more: str = "", vm: str = "one", stdout: str = "") -> str:
    return (
        f"<task><virtualmachine>{vm}</virtualmachine><image>guest.vdi</image><application>./worker</application>"
        f"<copy_app_to_VM>1</copy_app_to_VM><command_line>{line}</command_line>{more}"
        f"<stdout_filename>{stdout}</stdout_filename></task>"
    )


ASKED_MEANWHILE = ("getVMInfo", "waitVM", "getPerformanceData", "waitSilent", "getGuestUptime")
THREE = (
    guest("append=trace:a make=out0", more="<copy_file_from_VM>out0</copy_file_from_VM>", stdout="stdout0"),
    guest("append=trace:b sleep=0.1"),
    guest("append=trace:c copy=trace:out2", more="<copy_file_from_VM>out2</copy_file_from_VM>", stdout="stdout2"),
)


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    slot.write("worker", "the application", executable=True)
    yield slot
    slot.clean()


def calls(slot: TestSlot) -> list[str]:
    return [line.split()[0] for line in slot.text("fake_calls.txt").splitlines()]


def runs(slot: TestSlot) -> list[tuple[str, int]]:
    """What was executed: task and attempt."""
    lines = [line.split() for line in slot.text("fake_runs.txt").splitlines()]
    return [(name.split("_")[-2], int(attempt)) for name, attempt in lines]


def test_the_steps_come_in_the_promised_order(slot: TestSlot) -> None:
    slot.write("in", "input")
    slot.write("text", "for stdin")
    slot.job(
        HOST_MAIN_TASK,
        guest(
            "make=out",
            more="<copy_file_to_VM>in</copy_file_to_VM><stdin_filename>text</stdin_filename>"
            "<copy_file_from_VM>out</copy_file_from_VM>",
            stdout="stdout_worker",
        ),
    )
    assert slot.run("job.xml") == 0
    wanted = [
        "listAvailableVMs", "defineVM", "start", "waitGuest", "listCommands", "putFile", "putFile", "putFile",
        "runCommand", "waitCommand", "getFile", "getFile", "acknowledgeResult", "deleteVM", "shutdown",
    ]  # fmt: skip
    seen = [call for call in calls(slot) if call not in ASKED_MEANWHILE]
    assert [call for i, call in enumerate(seen) if i == 0 or call != "waitCommand" or seen[i - 1] != call] == wanted
    assert "made by" in slot.text("out")
    assert "stdout of" in slot.text("stdout_worker")
    assert json.loads(slot.text("fake_world.json")) == {}
    assert slot.text("boinc_finish_called").startswith("0")
    story = slot.text("stderr.txt")
    for stage in ("broker ready", "VM booted", "agent there", "files in", "run", "files out", "done"):
        assert stage in story
    slot.assert_nothing_runs()


def test_outputs_in_folders_that_the_slot_does_not_have_come_out(slot: TestSlot) -> None:
    slot.job(
        HOST_MAIN_TASK,
        guest("make=a/b/out", more="<copy_file_from_VM>a/b/out</copy_file_from_VM>", stdout="streams/stdout"),
    )
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert "made by" in slot.text("a/b/out")
    assert "stdout of" in slot.text("streams/stdout")


def test_an_output_whose_folder_cannot_be_made_does_not_hide_that_the_program_failed(slot: TestSlot) -> None:
    slot.write("taken", "a file where the folder would be")
    slot.job(HOST_MAIN_TASK, guest("exit=3", stdout="taken/stdout"))
    assert slot.run("job.xml") == 195
    assert "exit status 3" in slot.text("stderr.txt")


def test_an_output_whose_folder_cannot_be_made_is_a_temporary_exit_that_names_it(slot: TestSlot) -> None:
    slot.write("taken", "a file where the folder would be")
    slot.job(HOST_MAIN_TASK, guest("make=taken/out", more="<copy_file_from_VM>taken/out</copy_file_from_VM>"))
    assert slot.run("job.xml") == 75
    story = slot.text("stderr.txt")
    assert "taken/out cannot be written" in story
    (slot.folder / "taken").unlink()
    assert slot.run("job.xml") == 0
    assert runs(slot) == [("0", 1)], "the program's work was not lost"
    assert "made by" in slot.text("taken/out")


def test_a_finished_slot_is_done_at_once(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("make=out"))
    assert slot.run("job.xml") == 0
    count = len(calls(slot))
    assert slot.run("job.xml") == 0
    assert len(calls(slot)) == count


def test_a_program_that_something_killed_in_the_guest_is_begun_again_once(slot: TestSlot) -> None:
    """From the snapshot after the task before it; the second time it is a failure as any other."""
    slot.job(HOST_MAIN_TASK, THREE[0], guest("append=trace:b killed=1"), THREE[2])
    assert slot.run("job.xml") == 0
    assert runs(slot) == [("0", 1), ("1", 1), ("1", 2), ("2", 1)]
    assert slot.text("out2") == "a\nb\nc\n", "the second try began on the disk that the first task had left"
    story = slot.text("stderr.txt")
    assert "./worker was killed (signal 9) in the guest" in story
    assert "attempt 2: the guest went back to a state before it" in story


def test_an_agent_that_dies_while_results_are_copied_is_no_failure_of_the_task(slot: TestSlot) -> None:
    """What the program printed went with its agent: back to the snapshot."""
    slot.plan(agent_dies=["getFile", 3])
    slot.job(HOST_MAIN_TASK, THREE[0], guest("append=trace:b", stdout="stdout1"), THREE[2])
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert slot.plan_is_used_up()
    assert runs(slot) == [("0", 1), ("1", 1), ("1", 2), ("2", 1)]
    assert slot.text("out2") == "a\nb\nc\n"
    assert "was started anew before all results had been copied" in slot.text("stderr.txt")


def test_a_program_that_is_killed_again_has_failed(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("killed=9"))
    assert slot.run("job.xml") == 195
    assert runs(slot) == [("0", 1), ("0", 2)]
    assert "was ended by signal 9 in the guest" in slot.text("stderr.txt")
    assert json.loads(slot.text("fake_world.json")) == {}


POINTS = [
    (method, count, when)
    for method, count in (
        ("defineVM", 1), ("start", 1), ("putFile", 1), ("runCommand", 1), ("waitCommand", 1), ("getFile", 1),
        ("saveSnapshot", 1), ("acknowledgeResult", 1), ("runCommand", 2), ("waitCommand", 2), ("saveSnapshot", 2),
        ("deleteSnapshot", 1), ("runCommand", 3), ("getFile", 3), ("deleteVM", 1), ("shutdown", 1),
    )
    for when in ("before", "after")
]  # fmt: skip


SAVED = [point for point in POINTS if point[0] in ("start", "runCommand", "saveSnapshot") and point[1] == 1]
"""Fewer of them: a saved VM goes on from anywhere, so these points differ less."""


@pytest.mark.parametrize(
    ("method", "count", "when", "lifeline"),
    [*((*point, "die") for point in POINTS), *((*point, "save") for point in SAVED)],
)
def test_a_killed_wrapper_goes_on_and_repeats_nothing(
    slot: TestSlot, method: str, count: int, when: str, lifeline: str
) -> None:
    """kill -9 at a call to HostMain; HostMain saves the VM, or dies with it (power loss)."""
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(kill=[method, count, when], lifeline=lifeline)
    assert slot.run_to_the_end("job.xml") == 0, slot.text("stderr.txt")
    assert slot.plan_is_used_up(), "the wrapper was not killed"
    assert "made by" in slot.text("out0")
    assert slot.text("out2") == "a\nb\nc\n", "each task worked on the disk that the one before it left"
    assert "append=trace:c" in slot.text("stdout2")
    done = runs(slot)
    assert [task for task, _ in dict.fromkeys(done)] == sorted(task for task, _ in dict.fromkeys(done))
    story = slot.text("stderr.txt")
    if lifeline == "save":
        assert done == [("0", 1), ("1", 1), ("2", 1)], story
        assert "rollback" not in story
    else:
        assert {task for task, _ in done} == {"0", "1", "2"}
        again = len(done) - 3
        assert again <= story.count("rollback:") + story.count("back to snapshot") + story.count("made anew"), story
    assert json.loads(slot.text("fake_world.json")) == {}, "the VM is gone"
    slot.assert_nothing_runs()


def test_a_vm_that_is_saved_right_after_it_went_back_is_not_taken_for_one_that_has_the_files(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(kill=["waitCommand", 1], lifeline="die")
    assert slot.run("job.xml") == -9
    slot.plan(kill=["waitGuest", 1], lifeline="save")
    assert slot.run("job.xml") == -9
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert runs(slot) == [("0", 1), ("0", 2), ("1", 1), ("2", 1)]
    assert slot.text("out2") == "a\nb\nc\n"


def test_a_lost_snapshot_takes_the_job_back_to_the_first_task_in_that_vm(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(kill=["runCommand", 2, "after"], lifeline="die")
    assert slot.run("job.xml") == -9
    slot.write("fake_world.json", "{}")
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert runs(slot) == [("0", 1), ("1", 1), ("0", 2), ("1", 2), ("2", 1)]
    assert slot.text("out2") == "a\nb\nc\n", "no task worked on a disk without what the one before it did"
    assert "the job goes back to task 1" in slot.text("stderr.txt")


def test_a_dead_vm_is_noticed_and_the_task_goes_back_to_the_snapshot(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(vm_dies=["waitCommand", 3])
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert slot.plan_is_used_up()
    assert slot.text("out2") == "a\nb\nc\n"
    assert "rollback" in slot.text("stderr.txt") or "back to snapshot" in slot.text("stderr.txt")


def test_a_dead_hostmain_is_started_again(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(die=["waitCommand", 2])
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert slot.plan_is_used_up()
    assert slot.text("out2") == "a\nb\nc\n"
    assert "starting HostMain again" in slot.text("stderr.txt")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_next_start_goes_on(slot: TestSlot, name: str) -> None:
    slot.job(HOST_MAIN_TASK, guest("sleep=1 make=out", more="<copy_file_from_VM>out</copy_file_from_VM>"))
    process = slot.start("job.xml")
    slot.wait_for("fake_runs.txt", "_0_")
    process.send_signal(getattr(signal, name))
    assert process.wait(20) == -getattr(signal, name)
    world = json.loads(slot.text("fake_world.json"))
    assert [vm["state"] for vm in world.values()] == ["Saved"]
    assert not (slot.folder / "boinc_finish_called").exists()
    slot.assert_nothing_runs()
    assert slot.run("job.xml") == 0
    assert runs(slot) == [("0", 1)]


def test_a_job_that_an_older_version_left_saved_goes_on_where_it_is(slot: TestSlot) -> None:
    """Its checkpoint names one snapshot of a VM, and its commands have other ids."""
    slot.job(HOST_MAIN_TASK, THREE[0], guest("append=trace:b sleep=2"), THREE[2])
    process = slot.start("job.xml")
    slot.wait_for("fake_runs.txt", "_1_")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    checkpoint = json.loads(slot.text("vmwrapper_checkpoint.json"))
    id = checkpoint["current"]["command_id"]
    for name in ("attempts", "rollbacks", "rolled_back_to"):
        del checkpoint[name]
    checkpoint["version"] = 1
    for vm in checkpoint["vms"]:
        vm["snapshot"] = vm.pop("snapshots")[-1]["name"]
        del vm["discard"]
    slot.write("vmwrapper_checkpoint.json", json.dumps(checkpoint).replace(id, "byhand_1_0123abcd"))
    slot.write("fake_world.json", slot.text("fake_world.json").replace(id, "byhand_1_0123abcd"))
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert runs(slot) == [("0", 1), ("1", 1), ("2", 1)]
    assert slot.text("out2") == "a\nb\nc\n"
    assert "damaged" not in slot.text("stderr.txt")


@pytest.mark.parametrize(
    ("line", "more", "status", "words"),
    [
        ("exit=3", "", 195, ["exit status 3", "last words"]),
        ("oom", "", 205, ["memory"]),
        ("make=x", "<copy_file_from_VM>missing</copy_file_from_VM>", 195, ["missing", "there is:", "x"]),
        ("folder=x", "<copy_file_from_VM>x</copy_file_from_VM>", 195, ["x cannot be copied", "is no regular file"]),
        (
            "make=x",
            "<copy_file_to_VM>nowhere</copy_file_to_VM>",
            206,
            ["<copy_file_to_VM>: nowhere is", "there is:", "worker"],
        ),
        (
            "make=x",
            "<copy_file_to_VM>too_long</copy_file_to_VM>",
            206,
            ["<copy_file_to_VM>: too_long is", "there is:", "worker"],
        ),
    ],
)
def test_a_failure_has_its_status_and_one_clear_line(
    slot: TestSlot, line: str, more: str, status: int, words: list[str]
) -> None:
    slot.write("too_long", f"<soft_link>{'n' * 300}</soft_link>")
    slot.job(HOST_MAIN_TASK, guest(line, more=more))
    assert slot.run("job.xml") == status
    for word in words:
        assert word in slot.text("stderr.txt")
    assert slot.text("boinc_finish_called").splitlines()[0] == str(status)
    if (slot.folder / "fake_world.json").exists():
        assert json.loads(slot.text("fake_world.json")) == {}, "the VM is gone"
    else:
        assert status == 206, "nothing was started"
    slot.assert_nothing_runs()


def test_a_passing_fault_is_a_temporary_exit_with_a_limit(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("make=out"))
    fault = json.dumps({"key": "no-memory", "reason": "not enough memory for the VM", "delay_s": 120})
    for _ in range(5):
        slot.plan(faults=[["start", 1, fault]])
        assert slot.run("job.xml") == 75
        assert slot.plan_is_used_up()
    slot.plan(faults=[["start", 1, fault]])
    assert slot.run("job.xml") == 208
    assert "not enough memory for the VM" in slot.text("stderr.txt")


def test_an_input_that_hostmain_cannot_read_is_bad_input(slot: TestSlot) -> None:
    slot.write("in", "input")
    slot.job(HOST_MAIN_TASK, guest("make=out", more="<copy_file_to_VM>in</copy_file_to_VM>"))
    slot.plan(faults=[["putFile", 2, json.dumps({"path": str(slot.folder / "worker"), "listing": []})]])
    assert slot.run("job.xml") == 206
    assert "job.xml:3: <application>: ./worker cannot be copied into the guest" in slot.text("stderr.txt")
    assert json.loads(slot.text("fake_world.json")) == {}, "the VM is gone"
    slot.assert_nothing_runs()


def test_a_permanent_fault_is_208(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("make=out"))
    slot.plan(faults=[["start", 1, json.dumps({"key": "broken", "reason": "no hypervisor", "delay_s": None})]])
    assert slot.run("job.xml") == 208
    assert "no hypervisor" in slot.text("stderr.txt")


def test_a_hostmain_that_always_dies_is_208(slot: TestSlot) -> None:
    slot.write("dies", "#!/bin/sh\necho no luck >&2\nexit 1\n", executable=True)
    slot.job(
        HOST_MAIN_TASK,
        "<VMmanage_task><application>./dies</application><stderr_filename>stderr_dies</stderr_filename></VMmanage_task>",
        guest("sleep=20"),
    )
    assert slot.run("job.xml") == 208
    assert "no luck" in slot.text("stderr.txt")
    slot.assert_nothing_runs()


def test_a_time_limit_ends_the_command_and_counts_as_done(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("sleep=60", more="<time_limit>0.3</time_limit>"))
    assert slot.run("job.xml") == 0
    assert "time_limit" in slot.text("stderr.txt")


def test_two_vms_one_after_the_other_and_back(slot: TestSlot) -> None:
    slot.job(
        HOST_MAIN_TASK,
        guest("append=trace:a"),
        guest("append=trace:b", vm="two"),
        guest("append=trace:c copy=trace:out", more="<copy_file_from_VM>out</copy_file_from_VM>"),
    )
    assert slot.run("job.xml") == 0, slot.text("stderr.txt")
    assert slot.text("out") == "a\nc\n"
    assert calls(slot).count("saveState") == 1
    assert json.loads(slot.text("fake_world.json")) == {}


def test_damaged_checkpoints(slot: TestSlot) -> None:
    """The newest damaged: the older is used. Both: the job begins at the beginning, with a VM made anew."""
    slot.job(HOST_MAIN_TASK, *THREE)
    slot.plan(kill=["runCommand", 2, "after"])
    assert slot.run("job.xml") == -9
    slot.write("vmwrapper_checkpoint.json", "{")
    slot.plan(kill=["runCommand", 1, "after"])
    assert slot.run("job.xml") == -9 or True
    assert "damaged" in slot.text("stderr.txt")
    assert runs(slot).count(("0", 1)) == 1, "the older checkpoint knows that task 0 is done"
    for name in ("vmwrapper_checkpoint.json", "vmwrapper_checkpoint.previous.json"):
        slot.write(name, "{")
    assert slot.run_to_the_end("job.xml") == 0
    assert "begins at the beginning" in slot.text("stderr.txt")
    assert slot.text("out2") == "a\nb\nc\n"
