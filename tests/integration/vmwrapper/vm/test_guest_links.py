"""A file that came out of a guest is no link: nothing is written to where it leads, and nothing read from there.

The whole wrapper; HostMain, and with it the hostile guest, is scripted (fake_hostmain.py).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.slots import DRIVER, HOST_MAIN_TASK, PlayedClient, TestSlot
from vmwrapper.boinc.library import LibraryMissing, load_libraries

RESULT = "wu_7_1"


class World:
    """A slot with a link of each form into a project's folder, and a file of the volunteer's."""

    def __init__(self, root: Path) -> None:
        self.slot = TestSlot(root / "slots" / "0")
        self.project, self.victim = root / "projects" / "p", root / "victim"
        for folder in (self.slot.folder, self.project):
            folder.mkdir(parents=True)
        self.victim.write_text("secret")
        self.victim.chmod(0o600)
        self.slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
        self.slot.write("guest.vdi", "an image")
        (self.project / "in_5").write_text("input")
        self.slot.write("in", "<soft_link>../../projects/p/in_5</soft_link>\n")
        self.slot.write("out", f"<soft_link>../../projects/p/{RESULT}_0</soft_link>\n")
        (self.slot.folder / "sym").symlink_to(f"../../projects/p/{RESULT}_1")

    @property
    def attack(self) -> str:
        """What the guest's output says, as an argument of its program in job.xml."""
        return f"&lt;soft_link&gt;{self.victim}&lt;/soft_link&gt;"

    @property
    def text(self) -> str:
        return f"<soft_link>{self.victim}</soft_link>\n"

    def job(self, *tasks: str) -> None:
        self.slot.job(HOST_MAIN_TASK, *tasks)

    def vm(self) -> dict[str, Any]:
        vms: dict[str, dict[str, Any]] = json.loads(self.slot.text("fake_world.json"))
        return next(iter(vms.values()), {})

    def assert_safe(self) -> None:
        assert self.victim.read_text() == "secret"
        assert {path.name for path in self.victim.parent.iterdir()} == {"slots", "projects", "victim"}
        for path in self.project.iterdir():
            assert path.name == "in_5" or path.name.startswith(RESULT), path


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.slot.clean()
    world.assert_safe()


def guest(line: str, more: str = "") -> str:
    return (
        "<task><virtualmachine>one</virtualmachine><image>guest.vdi</image><application>worker</application>"
        f"<command_line>{line}</command_line>{more}</task>"
    )


def out(*names: str) -> str:
    return "".join(f"<copy_file_from_VM>{name}</copy_file_from_VM>" for name in names)


def into(*names: str) -> str:
    return "".join(f"<copy_file_to_VM>{name}</copy_file_to_VM>" for name in names)


def host(program: str, line: str = "", more: str = "") -> str:
    return f"<task><application>{program}</application><command_line>{line}</command_line>{more}</task>"


def library_is_there() -> bool:
    try:
        load_libraries()
    except LibraryMissing:
        return False
    return True


@pytest.mark.parametrize("runtime", ["python", "library"])
def test_out_and_in_again_by_each_runtime(world: World, runtime: str) -> None:
    if runtime == "library" and not library_is_there():
        pytest.skip("libboinc_api is not installed")
    world.job(
        guest(
            f"append=fresh:{world.attack} append=out:{world.attack} append=sym:{world.attack}",
            out("fresh", "out", "sym"),
        ),
        guest(
            "make=fresh make=out make=sym",
            into("in", "fresh") + out("out", "sym") + "<stdout_filename>fresh</stdout_filename>",
        ),
        guest("sleep=60", into("fresh", "out", "sym", "in")),
    )
    process = world.slot.start(VMWRAPPER_BOINC_RUNTIME=runtime)
    world.slot.wait_for("fake_runs.txt", "_2_")
    process.send_signal(signal.SIGKILL)
    process.wait()
    files = world.vm()["files"]
    assert files["in"] == "input"
    assert "secret" not in json.dumps(files)
    assert world.slot.text("fresh").startswith("stdout of"), "written where it is, over what looked like a link"
    for number, name in enumerate(("out", "sym")):
        assert (world.project / f"{RESULT}_{number}").read_text().startswith("made by"), "the client's links count"
        assert files[name].startswith("made by")
    assert world.slot.text("out").endswith(f"{RESULT}_0</soft_link>\n")
    assert (world.slot.folder / "sym").is_symlink()


