"""SMBIOS tables as firmware lays them out: what the host left is found, and nothing else disturbs."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from guest.agent import smbios
from guest.agent.smbios import HostSettings

SECRET = "0123456789abcdef" * 4


def structure(kind: int, body: bytes, *strings: bytes, handle: int = 1) -> bytes:
    """One structure: header, formatted part, strings, end (SMBIOS 3 section 6.1)."""
    text = b"\0".join(strings) + b"\0\0" if strings else b"\0\0"
    return bytes([kind, 4 + len(body)]) + handle.to_bytes(2, "little") + body + text


def oem_strings(*strings: bytes) -> bytes:
    return structure(11, bytes([len(strings)]), *strings)


def system_information(sku: bytes) -> bytes:
    body = bytearray(0x1B - 4)
    body[0x19 - 4] = 3
    return structure(1, bytes(body), b"innotek GmbH", b"VirtualBox", sku)


BIOS = structure(0, bytes(20), b"SeaBIOS", b"1.16")
END = structure(127, b"")


def settings(table: bytes) -> HostSettings:
    return smbios.settings_in(table)


def test_a_secret_in_an_oem_string() -> None:
    table = BIOS + oem_strings(b"vboxVer_7.0", f"secret={SECRET} interface=52:54:00:12:34:56".encode()) + END
    assert settings(table) == HostSettings(SECRET, False, "52:54:00:12:34:56")


def test_a_secret_alone() -> None:
    assert settings(oem_strings(SECRET.encode()) + END).secret == SECRET


def test_a_token_in_the_sku_number() -> None:
    assert settings(BIOS + system_information(f"token={SECRET}".encode()) + END) == HostSettings(SECRET, True, "")


def test_oem_strings_count_before_the_sku_number() -> None:
    table = system_information(b"secret=cafe") + oem_strings(b"secret=beef") + END
    assert settings(table).secret == "beef"


def test_what_others_leave_there_is_passed_over() -> None:
    table = BIOS + oem_strings(b"vboxVer_7.0.14", b"vboxRev_161095", b"Dell System; key=1") + END
    assert settings(table) == HostSettings()


def test_what_comes_after_the_end_is_not_read() -> None:
    assert settings(END + oem_strings(b"secret=beef")) == HostSettings()


def test_plain_text_is_taken_too() -> None:
    assert smbios.settings_in(f"secret={SECRET}\ninterface=eth1\n".encode()) == HostSettings(SECRET, False, "eth1")


def test_a_file_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    assert smbios.read(tmp_path / "nothing") == HostSettings()


_string = st.binary(min_size=1, max_size=20).map(lambda b: b.replace(b"\0", b"x"))
_structure = st.builds(
    lambda kind, body, strings: structure(kind, body, *strings),
    st.integers(0, 126),
    st.binary(max_size=40),
    st.lists(_string, max_size=4),
)


@given(st.lists(_structure, max_size=6), st.lists(_string, min_size=1, max_size=5))
def test_structures_are_read_back_as_they_were_laid_out(before: list[bytes], strings: list[bytes]) -> None:
    table = b"".join(before) + oem_strings(*strings) + END
    found = list(smbios.structures(table))
    assert len(found) == len(before) + 2
    assert found[-2].type == 11
    assert found[-2].strings == tuple(strings)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_fail(content: bytes) -> None:
    smbios.settings_in(content)
    smbios.texts_of_table(content)


@given(st.lists(_structure, max_size=3), st.integers(0, 200))
def test_a_table_that_is_cut_never_fails(parts: list[bytes], length: int) -> None:
    smbios.texts_of_table(b"".join(parts)[:length])
