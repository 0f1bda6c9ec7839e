"""The key with which a BOINC project signs its files, and signatures, in BOINC's own form (lib/crypt.cpp). For tests.

A signature is the MD5 of the file as 32 hexadecimal characters, padded by PKCS #1 version 1.5 (block type 1, without
the name of a hash) and raised to the private exponent of a 1024-bit RSA key. Numbers are written as hexadecimal text,
32 bytes a line, with a full stop at the end; a key has its bits on a line before that.
"""

from __future__ import annotations

import hashlib
import secrets
from functools import cached_property
from pathlib import Path

KEY_BITS = 1024  # MAX_RSA_MODULUS_BITS of lib/crypt.h
KEY_BYTES = KEY_BITS // 8
PUBLIC_EXPONENT = 65537
PIECE = 1 << 20


class SigningKey:
    """A throw-away key, new with each object."""

    @cached_property
    def _numbers(self) -> tuple[int, int]:
        """Modulus and private exponent."""
        while True:
            p, q = _prime(KEY_BITS // 2), _prime(KEY_BITS // 2)
            if p != q:
                return p * q, pow(PUBLIC_EXPONENT, -1, (p - 1) * (q - 1))

    @property
    def public_text(self) -> str:
        """As the client gets it: R_RSA_PUBLIC_KEY, modulus and exponent."""
        modulus = self._numbers[0].to_bytes(KEY_BYTES, "big")
        return f"{KEY_BITS}\n{_hex_text(modulus + PUBLIC_EXPONENT.to_bytes(KEY_BYTES, 'big'))}"

    def sign_file(self, path: Path) -> str:
        """As BOINC's sign_executable prints it."""
        return self._sign(md5_of(path))

    def sign_text(self, text: str) -> str:
        """As BOINC's generate_signature: for upload certificates."""
        return self._sign(hashlib.md5(text.encode()).hexdigest())

    def _sign(self, digest: str) -> str:
        modulus, exponent = self._numbers
        content = digest.encode()
        block = b"\0\1" + b"\xff" * (KEY_BYTES - len(content) - 3) + b"\0" + content
        return _hex_text(pow(int.from_bytes(block, "big"), exponent, modulus).to_bytes(KEY_BYTES, "big"))


def md5_of(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _hex_text(data: bytes) -> str:
    lines = [data[start : start + 32].hex() for start in range(0, len(data), 32)]
    return "\n".join(lines) + "\n.\n"


def _prime(bits: int) -> int:
    """A random prime with its two highest bits set, that fits the public exponent."""
    while True:
        number = secrets.randbits(bits) | (3 << (bits - 2)) | 1
        if number % PUBLIC_EXPONENT != 1 and _is_prime(number):
            return number


def _is_prime(number: int) -> bool:
    """Miller and Rabin, 24 rounds."""
    if any(number % small == 0 for small in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)):
        return False
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(24):
        power = pow(secrets.randbelow(number - 3) + 2, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True
