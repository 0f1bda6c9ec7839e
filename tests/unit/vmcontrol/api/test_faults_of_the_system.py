"""What the operating system refuses while HostMain works is the computer's trouble, with a reason and a delay."""

from __future__ import annotations

import errno
import json

import pytest

from vmcontrol.api.faults import ERROR, TROUBLE, to_fault


@pytest.mark.parametrize(
    ("number", "key", "words"),
    [
        (errno.ENOSPC, "disk-full", "free some space"),
        (errno.EDQUOT, "disk-full", "free some space"),
        (errno.EMFILE, "no-files", "files open"),
        (errno.ENOMEM, "no-memory", "memory"),
        (errno.EROFS, "read-only", "cannot be written"),
    ],
)
def test_it_is_told_with_its_key(number: int, key: str, words: str) -> None:
    fault = to_fault(OSError(number, "as the system says", "/slot/out"))
    value = json.loads(fault.faultString)
    assert (fault.faultCode, value["key"]) == (TROUBLE, key)
    assert words in value["reason"]
    assert "/slot/out" in value["reason"]
    assert value["delay_s"] > 0


def test_another_error_of_the_system_is_what_it_was() -> None:
    assert to_fault(OSError(errno.EBADF, "bad")).faultCode == ERROR
