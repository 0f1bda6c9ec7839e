"""Archives of unzip_input: where their members go, and that nothing is written where it must not be."""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmwrapper.host import archives, unpacking
from vmwrapper.host.unpacking import BadArchive
from vmwrapper.host.zip_names import _CONTROLS, RawName, Unplaced, name_of, place_of

LINK = stat.S_IFLNK | 0o777
CONTROLS_BACK = {ord(shown): plain for plain, shown in _CONTROLS.items()}
posix = pytest.mark.skipif(os.name != "posix", reason="names are bytes there")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names are any bytes there")


class Told(RawName):
    """A member with a name of bytes and just the flags that are given."""

    told = False

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return os.fsencode(self.filename), 0x800 if self.told else 0


def member(name: str | bytes, mode: int = 0o644, *, told: bool = False, extra: bytes = b"") -> Told:
    information = Told(os.fsdecode(name))
    information.create_system = 3
    information.external_attr = mode << 16
    information.told = told
    information.extra = extra
    return information


def make(path: Path, *members: tuple[Told, bytes]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # names that come twice
        for information, content in members:
            archive.writestr(information, content)
    return path


def unpack(archive: Path, slot: Path, limit: float = 0.0) -> list[str]:
    slot.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return unpacking.unpack(archive, slot, lambda: None, lambda _: None, limit=limit)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Files with their content, links with their text; names as bytes that are not UTF-8 escaped."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = str(path.readlink())
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@linux
@pytest.mark.parametrize(
    ("raw", "told", "name"),
    [
        (b"plain", False, "plain"),
        ("größe".encode(), False, "größe"),
        ("größe".encode(), True, "größe"),
        ("日本.txt".encode(), False, "日本.txt"),
        (b"gr\x94\xe1e", False, "größe"),  # cp437
        (b"gr\xf6\xdfe", False, "gr÷▀e"),  # Latin-1, which nobody can know
        (b"a\x1fb", False, "a▼b"),
        (b"tab\tnewline\n", False, "tab\tnewline\n"),
        (b"\xc3", False, "├"),
        (b"\xed\xa0\x80", False, os.fsdecode(b"\xed\xa0\x80")),
    ],
)
def test_names_are_guessed_as_libzip_does(tmp_path: Path, raw: bytes, told: bool, name: str) -> None:
    archive = make(tmp_path / "a", (member(raw, told=told), b"x"))
    unpack(archive, tmp_path / "slot")
    assert [os.fsencode(path.name) for path in (tmp_path / "slot").iterdir()] == [os.fsencode(name)]


def test_the_name_in_info_zips_field_counts_when_it_belongs_to_this_name() -> None:
    def field(name: bytes, of: bytes) -> bytes:
        content = struct.pack("<BI", 1, zlib.crc32(of)) + name
        return struct.pack("<HH", 0x7075, len(content)) + content

    information = zipfile.ZipInfo("?.txt")
    information.extra = b"\x01\x00\x02\x00xx" + field("é.txt".encode(), b"?.txt")
    assert name_of(information) == "é.txt"
    information.extra = field("é.txt".encode(), b"other")
    assert name_of(information) == "?.txt"
    information.extra = field(b"\xff", b"?.txt")
    assert name_of(information) == "?.txt"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a", "a"), ("./a/b", "a/b"), ("lib/../lib/x", "lib/x"), ("a//b/./c", "a/b/c"), ("/etc/x", "etc/x"),
        ("a/..b", "a/..b"), ("...", "..."), ("sub/job.xml", "sub/job.xml"), ("a/stderr.txt", "a/stderr.txt"),
        ("x" * 300, "x" * 300),
    ],
)  # fmt: skip
def test_places(name: str, place: str) -> None:
    assert str(place_of(name, windows=False)) == place
    assert str(place_of(name, windows=True)) == place


@pytest.mark.parametrize(
    "name",
    ["", ".", "/", "a/..", "..", "../x", "a/../../x", "/..", "job.xml", "./job.xml", "a/../job.xml", "init_data.xml",
     "vmwrapper_checkpoint.json", "vmwrapper_x/y", "boinc_finish_called", "boinc_lockfile", "stderr.txt"],
)  # fmt: skip
def test_what_goes_nowhere(name: str) -> None:
    with pytest.raises(Unplaced):
        place_of(name, windows=False)


