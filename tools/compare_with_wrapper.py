#!/usr/bin/env python3
"""Runs jobs with BOINC's own `wrapper` and with vmwrapper in slots of the same kind, and prints what differs.

    tools/compare_with_wrapper.py PATH_OF_WRAPPER [JOB ...]

A slot is laid out as the client does it: the files of the job in the project's folder, links to them in the slot,
init_data.xml, shared memory, stderr to stderr.txt. Compared are the files afterwards (archives by their members), exit
status, finish file, the last status to the client and the trickle-up messages. Jobs: all examples for the host, and
small ones for what goes wrong; with names, only those. docs/compared-with-wrapper.md has the outcome.
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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from vmwrapper.boinc.channels import SEGMENT_BYTES, Channel, Channels

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("many-tasks", "checkpointing", "pipeline")
LIMIT_S = 300.0
OWN_FILES = re.compile(
    r"vmwrapper_.*|wrapper_checkpoint\.txt|initial_file_list|boinc_.*|init_data\.xml|stderr\.txt|trickle_up\.xml|slotdir"
)
"""What each keeps for itself, or is compared in another way."""
SHELL = "#!/bin/sh\n"


@dataclass(frozen=True)
class Case:
    """A job with the files it needs."""

    job: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Executable when they begin with #!."""
    words: tuple[str, ...] = ()


def task(application: str, more: str = "") -> str:
    return f"<task><application>{application}</application>{more}</task>"


def script(text: str) -> dict[str, bytes]:
    return {"p": (SHELL + text + "\n").encode()}


OUT = "<stdout_filename>out</stdout_filename>"
CASES = {
    "a program fails": Case(task("p") + task("p"), script("exit 3")),
    "a program is killed": Case(task("p"), script("kill -9 $$")),
    "a program that is no program": Case(task("p"), {"p": b"text\n"}),
    "no such application": Case(task("nowhere")),
    "an exec_dir that is none": Case(task("p", "<exec_dir>nowhere</exec_dir>"), script("true")),
    "stdin cannot be opened": Case(task("p", "<stdin_filename>nowhere</stdin_filename>"), script("true")),
    "stdout cannot be opened": Case(task("p", "<stdout_filename>no/where</stdout_filename>"), script("true")),
    "no task": Case(""),
    "a job file that is cut": Case("<task><application>p</application>", script("true")),
    "a bare &": Case(task("p", f"<command_line>a &amp; b & c</command_line>{OUT}"), script('echo "$@"')),
    "an unknown option": Case(task("p", OUT), script('echo "$@"'), ("--unknown",)),
    "words passed on": Case(
        task("p", f"<append_cmdline_args/><command_line>1</command_line>{OUT}") + task("p", OUT),
        script('for word; do echo "[$word]"; done'), ("--passthrough_child", "a", "'b", "c'", "--x"),
    ),
    "macros": Case(
        task("p", f"<command_line>$NTHREADS $GPU_DEVICE_NUM boinc_resolve(in) $PWD</command_line>{OUT}"),
        {**script('for word; do echo "[${word##*/}]"; done'), "in": b"x"}, ("--nthreads", "2", "--device", "1"),
    ),
    "quotes": Case(
        task("p", f"<command_line>a \"b c\" 'd' x\"y z\" \"e\"f it's --g=\"h i\"</command_line>{OUT}"),
        script('for word; do echo "[$word]"; done'),
    ),
    "environment": Case(
        task("p", f"<setenv>A=b c</setenv><setenv>N=$NTHREADS</setenv>{OUT}"),
        script('echo "$A|$N|${HOME-none}|${PATH-none}"'),
    ),
    "no stdout_filename": Case(task("p"), script("echo to stdout")),
    "priority": Case(task("p", OUT) + task("p", f"<priority>2</priority>{OUT}"), script("nice")),
    "a time limit": Case(task("p", f"<time_limit>1</time_limit>{OUT}"), script("echo a; exec sleep 60")),
    "a grandchild": Case(task("p"), script("(sleep 3; echo late > late) &")),
    "a daemon that ends early": Case(task("d", "<daemon/>") + task("p"), {**script("sleep 0.2"), "d": b"#!/bin/sh\n"}),
    "a pattern that is none": Case(
        "<zip_output><zipfilename>z</zipfilename><filename>a(b</filename></zip_output>" + task("p"), script("echo > ab")
    ),
    "patterns": Case(
        "<zip_output><zipfilename>z</zipfilename><filename>^[[:alpha:]]+_\\d{2}$</filename>"
        "<filename>\\.(txt|dat)$</filename></zip_output>" + task("p"),
        script("touch ab_12 a1_12 ab_123 x.txt y.dat z.txtx; mkdir -p q"),
    ),
    "a pattern that finds everything": Case(
        "<zip_output><zipfilename>z</zipfilename><filename>.*</filename></zip_output>" + task("p"), script("touch a b")
    ),
    "archives of inputs": Case(
        "<unzip_input><zipfilename>i.zip</zipfilename><zipfilename>none</zipfilename></unzip_input>" + task("p", OUT),
        script("cat sub/x"),
    ),
    "an archive that is none": Case("<unzip_input><zipfilename>i</zipfilename></unzip_input>" + task("p"),
                                    {**script("true"), "i": b"text"}),
    "trickles": Case(task("p"), script("sleep 2.5"), ("--trickle", "1")),
    "fraction done": Case(
        task("p", "<fraction_done_filename>f</fraction_done_filename><weight>3</weight>") + task("p"),
        script("echo 0.5 > f; sleep 1.6"),
    ),
}  # fmt: skip


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


