"""Logical names: followed as they lie there until a guest runs, and by the list that was made then ever after."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common.jsonfile import Damaged
from vmwrapper.context import logical_names
from vmwrapper.context.logical_names import LinkRefused, LogicalNames, guest_has_left_traces
from vmwrapper.errors import BadInput
from vmwrapper.job import filenames, parse
from vmwrapper.job.model import Job
from vmwrapper.slot import Slot
from vmwrapper.state import links
from vmwrapper.state.links import Kind, Link, SlotLinks, from_bytes, to_bytes

RESULT = "wu_7_1"


class World:
    """A slot with links of both forms into a project's folder, and a file that is nobody's business."""

    def __init__(self, root: Path) -> None:
        self.slot = Slot(root / "slots" / "0")
        self.project = root / "projects" / "p"
        self.victim = root / "victim"
        for folder in (self.slot.folder, self.project):
            folder.mkdir(parents=True)
        self.victim.write_text("secret")
        for name in ("in_5", f"{RESULT}_0", f"{RESULT}_1", "program_3"):
            (self.project / name).write_text(name)
        self.soft("in", "../../projects/p/in_5")
        self.soft("out", f"../../projects/p/{RESULT}_0")
        (self.slot.folder / "sym").symlink_to(f"../../projects/p/{RESULT}_1")
        (self.slot.folder / "inner").mkdir()
        self.soft("inner/out", f"../../projects/p/{RESULT}_0")

    def soft(self, name: str, target: str) -> None:
        (self.slot.folder / name).unlink(missing_ok=True)
        (self.slot.folder / name).write_text(f"<soft_link>{target}</soft_link>\n")

    def names(self) -> LogicalNames:
        """Of the next start."""
        found = LogicalNames(self.slot)
        assert found.load() == []
        return found

    def established(self) -> LogicalNames:
        self.names().establish(["in", "out"])
        found = self.names()
        assert found.established
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- before and after


def test_until_a_guest_runs_links_are_followed_as_they_lie_there(world: World) -> None:
    names = world.names()
    assert names.source("in").read_text() == "in_5"
    assert names.target("out") == world.project / f"{RESULT}_0"
    assert names.target("sym") == world.project / f"{RESULT}_1"
    world.soft("made by a program", "../../projects/p/in_5")
    assert names.resolve("made by a program") == Path("../../projects/p/in_5")
    assert names.base is None


def test_what_was_linked_stays_linked_whatever_lies_there_later(world: World) -> None:
    names = world.established()
    for name in ("in", "out", "sym", "inner/out"):
        (world.slot.folder / name).unlink()
        world.soft(name, str(world.victim))
    for found in (names, world.names()):
        assert found.source("in") == world.project / "in_5"
        assert found.resolve("./in") == Path("../../projects/p/in_5")
        assert found.target("out") == world.project / f"{RESULT}_0"
        assert found.target("sym") == world.project / f"{RESULT}_1"
        assert found.appended("inner/out") == world.project / f"{RESULT}_0"
        assert found.link_text("sym") == f"../../projects/p/{RESULT}_1"
    assert links.from_bytes((world.slot.folder / "vmwrapper_links.json").read_bytes()).established
    assert (world.slot.folder / "vmwrapper_links.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_that_came_later_is_no_link_in_any_way_of_using_it(world: World, absolute: bool) -> None:
    names = world.established()
    world.soft("fresh", str(world.victim) if absolute else "../../victim")
    itself = world.slot.folder / "fresh"
    assert names.resolve("fresh") == Path("fresh")
    assert names.resolve("./fresh") == Path("./fresh")
    assert names.link_text("fresh") == ""
    assert [place("fresh") for place in (names.source, names.target, names.appended)] == [itself] * 3
    assert world.victim not in names.outside_targets()


def test_a_symbolic_link_that_came_later_leads_nowhere_outside(world: World) -> None:
    names = world.established()
    folder = world.slot.folder
    (folder / "fresh").symlink_to("../../victim")
    (folder / "folder").symlink_to("../..")
    (folder / "chain").symlink_to("fresh")
    for name in ("fresh", "folder/victim", "chain", "inner/../fresh"):
        with pytest.raises(LinkRefused, match="before the first guest task"):
            names.source(name)
    for name in ("folder/victim", "folder/new"):
        with pytest.raises(LinkRefused):
            names.target(name)
        with pytest.raises(LinkRefused):
            names.appended(name)
    assert names.target("fresh") == folder / "fresh", "it is replaced itself"


def test_a_later_link_may_lead_to_another_file_of_the_slot_and_to_none_of_ours(world: World) -> None:
    """A program of the job, not a guest, has made it."""
    names = world.established()
    folder = world.slot.folder
    (folder / "data").write_text("data")
    (folder / "newest").symlink_to("data")
    assert names.source("newest") == folder / "data"
    for ours in ("init_data.xml", "vmwrapper_secret", "vm/one/overlay.qcow2", "."):
        (folder / "sly").unlink(missing_ok=True)
        (folder / "sly").symlink_to(ours)
        with pytest.raises(LinkRefused):
            names.source("sly")


@pytest.mark.parametrize(
    "name",
    ["trap/.", "./trap", "inner/../trap", "root", "root/VICTIM", "self/trap", "self/self/root/VICTIM",
     "inner/up/VICTIM", "proc/VICTIM", "..//0/trap", "self/vmwrapper_links.json", "\ud800", "x" * 5000, "\0", "/"],
)  # fmt: skip
def test_no_name_leads_to_the_victim(world: World, name: str) -> None:
    names, folder = world.established(), world.slot.folder
    world.soft("trap", str(world.victim))
    (folder / "root").symlink_to("/")
    (folder / "proc").symlink_to("/proc/self/root")
    (folder / "self").symlink_to(".")
    (folder / "inner" / "up").symlink_to("../root")
    for place in (names.source, names.target, names.appended):
        try:
            found = place(name.replace("/VICTIM", str(world.victim)))
        except LinkRefused:
            continue
        assert "victim" not in str(found)
        assert found.name != "vmwrapper_links.json" or place == names.source


def test_links_that_go_round_end(world: World) -> None:
    (world.slot.folder / "a").symlink_to("b")
    (world.slot.folder / "b").symlink_to("a")
    names = world.established()
    for place in (names.source, names.target, names.appended):
        with pytest.raises(LinkRefused, match="too many"):
            place("a")


def test_a_second_name_of_a_file_outside_is_not_used(world: World) -> None:
    folder = world.slot.folder
    os.link(world.victim, folder / "there before")
    names = world.established()
    assert names.source("there before").read_text() == "secret"
    other = world.victim.with_name("other")
    other.write_text("other")
    os.link(other, folder / "later")
    for place in (names.source, names.appended):
        with pytest.raises(LinkRefused, match="another name outside"):
            place("later")
    assert names.target("later") == folder / "later", "it is replaced, not written"
    (folder / "one").write_text("1")
    os.link(folder / "one", folder / "inner" / "two")
    assert names.source("one").read_text() == "1", "both names are in the slot"


@pytest.mark.parametrize(
    "name",
    ["vmwrapper_links.json", "./vmwrapper_links.previous.json", "VMWRAPPER_LINKS.JSON", "inner/../vmwrapper_secret",
     "vmwrapper_messages.json", ".vmwrapper_links.json.x", "boinc_ufs_out", "vm/one/disk", "init_data.xml", "."],
)  # fmt: skip
def test_our_own_files_are_written_under_no_name(world: World, name: str) -> None:
    names = world.established()
    for place in (names.target, names.appended):
        with pytest.raises(LinkRefused, match="uses itself"):
            place(name)


def test_a_list_is_made_once(world: World) -> None:
    names = world.established()
    before = (world.slot.folder / "vmwrapper_links.json").read_bytes()
    world.soft("fresh", "../../victim")
    names.establish(["fresh"])
    world.names().establish(["fresh"])
    assert (world.slot.folder / "vmwrapper_links.json").read_bytes() == before


def test_a_file_out_of_an_archive_is_no_link_before_a_guest_runs_either(world: World) -> None:
    names = world.names()
    names.note_unpacked("packed")
    world.soft("packed", "../../victim")
    for found in (names, world.names()):
        assert found.resolve("packed") == Path("packed")
        assert found.link_text("packed") == ""
    world.names().establish(["packed"])
    assert world.names().resolve("packed") == Path("packed")


def test_a_large_slot_is_looked_at_in_part_and_what_the_job_names_in_any_case(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "ENTRIES_LIMIT", 3)
    for number in range(10):
        (world.slot.folder / f"a{number}").touch()
    world.names().establish(["./inner/out", "out", "/etc/passwd", "../x", "\0"])
    names = world.names()
    world.soft("inner/out", "/elsewhere")
    assert names.target("inner/out") == world.project / f"{RESULT}_0"
    assert names.target("out") == world.project / f"{RESULT}_0"
    assert names.target("sym") == world.slot.folder / "sym", "not known"


def test_names_outside_of_the_slot_are_the_volunteers(world: World) -> None:
    world.soft("out", f"../../projects/p/{RESULT}_0")
    names = world.established()
    (world.project / "aside").symlink_to(world.victim)
    assert names.source("../../projects/p/aside") == world.victim
    assert names.source(str(world.victim)) == world.victim
    (world.project / f"{RESULT}_0").write_text("<soft_link>../../victim</soft_link>")
    assert names.resolve(f"../../projects/p/{RESULT}_0") == Path(f"../../projects/p/{RESULT}_0")


# --- the file


def test_the_older_generation_counts_when_the_newer_is_damaged(world: World) -> None:
    names = world.names()
    names.note_unpacked("one")
    names.establish([])
    (world.slot.folder / "vmwrapper_links.json").write_text("{}")
    found = LogicalNames(world.slot)
    assert "damaged" in found.load()[0]
    assert not found.established
    assert not found.was_lost
    assert found.resolve("one") == Path("one")
    (world.slot.folder / "vmwrapper_links.previous.json").unlink()
    found = LogicalNames(world.slot)
    found.load()
    assert found.was_lost


LINKS = st.builds(
    Link,
    st.sampled_from(["a", "b", "c/d", "ü \udcff"]),
    st.just(Kind.SOFT_LINK.value),
    st.text(st.characters(exclude_characters="\0"), min_size=1),
    st.integers(0, 2**64),
    st.integers(0, 2**64),
)


@given(st.booleans(), st.lists(LINKS, unique_by=lambda link: link.name), st.just(("x",)))
def test_what_was_written_is_read(established: bool, found: list[Link], unpacked: tuple[str, ...]) -> None:
    known = SlotLinks(established, tuple(found), unpacked)
    assert from_bytes(to_bytes(known)) == known


GOOD = to_bytes(SlotLinks(True, (Link("a", Kind.SOFT_LINK, "../x", 1, 2),), ("b",)))


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_damaged_byte_is_seen(place: int, change: int) -> None:
    damaged = bytearray(GOOD)
    damaged[place] ^= change
    try:
        found = from_bytes(bytes(damaged))
    except Damaged:
        return
    assert found == from_bytes(GOOD), "white space only"


def remade(content: object) -> bytes:
    """With a right checksum: what is in it has to be seen to be wrong."""
    return json.dumps({"version": 1, "sha256": links._digest(content), "content": content}).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"established": JSON, "links": JSON, "unpacked": JSON}) | JSON)
def test_wrong_types_are_damage(content: object) -> None:
    try:
        found = from_bytes(remade(content))
    except Damaged:
        return
    assert isinstance(found.established, bool)
    assert all(isinstance(name, str) for name in found.unpacked)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_damage(content: bytes) -> None:
    with pytest.raises(Damaged):
        from_bytes(content)


@pytest.mark.parametrize(
    "link",
    [
        {"name": "../up", "kind": "soft link", "target": "x", "device": 1, "inode": 1},
        {"name": "/abs", "kind": "soft link", "target": "x", "device": 1, "inode": 1},
        {"name": "a/./b", "kind": "soft link", "target": "x", "device": 1, "inode": 1},
        {"name": "", "kind": "soft link", "target": "x", "device": 1, "inode": 1},
        {"name": "a", "kind": "hard", "target": "x", "device": 1, "inode": 1},
        {"name": "a", "kind": "soft link", "target": "", "device": 1, "inode": 1},
        {"name": "a", "kind": "soft link", "target": "x\0y", "device": 1, "inode": 1},
        {"name": "a", "kind": "soft link", "target": 1, "device": 1, "inode": 1},
        {"name": "a", "kind": "soft link", "target": "x", "device": True, "inode": 1},
        {"name": "a", "kind": "soft link", "target": "x", "device": 1},
        {"name": "a", "kind": "soft link", "target": "x", "device": 1, "inode": 1, "more": 1},
    ],
)
def test_a_link_that_cannot_be_is_damage(link: object) -> None:
    with pytest.raises(Damaged):
        from_bytes(remade({"established": True, "links": [link], "unpacked": []}))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{" * 100_000, b" " * (links.SIZE_LIMIT + 1)])
def test_nested_and_huge_files_are_damage(content: bytes) -> None:
    with pytest.raises(Damaged):
        from_bytes(content)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.mkdir(), lambda path: path.symlink_to("elsewhere")])
def test_something_else_in_the_place_of_the_list_is_damage_and_is_replaced(
    world: World, put: Callable[[Path], None]
) -> None:
    path = world.slot.folder / "vmwrapper_links.json"
    put(path)
    found = LogicalNames(world.slot)
    assert "damaged" in found.load()[0]
    found.establish([])
    assert not (world.slot.folder / "elsewhere").exists()
    assert world.names().established


# --- a list that was lost


def job_of(*elements: str) -> Job:
    text = "".join(elements)
    host_main = "<VMmanage_task><application>HostMain</application><command_line>c</command_line></VMmanage_task>"
    return parse.parse(f"<job_desc>{host_main}{text}</job_desc>".encode(), "job.xml")


GUEST = (
    "<task><virtualmachine>one</virtualmachine><image>disk</image><application>worker</application>"
    "<copy_file_to_VM>in</copy_file_to_VM><copy_file_from_VM>out</copy_file_from_VM>"
    "<copy_file_from_VM>sym</copy_file_from_VM></task>"
)


def recover(world: World, *, result: str = RESULT, project: bool = True, job: str = GUEST) -> LogicalNames:
    names, read = world.names(), job_of(job)
    names.recover(
        filenames.mentioned(read),
        filenames.written_by_guests(read),
        project_dir=world.project if project else None,
        result=result,
        why="the list is missing",
    )
    return names


def test_links_of_the_job_into_the_projects_folder_are_taken_again(world: World) -> None:
    world.soft("not of the job", "../../victim")
    recover(world)
    names = world.names()
    assert names.source("in") == world.project / "in_5"
    assert names.target("out") == world.project / f"{RESULT}_0"
    assert names.target("sym") == world.project / f"{RESULT}_1"
    assert names.resolve("not of the job") == Path("not of the job")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("in", "../../victim"),
        ("out", "../../victim"),
        ("out", "../../projects/p/program_3"),
        ("out", "../../projects/p/wu_7_10_0"),
        ("out", "../../projects/p"),
        ("out", "../../projects/q/wu_7_1_0"),
        ("out", "../../projects/p/../../victim"),
        ("out", "../../projects/p/aside"),
    ],
)
def test_any_other_link_ends_the_job_with_206_and_words(world: World, name: str, target: str) -> None:
    (world.project / "aside").symlink_to(world.victim)
    world.soft(name, target)
    with pytest.raises(BadInput, match=f"{name} leads to .* not followed") as caught:
        recover(world)
    assert caught.value.status == 206
    assert not (world.slot.folder / "vmwrapper_links.json").exists()


def test_without_a_project_or_result_no_output_may_be_a_link(world: World) -> None:
    with pytest.raises(BadInput):
        recover(world, project=False)
    with pytest.raises(BadInput):
        recover(world, result="")
    for name in ("in", "out", "sym"):
        (world.slot.folder / name).unlink()
    assert recover(world, project=False).established, "nothing of the job is a link"


def test_traces_of_a_guest(world: World) -> None:
    assert not guest_has_left_traces(world.slot)
    world.slot.vm_folder.mkdir()
    (world.slot.vm_folder / ".hostmain.lock").touch()
    assert not guest_has_left_traces(world.slot), "HostMain was there, and no VM"
    (world.slot.vm_folder / "CernVM").mkdir()
    assert not guest_has_left_traces(world.slot), "a VM that was put there for the job"
    (world.slot.vm_folder / "vmwrapper_p_r_0_one").mkdir()
    assert guest_has_left_traces(world.slot)


def test_every_name_of_a_job_is_known() -> None:
    job = job_of(
        GUEST,
        "<task><application>host</application><command_line>./a 'x y' boinc_resolve(b)</command_line>"
        "<stdin_filename>c</stdin_filename><stdout_filename>d</stdout_filename><stderr_filename>e</stderr_filename>"
        "<checkpoint_filename>f</checkpoint_filename><fraction_done_filename>g</fraction_done_filename></task>",
        "<unzip_input><zipfilename>h</zipfilename></unzip_input><zip_output><zipfilename>i</zipfilename></zip_output>"
        "<intermediate_upload_file>j</intermediate_upload_file>",
    )
    assert filenames.mentioned(job) >= {
        "worker", "disk", "disk.json", "in", "out", "host", "./a", *"bcdefghij",
    }  # fmt: skip
    assert filenames.written_by_guests(job) == {"out", "sym", "j"}


# --- one module resolves

LOOKERS = {"read_soft_link", "find_link", "scan_links", "top_links"}
FOLLOWERS = {"realpath", "readlink"}
MAY_FOLLOW = {
    "links.py",
    "logical_names.py",
    "unpacking.py",  # whether a link of an archive stays in the slot
    "paths.py",  # the slot's own folder
    "images.py",  # the place of an image outside of the slot
    "shipped_image.py",  # the same
}


def attributes(path: Path) -> set[str]:
    """Names and attributes that a module uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value == "boinc_resolve_filename":
            found.add(node.value)
    return found


