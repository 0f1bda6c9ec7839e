"""VMMain runs commands: driven over a real broker by a host of 2009 in raw frames (tests/support/agenthost.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from guest.commands.outputtext import INLINE_LIMIT
from guest.commands.runner import OVERDUE_S
from guest.commands.table import KILL_GRACE_S
from tests.support.agenthost import (
    GUEST_ID,
    AgentProcess,
    ScriptedHost,
    agent_process,
    exists,
    killed_at_the_end,
    wait_until,
)
from tests.support.brokers import BrokerAddress, running_broker
from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.messages import (
    CommandCancel,
    CommandForget,
    CommandForgotten,
    CommandList,
    CommandQuery,
    CommandResult,
    CommandTable,
)

AWKWARD = ["a b", "", 'quo"te', "apo'strophe", "new\nline", "back\\slash", "\ttab", "ünï☃𝄞", "$HOME", "*"]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerAddress]:
    with running_broker("embedded", tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="module")
def agent(broker: BrokerAddress, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """One agent for all tests here; each test has command ids of its own."""
    with agent_process(tmp_path_factory.mktemp("guest"), broker) as agent:
        yield agent


@pytest.fixture
def host(broker: BrokerAddress, agent: AgentProcess) -> Iterator[ScriptedHost]:
    host = ScriptedHost(broker)
    host.send(CommandList(GUEST_ID, "up"))
    while True:  # the agent may not be there yet: ask again until it is
        try:
            host.expect(CommandTable, lambda table: table.token == "up", limit_s=1)
            break
        except TimeoutError:
            host.send(CommandList(GUEST_ID, "up"))
    yield host
    host.forget_all(KILL_GRACE_S + OVERDUE_S + 10)
    host.close()


def script(agent: AgentProcess, name: str, text: str, mode: int = 0o755) -> str:
    path = agent.work / name
    path.write_text(text)
    path.chmod(mode)
    return f"./{name}"


def _peak_kb(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def output(agent: AgentProcess, result: object, which: str = "stdout") -> bytes:
    assert isinstance(result, dict)
    path: str = result[f"{which}_path"]
    return (agent.home / path).read_bytes()


def test_arguments_stay_apart(host: ScriptedHost, agent: AgentProcess) -> None:
    host.run("args", "printf", r"<%s>\0", *AWKWARD, inline_output=False)
    result = host.result("args")
    assert output(agent, result) == b"".join(f"<{word}>".encode() + b"\0" for word in AWKWARD)
    assert (result["exit_status"], result["signal"], result["finished"], result["error"]) == (0, None, True, "")


def test_environment_folder_and_session(host: ScriptedHost, agent: AgentProcess) -> None:
    folder = agent.work / "a folder"
    folder.mkdir()
    text = 'printf "%s|%s|%s|" "$PWD" "$MARK" "$ADDED"; ps -o sid= -p $$ | tr -d " \\n"; echo "|$$"'
    host.run("env", "sh", "-c", text, environment={"ADDED": "x=y z"}, folder=str(folder), inline_output=False)
    started = host.state("env", lambda status: status.pid is not None)
    words = output(agent, host.result("env")).decode().strip().split("|")
    assert words == [str(folder), "the agent's", "x=y z", str(started.pid), str(started.pid)]


def test_without_a_folder_commands_run_where_vmmain_was_started(host: ScriptedHost, agent: AgentProcess) -> None:
    name = script(agent, "where.sh", "#!/bin/sh\npwd\n")
    host.run("where", name)
    assert host.result("where")["out"] == f"{agent.work}\n"


def test_an_application_copied_without_an_x_bit_is_run(host: ScriptedHost, agent: AgentProcess) -> None:
    (agent.home / "worker.py").write_text("#!/bin/sh\necho from the base folder\n")
    host.run("xbit", "./worker.py")
    assert host.result("xbit")["out"] == "from the base folder\n"


@pytest.mark.parametrize("place", ["work", "home"])
def test_stdin_is_a_file_in_the_guest(host: ScriptedHost, agent: AgentProcess, place: str) -> None:
    (getattr(agent, place) / f"stdin_{place}").write_bytes(b"some input\0\xff")
    host.run(f"stdin-{place}", "cat", stdin=f"stdin_{place}", inline_output=False)
    assert output(agent, host.result(f"stdin-{place}")) == b"some input\0\xff"


def test_without_stdin_there_is_nothing_to_read(host: ScriptedHost) -> None:
    host.run("nostdin", "cat")
    assert host.result("nostdin")["out"] == ""


@pytest.mark.parametrize(
    ("id", "command", "more", "code"),
    [
        ("noapp", "./no-such-worker.py", {}, "application-missing"),
        ("noword", "no-such-program", {}, "application-missing"),
        ("empty", "", {}, "application-missing"),
        ("noin", "cat", {"stdin": "no-such-file"}, "stdin-missing"),
        ("nofolder", "pwd", {"folder": "/no/such/folder"}, "folder-missing"),
        ("nointerpreter", "./nointerpreter", {}, "application-missing"),
        ("noprogram", "./noprogram", {}, "application-not-executable"),
    ],
)
def test_what_cannot_be_started_says_why(
    host: ScriptedHost, agent: AgentProcess, id: str, command: str, more: dict[str, str], code: str
) -> None:
    (agent.work / "nointerpreter").write_text("#!/no/such/python\n")
    (agent.work / "noprogram").write_text("just text\n")
    host.run(id, command, **more)
    result = host.result(id)
    assert result["error"].startswith(f"{code}: ")
    assert result["error"] in result["err"]
    assert (result["exitCodeOrSignal"], result["finished"], result["exit_status"]) == (-1, False, None)
    if code.endswith("missing") and id not in {"nofolder", "nointerpreter"}:
        assert "noprogram" in result["error"], "what is there is listed"


def test_a_program_whose_name_takes_megabytes_ends_with_a_short_error(host: ScriptedHost) -> None:
    host.run("long", "x" * 3_000_000)
    result = host.result("long")
    assert result["error"].startswith("application-missing: xxx")
    assert result["error"].endswith(" characters]")
    assert len(result["error"]) < 3000


def test_exit_status_and_signal(host: ScriptedHost) -> None:
    host.run("status", "sh", "-c", "echo last words >&2; exit 7")
    result = host.result("status")
    assert (result["exit_status"], result["signal"], result["exitCodeOrSignal"]) == (7, None, 7)
    assert result["stderr_tail"] == result["err"] == "last words\n"
    host.run("signal", "sh", "-c", "kill -SEGV $$")
    result = host.result("signal")
    assert (result["exit_status"], result["signal"], result["exitCodeOrSignal"]) == (None, signal.SIGSEGV, 11)
    assert result["out_of_memory"] is False


BURN = "import time\nend = time.process_time() + %s\nwhile time.process_time() < end: pass\n"


def test_cpu_time_of_ended_living_and_orphaned_descendants_and_never_anothers(
    host: ScriptedHost, agent: AgentProcess
) -> None:
    (agent.work / "burn.py").write_text(BURN % "0.4")
    # an ended child, an ended grandchild, and an orphan in a session of its own that is still there at the end
    text = """
