"""The contract of `vmwrapper.boinc.runtime.Runtime`, kept by both implementations.

Each test starts a process with one runtime in a slot of its own and plays the client through boinc_mmap_file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import after
from vmwrapper.boinc.channels import SEGMENT_BYTES, Channel, Channels
from vmwrapper.boinc.library import LibraryMissing, LibraryRuntime
from vmwrapper.context.logical_names import LogicalNames
from vmwrapper.slot import Slot

DRIVER = Path(__file__).parents[3] / "support" / "runtime_driver.py"
LIMIT_S = 20.0
NOT_SUSPENDED = {
    "no_heartbeat": False,
    "suspended": False,
    "quit_request": False,
    "abort_request": False,
    "network_suspended": False,
    "reread_init_data_file": False,
}


def have_library() -> bool:
    try:
        LibraryRuntime(Path())
    except LibraryMissing:
        return False
    return True


@pytest.fixture(
    params=[
        pytest.param(
            "library", marks=pytest.mark.skipif(not have_library(), reason="package libboinc-app7 is not installed")
        ),
        "python",
    ]
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class BoincRaisedError(Exception):
    """The runtime raised a BoincError of this kind."""


class Driven:
    """A runtime in a process of its own."""

    def __init__(self, kind: str, slot: Path, lock_wait_s: float = 5.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), kind, str(lock_wait_s)],
            cwd=slot,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, name: str, *arguments: Any, **keywords: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([name, arguments, keywords]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the runtime's process ended with {self.process.wait(LIMIT_S)}"
        answer = json.loads(line)
        if "error" in answer:
            raise BoincRaisedError(f"{answer['error']}: {answer['text']}")
        return answer["result"]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.begin(name, *arguments, **keywords)
            return self.answer()

        return call

    def end(self) -> int:
        """The process ends as any Python program does; its status."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(LIMIT_S)


@pytest.fixture
def start(kind: str, tmp_path: Path) -> Iterator[Callable[..., Driven]]:
    with contextlib.ExitStack() as started:

        def start_one(slot: Path = tmp_path, **keywords: Any) -> Driven:
            driven = Driven(kind, slot, **keywords)
            started.callback(driven.process.wait)
            started.callback(driven.process.kill)
            return driven

        yield start_one


@pytest.fixture
def runtime(start: Callable[..., Driven]) -> Driven:
    return start()


class FakeClient:
    """The client's end of the channels and files of a slot."""

    def __init__(self, slot: Path, client_pid: int) -> None:
        self.slot = slot
        self.write_init_data(client_pid)
        path = slot / "boinc_mmap_file"
        path.write_bytes(bytes(SEGMENT_BYTES))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), SEGMENT_BYTES)
        self.channels = Channels(self.memory)

    def write_init_data(self, client_pid: int, more: str = "") -> None:
        (self.slot / "init_data.xml").write_text(
            "<app_init_data>\n<major_version>7</major_version>\n<minor_version>20</minor_version>\n"
            "<release>5</release>\n<app_name>worker</app_name>\n<wu_name>wu</wu_name>\n"
            f"<result_name>wu_0</result_name>\n<project_dir>{self.slot}</project_dir>\n<shm_key>-1</shm_key>\n"
            f"<slot>3</slot>\n<client_pid>{client_pid}</client_pid>\n<wu_cpu_time>12.500000</wu_cpu_time>\n"
            f"<checkpoint_period>2.0</checkpoint_period>\n{more}</app_init_data>\n"
        )

    def taken(self, channel: Channel) -> None:
        """Wait until the runtime has taken a message."""
        eventually(lambda: not self.channels.is_full(channel))

    def tell(self, text: str, channel: Channel = Channel.PROCESS_CONTROL_REQUEST) -> None:
        eventually(lambda: self.channels.send(channel, text))