def test_no_other_module_resolves() -> None:
    package = Path(logical_names.__file__).parents[1]
    for path in package.rglob("*.py"):
        used = attributes(path)
        if path.name not in {"links.py", "logical_names.py"}:
            # An archive spares the client's links to outputs; it follows none.
            assert used & LOOKERS <= ({"read_soft_link"} if path.name == "unpacking.py" else set()), path
        assert path.name in MAY_FOLLOW or not used & FOLLOWERS, path
        assert "boinc_resolve_filename" not in used, path
        assert path.name == "links.py" or "<soft_link>" not in path.read_text().replace("`<soft_link>", ""), path


def test_the_check_sees_what_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import os\nfrom a import scan_links\nos.path.realpath(b.find_link)\n")
    assert attributes(tmp_path / "x.py") >= {"scan_links", "realpath", "find_link"}


# --- names that a job file may not give


OURS = [
    "vmwrapper_links.json",
    "./vmwrapper_links.previous.json",
    "VMwrapper_Checkpoint.json",
    "vmwrapper_messages.json",
]


@pytest.mark.parametrize(
    "name",
    [*OURS, ".vmwrapper_links.json.x", "boinc_ufr_x", "my_trickle_down_1", "_MEI12/libc.so", "vmwrapper_anything",
     "vm/x", "trickle_up.xml", ".graphics_status.xml"],
)  # fmt: skip
@pytest.mark.parametrize("element", ["copy_file_from_VM", "stdout_filename", "stderr_filename"])
def test_nothing_of_a_guest_gets_the_name_of_a_file_of_ours(element: str, name: str) -> None:
    with pytest.raises(BadInput, match=element):
        job_of(GUEST.replace("<copy_file_to_VM>in</copy_file_to_VM>", f"<{element}>{name}</{element}>"))
    with pytest.raises(BadInput, match="intermediate_upload_file"):
        job_of(GUEST, f"<intermediate_upload_file>{name}</intermediate_upload_file>")


@pytest.mark.parametrize("name", [*OURS, "x/../vmwrapper_links.json"])
def test_no_stream_of_a_program_of_the_host_gets_one_either(name: str) -> None:
    for element in ("stdout_filename", "stderr_filename"):
        with pytest.raises(BadInput, match=element):
            job_of(f"<task><application>a</application><{element}>{name}</{element}></task>")
        with pytest.raises(BadInput, match=element):
            job_of(f"<unzip_task><application>a</application><{element}>{name}</{element}></unzip_task>")
    with pytest.raises(BadInput, match="zip_output"):
        job_of(f"<zip_output><zipfilename>{name}</zipfilename><filename>x</filename></zip_output>")
    job_of("<task><application>a</application><stderr_filename>stderr.txt</stderr_filename></task>")
