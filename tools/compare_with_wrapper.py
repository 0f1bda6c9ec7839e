#!/usr/bin/env python3
"""Runs jobs with BOINC's own `wrapper` and with vmwrapper in slots of the same kind, and prints what differs.

    python -m tools.compare_with_wrapper PATH_OF_WRAPPER [JOB ...]

A slot is laid out as the client does it: the files of the job in the project's folder, links to them in the slot,
init_data.xml, shared memory, stderr to stderr.txt. Compared are the files afterwards (archives by their members), exit
status, finish file, the last status to the client and the trickle-up messages. Jobs: all examples for the host, and
small ones for what goes wrong; with names, only those. docs/projects/from-wrapper.md has the outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from tools.wrapper_cases import CASES, Case, archive
from vmwrapper.boinc.channels import SEGMENT_BYTES, Channel, Channels

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("many-tasks", "checkpointing", "pipeline")
LIMIT_S = 300.0
OWN_FILES = re.compile(
    r"vmwrapper_.*|wrapper_checkpoint\.txt|initial_file_list|boinc_.*|init_data\.xml|stderr\.txt|trickle_up\.xml|slotdir"
)
"""What each keeps for itself, or is compared in another way."""


@dataclass
class Outcome:
    """What a run left."""

    status: str
    finish: str
    files: dict[str, str]
    messages: dict[str, str]
    stdout: str
    left: int
    """Processes that survived."""
    seconds: float


def lay_out(folder: Path, job: bytes, case: Case) -> Path:
    """The folders of a client; the slot."""
    base = folder / case.folder
    project, slot = base / "projects" / "p", base / "slots" / "0"
    project.mkdir(parents=True)
    slot.mkdir(parents=True)
    for name, content in {"job.xml": job, **case.files}.items():
        (project / name).write_bytes(content)
        (project / name).chmod(0o755 if content.startswith(b"#!") else 0o644)
        (slot / name).write_bytes(b"<soft_link>../../projects/p/" + os.fsencode(name) + b"</soft_link>\n")
    for output in ("output.zip", "picture", *case.outputs):
        (slot / output).write_bytes(b"<soft_link>../../projects/p/" + os.fsencode(output) + b"_7</soft_link>\n")
    (slot / "init_data.xml").write_bytes(
        b"<app_init_data>\n<major_version>8</major_version>\n"
        + (b"<project_preferences>\n" + case.preferences + b"\n</project_preferences>\n" if case.preferences else b"")
        + b"<result_name>r_0</result_name>\n<slot>0</slot>\n<shm_key>-1</shm_key>\n"
        + b"<client_pid>%d</client_pid>\n" % os.getpid()
        + b"<project_dir>" + os.fsencode(project) + b"</project_dir>\n"
        + b"<boinc_dir>" + os.fsencode(base) + b"</boinc_dir>\n"
        + b"<checkpoint_period>1</checkpoint_period>\n<fraction_done_start>0</fraction_done_start>\n"
        + b"<fraction_done_end>1</fraction_done_end>\n</app_init_data>\n"
    )  # fmt: skip
    return slot


def run(command: list[str], slot: Path, case: Case) -> Outcome:
    """A job under a client that is played: one run, or with `edit` two."""
    outcome = run_once(command, slot, case, quit_at="ready" if case.edit else "")
    if case.edit is None:
        return outcome
    path = slot.parents[1] / "projects" / "p" / "job.xml"
    path.write_bytes(path.read_bytes().replace(*case.edit))
    return run_once(command, slot, case)


def run_once(command: list[str], slot: Path, case: Case, quit_at: str = "") -> Outcome:
    """One run: the client reads status and trickles, and says quit when a file is there."""
    with (slot / "boinc_mmap_file").open("wb+") as file:
        file.truncate(SEGMENT_BYTES)
        memory = mmap.mmap(file.fileno(), SEGMENT_BYTES)
    channels = Channels(memory)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VMWRAPPER_COMPARED": slot.parts[-4]}
    began = time.monotonic()
    last, trickles = "", 0
    stdout = slot.parent.parent / "stdout"
    with (slot / "stderr.txt").open("ab") as err, stdout.open("ab") as out:
        process = subprocess.Popen(
            [*command, *case.words], cwd=slot, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        while True:
            over = process.poll() is not None
            last = channels.receive(Channel.APP_STATUS) or last
            if "have_new_trickle_up" in (channels.receive(Channel.TRICKLE_UP) or ""):
                trickles += (slot / "trickle_up.xml").exists()
                (slot / "trickle_up.xml").unlink(missing_ok=True)
            if over:
                break
            if quit_at and (slot / quit_at).exists():
                channels.send(Channel.PROCESS_CONTROL_REQUEST, "<quit/>")
                quit_at = ""
            if time.monotonic() - began > LIMIT_S:
                process.kill()
            time.sleep(0.01)
    seconds = time.monotonic() - began
    left = _survivors(slot.parts[-4])
    finish = (slot / "boinc_finish_called").read_text() if (slot / "boinc_finish_called").exists() else "none"
    fraction = re.search(r"<fraction_done>([^<]*)<", last)
    status = process.returncode
    return Outcome(
        status=f"signal {-status}" if status < 0 else str(status),
        finish=finish.splitlines()[0] if finish else "empty",
        files={**_files(slot, ""), **_files(slot.parents[1] / "projects" / "p", "project/")},
        messages={"fraction": f"{float(fraction[1]):.2f}" if fraction else "none", "trickles": str(trickles)},
        stdout=stdout.read_text(errors="replace"),
        left=left,
        seconds=seconds,
    )


def _survivors(mark: str) -> int:
    """Processes that the run left; they are killed."""
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in process.cwd().split("/") and process.status() != psutil.STATUS_ZOMBIE:
                count += 1
                process.kill()
    return count


def _files(folder: Path, prefix: str) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or OWN_FILES.fullmatch(path.name):
            continue
        content = path.read_bytes()
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(path) as opened:
                encrypted = any(member.flag_bits & 1 for member in opened.infolist())
                names = sorted(opened.namelist())
                members = dict.fromkeys(names) if encrypted else {member: opened.read(member) for member in names}
            found[prefix + name] = f"archive of {members!r}"
        else:
            found[prefix + name] = content.decode(errors="replace")
    return found


def differences(theirs: Outcome, ours: Outcome) -> list[str]:
    """One line each: wrapper's value, then ours."""
    lines = []

    def compare(what: str, one: object, other: object) -> None:
        if one != other:
            lines.append(f"{what}: {_short(one)} | {_short(other)}")

    compare("exit status", theirs.status, ours.status)
    compare("finish file", theirs.finish, ours.finish)
    compare("standard output", theirs.stdout, ours.stdout)
    compare("processes left", theirs.left, ours.left)
    for name in sorted({*theirs.messages, *ours.messages}):
        compare(f"last {name}", theirs.messages.get(name), ours.messages.get(name))
    for name in sorted({*theirs.files, *ours.files}):
        compare(f"file {name}", theirs.files.get(name, "not there"), ours.files.get(name, "not there"))
    return lines


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str) and not value.replace(" ", "").isalnum() else str(value)
    return text if len(text) <= 150 else text[:147] + "..."