def test_backslashes_and_drives_are_windows_affair() -> None:
    assert str(place_of("a\\b", windows=False)) == "a\\b"
    assert str(place_of("..\\b", windows=False)) == "..\\b"
    assert str(place_of("a\\b", windows=True)) == "a/b"
    for name in ("..\\b", "C:\\x", "c:x", "x:stream", "JOB.XML"):
        with pytest.raises(Unplaced):
            place_of(name, windows=True)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.booleans())
def test_no_place_is_outside(name: str, windows: bool) -> None:
    try:
        place = place_of(name, windows=windows)
    except Unplaced:
        return
    assert not place.is_absolute()
    assert ".." not in place.parts
    assert place.parts


@posix
class TestLinks:
    def test_links_inside_are_made_in_any_order(self, tmp_path: Path) -> None:
        archive = make(
            tmp_path / "a",
            (member("lib.so", LINK), b"lib.so.1"),
            (member("lib.so.1"), b"x"),
            (member("d/up", LINK), b"../lib.so"),
            (member("dangling", LINK), b"nowhere"),
        )
        unpack(archive, tmp_path / "slot")
        assert tree(tmp_path / "slot") == {
            "lib.so": "lib.so.1", "lib.so.1": b"x", "d/up": "../lib.so", "dangling": "nowhere",
        }  # fmt: skip

    @pytest.mark.parametrize("text", ["/etc/passwd", "..", "../x", "d/../../x", "", "x\0y", "y" * 5000])
    def test_links_that_lead_outside_are_left_out(
        self, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        archive = make(tmp_path / "a", (member("l", LINK), text.encode()), (member("good"), b"x"))
        assert unpack(archive, tmp_path / "slot") == ["good"]
        assert "a: 'l' is left out: it is a link that leads" in caplog.text

    def test_links_that_lead_outside_together(self, tmp_path: Path) -> None:
        """Each alone leads nowhere outside: the first through a folder that is not there yet."""
        archive = make(tmp_path / "a", (member("x", LINK), b"d/../secret"), (member("d", LINK), b"."))
        (tmp_path / "secret").write_text("s")
        unpack(archive, tmp_path / "slot")
        assert tree(tmp_path / "slot") == {"d": "."}

    def test_nothing_is_written_through_a_link(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        first = make(tmp_path / "a", (member("d", LINK), b"real"), (member("real/x"), b"1"), (member("f", LINK), b"g"))
        second = make(tmp_path / "b", (member("d/x"), b"evil"), (member("f"), b"mine"), (member("d/"), b""))
        slot = tmp_path / "slot"
        unpack(first, slot)
        (slot / "out").symlink_to(tmp_path / "elsewhere")
        unpack(second, slot)
        unpack(make(tmp_path / "c", (member("out"), b"own")), slot)
        assert tree(slot) == {"d": "real", "real/x": b"1", "f": b"mine", "out": b"own"}
        assert not (tmp_path / "elsewhere").exists()
        assert "'d/x' is left out: it lies below 'd', which is a link" in caplog.text

    def test_a_member_below_a_link_of_its_own_archive(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        archive = make(tmp_path / "a", (member("d", LINK), b"../outside"), (member("d/x"), b"evil"))
        unpack(archive, tmp_path / "slot")
        assert list(outside.iterdir()) == []
        assert tree(tmp_path / "slot") == {"d/x": b"evil"}


@posix
def test_members_that_are_odd_do_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = make(
        tmp_path / "a",
        (member("twice"), b"1"), (member("twice"), b"2"), (member("d/"), b""), (member("d"), b"no folder"),
        (member("file"), b"f"), (member("file/below"), b"g"), (member("/abs/x"), b"a"), (member("../up"), b"u"),
        (member("Case"), b"C"), (member("case"), b"c"), (member("a\\b"), b"back"), (member("none", 0), b"0"),
        (member("pipe", stat.S_IFIFO | 0o644), b"p"), (member("set", 0o104755), b"s"), (member("job.xml"), b"j"),
        (member("./"), b""), (member("n" * 300), b"n"), (member("out"), b"o"), (member("in"), b"new"),
    )  # fmt: skip
    slot = tmp_path / "slot"
    slot.mkdir()
    (tmp_path / "there").write_text("old")
    (slot / "out").write_text("<soft_link>../out_7</soft_link>\n")
    (slot / "in").write_text("<soft_link>../there</soft_link>\n")
    unpack(archive, slot)
    assert tree(slot) == {
        "twice": b"2", "file": b"f", "abs/x": b"a", "Case": b"C", "case": b"c", "a\\b": b"back", "none": b"0",
        "pipe": b"p", "set": b"s", "in": b"new", "out": b"<soft_link>../out_7</soft_link>\n",
    }  # fmt: skip
    assert (slot / "set").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "there").read_text() == "old"
    assert not (tmp_path / "up").exists()
    left_out = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert len(left_out) == 6, left_out


def test_what_is_left_out_is_told_in_bounds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unpack(make(tmp_path / "a", *((member(f"../{n}"), b"") for n in range(100))), tmp_path / "slot")
    assert len(caplog.records) == unpacking.TOLD_LIMIT + 1
    assert "80 more members are left out" in caplog.text


def test_a_bomb_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good", b"x")
        archive.writestr("zeros", bytes(5_000_000))
    with pytest.raises(BadArchive, match="holds 5000001 bytes, more than the 1000000 that the job may have"):
        unpack(tmp_path / "a", tmp_path / "slot", limit=1e6)
    assert tree(tmp_path / "slot") == {}
    assert len(unpack(tmp_path / "a", tmp_path / "slot", limit=1e7)) == 2


def test_what_cannot_be_read_spoils_the_archive(tmp_path: Path) -> None:
    plain = make(tmp_path / "a", (member("x"), b"text")).read_bytes()
    cases = {
        "encrypted": plain.replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"),
        "compression": plain.replace(b"PK\1\2\x14\x03\x14\0\0\0\0\0", b"PK\1\2\x14\x03\x14\0\0\0\x09\0"),
        "CRC": plain.replace(b"text", b"tent"),
        "not a zip file": b"nothing",
        "zip file": plain[:-10],
    }
    for words, content in cases.items():
        assert content != plain
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(BadArchive, match=words):
            unpack(tmp_path / "b", tmp_path / "slot")


def test_a_full_disk_is_no_bad_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space"):
        unpack(make(tmp_path / "a", (member("x"), b"1")), tmp_path / "slot")


@linux
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sets(st.binary(min_size=1, max_size=20), max_size=5))
def test_any_names_go_out_and_come_in(tmp_path: Path, names: set[bytes]) -> None:
    """Packed by zip_output and unpacked again; names that are neither UTF-8 nor plain come back as cp437 has them."""
    folder = tmp_path / os.urandom(8).hex()
    source, slot = folder / "source", folder / "slot"
    source.mkdir(parents=True)
    wanted = {name for raw in names if (name := raw.translate(None, b"\0/")) not in {b"", b".", b".."}}
    for name in wanted:
        (source / os.fsdecode(name)).write_bytes(name)
    chosen = archives.choose(source, [""], set(), "z")
    assert {os.fsencode(name) for name in chosen} == {name for name in wanted if name != b"z"}
    archives.pack(folder / "z", source, chosen, lambda: None)
    logging.disable()
    try:
        unpack(folder / "z", slot)
    finally:
        logging.disable(logging.NOTSET)
    for shown, packed in tree(slot).items():
        raw = os.fsencode(shown)
        back = raw.decode("utf-8", "replace").translate(CONTROLS_BACK).encode("cp437", "replace")
        assert packed in (raw, back)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200), st.integers(0, 250))
def test_any_damage_is_a_bad_archive_or_none(tmp_path_factory: pytest.TempPathFactory, damage: bytes, at: int) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b", b"text" * 50)
        archive.writestr(member("l", LINK), b"a/b")
    folder = tmp_path_factory.mktemp("damage")
    whole = content.getvalue()
    (folder / "a").write_bytes(whole[:at] + damage + whole[at + len(damage) :])
    logging.disable()
    try:
        unpack(folder / "a", folder / "slot", limit=1e6)
    except BadArchive:
        pass
    finally:
        logging.disable(logging.NOTSET)
    assert {path.name for path in folder.iterdir()} == {"a", "slot"}