python3 burn.py
sh -c 'python3 burn.py; true'
(setsid python3 -c 'import time
end = time.process_time() + 0.4
while time.process_time() < end: pass
open("orphan-done", "w").close(); time.sleep(600)' &)
while [ ! -e orphan-done ]; do sleep 0.05; done
"""
    host.run("busy", "sh", "-c", text, inline_output=False)
    host.run("idle", "sh", "-c", "(setsid sh -c 'sleep 600' &); while [ ! -e orphan-done ]; do sleep 0.05; done")
    results: dict[str, Mapping[str, Any]] = {}
    while len(results) < 2:
        message = host.expect(CommandResult, lambda result: result.id in {"busy", "idle"})
        results[message.id] = message.body
    # python's own start counts too
    assert 1.2 <= results["busy"]["cpu_time_s"] < 4
    resources = results["busy"]["resources"]
    assert resources["ru_utime"] + resources["ru_stime"] == pytest.approx(results["busy"]["cpu_time_s"], abs=0.1)
    assert results["idle"]["cpu_time_s"] < 0.5
    assert results["busy"]["exit_status"] == results["idle"]["exit_status"] == 0


def test_nothing_survives_the_end_of_a_command(host: ScriptedHost, agent: AgentProcess) -> None:
    text = (
        "(trap '' TERM HUP; setsid sh -c 'echo $$ > survivor; exec sleep 600' &) & while [ ! -s survivor ]; do :; done"
    )
    host.run("survivor", "sh", "-c", text)
    host.result("survivor")
    assert not exists(int((agent.work / "survivor").read_text()))


def test_cancel_ends_a_whole_tree_that_ignores_term(host: ScriptedHost, agent: AgentProcess) -> None:
    text = """
trap '' TERM
(setsid sh -c 'trap "" TERM; echo $$ > stubborn; sleep 600; sleep 600' &)
sleep 600; sleep 600
"""
    host.run("stubborn", "sh", "-c", text)
    pid = host.state("stubborn", lambda status: status.pid is not None).pid
    wait_until(lambda: (agent.work / "stubborn").exists() and (agent.work / "stubborn").read_text() != "", "its child")
    began = time.monotonic()
    host.send(CommandCancel(GUEST_ID, "stubborn", 0.5))
    result = host.result("stubborn")
    assert 0.4 < time.monotonic() - began < 5
    assert (result["signal"], result["cancelled"], result["out_of_memory"]) == (signal.SIGKILL, True, False)
    assert pid is not None
    assert not exists(pid)
    assert not exists(int((agent.work / "stubborn").read_text()))


def test_cancel_lets_a_program_tidy_up(host: ScriptedHost, agent: AgentProcess) -> None:
    host.run("tidy", "sh", "-c", "trap 'echo tidy; exit 5' TERM; touch ready; while :; do sleep 0.05; done")
    wait_until((agent.work / "ready").exists, "the program's trap")
    host.send(CommandCancel(GUEST_ID, "tidy", 20))
    result = host.result("tidy")
    assert (result["exit_status"], result["out"], result["cancelled"]) == (5, "tidy\n", True)


def test_a_repeated_run_starts_once_and_a_lower_attempt_is_refused(host: ScriptedHost, agent: AgentProcess) -> None:
    run = host.run("once", "sh", "-c", "echo x >> once; while [ ! -e go ]; do sleep 0.05; done", attempt=2)
    for _ in range(5):
        host.send(run)
    host.run("once", "true", attempt=1)
    refused = host.state("once", lambda status: status.state is CommandState.REFUSED)
    assert refused.attempt == 2
    (agent.work / "go").touch()
    assert host.result("once")["attempt"] == 2
    host.send(run)
    host.state("once", lambda status: status.state is CommandState.FINISHED)
    assert (agent.work / "once").read_text() == "x\n"


def test_a_higher_attempt_replaces_a_running_one(host: ScriptedHost) -> None:
    host.run("again", "sleep", "600")
    first = host.state("again", lambda status: status.pid is not None).pid
    host.run("again", "echo", "second", attempt=2)
    result = host.result("again")
    assert (result["attempt"], result["out"]) == (2, "second\n")
    assert first is not None
    assert not exists(first)


def test_a_command_that_is_cancelled_or_replaced_at_once_ends_at_once(host: ScriptedHost) -> None:
    """Also when its supervisor is started for it: then both messages may reach it in one piece."""
    host.run("beside", "sleep", "600")  # with it, no supervisor waits for the next command
    host.state("beside", lambda status: status.pid is not None)
    began = time.monotonic()
    host.run("regretted", "sleep", "600")
    host.send(CommandCancel(GUEST_ID, "regretted", 20))
    assert host.result("regretted")["cancelled"] is True
    host.run("replaced", "sleep", "600")
    host.run("replaced", "echo", "second", attempt=2)
    result = host.result("replaced")
    assert (result["attempt"], result["out"]) == (2, "second\n")
    assert time.monotonic() - began < 15
    host.send(CommandForget(GUEST_ID, "beside"))
    host.expect(CommandForgotten, lambda message: message.id == "beside")


def test_a_result_is_repeated_until_forgotten_and_its_files_go(host: ScriptedHost, agent: AgentProcess) -> None:
    host.run("kept", "echo", "out", inline_output=False)
    result = host.result("kept")
    assert output(agent, result) == b"out\n"
    assert host.result("kept", limit_s=6) == result
    host.send(CommandForget(GUEST_ID, "kept"))
    host.expect(CommandForgotten, lambda message: message.id == "kept")
    wait_until(lambda: not (agent.home / result["stdout_path"]).exists(), "the output's end")
    host.send(CommandQuery(GUEST_ID, "kept"))
    assert host.state("kept").state is CommandState.UNKNOWN
    late = [m for m in host.collect(5) if isinstance(m, CommandResult) and m.id == "kept"]
    assert not late


def test_query_and_list(host: ScriptedHost) -> None:
    host.send(CommandQuery(GUEST_ID, "never heard of"))
    assert host.state("never heard of").state is CommandState.UNKNOWN
    host.run("listed", "sleep", "600")
    pid = host.state("listed", lambda status: status.pid is not None).pid
    host.send(CommandQuery(GUEST_ID, "listed"))
    assert host.state("listed").pid == pid
    host.send(CommandList(GUEST_ID, "token-1"))
    table = host.expect(CommandTable, lambda table: table.token == "token-1")
    assert {c.id: (c.state, c.pid) for c in table.commands}["listed"] == (CommandState.RUNNING, pid)
    host.send(CommandForget(GUEST_ID, "listed"))
    host.expect(CommandForgotten, lambda message: message.id == "listed")
    assert pid is not None
    assert not exists(pid)


def test_progress_is_reported_at_most_once_a_second(host: ScriptedHost, agent: AgentProcess) -> None:
    text = "for i in 1 2 3 4 5 6 7 8 9; do echo 0.$i >> fraction; sleep 0.3; done"
    began = time.monotonic()
    host.run("progress", "sh", "-c", text, fraction_done_file="fraction")
    seen: list[CommandStatus] = []
    while not seen or seen[-1].state is CommandState.RUNNING:
        seen.append(host.state("progress"))
    samples = [status for status in seen if status.fraction_done is not None and status.state is CommandState.RUNNING]
    fractions = [status.fraction_done for status in samples]
    assert fractions == sorted(fractions, key=lambda fraction: fraction or 0)
    assert 1 <= len(samples) <= time.monotonic() - began
    assert samples[0].memory_bytes > 0


def test_unknown_words_and_words_for_others_change_nothing(host: ScriptedHost) -> None:
    topic = {"destination": "/topic/cmd_requests"}
    host.frame("SEND", {**topic, "to": GUEST_ID}, "MAKE_COFFEE now")
    host.frame("SEND", {**topic, "to": GUEST_ID}, "CMD_QUERY")
    host.frame("SEND", {**topic, "to": GUEST_ID, "cmd-id": "bad", "cmd": "sh"}, "CMD_RUN [1, 2")
    host.frame("SEND", {**topic, "to": GUEST_ID}, "HELLO")
    host.frame("SEND", topic, "PING")
    host.frame("SEND", {**topic, "to": "52:54:*", "timestamp": "1"}, "PING")
    host.frame("SEND", {**topic, "to": "00:*", "timestamp": "2"}, "PING")
    while "timestamp:2" not in [f"timestamp:{headers.get('timestamp')}" for headers, _ in host.raw]:
        host.collect(0.2)
    assert not [headers for headers, body in host.raw if body == "PONG" and headers["timestamp"] == "1"]


def test_big_output_does_not_go_through_the_agent(host: ScriptedHost, agent: AgentProcess) -> None:
    before = _peak_kb(agent.pid)
    host.run("big", "sh", "-c", "head -c 300000000 /dev/zero; head -c 1000 /dev/zero >&2", inline_output=False)
    result = host.result("big", limit_s=60)
    assert (result["stdout_size"], result["stderr_size"]) == (300_000_000, 1000)
    assert (agent.home / result["stdout_path"]).stat().st_size == 300_000_000
    assert _peak_kb(agent.pid) - before < 20_000
    host.send(CommandForget(GUEST_ID, "big"))
    wait_until(lambda: not (agent.home / result["stdout_path"]).exists(), "the output's end")


def test_inline_output_is_escaped_and_cut(host: ScriptedHost) -> None:
    host.run("inline", "sh", "-c", r"printf 'a\000b\377'; head -c 9000000 /dev/zero | tr '\0' x; printf 'e\001' >&2")
    result = host.result("inline", limit_s=60)
    assert result["out"].startswith("a\\x00b\\xffxxx")
    assert result["out"].endswith(f"\n[cut: {INLINE_LIMIT} of 9000004 bytes]\n")
    assert result["err"] == "e\\x01"
    assert result["stdout_size"] == 9_000_004
    host.send(CommandForget(GUEST_ID, "inline"))


def test_output_that_needs_many_escapes_still_fits_into_a_message(host: ScriptedHost) -> None:
    host.run("escapes", "sh", "-c", r"head -c 9000000 /dev/zero")
    result = host.result("escapes", limit_s=60)
    assert result["out"].startswith("\\x00\\x00")
    assert "[cut: " in result["out"][-60:]
    host.send(CommandForget(GUEST_ID, "escapes"))


def test_a_stopped_program_can_be_cancelled(host: ScriptedHost) -> None:
    host.run("stopped", "sh", "-c", "kill -STOP $$; sleep 600")
    pid = host.state("stopped", lambda status: status.pid is not None).pid
    assert pid is not None
    wait_until(lambda: state_of(pid) == "T", "the stop")
    host.send(CommandCancel(GUEST_ID, "stopped", 20))
    assert host.result("stopped")["signal"] == signal.SIGTERM


def test_a_killed_supervisor_takes_its_command_along(host: ScriptedHost) -> None:
    host.run("supervisor", "sh", "-c", "(setsid sleep 601 &); sleep 602")
    pid = host.state("supervisor", lambda status: status.pid is not None).pid
    assert pid is not None
    supervisor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    result = host.result("supervisor")
    assert result["error"].startswith("agent-fault: ")
    wait_until(lambda: not exists(pid), "the command's end", 5)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def waiting_supervisors(agent: AgentProcess) -> list[int]:
    """The supervisor that waits for a command, when none runs."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"guest.commands.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_command_whose_supervisor_is_stopped_is_ended_all_the_same(host: ScriptedHost, agent: AgentProcess) -> None:
    """By the command, perhaps before it was said which process that is; and before it has even started one."""
    wait_until(lambda: len(waiting_supervisors(agent)) == 1, "a supervisor that waits")
    [mute] = waiting_supervisors(agent)
    with killed_at_the_end(mute):
        os.kill(mute, signal.SIGSTOP)
        host.run("mute", "sleep", "605")
        text = "echo $$ $PPID > new; mv new stopper; (setsid sleep 603 &); kill -STOP $PPID; exec sleep 604"
        host.run("stopper", "sh", "-c", text)
        wait_until((agent.work / "stopper").exists, "the command")
        pid, supervisor = map(int, (agent.work / "stopper").read_text().split())
        with killed_at_the_end(supervisor, pid):
            wait_until(lambda: state_of(supervisor) == "T", "the stop")
            for id in ("mute", "stopper"):
                host.send(CommandCancel(GUEST_ID, id, 600))
                host.send(CommandCancel(GUEST_ID, id, 0.1))  # the shorter grace counts here too
                host.send(CommandCancel(GUEST_ID, id, 600))
            results: dict[str, Mapping[str, Any]] = {}
            while len(results) < 2:
                message = host.expect(CommandResult, lambda result: result.id in {"mute", "stopper"}, OVERDUE_S + 10)
                results[message.id] = message.body
            for result in results.values():
                assert result["error"].startswith("agent-fault: ")
            assert not [one for one in host.messages if isinstance(one, CommandStatus) and one.id == "mute" and one.pid]
            wait_until(lambda: not any(map(exists, (pid, supervisor, mute))), "the command's end", 5)
    host.run("after", "echo", "hi")
    assert host.result("after")["out"] == "hi\n"


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup of 48 MiB; its out-of-memory kills are the kernel's own, as those of a small guest are."""
    for root, limit, swap in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.swappiness"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.swap.max"),
    ):
        group = root / f"vmwrapper-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(48 << 20))
            if (group / swap).exists():
                (group / swap).write_text("0")
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no memory cgroup can be made here (root and the memory controller are needed)")


@pytest.mark.parametrize("way", ["itself", "child"])
def test_running_out_of_memory_is_told_from_other_kills(host: ScriptedHost, small_memory: Path, way: str) -> None:
    eat = f"echo $$ > {small_memory}/cgroup.procs; python3 -c 'x = bytearray(300 << 20)'"
    host.run(
        f"oom-{way}", "sh", "-c", eat.replace("python3", "exec python3") if way == "itself" else f"{eat} || exit 9"
    )
    result = host.result(f"oom-{way}")
    assert result["out_of_memory"] is True
    assert (result["signal"], result["exit_status"]) == ((9, None) if way == "itself" else (None, 9))
    host.run(f"kill-{way}", "sh", "-c", "kill -9 $$")
    assert host.result(f"kill-{way}")["out_of_memory"] is False