def eventually(condition: Callable[[], Any]) -> Any:
    """What condition gives as soon as it is true. Shared memory tells nobody that it has changed, so this looks."""
    deadline = after(LIMIT_S)
    while not (result := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
    return result


@pytest.fixture
def client(tmp_path: Path) -> Iterator[FakeClient]:
    fake = FakeClient(tmp_path, os.getpid())
    yield fake
    fake.memory.close()


class TestStandalone:
    def test_it_works_without_a_client(self, runtime: Driven, tmp_path: Path) -> None:
        runtime.init()
        assert runtime.get_status() == NOT_SUSPENDED
        assert runtime.init_data()["result_name"] == ""
        assert runtime.time_to_checkpoint() is False
        runtime.end_critical_section()
        runtime.checkpoint_completed()
        runtime.report_app_status(cpu_time=1.0, checkpoint_cpu_time=0.5, fraction_done=0.1)
        runtime.need_network()
        runtime.network_done()
        runtime.ops_cumulative(1e12, 0)
        runtime.web_graphics_url("http://127.0.0.1:1/")
        runtime.remote_desktop_addr("127.0.0.1:5900")
        runtime.upload_file("out")
        assert runtime.upload_status("out") == "NOT_READY"
        assert runtime.receive_trickle_down() is None
        runtime.finish(0, "all done", notice=True)
        runtime.close()
        runtime.close()
        assert runtime.end() == 0
        assert (tmp_path / "boinc_finish_called").read_text() == "0\nall done\nnotice\n"
        assert not (tmp_path / "boinc_lockfile").exists()

    def test_the_process_stays_as_it_was(self, kind: str, tmp_path: Path) -> None:
        """libboinc would put stderr.txt in the place of fd 2, send a SIGALRM ten times a second, and round floats."""
        program = (
            "import sys, signal, pathlib\nfrom vmwrapper.boinc.choose import open_runtime\n"
            f"runtime = open_runtime({kind!r}, pathlib.Path('.'))\nruntime.init()\n"
            "assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)\n"
            "assert signal.getsignal(signal.SIGSEGV) == signal.SIG_DFL\n"
            "assert sys.float_info.min * float('0.5') > 0\n"
            "print('still here', file=sys.stderr)\nruntime.finish(0)\nruntime.close()\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == "still here\n"
        assert not (tmp_path / "stderr.txt").exists()

    def test_the_end_takes_milliseconds(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        begin = time.monotonic()
        runtime.finish(0)
        runtime.close()
        assert runtime.end() == 0
        assert time.monotonic() - begin < 1.8  # boinc_finish alone would sleep 2 s

    def test_without_shared_memory_it_is_standalone(self, runtime: Driven, client: FakeClient) -> None:
        (client.slot / "boinc_mmap_file").unlink()
        runtime.init()
        runtime.report_app_status(cpu_time=1.0, checkpoint_cpu_time=0.5, fraction_done=0.1)
        assert runtime.get_status() == NOT_SUSPENDED
        assert runtime.init_data()["result_name"] == "wu_0"

    def test_half_written_init_data_is_an_error(self, runtime: Driven, client: FakeClient) -> None:
        path = client.slot / "init_data.xml"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(BoincRaisedError, match=r"InitDataError: init_data\.xml: has no end tag"):
            runtime.init()


class TestTheSlotsLock:
    def test_a_second_one_in_the_slot_is_refused(self, start: Callable[..., Driven]) -> None:
        start().init()
        with pytest.raises(BoincRaisedError, match="SlotLocked"):
            start(lock_wait_s=0.1).init()

    def test_a_second_one_waits_until_the_first_is_gone(self, start: Callable[..., Driven]) -> None:
        first, second, third = start(), start(lock_wait_s=LIMIT_S), start(lock_wait_s=0.1)
        first.init()
        second.begin("init")
        first.close()
        second.answer()
        with pytest.raises(BoincRaisedError, match="SlotLocked"):
            third.init()

    def test_a_killed_one_holds_nothing(self, start: Callable[..., Driven]) -> None:
        first = start()
        first.init()
        first.process.kill()
        first.process.wait()
        start().init()


class TestTheClientsMessages:
    def test_suspend_resume_quit_abort(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        assert runtime.get_status() == NOT_SUSPENDED
        client.tell("<suspend/>")
        eventually(lambda: runtime.get_status()["suspended"])
        client.tell("<resume/>")
        eventually(lambda: not runtime.get_status()["suspended"])
        client.tell("<quit/>")
        eventually(lambda: runtime.get_status()["quit_request"])
        client.tell("<abort/>")
        eventually(lambda: runtime.get_status()["abort_request"])
        assert runtime.get_status() == {**NOT_SUSPENDED, "quit_request": True, "abort_request": True}

    def test_a_critical_section_hides_no_message(self, runtime: Driven, client: FakeClient) -> None:
        """A wrapper must see quit while it takes a snapshot."""
        runtime.init()
        eventually(runtime.time_to_checkpoint)
        client.tell("<quit/>")
        eventually(lambda: runtime.get_status()["quit_request"])

    def test_preferences_are_read_again_when_told(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        data = runtime.init_data()
        assert (data["result_name"], data["slot"], data["client_pid"]) == ("wu_0", 3, os.getpid())
        assert (data["wu_cpu_time"], data["checkpoint_period"], data["ncpus"]) == (12.5, 2.0, 1.0)
        limit = "<global_preferences>\n<cpu_usage_limit>35.0</cpu_usage_limit>\n</global_preferences>\n"
        client.write_init_data(os.getpid(), limit + "<ncpus>4.0</ncpus>\n")
        client.tell("<reread_app_info/>")
        eventually(lambda: runtime.get_status()["reread_init_data_file"])
        assert runtime.get_status()["reread_init_data_file"] is False
        data = runtime.reread_init_data()
        assert (data["cpu_usage_limit"], data["ncpus"]) == (35.0, 4.0)
        (client.slot / "init_data.xml").write_text("<app_init_data>\n<ncpus>9")
        assert runtime.reread_init_data()["ncpus"] == 4.0

    def test_the_network_may_be_suspended(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        client.tell("<heartbeat/><wss>1e6</wss><network_suspended>1</network_suspended>", Channel.HEARTBEAT)
        eventually(lambda: runtime.get_status()["network_suspended"])
        eventually(lambda: runtime.get_status() and client.channels.send(Channel.HEARTBEAT, "<heartbeat/>"))
        eventually(lambda: not runtime.get_status()["network_suspended"])


KINDS = ("library", "python") if have_library() else ("python",)


def seconds_until_the_client_is_lost(folder: Path, client_pid: int) -> list[float]:
    """Of all runtimes side by side, because they wait so long."""
    begin, found = time.monotonic(), []
    with contextlib.ExitStack() as started:
        runtimes = []
        for kind in KINDS:
            slot = folder / kind
            slot.mkdir()
            FakeClient(slot, client_pid).memory.close()
            runtimes.append(Driven(kind, slot))
            started.callback(runtimes[-1].process.wait)
            started.callback(runtimes[-1].process.kill)
            runtimes[-1].init()
        while runtimes and time.monotonic() - begin < 50:
            time.sleep(0.05)  # a wrapper polls like this too
            for runtime in list(runtimes):
                if runtime.get_status()["no_heartbeat"]:
                    found.append(time.monotonic() - begin)
                    runtimes.remove(runtime)
    assert not runtimes, "not noticed"
    return found


@pytest.mark.slow
def test_a_dead_client_is_noticed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for seconds in seconds_until_the_client_is_lost(tmp_path, dead.pid):
        assert 5 < seconds < 20  # it looks every 10 s


@pytest.mark.optin
def test_a_client_that_told_no_pid_is_given_up_after_30_s(tmp_path: Path) -> None:
    for seconds in seconds_until_the_client_is_lost(tmp_path, 0):
        assert 28 < seconds < 36


class TestMessagesToTheClient:
    def test_status(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        runtime.report_app_status(cpu_time=100.5, checkpoint_cpu_time=90.0, fraction_done=0.25, other_pid=4711)
        text = client.channels.receive(Channel.APP_STATUS) or ""
        assert number(text, "current_cpu_time") == 100.5
        assert number(text, "checkpoint_cpu_time") == 90.0
        assert number(text, "fraction_done") == 0.25
        assert number(text, "other_pid") == 4711
        assert "want_network" not in text
        assert "wss" not in text

    def test_what_the_library_drops_is_sent_all_the_same(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        runtime.need_network()
        runtime.ops_cumulative(2e12, 0)
        runtime.report_app_status(cpu_time=1, checkpoint_cpu_time=0, fraction_done=0.5, working_set_bytes=3e6)
        text = client.channels.receive(Channel.APP_STATUS) or ""
        assert number(text, "want_network") == 1
        assert number(text, "fpops_cumulative") == 2e12
        assert number(text, "wss") == 3e6
        runtime.network_done()
        runtime.report_app_status(cpu_time=1, checkpoint_cpu_time=0, fraction_done=0.5)
        assert "want_network" not in (client.channels.receive(Channel.APP_STATUS) or "")

    def test_an_unread_status_is_not_overwritten_except_by_the_last(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        for step in (1, 2):
            runtime.report_app_status(cpu_time=step, checkpoint_cpu_time=0, fraction_done=step / 10)
        assert number(client.channels.text(Channel.APP_STATUS), "current_cpu_time") == 1
        runtime.finish(0)
        assert number(client.channels.receive(Channel.APP_STATUS) or "", "current_cpu_time") == 2

    def test_it_says_nothing_by_itself(self, runtime: Driven, client: FakeClient) -> None:
        """send_status_msgs is off: what the client sees of CPU time and progress is what a wrapper reports."""
        runtime.init()
        client.tell("<suspend/>")
        eventually(lambda: runtime.get_status()["suspended"])
        assert not client.channels.is_full(Channel.APP_STATUS)

    def test_checkpoints_come_by_the_preferred_period(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        assert runtime.time_to_checkpoint() is False
        eventually(runtime.time_to_checkpoint)
        runtime.checkpoint_completed()
        assert runtime.time_to_checkpoint() is False

    def test_graphics(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        runtime.web_graphics_url("http://127.0.0.1:81/")
        runtime.remote_desktop_addr("127.0.0.1:5901")
        texts = []
        for _ in range(2):
            eventually(lambda: runtime.get_status() and client.channels.is_full(Channel.GRAPHICS_REPLY))
            texts.append(client.channels.receive(Channel.GRAPHICS_REPLY))
        assert texts == [
            "<web_graphics_url>http://127.0.0.1:81/</web_graphics_url>",
            "<remote_desktop_addr>127.0.0.1:5901</remote_desktop_addr>",
        ]

    def test_trickles_up_are_sent_one_after_the_other(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        runtime.send_trickle_up("progress", "<steps>1</steps>\n")
        runtime.send_trickle_up("progress", "<steps>2</steps>\n")
        for step in (1, 2):
            eventually(lambda: runtime.get_status() and client.channels.is_full(Channel.TRICKLE_UP))
            assert "<have_new_trickle_up/>" in (client.channels.receive(Channel.TRICKLE_UP) or "")
            file = client.slot / "trickle_up.xml"
            assert file.read_text() == f"<variety>progress</variety>\n<steps>{step}</steps>\n"
            file.unlink()

    def test_a_trickle_right_before_the_end_is_not_lost(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        runtime.send_trickle_up("last", "")
        runtime.finish(0)
        runtime.close()
        assert runtime.end() == 0
        assert "<have_new_trickle_up/>" in (client.channels.receive(Channel.TRICKLE_UP) or "")
        assert (client.slot / "trickle_up.xml").read_text() == "<variety>last</variety>\n"

    def test_trickles_down_are_named_once_each(self, runtime: Driven, client: FakeClient) -> None:
        (client.slot / "trickle_down_1").write_text("old")
        runtime.init()
        assert runtime.receive_trickle_down() == "trickle_down_1"
        assert runtime.receive_trickle_down() is None
        (client.slot / "trickle_down_1").unlink()
        (client.slot / "trickle_down_2").write_text("new")
        client.tell("<have_trickle_down/>\n", Channel.TRICKLE_DOWN)
        assert eventually(runtime.receive_trickle_down) == "trickle_down_2"
        assert runtime.receive_trickle_down() is None

    def test_intermediate_uploads(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        runtime.upload_file("out")
        runtime.upload_file("bad")
        eventually(lambda: runtime.get_status() and client.channels.is_full(Channel.TRICKLE_UP))
        assert "<have_new_upload_file/>" in (client.channels.receive(Channel.TRICKLE_UP) or "")
        assert (client.slot / "boinc_ufr_out").exists()
        assert runtime.upload_status("out") == "NOT_READY"
        (client.slot / "boinc_ufs_out").write_text("<status>1</status>\n")
        (client.slot / "boinc_ufs_bad").write_text("<status>-224</status>\n")
        client.tell("<upload_file_status/>\n", Channel.TRICKLE_DOWN)
        eventually(lambda: runtime.get_status() and not client.channels.is_full(Channel.TRICKLE_DOWN))
        assert (runtime.upload_status("out"), runtime.upload_status("bad")) == ("DONE", "FAILED")
        with pytest.raises(BoincRaisedError, match="boinc_upload_file"):
            runtime.upload_file("../out")

    def test_a_temporary_exit(self, runtime: Driven, client: FakeClient) -> None:
        runtime.init()
        with pytest.raises(BoincRaisedError, match="boinc_temporary_exit: needs a reason"):
            runtime.temporary_exit(60, "  ")
        runtime.temporary_exit(10**6, "No room\non the disk " + "x" * 300, notice=True)
        lines = (client.slot / "boinc_temporary_exit").read_text().splitlines()
        assert lines[0] == "86400"
        assert lines[1].startswith("No room on the disk xxx")
        assert len(lines[1]) < 255
        assert lines[2:] == ["notice"]


RESOLVE = """
import ctypes, sys
from vmwrapper.boinc.library import load_libraries
boinc, _, _ = load_libraries()
for name in sys.argv[1:]:
    buffer = ctypes.create_string_buffer(4096)
    assert boinc.boinc_resolve_filename(name.encode(), buffer, 4096) == 0
    print(buffer.value.decode())
"""


def test_links_are_read_as_boinc_reads_them(tmp_path: Path) -> None:
    """The wrapper resolves names itself (vmwrapper.context.logical_names), by either runtime."""
    (tmp_path / "a file").write_text("content")
    (tmp_path / "linked").write_text("<soft_link>../../projects/a b/x&amp;y_1</soft_link>\n")
    (tmp_path / "second line").write_text("text\n<soft_link>../x</soft_link>\n")
    (tmp_path / "blanks").write_text("  <soft_link> ../x </soft_link> more")
    (tmp_path / "symlinked").symlink_to("linked")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"\xff\0" * 1000)
    names = ["linked", "./linked", "a file", "second line", "blanks", "symlinked", "dangling", "missing", "empty",
             "binary", "/etc/hosts"]  # fmt: skip
    root = str(Path(__file__).parents[4])
    told = subprocess.run(
        [sys.executable, "-c", RESOLVE, *names],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    ours = LogicalNames(Slot(tmp_path))
    assert [str(ours.resolve(name)) for name in names] == told
    assert told[:2] == ["../../projects/a b/x&y_1"] * 2


def number(text: str, name: str) -> float:
    begin, end = f"<{name}>", f"</{name}>"
    assert text.count(begin) == 1, text
    return float(text.partition(begin)[2].partition(end)[0])