def test_an_agent_that_says_missing_once(world: World) -> None:
    """One task: its stdout is copied out, its stderr is missing, the command unknown; so all is done again."""
    world.slot.plan(agent_dies=["getFile", 2])  # the stdout of the scripted guest is its arguments: the attack
    streams = "<stdout_filename>log</stdout_filename><stderr_filename>err</stderr_filename>"
    world.job(guest(f"append=more:{world.attack}", streams))
    assert world.slot.run() == 0
    assert world.slot.plan_is_used_up()
    assert world.slot.text("fake_runs.txt").count("_0_") == 2
    assert str(world.victim) in world.slot.text("log")


@pytest.mark.parametrize("point", [["getFile", 1, "after"], ["runCommand", 2, "before"], ["putFile", 2, "before"]])
def test_what_was_linked_survives_a_kill(world: World, point: list[Any]) -> None:
    world.slot.plan(kill=point)
    world.job(
        guest(f"append=out:{world.attack} append=fresh:{world.attack}", out("fresh", "out")),
        guest("make=out", into("in", "fresh") + out("out", "fresh")),
    )
    assert world.slot.run_to_the_end() == 0
    assert world.slot.plan_is_used_up()
    assert (world.project / f"{RESULT}_0").read_text().startswith("made by")
    assert world.slot.text("fresh") == world.text


def test_programs_of_the_host_after_a_guest(world: World) -> None:
    """Streams, words and macros of a host task: what came out of the guest stands for itself."""
    world.slot.write("show", '#!/bin/sh\necho "$@"; cat\n', executable=True)
    world.slot.write("append", "#!/bin/sh\necho appended\n", executable=True)
    world.job(
        guest(f"append=fresh:{world.attack} append=err:{world.attack}", out("fresh", "err")),
        host("show", "./fresh boinc_resolve(fresh) ./in boinc_resolve(out)",
             "<stdin_filename>fresh</stdin_filename><stdout_filename>shown</stdout_filename>"),
        host("append", "", "<stdout_filename>fresh</stdout_filename><stderr_filename>err</stderr_filename>"),
        host("append", "", "<stdout_filename>sym</stdout_filename>"),
    )  # fmt: skip
    assert world.slot.run() == 0
    words, said = world.slot.text("shown").splitlines()
    assert words == f"./fresh fresh ../../projects/p/in_5 ../../projects/p/{RESULT}_0"
    assert said == world.text.strip()
    assert world.slot.text("fresh") == world.text + "appended\n"
    assert (world.project / f"{RESULT}_1").read_text() == "appended\n"


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (guest("make=folder/x", out("folder/x")), 195, "folder/x cannot be written: it is a link"),
        (guest("make=x", out("x")), 0, ""),
        (guest("sleep=0", into("x")), 206, "<copy_file_to_VM>: x is a link"),
        (host("true", "", "<stdout_filename>x</stdout_filename>"), 195, "x cannot be opened: is a link"),
        (host("true", "", "<stdout_filename>folder/new</stdout_filename>"), 195, "is a link"),
        (host("cat", "", "<stdin_filename>x</stdin_filename>"), 195, "stdin file x cannot be opened: is a link"),
    ],
)
def test_links_that_a_program_made_after_a_guest(world: World, more: str, status: int, words: str) -> None:
    """As one does that unpacks an archive out of the guest."""
    world.slot.write("unpack", "#!/bin/sh\nln -s ../../victim x; ln -s ../.. folder\n", executable=True)
    world.job(guest("make=a", out("a")), host("unpack"), more)
    assert world.slot.run() == status, world.slot.text("stderr.txt")
    assert words in world.slot.text("stderr.txt")
    if not status:
        assert world.slot.text("x").startswith("made by"), "the link itself was replaced"