def cases() -> dict[str, tuple[bytes, Case]]:
    """Job file and case of every job."""
    found: dict[str, tuple[bytes, Case]] = {}
    for name in EXAMPLES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            shutil.copytree(ROOT / "examples" / name, folder)
            if (folder / "prepare").exists():
                subprocess.run([sys.executable, folder / "prepare", folder], check=True)
                (folder / "prepare").unlink()
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        found[f"examples/{name}"] = (files.pop("job.xml"), Case("", files))
    for name, case in CASES.items():
        if isinstance(case.job, bytes):
            found[name] = (case.job, case)
            continue
        files = dict(case.files)
        if "i.zip" in case.job and "i.zip" not in files:
            files["i.zip"] = archive((b"sub/x", b"unpacked\n", 0o644, False))
        whole = case.job.startswith("<job_desc>")
        end = "" if name == "a job file that is cut" or whole else "</job_desc>\n"
        text = case.job if whole else f"<job_desc>\n{case.job}\n{end}"
        found[name] = (text.encode(), replace(case, files=files))
    return found


def main() -> int:
    """0, also when there are differences: whoever reads them knows which are meant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wrapper", type=Path, help="BOINC's wrapper, an executable")
    parser.add_argument("jobs", nargs="*", help="names of jobs; default: all")
    arguments = parser.parse_args()
    chosen = {name: case for name, case in cases().items() if not arguments.jobs or name in arguments.jobs}
    same = 0
    for name, (job, case) in chosen.items():
        outcomes = []
        for command in ([str(arguments.wrapper.resolve())], [sys.executable, "-m", "vmwrapper"]):
            with tempfile.TemporaryDirectory(prefix="compare_") as scratch:
                outcomes.append(run(command, lay_out(Path(scratch), job, case), case))
        lines = differences(*outcomes)
        same += not lines
        print(
            f"{name}: {'differs' if lines else 'the same'} ({outcomes[0].seconds:.1f} s | {outcomes[1].seconds:.1f} s)"
        )
        for line in lines:
            print(f"    {line}")
    print(f"{same} of {len(chosen)} jobs have the same outcome")
    return 0


if __name__ == "__main__":
    sys.exit(main())
