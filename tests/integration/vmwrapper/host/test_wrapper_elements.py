"""Every element, flag and macro of BOINC's wrapper, run for real: the wrapper as a program in a slot."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.limits import after
from tests.support.slots import PlayedClient, TestSlot

WRAPPER = [sys.executable, "-m", "vmwrapper"]
SHOW = '#!/bin/sh\nfor word; do echo "[$word]"; done\n'
"""A program that prints its words."""


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("show", SHOW, executable=True)
    yield slot
    slot.clean()


def task(script: str, more: str = "") -> str:
    script = script.replace("&", "&amp;").replace("<", "&lt;")
    return f"<task><application>sh</application><command_line>-c '{script}'</command_line>{more}</task>"


def show(command_line: str, more: str = "") -> str:
    """A task that prints its words to `out`."""
    return (
        f"<task><application>show</application><command_line>{command_line}</command_line>"
        f"<stdout_filename>out</stdout_filename>{more}</task>"
    )


def run(slot: TestSlot, *words: str, limit_s: float = 30) -> int:
    return slot.run(*words, program=WRAPPER, limit_s=limit_s)


@dataclass(frozen=True)
class Row:
    """One element, flag or macro: a job, and what the slot has after it."""

    name: str
    job: str
    files: dict[str, str]
    """Name, and the whole text that is there afterwards; {slot} stands for the slot's path."""
    words: tuple[str, ...] = ()
    before: dict[str, str] = field(default_factory=dict)
    client: str | None = None
    """Elements of init_data.xml; None: by hand."""
    status: int = 0


