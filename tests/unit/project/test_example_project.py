"""examples/boinc-project: its script calls the server's programs as they want it, and its parts name the same files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from vmwrapper.job import parse
from vmwrapper.vm.decisions import files_in, files_out

EXAMPLE = Path(__file__).parents[3] / "examples" / "boinc-project"


def template(name: str) -> etree._Element:
    """Either form: with an outermost element or, as in 2009, without."""
    return etree.fromstring(f"<any>{(EXAMPLE / 'templates' / name).read_text()}</any>")


def names(name: str) -> list[str]:
    tree = template(name)
    references = list(tree.iter("file_ref"))
    assert len(references) == len(list(tree.iter("file_info")))
    return [one.findtext("open_name") or "" for one in references]


@pytest.mark.parametrize(("page", "today"), [("worker_wu", "worker_in"), ("worker_result", "worker_out")])
def test_both_forms_of_a_template_say_the_same(page: str, today: str) -> None:
    assert names(page) == names(today)


def test_the_job_file_has_the_templates_names() -> None:
    job = parse.parse((EXAMPLE / "app" / "job.xml").read_bytes(), "job.xml")
    (task,) = job.tasks
    came = {copy.remote for copy in files_in(task)} - {"worker.py"}
    assert came == set(names("worker_wu"))
    assert {task.stdout_filename, task.stderr_filename, *(one.remote for one in files_out(task))} == set(
        names("worker_result")
    )


@pytest.mark.parametrize("form", ["today", "page"])
def test_make_work(tmp_path: Path, form: str) -> None:
    """Each workunit's files have names of their own, in the templates' order."""
    (tmp_path / "bin").mkdir()
    for name in ("stage_file", "create_work"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n')
        program.chmod(0o755)
    for name in ("in", "stdin"):
        (tmp_path / name).write_text(name)
    done = subprocess.run(
        [EXAMPLE / "bin" / "make_work", "in", "stdin"],
        cwd=tmp_path,
        env={**os.environ, "TEMPLATES": form, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    work = done.stdout.strip()
    wanted = ("worker_wu", "worker_result") if form == "page" else ("worker_in", "worker_out")
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"stage_file {tmp_path}/{work}_in",
        f"stage_file {tmp_path}/{work}_stdin",
        (
            f"create_work --appname worker --wu_name {work} --wu_template templates/{wanted[0]} "
            f"--result_template templates/{wanted[1]} {work}_in {work}_stdin"
        ),
    ]
    assert (tmp_path / f"{work}_stdin").read_text() == "stdin"
    assert names(wanted[0]) == ["in", "stdin"]