def test_links_that_a_program_made_before_the_first_guest_are_links(world: World) -> None:
    world.slot.write("prepare", "#!/bin/sh\nln -s ../../projects/p/in_5 x\n", executable=True)
    world.job(host("prepare"), guest("copy=x:y", into("x") + out("y")))
    assert world.slot.run() == 0
    assert world.slot.text("y") == "input"


def test_a_file_of_an_archive_is_no_link(world: World) -> None:
    """Neither for programs of the host: an archive is no word of the client's."""
    import zipfile

    with zipfile.ZipFile(world.slot.folder / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("packed", world.text + "data " * 100)
    world.slot.job(
        host("echo", "said", "<stdout_filename>packed</stdout_filename>"),
        "<unzip_input><zipfilename>in.zip</zipfilename></unzip_input>",
    )
    assert world.slot.run() == 0
    assert world.slot.text("packed") == world.text + "data " * 100 + "said\n"


def paused_after_a_guest(world: World) -> None:
    """A guest has run, and the second one was killed with its wrapper."""
    world.job(guest(f"append=fresh:{world.attack}", out("fresh")), guest("make=out", into("in") + out("out", "fresh")))
    world.slot.plan(kill=["runCommand", 2, "before"])
    assert world.slot.run() == -signal.SIGKILL
    for path in world.slot.folder.glob("vmwrapper_links*"):
        path.unlink()


def test_a_list_that_was_lost_and_links_that_may_be_the_guests(world: World) -> None:
    PlayedClient(world.slot, result=RESULT, more=f"<project_dir>{world.project}</project_dir>")
    paused_after_a_guest(world)
    assert world.slot.run() == 206
    said = world.slot.text("boinc_finish_called")
    assert "vmwrapper_links.json is missing" in said
    assert f"fresh leads to {world.victim}" in said
    world.slot.write("fresh", "no link")
    world.slot.write("out", "<soft_link>../../projects/p/in_5</soft_link>")
    assert world.slot.run() == 206, "in the project's folder, and no file of this result"
    world.slot.write("out", f"<soft_link>../../projects/p/{RESULT}_0</soft_link>")
    assert world.slot.run() == 0
    assert (world.project / f"{RESULT}_0").read_text().startswith("made by")
    assert (world.project / "in_5").read_text() == "input"


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 10**6, b'{"version": 2}'])
def test_a_damaged_list(world: World, damage: bytes) -> None:
    paused_after_a_guest(world)
    (world.slot.folder / "vmwrapper_links.json").write_bytes(damage)
    assert world.slot.run() == 206
    assert "vmwrapper_links.json is damaged" in world.slot.text("stderr.txt")


def test_an_early_upload_and_a_trigger_file(world: World) -> None:
    client = PlayedClient(world.slot, result=RESULT)
    (world.slot.folder / "late").symlink_to("nowhere")
    world.job(
        guest(
            f"sleep=600 early=part:{world.attack} early=news:&lt;/msg_from_host&gt; early=big:@300000",
            "<trickle_trigger_file>news</trickle_trigger_file><trickle_trigger_file>big</trickle_trigger_file>",
        ),
        "<intermediate_upload_file>part</intermediate_upload_file>",
    )
    world.slot.write("part", world.text)  # as if it had come before
    process = world.slot.start()
    world.slot.wait_for("trickle_up.xml", "<variety>news</variety>\n&lt;/msg_from_host&gt;", 20)
    world.slot.wait_for("boinc_ufr_part", limit_s=30)
    assert world.slot.text("part").strip() == world.text.strip()
    world.slot.wait_for("fake_world.json", '"big": ""')  # not sent, and emptied so that the program may go on
    client.say("<abort/>")
    assert process.wait(10) == 194


