"""Debian's kernel, repacked so that an emulated processor has it unpacked in a moment.

Takes a bzImage apart (Documentation/x86/boot.rst), unpacks the kernel proper, and puts it, packed with LZ4, behind
`files/loader.s`. The kernel's own bytes are not changed. Never downloads, never touches modules (that is `modules`).
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

LOADER_SOURCE = Path(__file__).parent / "files" / "loader.s"
LOAD_ADDRESS = 0x100000
"""Where boot loaders put the protected-mode part of a kernel that is not relocatable."""
PAGE = 4096
LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
XZ_MAGIC = b"\xfd7zXZ\x00"
ELF_MAGIC = b"\x7fELF"
PT_LOAD = 1
BSS = b".bss"


class KernelError(Exception):
    """This file is not a kernel that we know how to repack. str: what was expected and what was found."""


@dataclass(frozen=True, slots=True)
class FlatKernel:
    """A kernel as it lies in memory: `content` from `address` on, up to the part that it clears itself (.bss)."""

    content: bytes
    address: int
    entry: int
    end: int
    """First address above all memory that the kernel claims at its start."""


def setup_bytes(image: bytes) -> int:
    """Length of a bzImage's real-mode part: its boot sector and `setup_sects` sectors (0 means 4)."""
    if image[0x202:0x206] != b"HdrS":
        raise KernelError("not a bzImage: no HdrS at 0x202")
    return (1 + (image[0x1F1] or 4)) * 512


def packed_kernel(image: bytes) -> bytes:
    """The compressed kernel inside a bzImage, by the header's payload_offset and payload_length (protocol 2.08)."""
    setup = setup_bytes(image)
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[setup + offset : setup + offset + length]
    if length < 16 or len(payload) != length:
        raise KernelError(f"bzImage is cut short: its header promises {length} bytes of payload")
    return payload


def unpack_kernel(payload: bytes) -> bytes:
    """vmlinux (ELF) from the payload of a bzImage. Debian 12 uses xz (standard kernel) and LZ4 (cloud kernel)."""
    if payload.startswith(XZ_MAGIC):
        content = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(LZ4_LEGACY_MAGIC):
        # The last four bytes are the size, appended for the loader of the kernel; lz4 does not want them.
        content = subprocess.run(["lz4", "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
    else:
        raise KernelError(f"kernel compressed in an unknown way (starts with {payload[:6].hex()}); known: xz, lz4")
    if not content.startswith(ELF_MAGIC):
        raise KernelError("what was unpacked is not an ELF file")
    return content


def flatten(vmlinux: bytes) -> FlatKernel:
    """Lay the ELF's segments out as they are in memory."""
    if vmlinux[:6] != ELF_MAGIC + b"\x02\x01":
        raise KernelError("vmlinux is not a 64-bit little-endian ELF file")
    entry, program_headers, section_headers = struct.unpack_from("<QQQ", vmlinux, 24)
    program_count, section_size, section_count, names_index = struct.unpack_from("<HHHH", vmlinux, 56)
    segments = []
    for index in range(program_count):
        kind, _, offset, virtual, physical, in_file, in_memory, _ = struct.unpack_from(
            "<IIQQQQQQ", vmlinux, program_headers + 56 * index
        )
        if kind == PT_LOAD:
            segments.append((physical, virtual, offset, in_file, in_memory))
    if not segments:
        raise KernelError("vmlinux has nothing to load")
    start = min(physical for physical, *_ in segments)
    end = max(physical + in_memory for physical, _, _, _, in_memory in segments)
    memory = bytearray(end - start)
    for physical, _, offset, in_file, _ in segments:
        memory[physical - start : physical - start + in_file] = vmlinux[offset : offset + in_file]
    keep = len(memory)
    names_at = struct.unpack_from("<Q", vmlinux, section_headers + section_size * names_index + 24)[0]
    for index in range(section_count):
        header = section_headers + section_size * index
        name_at = names_at + struct.unpack_from("<I", vmlinux, header)[0]
        address = struct.unpack_from("<Q", vmlinux, header + 16)[0]
        if vmlinux[name_at : vmlinux.index(b"\0", name_at)] == BSS:
            for physical, virtual, _, _, in_memory in segments:
                if virtual <= address < virtual + in_memory:
                    keep = min(keep, physical + address - virtual - start)
    return FlatKernel(bytes(memory[:keep]), start, entry, end)


def lz4_file(content: bytes) -> bytes:
    """`content` in lz4's legacy format, the one that the kernel reads."""
    packed = subprocess.run(["lz4", "-l", "-12", "-cq"], input=content, stdout=subprocess.PIPE, check=True).stdout
    if not packed.startswith(LZ4_LEGACY_MAGIC):
        raise KernelError("lz4 -l did not write its legacy format")
    return packed


def lz4_blocks(content: bytes) -> bytes:
    """`content` as the loader reads it: (32-bit length, LZ4 block)..., a length of 0; padded to 8 bytes."""
    blocks = lz4_file(content)[len(LZ4_LEGACY_MAGIC) :] + bytes(4)
    return blocks + bytes(-len(blocks) % 8)


def assemble_loader(constants: dict[str, int]) -> bytes:
    """The loader's machine code, by binutils from its source, linked for LOAD_ADDRESS."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-loader-") as folder:
        work = Path(folder)
        symbols: list[str | Path] = [f"--defsym={name}={value}" for name, value in constants.items()]
        subprocess.run(["as", "--64", *symbols, "-o", work / "loader.o", LOADER_SOURCE], check=True)
        link: list[str | Path] = ["ld", "--entry=loader", f"-Ttext={LOAD_ADDRESS:#x}"]
        link += ["-o", work / "loader.elf", work / "loader.o"]
        subprocess.run(link, check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", work / "loader.elf", work / "loader.bin"], check=True)
        return (work / "loader.bin").read_bytes()


def repack(image: bytes) -> bytes:
    """A bzImage with the same kernel, packed with LZ4 behind our loader. Raises KernelError."""
    setup = bytearray(image[: setup_bytes(image)])
    kernel = flatten(unpack_kernel(packed_kernel(image)))
    payload = lz4_blocks(kernel.content)
    spare = -(-kernel.end // PAGE) * PAGE
    loader = assemble_loader(
        {
            "PAYLOAD_BYTES": len(payload),
            "PAYLOAD_SPARE_ADDRESS": spare,
            "KERNEL_ADDRESS": kernel.address,
            "KERNEL_ENTRY": kernel.entry,
        }
    )
    if LOAD_ADDRESS + len(loader) > kernel.address:
        raise KernelError("the loader would overwrite itself")
    body = loader + payload
    body += bytes(-len(body) % 16)
    memory_needed = spare + len(payload) - LOAD_ADDRESS
    # Offsets of the setup header: Documentation/x86/boot.rst.
    struct.pack_into("<I", setup, 0x1F4, len(body) // 16)  # syssize
    setup[0x234] = 0  # relocatable_kernel: it must be loaded at LOAD_ADDRESS
    struct.pack_into("<H", setup, 0x236, 0)  # xloadflags: no 64-bit or EFI entry
    struct.pack_into("<II", setup, 0x248, len(loader), len(payload))
    struct.pack_into(
        "<QIII", setup, 0x258, LOAD_ADDRESS, memory_needed, 0, 0
    )  # pref_address, init_size, handover, info
    return bytes(setup) + body