def lay_out(folder: Path, job: bytes, files: Mapping[str, bytes]) -> Path:
    """The folders of a client; the slot."""
    project, slot = folder / "projects" / "p", folder / "slots" / "0"
    project.mkdir(parents=True)
    slot.mkdir(parents=True)
    for name, content in {"job.xml": job, **files}.items():
        (project / name).write_bytes(content)
        (project / name).chmod(0o755 if content.startswith(b"#!") else 0o644)
        (slot / name).write_text(f"<soft_link>../../projects/p/{name}</soft_link>\n")
    for output in ("output.zip", "picture"):
        (slot / output).write_text(f"<soft_link>../../projects/p/{output}_7</soft_link>\n")
    (slot / "init_data.xml").write_text(
        "<app_init_data>\n<major_version>8</major_version>\n<result_name>r_0</result_name>\n<slot>0</slot>\n"
        f"<shm_key>-1</shm_key>\n<client_pid>{os.getpid()}</client_pid>\n<project_dir>{project}</project_dir>\n"
        f"<boinc_dir>{folder}</boinc_dir>\n<checkpoint_period>1</checkpoint_period>\n"
        "<fraction_done_start>0</fraction_done_start>\n<fraction_done_end>1</fraction_done_end>\n</app_init_data>\n"
    )
    return slot


def run(command: list[str], slot: Path, words: tuple[str, ...]) -> Outcome:
    """One run under a client that is played: it reads status and trickles."""
    with (slot / "boinc_mmap_file").open("wb+") as file:
        file.truncate(SEGMENT_BYTES)
        memory = mmap.mmap(file.fileno(), SEGMENT_BYTES)
    channels = Channels(memory)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VMWRAPPER_COMPARED": slot.parts[-3]}
    began = time.monotonic()
    last, trickles = "", 0
    stdout = slot.parent.parent / "stdout"
    with (slot / "stderr.txt").open("ab") as err, stdout.open("ab") as out:
        process = subprocess.Popen(
            [*command, *words], cwd=slot, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        while True:
            over = process.poll() is not None
            last = channels.receive(Channel.APP_STATUS) or last
            if "have_new_trickle_up" in (channels.receive(Channel.TRICKLE_UP) or ""):
                trickles += (slot / "trickle_up.xml").exists()
                (slot / "trickle_up.xml").unlink(missing_ok=True)
            if over:
                break
            if time.monotonic() - began > LIMIT_S:
                process.kill()
            time.sleep(0.01)
    seconds = time.monotonic() - began
    left = _survivors(slot.parts[-3])
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
            if process.cwd().split("/")[-3:-2] == [mark] and process.status() != psutil.STATUS_ZOMBIE:
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
            with zipfile.ZipFile(path) as archive:
                members = {member: archive.read(member) for member in sorted(archive.namelist())}
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


def cases() -> dict[str, tuple[bytes, dict[str, bytes], tuple[str, ...]]]:
    """Job file, files and words of every job."""
    found: dict[str, tuple[bytes, dict[str, bytes], tuple[str, ...]]] = {}
    for name in EXAMPLES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            shutil.copytree(ROOT / "examples" / name, folder)
            if (folder / "prepare").exists():
                subprocess.run([sys.executable, folder / "prepare", folder], check=True)
                (folder / "prepare").unlink()
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        found[f"examples/{name}"] = (files.pop("job.xml"), files, ())
    for name, case in CASES.items():
        files = dict(case.files)
        if "i.zip" in case.job:
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w") as archive:
                archive.writestr("sub/x", "unpacked\n")
            files["i.zip"] = content.getvalue()
        end = "" if name == "a job file that is cut" else "</job_desc>\n"
        found[name] = (f"<job_desc>\n{case.job}\n{end}".encode(), files, case.words)
    return found


def main() -> int:
    """0, also when there are differences: whoever reads them knows which are meant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wrapper", type=Path, help="BOINC's wrapper, an executable")
    parser.add_argument("jobs", nargs="*", help="names of jobs; default: all")
    arguments = parser.parse_args()
    chosen = {name: case for name, case in cases().items() if not arguments.jobs or name in arguments.jobs}
    same = 0
    for name, (job, files, words) in chosen.items():
        outcomes = []
        for command in ([str(arguments.wrapper.resolve())], [sys.executable, "-m", "vmwrapper"]):
            with tempfile.TemporaryDirectory(prefix="compare_") as scratch:
                outcomes.append(run(command, lay_out(Path(scratch), job, files), words))
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