def test_no_file_of_ours_is_writable_for_others_whatever_the_umask(world: World) -> None:
    world.slot.write("umask.sh", "#!/bin/sh\numask; touch theirs\n", executable=True)
    world.job(
        guest("make=a", out("a", "folder/b") + "<stdout_filename>log</stdout_filename>").replace(
            "make=a", "make=a make=folder/b"
        ),
        host("umask.sh", "", "<stdout_filename>shown</stdout_filename>"),
    )
    before = {path.name for path in world.slot.folder.iterdir()}
    program = ["sh", "-c", 'umask 000; exec "$@"', "sh", sys.executable, str(DRIVER)]
    assert world.slot.run(program=program) == 0
    fakes = {"fake_world.json", "fake_calls.txt", "fake_runs.txt", "theirs"}
    made = [path for path in world.slot.folder.rglob("*") if path.name not in before | fakes]
    assert len(made) > 5
    assert [path for path in made if path.lstat().st_mode & 0o022] == []
    assert world.slot.text("shown").strip() in {"0", "00", "000", "0000"}, "programs have the client's umask"


@pytest.mark.parametrize("name", ["HostConfig.cfg", "./HostConfig.cfg", "mine.xml"])
def test_nothing_of_a_guest_is_written_over_what_runs_the_job(world: World, name: str) -> None:
    world.job(guest(f"make={name}", out(name)))
    (world.slot.folder / "job.xml").rename(world.slot.folder / "mine.xml")
    assert world.slot.run("mine.xml") == 206
    assert "by which this job is run" in world.slot.text("stderr.txt")


def test_a_damaged_checkpoint_without_a_list_trusts_no_link(world: World) -> None:
    paused_after_a_guest(world)
    for path in world.slot.folder.glob("vmwrapper_checkpoint*"):
        path.write_bytes(b"damaged")
    assert world.slot.run() == 206
    assert "not followed" in world.slot.text("stderr.txt")


def test_links_of_our_own_names_are_not_written_through(world: World) -> None:
    """An archive that a program of the job has unpacked may hold any name."""
    client = PlayedClient(world.slot, result=RESULT)
    names = ["boinc_ufr_part", "trickle_up.xml", "vmwrapper_reserve", ".graphics_status.xml", "graphics_status.xml",
             "vmwrapper_messages.json", "boinc_finish_called", "boinc_temporary_exit", "stderr_HostMain"]  # fmt: skip
    script = "".join(f"ln -sf ../../victim {name}\n" for name in names)
    world.slot.write("unpack", f"#!/bin/sh\n{script}", executable=True)
    world.job(
        guest("make=part", out("part")),
        host("unpack"),
        guest("sleep=3 early=news:text", "<trickle_trigger_file>news</trickle_trigger_file>"),
        "<intermediate_upload_file>part</intermediate_upload_file><enable_graphics_support>1</enable_graphics_support>",
    )
    process = world.slot.start()
    world.slot.wait_for("trickle_up.xml", "text", 20)
    world.slot.wait_for("boinc_finish_called", "0\n", 30)
    assert process.wait(10) == 0
    del client


def test_traces_of_a_guest_and_no_list(world: World) -> None:
    """As an older version leaves them: the checkpoint may have gone back to before that guest."""
    world.job(host("true"), guest("make=out", into("in") + out("out")))
    world.slot.write("guest_console.log", "")
    assert world.slot.run() == 206
    assert "vmwrapper_links.json is missing" in world.slot.text("stderr.txt")
    (world.slot.folder / "guest_console.log").unlink()
    (world.slot.folder / "vm").mkdir()
    (world.slot.folder / "vm" / ".hostmain.lock").touch()
    assert world.slot.run() == 0, "HostMain was there, and no guest"
