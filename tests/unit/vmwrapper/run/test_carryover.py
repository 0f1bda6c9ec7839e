"""A job file that was edited between two starts: what stays done, and what begins again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common.slotfiles import JOB_COPY
from vmwrapper.job import meaning, parse
from vmwrapper.job.model import Job
from vmwrapper.run import carryover
from vmwrapper.slot import Slot
from vmwrapper.state.checkpoint import Checkpoint, CheckpointStore, GuestProgress, SnapshotRecord, VmRecord

APPLICATION = "<application>p</application>"
HOST_MAIN = "<VMmanage_task><application>HostMain</application><command_line>H.cfg</command_line></VMmanage_task>"


def host(words: str, more: str = "") -> str:
    return f"<task><application>p</application><command_line>{words}</command_line>{more}</task>\n"


def guest(words: str, vm: str = "VM", more: str = "") -> str:
    return host(words, f"<virtualmachine>{vm}</virtualmachine>{more}")


def job(*parts: str) -> Job:
    return parse.parse(f"<job_desc>\n{HOST_MAIN}{''.join(parts)}</job_desc>".encode(), "job.xml")


def carried(old: Job, new: Job, done: int, **more: object) -> tuple[Checkpoint, list[str], list[str]]:
    checkpoint = Checkpoint(old.digest, "r", tasks_done=done, task_elapsed_s=5.0, cpu_time_s=7.0, **more)  # type: ignore[arg-type]
    found = carryover.carry_over(old, new, checkpoint)
    assert found.checkpoint.job_digest == new.digest
    assert found.checkpoint.cpu_time_s == 7.0
    return found.checkpoint, list(found.lines[1:]), [vm.name for vm in found.stale_vms]


VM = VmRecord("VM", "vm_1", snapshots=(SnapshotRecord("s1", True, 1),))
CURRENT = GuestProgress(1, "c")


@pytest.mark.parametrize(
    "new",
    [
        job("<!-- edited -->", host("a"), host("b")),
        job("\n\n", host("a").replace("><", ">\n  <"), host("b")),
        job(host("a"), host("b"), host("c")),
        job(host("a"), host("b", "<weight>1.0</weight><priority>1</priority>")),
        job(host("a").replace(APPLICATION, "").replace("</task>", f"{APPLICATION}</task>"), host("b")),
        job(host("a"), host("b"), "<zip_output><zipfilename>z</zipfilename><filename>x</filename></zip_output>"),
    ],
)  # fmt: skip
def test_what_means_the_same_stays_done(new: Job) -> None:
    checkpoint, lines, _ = carried(job(host("a"), host("b")), new, 1)
    assert (checkpoint.tasks_done, checkpoint.task_elapsed_s, lines) == (1, 5.0, [])


def test_from_the_first_task_that_has_changed_all_begin_again() -> None:
    old = job(host("a"), host("b"), host("c"), host("d"))
    new = job(host("a"), host("b", "<time_limit>5</time_limit>"), host("c"), host("d"))
    checkpoint, lines, _ = carried(old, new, 3, left_running=(0, 2))
    assert (checkpoint.tasks_done, checkpoint.task_elapsed_s, checkpoint.left_running) == (1, 0.0, (0,))
    assert lines == ["task 2 has changed (<time_limit>): from it on all begin again"]


def test_the_task_that_was_being_done_begins_again_when_it_has_changed() -> None:
    checkpoint, lines, _ = carried(job(host("a"), host("b")), job(host("a"), host("x")), 1)
    assert (checkpoint.tasks_done, checkpoint.task_elapsed_s) == (1, 0.0)
    assert lines == ["task 2 has changed (<command_line>): it begins again"]


def test_tasks_that_are_gone() -> None:
    checkpoint, lines, _ = carried(job(host("a"), host("b"), host("c")), job(host("a")), 2)
    assert checkpoint.tasks_done == 1
    assert lines == ["there are only 1 of the 2 tasks that were done"]


def test_archives_and_unzip_tasks() -> None:
    def unzip(words: str) -> str:
        return f"<unzip_task><application>tar</application><command_line>{words}</command_line></unzip_task>"

    def archive(name: str) -> str:
        return f"<unzip_input><zipfilename>{name}</zipfilename></unzip_input>"

    old = job(unzip("a"), unzip("b"), archive("x"), archive("y"), host("a"))
    checkpoint, lines, _ = carried(old, job(unzip("a"), unzip("c"), archive("x"), host("a")), 0, unzip_done=2,
                                   inputs_unzipped=True)  # fmt: skip
    assert (checkpoint.unzip_done, checkpoint.inputs_unzipped) == (1, True)
    assert lines == ["unzip task 2 has changed (<command_line>): from it on all begin again"]
    checkpoint, lines, _ = carried(old, job(unzip("a"), unzip("b"), archive("z"), host("a")), 0, unzip_done=2,
                                   inputs_unzipped=True)  # fmt: skip
    assert (checkpoint.unzip_done, checkpoint.inputs_unzipped) == (2, False)
    assert lines == ["<unzip_input> has changed: its archives are unpacked"]


class TestVirtualMachines:
    def test_a_machine_whose_tasks_mean_the_same_goes_on(self) -> None:
        old, new = job(guest("a"), guest("b")), job("<!-- x -->", guest("a"), guest("b"), guest("c"))
        checkpoint, lines, stale_vms = carried(old, new, 1, current=CURRENT, vms=(VM,))
        assert (checkpoint.current, checkpoint.vms, lines, stale_vms) == (CURRENT, (VM,), [], [])

    def test_one_that_has_seen_a_task_that_changed_goes(self) -> None:
        old, new = job(guest("a"), guest("b")), job(guest("a"), guest("x"))
        checkpoint, lines, stale_vms = carried(old, new, 1, current=CURRENT, vms=(VM,))
        assert (checkpoint.tasks_done, checkpoint.current, checkpoint.vms, stale_vms) == (0, None, (), ["vm_1"])
        assert lines == [
            "task 2 has changed (<command_line>): it begins again",
            "the state of the virtual machine VM is gone: back to task 1",
        ]

    def test_settings_of_the_machine_belong_to_all_its_tasks(self) -> None:
        old, new = job(guest("a"), guest("b")), job(guest("a"), guest("b", more="<memory_size_mb>99</memory_size_mb>"))
        checkpoint, lines, stale_vms = carried(old, new, 1, current=CURRENT, vms=(VM,))
        assert (checkpoint.tasks_done, stale_vms) == (0, ["vm_1"])
        assert lines[0] == "task 1 has changed (<memory_size_mb>): from it on all begin again"

    def test_another_machine_stays(self) -> None:
        other = VmRecord("W", "vm_2")
        old = job(guest("a", "W"), host("x"), guest("b"), guest("c", "W"))
        new = job(guest("a", "W"), host("x"), guest("y"), guest("c", "W"))
        checkpoint, _, stale_vms = carried(old, new, 2, current=GuestProgress(2, "c"), vms=(VM, other))
        assert (checkpoint.tasks_done, checkpoint.vms, stale_vms) == (2, (other,), ["vm_1"])

    def test_going_back_for_one_machine_may_cost_another(self) -> None:
        other = VmRecord("W", "vm_2")
        old = job(guest("a"), guest("b", "W"), guest("c"))
        new = job(guest("a"), guest("b", "W"), guest("x"))
        checkpoint, _, stale_vms = carried(old, new, 2, current=GuestProgress(2, "c"), vms=(VM, other))
        assert (checkpoint.tasks_done, checkpoint.vms, stale_vms) == (0, (), ["vm_1", "vm_2"])


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5), st.data())
def test_what_stays_done_is_there_and_was_done(old: list[str], new: list[str], data: st.DataObject) -> None:
    done = data.draw(st.integers(0, len(old)))
    checkpoint, lines, _ = carried(job(*map(host, old)), job(*map(host, new)), done)
    kept = checkpoint.tasks_done
    assert kept <= min(done, len(new))
    assert old[:kept] == new[:kept]
    assert kept == done or kept == len(new) or old[kept] != new[kept]
    assert bool(lines) == (kept < done or (kept < min(len(old), len(new)) and old[kept] != new[kept]))


def test_a_digest_of_a_task_is_of_what_it_means() -> None:
    (one,), (other,) = job(host("a")).tasks, job("\n", host("a", "<weight>1e0</weight>")).tasks
    assert meaning.digest(one) == meaning.digest(other)
    assert meaning.digest(one) != meaning.digest(job(host("b")).tasks[0])
    assert meaning.differences(one, job(guest("a")).tasks[0]) == ["virtualmachine"]


class TestTheCopy:
    def test_it_is_what_the_file_was(self, tmp_path: Path) -> None:
        path = tmp_path / "j.xml"
        path.write_bytes(b"<job_desc>" + host("\xe9").encode("latin-1") + b"</job_desc>")
        old = parse.parse_file(path, "job.xml")
        carryover.keep_job(Slot(tmp_path), path, old.digest)
        path.write_text("edited")
        assert carryover.kept_job(Slot(tmp_path), old.digest, "job.xml") == old
        assert carryover.kept_job(Slot(tmp_path), "00" * 32, "job.xml") is None
        assert sorted(one.name for one in tmp_path.iterdir()) == ["j.xml", JOB_COPY]

    def test_none_damaged_or_a_folder_in_its_place(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "j.xml"
        path.write_text("<job_desc></job_desc>")
        digest = parse.parse_file(path, "x").digest
        assert carryover.kept_job(Slot(tmp_path), digest, "x") is None
        (tmp_path / JOB_COPY).write_bytes(b"\0")
        assert carryover.kept_job(Slot(tmp_path), digest, "x") is None
        carryover.keep_job(Slot(tmp_path), path, digest)
        assert carryover.kept_job(Slot(tmp_path), digest, "x") is not None
        (tmp_path / JOB_COPY).unlink()
        (tmp_path / JOB_COPY).mkdir()
        carryover.keep_job(Slot(tmp_path), path, digest)
        assert "no copy of the job file can be kept" in caplog.text

    def test_a_file_that_changes_meanwhile_is_not_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "j.xml"
        path.write_text("other")
        carryover.keep_job(Slot(tmp_path), path, "00" * 32)
        assert [one.name for one in tmp_path.iterdir()] == ["j.xml"]


def test_the_store_carries_the_newest_generation_over(tmp_path: Path) -> None:
    """Also when an older one is of the file as it is now: it was edited, and edited back."""
    one, other = job(host("a"), host("b")), job(host("a"), host("b"), "<!-- -->")
    store = CheckpointStore(Slot(tmp_path))
    store.save(Checkpoint(one.digest, "r", tasks_done=1))
    store.save(Checkpoint(other.digest, "r", tasks_done=2))
    loaded = CheckpointStore(Slot(tmp_path)).load(
        one.digest, "r", lambda checkpoint: carryover.carry_over(other, one, checkpoint)
    )
    assert loaded.checkpoint is not None
    assert (loaded.checkpoint.tasks_done, loaded.is_carried_over) == (2, True)
    loaded = CheckpointStore(Slot(tmp_path)).load(other.digest, "another", lambda _: pytest.fail("another result"))
    assert loaded.checkpoint is None


def test_a_vm_that_lacks_the_disk_of_a_new_container_is_made_anew() -> None:
    more = guest("c", more="<container>app.vdi</container>")
    checkpoint, lines, stale = carried(job(guest("a"), guest("b")), job(guest("a"), guest("b"), more), 1, vms=(VM,))
    assert (checkpoint.tasks_done, checkpoint.vms, stale) == (0, (), ["vm_1"])
    assert lines == ["the state of the virtual machine VM is gone: back to task 1"]
    other = guest("c", "other", more="<container>app.vdi</container>")
    checkpoint, _, stale = carried(job(guest("a"), guest("b")), job(guest("a"), guest("b"), other), 1, vms=(VM,))
    assert (checkpoint.tasks_done, stale) == (1, []), "it is another VM's"