OUT = "<stdout_filename>out</stdout_filename>"
LINK = "<soft_link>../../projects/p/in_7</soft_link>\n"
ROWS = [
    Row("command_line", show("a \"b c\" 'd' x\"y z\""), {"out": '[a]\n[b c]\n[d]\n[x"y]\n[z"]\n'}),
    Row("application: a link", "<task><application>link</application>" + OUT + "</task>", {"out": "linked\n"},
        before={"link": "<soft_link>folder/program</soft_link>", "folder/program": "#!/bin/sh\necho linked\n"}),
    Row("application: a name with a path", "<task><application>./folder/p</application>" + OUT + "</task>",
        {"out": "p\n"}, before={"folder/p": "#!/bin/sh\necho p\n"}),
    Row("stdin_filename: a link", task("cat", f"<stdin_filename>in</stdin_filename>{OUT}"), {"out": "input\n"},
        before={"in": "<soft_link>sub/in_7</soft_link>", "sub/in_7": "input\n"}),
    Row("stdout_filename appends", task("echo one", OUT) + task("echo two", OUT), {"out": "zero\none\ntwo\n"},
        before={"out": "zero\n"}),
    Row("stdout_filename: a link", task("echo one", OUT), {"sub/out_7": "one\n"},
        before={"out": "<soft_link>sub/out_7</soft_link>", "sub/x": ""}),
    Row("stderr_filename appends", task("echo e >&2", "<stderr_filename>out</stderr_filename>"), {"out": "0\ne\n"},
        before={"out": "0\n"}),
    Row("exec_dir", task("pwd; cat here", f"<exec_dir>sub</exec_dir>{OUT}"), {"out": "{slot}/sub\nhere\n"},
        before={"sub/here": "here\n"}),
    Row("exec_dir: a macro", task("pwd", f"<exec_dir>$PWD/sub</exec_dir>{OUT}"), {"out": "{slot}/sub\n"},
        before={"sub/here": ""}),
    Row("exec_dir: the program there", "<task><application>p</application><exec_dir>sub</exec_dir>" + OUT + "</task>",
        {"out": "p\n"}, before={"p": "#!/bin/sh\necho wrong\n", "sub/p": "#!/bin/sh\necho p\n"}),
    Row("exec_dir: the slot's program", show("a", "<exec_dir>sub</exec_dir>"), {"out": "[a]\n"},
        before={"sub/here": ""}),
    Row("exec_dir: none", task("true", "<exec_dir>nowhere</exec_dir>"), {}, status=195),
    Row("setenv replaces", task('echo "$A|$B|${HOME-none}"',
        f"<setenv>A=x=y</setenv><setenv>B=$NTHREADS</setenv>{OUT}"), {"out": "x=y|1|none\n"}),
    Row("no setenv: the environment stays", task("test -n \"$HOME\" && echo yes", OUT), {"out": "yes\n"}),
    Row("weight 0", task("true", "<weight>0</weight>") + task("echo b", OUT), {"out": "b\n"}),
    Row("time_limit", task("echo a; exec sleep 60", f"<time_limit>0.2</time_limit>{OUT}") + task("echo b", OUT),
        {"out": "a\nb\n"}),
    Row("time_limit: not reached", task("exit 3", "<time_limit>60</time_limit>"), {}, status=195),
    Row("priority: the lowest by default", task("nice", OUT), {"out": "19\n"}),
    Row("priority 2", task("nice", f"<priority>2</priority>{OUT}"), {"out": "10\n"}),
    Row("priority 3 and 0: as it is", task("nice", f"<priority>3</priority>{OUT}")
        + task("nice", f"<priority>0</priority>{OUT}"), {"out": "{nice}\n{nice}\n"}),
    Row("priority 4 and 5", task("nice", f"<priority>4</priority>{OUT}") + task("nice", f"<priority>5</priority>{OUT}"),
        {"out": "-10\n-15\n" if os.geteuid() == 0 else "{nice}\n{nice}\n"}),
    Row("priority: the volunteer's", task("nice", f"<priority>1</priority>{OUT}"), {"out": "10\n"},
        client="<process_priority>1</process_priority>"),
    Row("priority: no change", task("nice", f"<priority>1</priority>{OUT}"), {"out": "{nice}\n"},
        client="<no_priority_change>1</no_priority_change><process_priority>1</process_priority>"),
    Row("append_cmdline_args", show("1", "<append_cmdline_args/>") + show("2"), {"out": "[1]\n[a]\n[b c]\n[2]\n"},
        words=("--passthrough_child", "a", '"b c"')),
    Row("append_cmdline_args: options are words", show("", "<append_cmdline_args>1</append_cmdline_args>"),
        {"out": "[--nthreads]\n[2]\n[--version]\n"}, words=("--passthrough_child", "--nthreads", "2", "--version")),
    Row("other words go to every task", show("1", "<append_cmdline_args/>") + show("2"),
        {"out": "[1]\n[a]\n[2]\n[a]\n"}, words=("a",), client=""),
    Row("$NTHREADS", show("-n $NTHREADS"), {"out": "[-n]\n[1]\n"}),
    Row("--nthreads", show("-n$NTHREADS"), {"out": "[-n4]\n"}, words=("--nthreads", "4.0")),
    Row("$PWD", show("$PWD/x"), {"out": "[{slot}/x]\n"}),
    Row("$PROJECT_DIR", show("$PROJECT_DIR"), {"out": "[/boinc/projects/p]\n"},
        client="<project_dir>/boinc/projects/p</project_dir>"),
    Row("$PROJECT_DIR by hand", show("$PROJECT_DIR"), {"out": "[.]\n"}),
    Row("$PROJECT_DIR in application", "<task><application>$PROJECT_DIR/p</application>" + OUT + "</task>",
        {"out": "p\n"}, before={"sub/p": "#!/bin/sh\necho p\n"}, client="<project_dir>{slot}/sub</project_dir>"),
    Row("$GPU_DEVICE_NUM: not known", show("$GPU_DEVICE_NUM"), {"out": "[$GPU_DEVICE_NUM]\n"}),
    Row("--device", show("$GPU_DEVICE_NUM"), {"out": "[2]\n"}, words=("--device", "2")),
    Row("$GPU_DEVICE_NUM: the client's", show("$GPU_DEVICE_NUM"), {"out": "[1]\n"}, words=("--device", "2"),
        client="<gpu_device_num>1</gpu_device_num>"),
    Row("boinc_resolve", show("-i=boinc_resolve(in) boinc_resolve(none)"),
        {"out": "[-i=../../projects/p/in_7]\n[none]\n"}, before={"in": LINK}),
    Row("boinc_resolve in a passed word", show("", "<append_cmdline_args/>"), {"out": "[../../projects/p/in_7]\n"},
        words=("--passthrough_child", "boinc_resolve(in)"), before={"in": LINK}),
    Row("boinc_resolve: open in a passed word", show("", "<append_cmdline_args/>"), {}, status=206,
        words=("--passthrough_child", "boinc_resolve(in")),
    Row("./ words", show("./in ./none"), {"out": "[../../projects/p/in_7]\n[./none]\n"}, before={"in": LINK}),
    Row("forward_slashes and multi_process", show("a", "<forward_slashes/><multi_process>1</multi_process>"),
        {"out": "[a]\n"}),
    Row("fraction_done_filename is made anew",
        task("test -e f || echo new", f"<fraction_done_filename>f</fraction_done_filename>{OUT}"),
        {"out": "new\n"}, before={"f": "0.9\n"}),
    Row("checkpoint_filename: a link", task("echo c > cp; test -e cp && echo made",
        f"<checkpoint_filename>cp</checkpoint_filename>{OUT}"), {"out": "made\n", "cp": "c\n"}),
    Row("daemon", task("true", "<daemon>0</daemon>") + task("until test -e d; do sleep 0.02; done; cat d", OUT)
        + task("echo daemon > .d; mv .d d; exec sleep 60", "<daemon/>"), {"out": "daemon\n"}),
    Row("booleans: <x/>, 1 and 0", show("1", "<append_cmdline_args/>")
        + show("2", "<append_cmdline_args>1</append_cmdline_args>")
        + show("3", "<append_cmdline_args>0</append_cmdline_args>"),
        {"out": "[1]\n[a]\n[2]\n[a]\n[3]\n"}, words=("--passthrough_child", "a")),
    Row("setenv: macros in name and value", task('echo "$N3 $P"',
        f"<setenv>N$NTHREADS=b</setenv><setenv>P=$PWD</setenv>{OUT}"), {"out": "b {slot}\n"},
        words=("--nthreads", "3")),
    Row("setenv: twice is passed on twice", "<task><application>twice</application><setenv>A=1</setenv>"
        "<setenv>A=2</setenv>" + OUT + "</task>", {"out": "A=1\nA=2\n"},
        before={"twice": f"#!{sys.executable} -IS\nprint(*[v.decode() for v in open('/proc/self/environ', 'rb').read()"
                ".split(b'\\0') if v.startswith(b'A')], sep='\\n')\n"}),
    Row("setenv: without = the environment is empty all the same", task('echo "${OMP-none}|${HOME-none}"',
        f"<setenv>OMP</setenv>{OUT}"), {"out": "none|none\n"}),
    Row("values that wrapper ignores", task("nice", "<weight>1,5</weight><time_limit>3600s</time_limit>"
        f"<priority>2,0</priority><multi_process>true</multi_process><daemon>yes</daemon>{OUT}"), {"out": "19\n"}),
    Row("values that wrapper understands otherwise", task("nice", f"<priority>9</priority>{OUT}"), {"out": "{nice}\n"}),
    Row("--device 0,1 and --nthreads x", show("$GPU_DEVICE_NUM $NTHREADS"), {"out": "[0]\n[0]\n"},
        words=("--device", "0,1", "--nthreads", "x", "--trickle", "abc")),
    Row("--device -1", show("$GPU_DEVICE_NUM"), {"out": "[$GPU_DEVICE_NUM]\n"}, words=("--device", "-1")),
    Row("unknown elements", "<frobnicate>1</frobnicate>" + show("a", "<frobnicate/>"), {"out": "[a]\n"}),
    Row("no well-formed XML", "<!-- a -- b -->" + show("a & b"), {"out": "[a]\n[&]\n[b]\n"}),
    Row("a program without #!", "<task><application>p</application></task>", {}, status=195,
        before={"p": "echo no program\n"}),
    Row("a signed program", "<task><application>link</application>" + OUT + "</task>", {"out": "ok\n"},
        before={"link": "<soft_link>../../sub/q_1</soft_link>"}, client="<app_file>q_1</app_file>"),
    Row("a program that is not signed", show("a"), {}, client="<app_file>q_1</app_file>", status=206),
    Row("a program of a signed job file", show("a"), {"out": "[a]\n"}, client="<app_file>job_1.xml</app_file>",
        before={"job.xml": "<soft_link>../../sub/job_1.xml</soft_link>"}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_element_does_what_boincs_wrapper_does(tmp_path: Path, row: Row) -> None:
    project = tmp_path / "sub"
    project.mkdir()
    (tmp_path / "slots" / "0").mkdir(parents=True)
    slot = TestSlot(tmp_path / "slots" / "0")
    slot.write("show", SHOW, executable=True)
    (project / "q_1").write_text("#!/bin/sh\necho ok\n")
    (project / "q_1").chmod(0o755)
    text = f"<job_desc>\n{row.job}\n</job_desc>\n"
    for name, content in row.before.items():
        path = slot.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(0o755 if content.startswith(("#!", "echo")) else 0o644)
    if "job.xml" in row.before:
        (project / "job_1.xml").write_text(text)
    else:
        slot.write("job.xml", text)
    if row.client is not None:
        PlayedClient(slot, more=row.client.format(slot=slot.folder))
    try:
        assert run(slot, *row.words) == row.status, slot.text("stderr.txt") if row.client is None else ""
    finally:
        slot.clean()
    values = {"slot": str(slot.folder), "nice": str(os.nice(0))}
    for name, content in row.files.items():
        wanted = content.replace("{slot}", values["slot"]).replace("{nice}", values["nice"])
        assert slot.text(name) == wanted
    finish = slot.text("boinc_finish_called").splitlines()[0]
    assert finish == str(row.status)


def test_version(slot: TestSlot) -> None:
    assert run(slot, "--version") == 0


@pytest.mark.parametrize(
    ("job", "status", "line"),
    [
        (show("a", "<exec_dir>nowhere</exec_dir>"), 195, "job.xml:2: <exec_dir>: 'nowhere' is not a folder"),
        (show("a", "<exec_dir>show</exec_dir>"), 195, "job.xml:2: <exec_dir>: 'show' is not a folder"),
        (show("boinc_resolve(a"), 206, "job.xml:2: <command_line>: expected 'boinc_resolve(' with its ')'"),
        (task("true", "<stdin_filename>sub</stdin_filename>"), 195, "job.xml:2: sh: stdin file"),
        (task("true", "<stdout_filename>no/where</stdout_filename>"), 195, "job.xml:2: sh: stdout file"),
        (task("true", "<stderr_filename>sub</stderr_filename>"), 195, "job.xml:2: sh: stderr file"),
        ("<task><application>nowhere_7</application></task>", 206, "job.xml:2: <application>: nowhere_7 is neither"),
        ("<task><application>too_long</application></task>", 206, "job.xml:2: <application>: too_long is neither"),
        (task("true", f"<exec_dir>{'n' * 256}</exec_dir>"), 195, "job.xml:2: <exec_dir>: 'nnn"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_line_with_file_line_and_element(slot: TestSlot, job: str, status: int, line: str) -> None:
    (slot.folder / "sub").mkdir()
    slot.write("too_long", f"<soft_link>{'n' * 300}</soft_link>")
    slot.job(job)
    assert run(slot) == status
    told = slot.text("boinc_finish_called").splitlines()
    assert told[0] == str(status)
    assert told[1].startswith(line), told
    assert not (slot.folder / "out").exists()


# --- archives


def make_zip(path: Path, members: dict[str, str], *, mode: int = 0o644) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            information = zipfile.ZipInfo(name)
            information.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(information, content)


UNZIP = "<unzip_input><zipfilename>in.zip</zipfilename></unzip_input>"


def test_input_archives_are_unpacked_once_and_outputs_packed(slot: TestSlot) -> None:
    (slot.folder / "project").mkdir()
    make_zip(
        slot.folder / "project" / "in_7",
        {"data/a.txt": "a\n", "data/": "", "tool": "#!/bin/sh\ncat data/*\n"},
        mode=0o755,
    )
    slot.write("in.zip", "<soft_link>project/in_7</soft_link>")
    slot.write("out.zip", "<soft_link>project/out_7</soft_link>")
    slot.write("old.out", "an input")
    slot.job(
        UNZIP,
        "<zip_output><zipfilename>out.zip</zipfilename><filename>.*\\.out$</filename><filename>^res_\\d+</filename>"
        "<filename>^vmwrapper</filename><filename>^boinc</filename></zip_output>",
        "<task><application>tool</application><stdout_filename>one.out</stdout_filename></task>",
        task("echo changed > data/a.txt; echo 1 > res_1; echo 2 > res_x; mkdir d.out; test -e again || "
             "{ touch again; kill -9 $PPID; sleep 60; }"),
        task("cat data/a.txt > two.out"),
    )  # fmt: skip
    assert run(slot) == -signal.SIGKILL
    assert not (slot.folder / "in.zip").exists(), "wrapper deletes it too"
    assert (slot.folder / "project" / "in_7").exists()
    slot.job(*slot.text("job.xml").splitlines()[1:-1])  # the same bytes
    (slot.folder / "d.out").rmdir()
    assert run(slot) == 0
    with zipfile.ZipFile(slot.folder / "project" / "out_7") as archive:
        assert sorted(archive.namelist()) == ["one.out", "res_1", "two.out"]
        assert archive.read("one.out") == b"a\n"
        assert archive.read("two.out") == b"changed\n", "it was not unpacked a second time"
    assert sorted(path.name for path in (slot.folder / "project").iterdir()) == ["in_7", "out_7"]
    assert run(slot) == 0, "finished"


def test_an_archive_that_a_task_made_stays(slot: TestSlot) -> None:
    slot.job("<zip_output><zipfilename>z</zipfilename><filename>.</filename></zip_output>", task("echo mine > z"))
    assert run(slot) == 0
    assert slot.text("z") == "mine\n"


def test_by_hand_stderr_txt_can_be_packed_and_inputs_are_not(slot: TestSlot) -> None:
    slot.job("<zip_output><zipfilename>z</zipfilename><filename>.*</filename></zip_output>", task("echo o > o"))
    assert run(slot) == 0
    with zipfile.ZipFile(slot.folder / "z") as archive:
        assert sorted(archive.namelist()) == ["o", "stderr.txt"]


def link_zip(path: Path, name: str, target: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        information = zipfile.ZipInfo(name)
        information.create_system = 3
        information.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(information, target)
        archive.writestr("after", "text")


def test_an_archive_that_cannot_be_used(slot: TestSlot) -> None:
    slot.write("in.zip", "no archive")
    slot.job(UNZIP, task("echo > never"))
    assert run(slot) == 206
    line = slot.text("boinc_finish_called").splitlines()[1]
    assert line == "job.xml: <unzip_input>: in.zip File is not a zip file"
    assert not (slot.folder / "never").exists()


def test_members_that_may_not_be_written_are_left_out(slot: TestSlot) -> None:
    odd = ("../evil", "/evil", "a/../../evil", "job.xml", "init_data.xml", "vmwrapper_checkpoint.json", "stderr.txt")
    make_zip(slot.folder / "in.zip", {**dict.fromkeys(odd, "x"), "lib/../lib/good": "good\n"})
    slot.job(UNZIP, task("cat lib/good evil > out"))
    assert run(slot) == 0
    assert slot.text("out") == "good\nx", "an absolute name counts below the slot, as with wrapper"
    assert not (slot.folder.parent / "evil").exists()
    story = slot.text("stderr.txt")
    assert story.count(" is left out: it ") == 6
    assert "unzip_input: in.zip: '../evil' is left out: it would be outside the slot" in story


def test_an_archive_larger_than_the_disk_bound_is_refused(slot: TestSlot) -> None:
    PlayedClient(slot, more="<rsc_disk_bound>1000</rsc_disk_bound>")
    make_zip(slot.folder / "in.zip", {"zeros": "0" * 2000})
    slot.job(UNZIP, task("echo > never"))
    assert run(slot) == 206
    assert "holds 2000 bytes, more than the 1000" in slot.text("boinc_finish_called")
    assert not (slot.folder / "zeros").exists()


def test_links_within_the_slot_and_an_archive_that_is_not_there(slot: TestSlot) -> None:
    link_zip(slot.folder / "in.zip", "lib.so", "after")
    more = "<zipfilename>other.zip</zipfilename></unzip_input>"
    slot.job(UNZIP.replace("</unzip_input>", more), task("cat lib.so > out"))
    assert run(slot) == 0
    assert slot.text("out") == "text"
    assert "other.zip is not there" in slot.text("stderr.txt")


# --- daemons


def test_daemons_run_beside_the_tasks_and_end_with_them(slot: TestSlot) -> None:
    slot.job(
        '<task><application>sh</application><daemon/><command_line>-c \'trap "echo ended $NTHREADS >> log; exit" TERM; '
        "echo > ready; while :; do sleep 0.02; done'</command_line></task>",
        "<task><application>false</application><daemon>1</daemon></task>",  # ends early: no failure
        "<task><application>sh</application><daemon/><command_line>-c '(sleep 300 &amp;) ; exit'</command_line></task>",
        task("until test -e ready; do sleep 0.02; done; echo task >> log"),
        task("echo task >> log"),
    )
    assert run(slot, "--nthreads", "3") == 0
    assert slot.text("log") == "task\ntask\nended 3\n"
    slot.assert_nothing_runs(0.5)


def test_an_unknown_daemon_ends_the_job(slot: TestSlot) -> None:
    slot.job("<task><application>./none</application><daemon/></task>", task("echo > never"))
    assert run(slot) == 206
    assert not (slot.folder / "never").exists()


# --- told to the client


def test_trickles_graphics_and_sporadic_files(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    client.beat("<sporadic_ca>2</sporadic_ca>")
    slot.job("<enable_graphics_support/>", task("echo 2 > ac; echo > started; sleep 60"))
    process = slot.start("--trickle", "0.5", "--sporadic", program=WRAPPER)
    slot.wait_for("trickle_up.xml", "<variety>cpu_time</variety>\n<cpu_time>")
    slot.wait_for("graphics_status.xml", "<suspended>0</suspended>")
    slot.wait_for("ca", "2\n")
    end = after(10)
    while "<sporadic_ac>2</sporadic_ac>" not in client.status():
        assert time.monotonic() < end
    client.say("<quit/>")
    assert process.wait(10) == 0


@pytest.mark.parametrize("multi_process", [False, True])
def test_use_tstp_reaches_the_program_alone_or_with_multi_process_all(slot: TestSlot, multi_process: bool) -> None:
    """For programs that are wrappers themselves: they catch it and stop their children."""
    client = PlayedClient(slot)
    slot.write(
        "inner.py",
        "import signal, subprocess, time, pathlib\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "signal.signal(signal.SIGTSTP, lambda *_: pathlib.Path('stopped').touch())\n"
        "signal.signal(signal.SIGCONT, lambda *_: pathlib.Path('resumed').touch())\n"
        "pathlib.Path('started').touch()\n"
        "while True: time.sleep(0.05)\n",
    )
    more = "<multi_process/>" if multi_process else ""
    slot.job(f"<task><application>{sys.executable}</application><command_line>inner.py</command_line>{more}</task>")
    process = slot.start("--use_tstp", program=WRAPPER)
    slot.wait_for("started")
    client.say("<suspend/>")
    slot.wait_for("stopped")
    (child,) = [process for process in slot.leftovers() if process.name() == "sleep"]
    end = after(5)
    while multi_process and child.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (child.status() == psutil.STATUS_STOPPED) == multi_process
    client.say("<resume/>")
    slot.wait_for("resumed")
    while child.status() == psutil.STATUS_STOPPED:
        assert time.monotonic() < end
        time.sleep(0.01)
    client.say("<quit/>")
    assert process.wait(10) == 0
    slot.assert_nothing_runs(0.2)


def test_a_checkpoint_file_that_changes_is_a_checkpoint(slot: TestSlot) -> None:
    """Also the first one, which BOINC's wrapper misses; and the run time before it counts for the time limit."""
    client = PlayedClient(slot)
    slot.job(
        task(
            "echo > started; i=0; while test $i -lt 40000; do i=$((i+1)); done; echo > cp; sleep 60",
            "<checkpoint_filename>cp</checkpoint_filename><time_limit>50</time_limit>",
        )
    )
    process = slot.start(program=WRAPPER)
    slot.wait_for("cp")
    end = after(10)
    while "<checkpoint_cpu_time>0.0" in (text := client.status()) or "checkpoint_cpu_time>0.00" in text:
        assert time.monotonic() < end, text
    client.say("<quit/>")
    assert process.wait(10) == 0
    checkpoint = json.loads(slot.text("vmwrapper_checkpoint.json"))
    assert checkpoint["cpu_time_s"] > 0
    assert 0 < checkpoint["task_elapsed_s"] < 20
