"""Small JSON files read back: what is in the place of one neither stops nor misleads; versions live side by side."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common import jsonfile
from vmcontrol.hypervisors.common.cache import cache_file


@dataclass(frozen=True)
class Kept:
    computer: str
    works: bool
    time: float
    count: int = 0


KEPT = {"computer": "this one", "works": True, "time": 1, "count": 3}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_text(json.dumps(KEPT))
    path.symlink_to(target)


POISON: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": _socket,
    "link": _link,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "huge": _huge,
    "nested": lambda path: path.write_text("[" * 100_000),
    "nested but whole": lambda path: path.write_text("[" * 900 + "]" * 900),
    "nested in a value": lambda path: path.write_text(
        json.dumps(KEPT)[:-1] + ', "x":' + '{"a":' * 500 + "1" + "}" * 501
    ),
    "no UTF-8": lambda path: path.write_bytes(b'{"computer": "\xff"}'),
    "NaN": lambda path: path.write_text('{"computer": "", "works": true, "time": NaN}'),
    "infinite": lambda path: path.write_text('{"computer": "", "works": true, "time": 1e999}'),
    "many digits": lambda path: path.write_text(
        '{"computer": "", "works": true, "time": 1, "count": ' + "9" * 9999 + "}"
    ),
    "name twice": lambda path: path.write_text('{"computer": "a", "works": true, "time": 1, "works": false}'),
    "wrong type": lambda path: path.write_text(json.dumps(KEPT | {"works": "yes"})),
    "truth for a number": lambda path: path.write_text(json.dumps(KEPT | {"count": True})),
    "field missing": lambda path: path.write_text('{"computer": "a"}'),
    "no object": lambda path: path.write_text("[1]"),
    "empty": lambda path: path.write_text(""),
    "strange format": lambda path: path.write_text(json.dumps(KEPT | {"format": "1"})),
    "truth for a format": lambda path: path.write_text(json.dumps(KEPT | {"format": True})),
}
STAYS = {"pipe", "folder", "device", "socket", "link", "dangling link"}
"""What is no file is not ours to replace."""


@pytest.mark.parametrize("kind", POISON)
def test_poison_costs_what_was_kept_and_nothing_else(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kept.json"
    POISON[kind](path)
    before = os.lstat(path)
    began = time.monotonic()
    assert jsonfile.load_kept(path, Kept, 1) is None
    jsonfile.keep(path, KEPT, 1)
    assert time.monotonic() - began < 1
    if kind in STAYS:
        assert os.lstat(path).st_ino == before.st_ino
        assert jsonfile.load_kept(path, Kept, 1) is None
    else:
        assert jsonfile.load_kept(path, Kept, 1) == Kept("this one", True, 1, 3)
    if kind != "dangling link":
        assert "kept.json" in caplog.text, "it is told once why nothing was used"


def test_unreadable_is_no_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = tmp_path / "kept.json"
    jsonfile.keep(path, KEPT, 1)
    path.chmod(0)
    assert jsonfile.load_kept(path, Kept, 1) is None
    jsonfile.keep(path, KEPT, 1)
    tmp_path.chmod(0o500)
    jsonfile.keep(path, KEPT, 1)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("found", [2, 0, 10**9])
def test_what_another_version_keeps_is_neither_used_nor_replaced(found: int, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    theirs = json.dumps({"format": found, **KEPT, "new": [1]})
    path.write_text(theirs)
    assert jsonfile.load_kept(path, Kept, 1) is None
    jsonfile.keep(path, KEPT, 1)
    assert path.read_text() == theirs


def test_a_file_without_a_format_is_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(KEPT))
    assert jsonfile.load_kept(path, Kept, 1) == Kept("this one", True, 1, 3)
    jsonfile.keep(path, KEPT | {"count": 4}, 1)
    value = json.loads(path.read_text())
    assert value.pop("format") == 1
    assert value == KEPT | {"count": 4}, "a version that knows no formats finds all that it knows"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_name_that_is_missing_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        jsonfile.load(tmp_path / "none")


def test_a_limit_counts_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"[" + b" " * 98 + b"]")
    assert jsonfile.load(path, 100) == []
    with pytest.raises(ValueError, match="more than 99"):
        jsonfile.load(path, 99)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_bytes_are_json_or_one_error(content: bytes | str) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    with contextlib.suppress(ValueError):
        value = jsonfile.parse(data)
        assert value == json.loads(data)
        with contextlib.suppress(ValueError):
            jsonfile.typed(Kept, value)


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Inner:
    name: jsonfile.Name
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outer:
    inner: tuple[Inner, ...]
    colour: Colour | None
    counts: dict[str, jsonfile.Count]
    pair: tuple[str, int] = ("", 0)


OUTER = {"inner": [{"name": "a", "seconds": 1}], "colour": "red", "counts": {"x": 1}, "pair": ["p", 2]}


def test_a_value_is_read_by_its_type() -> None:
    assert jsonfile.typed(Outer, OUTER, exact=True) == Outer((Inner("a", 1.0),), Colour.RED, {"x": 1}, ("p", 2))
    assert jsonfile.typed(Outer, {"inner": [], "colour": None, "counts": {}, "new": 1}) == Outer((), None, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inner": [{"name": "a"}, {"name": 1}]}, r"inner\[1\].name is '1' and not a text"),
        ({"inner": [{"name": ""}]}, r"inner\[0\].name is '' and not a name"),
        ({"inner": [{"name": "a", "seconds": 10**400}]}, r"inner\[0\].seconds is '1000"),
        ({"inner": {}}, "inner is '{}' and not a list"),
        ({"colour": "blue"}, "colour is 'blue' and not a Colour"),
        ({"colour": []}, "colour is"),
        ({"counts": {"x": -1}}, r"counts\['x'\] is '-1' and not from 0 to 1000000000"),
        ({"counts": {"x": True}}, "is 'True' and not a whole number"),
        ({"pair": ["p"]}, "pair is .* and not a list of 2"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        jsonfile.typed(Outer, OUTER | change)


def test_exact_is_neither_more_nor_less() -> None:
    with pytest.raises(ValueError, match="unknown 'new'"):
        jsonfile.typed(Outer, OUTER | {"new": 1}, exact=True)
    with pytest.raises(ValueError, match="pair is missing"):
        jsonfile.typed(Outer, {name: OUTER[name] for name in ("inner", "colour", "counts")}, exact=True)


class TestTheAccountsFolder:
    def test_it_is_private_whatever_the_umask(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
        before = os.umask(0)
        try:
            path = cache_file("x.json")
            assert path is not None
            jsonfile.keep(path, KEPT, 1)
        finally:
            os.umask(before)
        assert [one.stat().st_mode & 0o077 for one in (path, *list(path.parents)[:3])] == [0, 0, 0, 0]

    @pytest.mark.parametrize("kind", ["pipe", "dangling link", "socket"])
    def test_something_else_in_its_place_is_no_error(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        POISON[kind](tmp_path / "vmwrapper")
        path = cache_file("x.json")
        if path is not None:
            assert jsonfile.load_kept(path, Kept, 1) is None

    def test_one_that_others_can_write_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with tempfile.TemporaryDirectory() as folder:
            monkeypatch.setenv("XDG_CACHE_HOME", folder)
            Path(folder, "vmwrapper").mkdir()
            Path(folder, "vmwrapper").chmod(0o777)
            assert cache_file("x.json") is None
