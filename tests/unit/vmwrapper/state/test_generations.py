"""A file in two generations: the newest is there at every moment, and nothing else stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vmwrapper.state.generations import TwoGenerations


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_newest_is_there_between_any_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = tmp_path / "newest"
    store = TwoGenerations(newest, tmp_path / "previous", 100, bytes)
    store.save(b"1")
    seen = []

    def looking(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def step(*words: object, **named: object) -> object:
            seen.append(newest.read_bytes())
            return real(*words, **named)

        return step

    for name in ("link", "rename", "replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, looking(name))
    store.save(b"2")
    assert seen[0] == b"1"
    assert seen[-1] == b"2"
    assert files(tmp_path) == {"newest": b"2", "previous": b"1"}


def test_one_that_became_the_previous_one_just_before_a_crash(tmp_path: Path) -> None:
    store = TwoGenerations(tmp_path / "newest", tmp_path / "previous", 100, bytes)
    store.save(b"1")
    os.link(tmp_path / "newest", tmp_path / "previous")
    store.save(b"2")
    assert files(tmp_path) == {"newest": b"2", "previous": b"1"}


def test_where_a_file_has_one_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "no second names here")

    monkeypatch.setattr(os, "link", refuse)
    store = TwoGenerations(tmp_path / "newest", tmp_path / "previous", 100, bytes)
    for content in (b"1", b"2", b"3"):
        store.save(content)
    assert files(tmp_path) == {"newest": b"3", "previous": b"2"}
