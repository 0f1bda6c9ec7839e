"""Host and unzip tasks, VMmanage tasks under a supervisor, the client's messages: the wrapper as a real program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.limits import after
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot, ten_times_as_fast

WRAPPER = [sys.executable, "-m", "vmwrapper"]
GUEST = (
    "<task><virtualmachine>one</virtualmachine><image>guest.vdi</image><application>tool</application>"
    "<command_line>sleep=60</command_line></task>"
)
KEPT_TASK = "<VMmanage_task><application>./broker</application></VMmanage_task>"


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    yield slot
    slot.clean()


def task(script: str, more: str = "", *, name: str = "task") -> str:
    script = script.replace("&", "&amp;").replace("<", "&lt;")
    return f"<{name}><application>sh</application><command_line>-c '{script}'</command_line>{more}</{name}>"


def run(slot: TestSlot, *words: str, limit_s: float = 30) -> int:
    return slot.run("job.xml", *words, program=WRAPPER, limit_s=limit_s)


def test_tasks_run_in_order_and_append_to_their_streams(slot: TestSlot) -> None:
    out = "<stdout_filename>out</stdout_filename>"
    slot.write("in", "input\n")
    slot.job(
        task("cat; echo first", f"<stdin_filename>in</stdin_filename>{out}"),
        task("echo second $0 $1; echo oops >&2", f"{out}<stderr_filename>err</stderr_filename>"),
        task("env", "<setenv>A=b c</setenv><stdout_filename>env</stdout_filename>"),
    )
    assert run(slot, "x", "y") == 0
    assert slot.text("out") == "input\nfirst\nsecond x y\n"
    assert slot.text("err") == "oops\n"
    assert "A=b c" in slot.text("env").splitlines()
    assert not any(line.startswith("HOME=") for line in slot.text("env").splitlines()), "setenv alone, as with wrapper"
    assert slot.text("boinc_finish_called").startswith("0")
    assert json.loads(slot.text("vmwrapper_checkpoint.json"))["tasks_done"] == 3


def test_an_empty_job_is_done(slot: TestSlot) -> None:
    slot.job()
    assert run(slot) == 0


def test_host_jobs_load_neither_xml_rpc_nor_stomp_nor_hypervisors(slot: TestSlot) -> None:
    slot.job(task("true"))
    slot.write(
        "look.py",
        "import sys\nfrom pathlib import Path\nfrom vmwrapper.options import RunOptions\n"
        "from vmwrapper.run.run import run_job\nassert run_job(RunOptions(Path('job.xml'))).status == 0\n"
        "print([m for m in sys.modules if m.startswith(('stomp', 'xmlrpc', 'twisted.web', 'vmcontrol.hyper'))])\n"
        "Path('loaded').write_text(' '.join(m for m in sys.modules if m.startswith(('stomp', 'xmlrpc', 'twisted.web',"
        " 'vmcontrol.hyper', 'vmwrapper.vm.services', 'vmwrapper.vm.machine', 'vmwrapper.vm.task'))))\n",
    )
    assert slot.run(program=[sys.executable, "look.py"]) == 0
    assert slot.text("loaded") == ""


@pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="else psutil is asked for children"
)
def test_a_host_job_that_leaves_nothing_running_loads_neither_psutil_nor_lxml(slot: TestSlot) -> None:
    slot.job(task("true"))
    slot.write(
        "look.py",
        "import sys\nfrom pathlib import Path\nfrom vmwrapper.options import RunOptions\n"
        "from vmwrapper.run.run import run_job\nassert run_job(RunOptions(Path('job.xml'))).status == 0\n"
        "Path('loaded').write_text(' '.join({'psutil', 'lxml'} & sys.modules.keys()))\n",
    )
    assert slot.run(program=[sys.executable, "look.py"]) == 0
    assert slot.text("loaded") == ""


@pytest.mark.parametrize(
    ("element", "status", "words"),
    [
        (task("exit 3"), 195, ["exit status 3"]),
        (
            task("echo last words >&2; kill -9 $$", "<stderr_filename>e</stderr_filename>"),
            195,
            ["SIGKILL", "last words"],
        ),
        (task("true", "<stdin_filename>nowhere</stdin_filename>"), 195, ["stdin file", "nowhere"]),
        (task("true", "<stdin_filename>pipe</stdin_filename>"), 195, ["stdin file", "it is a named pipe"]),
        (task("true", "<stdout_filename>pipe</stdout_filename>"), 195, ["stdout file", "it is a named pipe"]),
        (
            "<task><application>./none</application></task>",
            206,
            ["job.xml:2: <application>: ./none", "there is:", "plain"],
        ),
        ("<task><application>./plain</application></task>", 195, ["not executable"]),
        (task("exit 4", name="unzip_task") + task("echo x > never"), 195, ["exit status 4"]),
        ("<unzip_task><application>./none</application></unzip_task>", 206, ["./none", "there is:", "plain"]),
        (
            KEPT_TASK + HOST_MAIN_TASK + GUEST,
            206,
            ["job.xml:2: <application>: ./broker is neither", "there is:", "plain"],
        ),
        (
            HOST_MAIN_TASK.replace("HostConfig", "nowhere") + GUEST,
            206,
            ["job.xml:2: <command_line>: HostMain's configuration ./nowhere.cfg is not", "there is:", "plain"],
        ),
        (
            KEPT_TASK.replace("./broker", "sh").replace("</V", "<stdin_filename>nowhere</stdin_filename></V")
            + HOST_MAIN_TASK
            + GUEST,
            206,
            ["job.xml:2: <stdin_filename>: sh: stdin file", "nowhere cannot be opened", "there is:", "plain"],
        ),
        (
            HOST_MAIN_TASK + GUEST.replace("guest.vdi", "none.vdi"),
            206,
            ["<image>: none.vdi is not", "there is:", "plain"],
        ),
        (HOST_MAIN_TASK + GUEST.replace("guest.vdi", "pipe"), 206, ["<image>: pipe is no file"]),
        (
            "<unzip_input><zipfilename>pipe</zipfilename></unzip_input>" + task("echo > never"),
            206,
            ["<unzip_input>: pipe is no file"],
        ),
        ("<tusk/><task>", 206, ["job.xml"]),
    ],
)
def test_a_failure_has_its_status_and_one_clear_line(
    slot: TestSlot, element: str, status: int, words: list[str]
) -> None:
    slot.write("plain", "no program")
    os.mkfifo(slot.folder / "pipe")
    slot.job(element)
    assert run(slot) == status
    for word in words:
        assert word in slot.text("stderr.txt")
    assert slot.text("boinc_finish_called").splitlines()[0] == str(status)
    assert not (slot.folder / "never").exists()


def test_a_job_file_that_is_a_pipe_is_refused_and_not_waited_for(slot: TestSlot) -> None:
    os.mkfifo(slot.folder / "job.xml")
    assert run(slot) == 206
    assert "it is no regular file" in slot.text("stderr.txt")
    assert slot.run("check", "job.xml", program=WRAPPER) == 206


def test_devices_are_streams(slot: TestSlot) -> None:
    null = "<{0}_filename>/dev/null</{0}_filename>"
    slot.job(task("cat; echo unseen", "".join(null.format(name) for name in ("stdin", "stdout", "stderr"))))
    assert run(slot) == 0


@pytest.mark.parametrize("name", ["task", "unzip_task"])
def test_what_a_program_says_on_stderr_is_in_stderr_txt_by_hand_too(slot: TestSlot, name: str) -> None:
    slot.job(task("echo what went wrong >&2; exit 3", name=name))
    process = slot.start("job.xml", program=WRAPPER, stderr=subprocess.PIPE)
    assert b"\nwhat went wrong\n" in process.communicate(timeout=30)[1]
    assert process.returncode == 195
    story = slot.text("stderr.txt")
    assert story.splitlines().count("what went wrong") == 1
    assert story.index("\nwhat went wrong") < story.index("exit status 3")


def test_much_on_stderr_holds_up_nobody(slot: TestSlot) -> None:
    slot.job(task("head -c 1000000 /dev/zero | tr '\\0' x >&2; echo >&2".replace("'", '"')))
    assert run(slot) == 0, slot.text("stderr.txt")[:2000]
    assert "x" * 1000000 in slot.text("stderr.txt")


def test_with_stderr_txt_as_stderr_nothing_is_written_twice(slot: TestSlot) -> None:
    slot.job(task("echo once >&2"))
    with (slot.folder / "stderr.txt").open("ab") as file:
        assert slot.start("job.xml", program=WRAPPER, stderr=file).wait(30) == 0
    assert slot.text("stderr.txt").splitlines().count("once") == 1


def test_only_what_this_run_said_is_quoted(slot: TestSlot) -> None:
    slot.write("err", "said long ago\n")
    slot.job(task("echo said now >&2; exit 3", "<stderr_filename>err</stderr_filename>"))
    assert run(slot) == 195
    assert "said now" in slot.text("stderr.txt")
    assert "said long ago" not in slot.text("stderr.txt")
    assert slot.text("err") == "said long ago\nsaid now\n"


def test_unzip_tasks_run_once_per_slot(slot: TestSlot) -> None:
    slot.job(
        task("echo one >> unzipped", name="unzip_task"),
        task("echo two >> unzipped", name="unzip_task"),
        task("test -e again || { touch again; kill -9 $PPID; sleep 60; }"),
    )
    assert run(slot) == -9
    assert run(slot) == 0
    assert slot.text("unzipped") == "one\ntwo\n"
    slot.assert_nothing_runs()


def test_a_task_that_a_killed_wrapper_left_is_ended_before_it_runs_again(slot: TestSlot) -> None:
    slot.job(task("echo begin >> log; test -e again || { touch again; sleep 20; echo late >> log; }; echo end >> log"))
    process = slot.start("job.xml", program=WRAPPER)
    slot.wait_for("again")
    process.kill()
    process.wait()
    assert run(slot) == 0
    assert slot.text("log") == "begin\nbegin\nend\n"
    assert "killed run left" in slot.text("stderr.txt")
    slot.assert_nothing_runs(0.5)


def test_nothing_that_a_task_started_survives_it(slot: TestSlot) -> None:
    slot.job(task("(sleep 300 & sleep 301 &) ; setsid sleep 302 & true"))
    assert run(slot) == 0
    slot.assert_nothing_runs(0.5)


@pytest.mark.parametrize("where", ["unzip", "task"])
def test_term_ends_the_tree_and_leaves_no_finish_file(slot: TestSlot, where: str) -> None:
    """TERM to everything at once, as systemd does: that is no failure of the task."""
    slow = "sh -c : ; echo > started; sleep 300"
    slot.job(task(slow, name="unzip_task") if where == "unzip" else task(slow))
    process = slot.start("job.xml", program=WRAPPER)
    slot.wait_for("started")
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert not (slot.folder / "boinc_finish_called").exists()
    slot.assert_nothing_runs()


def test_a_task_that_ignores_term_is_killed_45_s_after_the_message(slot: TestSlot) -> None:
    slot.job(task('trap "" TERM; echo > started; while :; do sleep 1; done'))
    process = slot.start("job.xml", program=ten_times_as_fast())
    slot.wait_for("started")
    began = time.monotonic()
    process.terminate()
    assert process.wait(12) == -signal.SIGTERM
    assert 4.4 < time.monotonic() - began < 8, "a tenth of 45 s"
    slot.assert_nothing_runs()


def test_a_time_limit_counts_as_done(slot: TestSlot) -> None:
    slot.job(task("sleep 300", "<time_limit>0.3</time_limit>"), task("echo > next"))
    assert run(slot) == 0
    assert (slot.folder / "next").exists()


def state_of(slot: TestSlot, name: str) -> set[str]:
    return {process.status() for process in slot.leftovers() if process.name() == name}


def wait_until_state(slot: TestSlot, name: str, wanted: str, limit_s: float) -> None:
    end = after(limit_s)
    while state_of(slot, name) != {wanted}:
        assert time.monotonic() < end, (state_of(slot, name), slot.text("stderr.txt"))
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["python", "library"])
def test_the_client_suspends_resumes_and_aborts(slot: TestSlot, kind: str) -> None:
    client = PlayedClient(slot)
    slot.write("f", "0.75 of the last run, which does not count\n")
    script = "sleep 300 & test -e f || echo 0.25 of 4 > f; echo > started; sleep 300"
    slot.job(task(script, "<fraction_done_filename>f</fraction_done_filename>"))
    process = slot.start(program=WRAPPER, VMWRAPPER_BOINC_RUNTIME=kind)
    slot.wait_for("started")
    client.say("<suspend/>")
    wait_until_state(slot, "sleep", psutil.STATUS_STOPPED, 1)
    client.say("<resume/>")
    wait_until_state(slot, "sleep", psutil.STATUS_SLEEPING, 1)
    end = after(5)
    while "<fraction_done>2.5" not in (text := client.status()):
        assert time.monotonic() < end, text
    client.say("<abort/>")
    assert process.wait(10) == 194
    assert not (slot.folder / "boinc_finish_called").exists()
    slot.assert_nothing_runs()


def test_quit_from_the_client_ends_with_0_and_no_finish_file(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    slot.job(task("echo > started; sleep 300"))
    process = slot.start(program=WRAPPER)
    slot.wait_for("started")
    client.say("<quit/>")
    assert process.wait(10) == 0
    assert not (slot.folder / "boinc_finish_called").exists()
    checkpoint = json.loads(slot.text("vmwrapper_checkpoint.json"))
    assert checkpoint["elapsed_s"] > 0
    assert checkpoint["task_elapsed_s"] == 0, "it begins again, and with it its time limit"
    slot.assert_nothing_runs()


def test_errors_of_ours_while_ending_are_counted(slot: TestSlot) -> None:
    """They are a temporary exit each, as other faults are; the sixth in a row is the end."""
    slot.job(task("kill -TERM $PPID; sleep 60"))
    slot.write(
        "broken.py",
        "from pathlib import Path\nfrom vmwrapper.process import orphans\n"
        "from vmwrapper.run import run as runner\n"
        "from vmwrapper.options import RunOptions\n"
        "def broken(*_, **_more): raise LookupError('never seen before')\n"
        "orphans.end_orphans = broken\nrunner.leave(runner.run_job(RunOptions(Path('job.xml'))))\n",
    )
    for _ in range(5):
        assert slot.run(program=[sys.executable, "broken.py"]) == 75
    assert slot.run(program=[sys.executable, "broken.py"]) == 208
    assert "never seen before" in slot.text("boinc_finish_called")


def test_a_folder_in_the_place_of_the_list_of_processes_fails_no_job_that_is_done(slot: TestSlot) -> None:
    slot.job(task("rm vmwrapper_processes.json; mkdir vmwrapper_processes.json"))
    assert run(slot) == 0, slot.text("stderr.txt")
    assert "vmwrapper_processes.json cannot be removed" in slot.text("stderr.txt")


# --- with VMmanage tasks (HostMain is the scripted one)

KEPT = """#!/bin/sh
# stands for ActiveMQ's script: the server is a child that outlives it, and its child lives in a session of its own
setsid sleep 300 &
sh -c 'trap "" TERM; sleep 301' &
echo $$ > kept_pid
wait
"""


@pytest.fixture
def guest_slot(slot: TestSlot) -> TestSlot:
    slot.write("broker", KEPT, executable=True)
    slot.job(HOST_MAIN_TASK, KEPT_TASK, GUEST)
    return slot


def test_nothing_is_left_when_the_wrapper_is_killed(guest_slot: TestSlot) -> None:
    process = guest_slot.start("job.xml")
    guest_slot.wait_for("fake_runs.txt", "_0_")
    guest_slot.wait_for("kept_pid")
    process.kill()
    process.wait()
    guest_slot.assert_nothing_runs(8)


def test_nothing_is_left_when_the_wrapper_is_told_to_end(guest_slot: TestSlot) -> None:
    process = guest_slot.start("job.xml")
    guest_slot.wait_for("fake_runs.txt", "_0_")
    guest_slot.wait_for("kept_pid")
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    guest_slot.assert_nothing_runs(0.2)


def test_a_killed_supervisor_takes_its_program_along_and_both_come_again(guest_slot: TestSlot) -> None:
    guest_slot.start("job.xml")
    guest_slot.wait_for("fake_runs.txt", "_0_")
    guest_slot.wait_for("kept_pid")
    first = int(guest_slot.text("kept_pid"))
    supervisor = psutil.Process(first).parent()
    assert supervisor is not None
    assert "vmwrapper.process.supervisor" in supervisor.cmdline()
    family = psutil.Process(first).children(recursive=True)
    supervisor.kill()
    guest_slot.wait_for("stderr.txt", "starting broker again")
    _, alive = psutil.wait_procs([*family, psutil.Process(first)] if psutil.pid_exists(first) else family, timeout=5)
    assert alive == []
    end = after(5)
    while guest_slot.text("kept_pid") in ("", f"{first}\n"):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("#!/bin/sh\nexit 7\n", "job.xml:3: <VMmanage_task>: broker died 4 times, at last it ended with exit status 7"),
        (
            "#!/bin/sh\nkill -9 $$\n",
            "job.xml:3: <VMmanage_task>: broker died 4 times, at last it ended by signal 9 (SIGKILL)",
        ),
        ("#!/nowhere/sh\n", "job.xml:3: <application>: broker cannot be started: No such file or directory"),
    ],
)
def test_a_broker_that_is_beyond_help_is_told_as_it_was(guest_slot: TestSlot, script: str, told: str) -> None:
    guest_slot.write("broker", script, executable=True)
    assert guest_slot.run("job.xml") == 208
    assert guest_slot.text("boinc_finish_called").splitlines()[1] == told
    story = guest_slot.text("stderr.txt")
    assert "wrote nothing" not in story, "what it wrote went to our own stderr"
    assert "exit status 0" not in story, "that would be the supervisor's"
    guest_slot.assert_nothing_runs()


def test_a_broker_without_a_word_is_told_with_the_file_where_one_would_be(guest_slot: TestSlot) -> None:
    kept = KEPT_TASK.replace("</VMm", "<stderr_filename>stderr_broker</stderr_filename></VMm")
    guest_slot.job(HOST_MAIN_TASK, kept, GUEST)
    guest_slot.write("broker", "#!/bin/sh\nexit 7\n", executable=True)
    assert guest_slot.run("job.xml") == 208
    assert "exit status 7: it wrote nothing to stderr_broker" in guest_slot.text("stderr.txt")


def test_no_broker_runs_beside_tasks_after_the_last_guest_task(guest_slot: TestSlot) -> None:
    """So nothing that becomes of it can fail them."""
    kept = KEPT.replace("setsid sleep 300 &\n", "")
    guest_slot.write("broker", kept, executable=True)
    guest_slot.job(
        HOST_MAIN_TASK,
        KEPT_TASK,
        task("until test -s kept_pid; do sleep 0.02; done"),
        GUEST.replace("sleep=60", "make=x"),
        task("kill -0 $(cat kept_pid) 2>/dev/null && touch alive; true"),
    )
    assert guest_slot.run("job.xml") == 0, guest_slot.text("stderr.txt")
    assert not (guest_slot.folder / "alive").exists()
    assert " died" not in guest_slot.text("stderr.txt")
    guest_slot.assert_nothing_runs(0.5)


def test_deaths_of_a_broker_count_in_a_row_only(guest_slot: TestSlot) -> None:
    """It dies three times before the first task is done, and three times after that."""
    broker = (
        "#!/bin/sh\necho start >> starts\nn=$(wc -l < starts)\n"
        "test $n -lt 4 && exit 1\n"
        "test $n -lt 7 && { until test -e go; do sleep 0.02; done; exit 1; }\n"
        "exec sleep 300\n"
    )
    guest_slot.write("broker", broker, executable=True)
    guest_slot.job(
        HOST_MAIN_TASK,
        KEPT_TASK,
        task("until test $(wc -l < starts) -ge 4; do sleep 0.02; done"),
        task("touch go; until test $(wc -l < starts) -ge 7; do sleep 0.02; done"),
        GUEST.replace("sleep=60", "make=x"),
    )
    assert guest_slot.run("job.xml", limit_s=60) == 0, guest_slot.text("stderr.txt")
    assert guest_slot.text("stderr.txt").count("broker died") == 6


def test_abort_deletes_the_vm(guest_slot: TestSlot) -> None:
    client = PlayedClient(guest_slot)
    process = guest_slot.start()
    guest_slot.wait_for("fake_runs.txt", "_0_")
    client.say("<abort/>")
    assert process.wait(10) == 194
    assert json.loads(guest_slot.text("fake_world.json")) == {}
    guest_slot.assert_nothing_runs(0.2)


def test_suspend_pauses_the_vm_and_resume_lets_it_go_on(guest_slot: TestSlot) -> None:
    client = PlayedClient(guest_slot)
    guest_slot.start()
    guest_slot.wait_for("fake_runs.txt", "_0_")
    client.say("<suspend/>")
    guest_slot.wait_for("fake_world.json", '"Paused"', limit_s=1)
    client.say("<resume/>")
    guest_slot.wait_for("fake_world.json", '"Running"', limit_s=1)


def guest(line: str, files: str) -> str:
    return GUEST.replace("sleep=60", line).replace("</task>", f"{files}</task>")


def test_host_and_guest_tasks_mix_in_order(slot: TestSlot) -> None:
    """What one makes the next one gets, a daemon runs beside both kinds, a kill -9 between them changes nothing."""
    slot.write("tool", "#!/bin/sh\n", executable=True)
    slot.job(
        HOST_MAIN_TASK,
        task("echo daemon >> ready; sleep 300", "<daemon/>"),
        task("echo one > in; until test -e ready; do sleep 0.02; done"),
        guest("copy=in:out", "<copy_file_to_VM>in</copy_file_to_VM><copy_file_from_VM>out</copy_file_from_VM>"),
        task("cat out >> log; test -e again || { touch again; kill -9 $PPID; sleep 60; }; echo two >> log"),
        guest("copy=log:out2", "<copy_file_to_VM>log</copy_file_to_VM><copy_file_from_VM>out2</copy_file_from_VM>"),
        task("cat out2 >> log; echo three >> log"),
    )
    assert slot.run("job.xml") == -signal.SIGKILL
    assert slot.text("log") == "one\n"
    assert slot.run("job.xml") == 0
    assert slot.text("log") == "one\none\ntwo\n" * 2 + "three\n"
    assert slot.text("ready") == "daemon\n" * 2
    slot.assert_nothing_runs(0.5)


def test_vmmanage_tasks_start_only_for_guest_tasks(slot: TestSlot) -> None:
    slot.write("broker", "#!/bin/sh\ntouch broker_was_here\n", executable=True)
    slot.job(HOST_MAIN_TASK, KEPT_TASK, task("true"))
    assert slot.run("job.xml") == 0
    assert not (slot.folder / "broker_was_here").exists()
