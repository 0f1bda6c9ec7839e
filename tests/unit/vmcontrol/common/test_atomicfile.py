"""Files that are replaced whole: names of any length and kind, and what stays when it fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common.atomicfile import PREFIX_BYTES, name_prefix, write_atomically


@pytest.mark.parametrize("name", ["a", "x" * 255, "\u4e2d" * 85, "\U0001f600" * 63 + "xyz", "\udcff" * 255])
def test_a_file_is_replaced_whatever_its_name(name: str, tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_atomically(tmp_path / name, content)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_bytes() == content


def test_what_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="there"):
        write_atomically(tmp_path / "there", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@given(st.binary(max_size=255).map(os.fsdecode))
def test_a_prefix_begins_the_name_and_fits(name: str) -> None:
    prefix = name_prefix(name)
    assert len(os.fsencode(prefix)) <= PREFIX_BYTES
    if name.isprintable() and not any("\udc80" <= c <= "\udcff" for c in name):
        assert name.startswith(prefix)
