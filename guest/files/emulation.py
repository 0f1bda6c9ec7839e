"""SHA-256 at the speed that an emulated processor allows.

QEMU's emulation (TCG) announces SSSE3, AVX and AVX2 and carries them out slowly; OpenSSL chooses its code by what is
announced. Measured with QEMU 7.2: 25 MB/s as chosen, 79 MB/s with the plain code, 44 MB/s with Python's own. So on an
emulated processor OpenSSL is told, by its documented variable, to use the plain code. It reads that once, when it is
loaded; so this has to happen before the first import of hashlib, and the variable is gone for the programs we start.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VARIABLE = "OPENSSL_ia32cap"  # man OPENSSL_ia32cap(3)
EMULATED = b"QEMU TCG CPU"
"""The name of the processor that `-cpu max` shows under emulation; with other models nothing is changed."""


def is_emulated(cpuinfo: Path = CPUINFO) -> bool:
    """Whether this processor is QEMU's emulation."""
    try:
        with cpuinfo.open("rb") as text:
            return EMULATED in text.read(4096)
    except OSError:
        return False


def digest_algorithm(cpuinfo: Path = CPUINFO) -> str:
    """By what large copies are confirmed here. Emulated, SHA-512 costs 5.5 ms a MiB where SHA-256 costs 12."""
    return "sha512" if is_emulated(cpuinfo) else "sha256"


def prefer_plain_sha256(cpuinfo: Path = CPUINFO) -> bool:
    """Load OpenSSL so that it fits an emulated processor. True: it was done. Harmless on any other."""
    if "_hashlib" in sys.modules or VARIABLE in os.environ:
        return False
    if not is_emulated(cpuinfo):
        return False
    os.environ[VARIABLE] = "0:0"
    try:
        import hashlib  # noqa: F401 (loads libcrypto, which reads the variable now)
    finally:
        del os.environ[VARIABLE]
    return True
