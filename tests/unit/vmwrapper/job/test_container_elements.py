"""A task in a container: what the job file may say of it, what is refused, and that other tasks keep their digest."""

from __future__ import annotations

import pytest

from tests.unit.vmwrapper.job.test_job_parse import HOST_MAIN, PAGE_EXAMPLE
from vmwrapper.job import filenames, meaning
from vmwrapper.job import parse as job_parse
from vmwrapper.job.model import Job, Task

PAGE_DIGEST = "8e73afc3a56ff4c1001e2ffe71512a0de93850e0cd51f9586700000759d1a92e"
"""Ids of commands are made of it: jobs that are under way go on with a new version."""


def job_text(task: str, rest: str = "") -> bytes:
    return f"<job_desc>{HOST_MAIN}<task><image>i.vdi</image>{task}</task>{rest}</job_desc>".encode()


def parse(task: str, rest: str = "") -> Job:
    return job_parse.parse(job_text(task, rest), "job.xml")


def parse_task(task: str) -> Task:
    (only,) = parse(task).tasks
    return only


def errors(task: str, rest: str = "") -> list[str]:
    return [str(error) for error in job_parse.examine(job_text(task, rest), "job.xml").errors]


def test_a_container_is_enough_for_a_guest_task() -> None:
    task = parse_task("<container>app.vdi</container>")
    assert task.guest is not None
    assert (task.guest.container, task.guest.container_workdir) == ("app.vdi", "")
    assert (task.application, task.title, task.guest.virtualmachine) == ("", "app.vdi", "container")
    assert task.fraction_done_filename == "fraction_done"


def test_what_is_given_counts() -> None:
    task = parse_task(
        "<container>app.vdi</container><virtualmachine>vm</virtualmachine><application>run</application>"
        "<fraction_done_filename>f</fraction_done_filename><container_workdir>/srv/data</container_workdir>"
    )
    assert task.guest is not None
    assert (task.title, task.guest.virtualmachine, task.fraction_done_filename) == ("run", "vm", "f")
    assert task.guest.container_workdir == "/srv/data"


def test_a_guest_task_without_container_needs_its_application() -> None:
    assert errors("<virtualmachine>vm</virtualmachine>") == ["job.xml:1: <application>: expected the name of a program"]
    assert parse_task("<virtualmachine>v</virtualmachine><application>a</application>").fraction_done_filename == ""


@pytest.mark.parametrize("name", ["/abs.vdi", "../up.vdi", "a\\b", "C:x"])
def test_the_disk_is_a_file_of_the_slot(name: str) -> None:
    assert errors(f"<container>{name}</container>")


@pytest.mark.parametrize("folder", ["app", "/", "/a/../b", "/proc/self", "/dev", "/sys/x", "/a//b", "/app/"])
def test_a_working_folder_is_plain_and_absolute(folder: str) -> None:
    (error,) = errors(f"<container>c</container><container_workdir>{folder}</container_workdir>")
    assert "<container_workdir>: expected an absolute folder in the container" in error


def test_a_working_folder_without_container_is_told() -> None:
    task = "<virtualmachine>v</virtualmachine><application>a</application><container_workdir>/a</container_workdir>"
    found = job_parse.examine(job_text(task), "job.xml")
    assert ["means nothing without <container>" in str(one) for one in found.complaints] == [True]


@pytest.mark.parametrize(
    "element", ["<copy_app_to_VM/>", "<copy_app_to_VM>1</copy_app_to_VM>", "<app_pathVM>/x</app_pathVM>"]
)
def test_an_application_that_is_copied_has_to_be_named(element: str) -> None:
    assert ["expected an <application> with it" in one for one in errors(f"<container>c</container>{element}")] == [
        True
    ]


@pytest.mark.parametrize("name", ["app.vdi", "./app.vdi", "APP.VDI", "app.vdi.json"])
@pytest.mark.parametrize("element", ["stdout_filename", "stderr_filename", "copy_file_from_VM"])
def test_no_output_is_written_into_the_disk(element: str, name: str) -> None:
    (error,) = errors(f"<container>app.vdi</container><{element}>{name}</{element}>")
    assert "a container's disk" in error


def test_neither_is_an_output_of_another_task_nor_an_archive() -> None:
    other = (
        "<task><virtualmachine>v</virtualmachine><image>i.vdi</image><application>a</application>"
        "<copy_file_from_VM>app.vdi</copy_file_from_VM></task>"
        "<zip_output><zipfilename>app.vdi</zipfilename><filename>x</filename></zip_output>"
        "<intermediate_upload_file>App.vdi</intermediate_upload_file>"
    )
    assert len(errors("<container>app.vdi</container>", other)) == 3


def test_the_links_of_the_disk_are_established() -> None:
    assert {"app.vdi", "app.vdi.json"} <= filenames.mentioned(parse("<container>app.vdi</container>"))


def test_the_digest_of_other_tasks_is_what_it_was() -> None:
    assert meaning.digest(job_parse.parse(PAGE_EXAMPLE.encode(), "job.xml").tasks[0]) == PAGE_DIGEST


def test_container_and_working_folder_count_in_the_digest() -> None:
    one = parse_task("<container>a</container>")
    other = parse_task("<container>b</container>")
    third = parse_task("<container>a</container><container_workdir>/x</container_workdir>")
    assert len({meaning.digest(task) for task in (one, other, third)}) == 3
    assert (meaning.differences(one, other), meaning.differences(one, third)) == (["container"], ["container_workdir"])
