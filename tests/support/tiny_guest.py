"""A guest of 512 bytes, for tests of life-cycles: a boot sector that counts in memory and on disk, and says so.

On the first serial port it prints, 18 times a second (each tick of the BIOS clock):

    B<disk counter>                     once at boot: 8 hexadecimal digits, from sector 8 of its disk
    C<memory counter><disk counter><=>  `=`: the disk holds what memory expected; `!`: it does not

So a resumed guest goes on with its memory counter, a rebooted one begins at 1 with the disk's counter kept, and a
memory that came back without its disk (or the other way round) shows itself by `!`. A disk operation that fails is
tried again, as an operating system does: VirtualBox's firmware sees an error after a resume in the middle of one.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

DISK_BYTES = 1024 * 1024

# From GNU as; addresses are absolute, the firmware loads the sector at 0x7c00. int $0x13 with 0x42 reads and with
# 0x43 writes one sector by the packet below; 0x46c is the BIOS clock; 0x3f8 is the first serial port.
_CODE = (
    # _start:
    b"\xfa"  # cli
    b"\x31\xc0"  # xor %ax,%ax
    b"\x8e\xd8"  # mov %ax,%ds
    b"\x8e\xc0"  # mov %ax,%es
    b"\x8e\xd0"  # mov %ax,%ss
    b"\xbc\x00\x7c"  # mov $0x7c00,%sp
    b"\xfb"  # sti
    b"\xfc"  # cld
    b"\x88\x16\xe1\x7c"  # mov %dl,0x7ce1
    b"\xb4\x42"  # mov $0x42,%ah
    b"\xe8\x9d\x00"  # call 7cb4 <disk_io>
    b"\x66\xa1\x00\x7e"  # mov 0x7e00,%eax
    b"\x66\xa3\xdc\x7c"  # mov %eax,0x7cdc
    b"\xb0\x42"  # mov $0x42,%al
    b"\xe8\x61\x00"  # call 7c85 <putc>
    b"\x66\xa1\xdc\x7c"  # mov 0x7cdc,%eax
    b"\xe8\x6d\x00"  # call 7c98 <hex8>
    b"\xe8\x55\x00"  # call 7c83 <newline>
    # tick:
    b"\x8b\x1e\x6c\x04"  # mov 0x46c,%bx
    b"\xf4"  # hlt
    b"\x3b\x1e\x6c\x04"  # cmp 0x46c,%bx
    b"\x74\xf9"  # je 7c32 <tick+0x4>
    b"\x66\xff\x06\xd8\x7c"  # incl 0x7cd8
    b"\xb4\x42"  # mov $0x42,%ah
    b"\xe8\x71\x00"  # call 7cb4 <disk_io>
    b"\x66\xa1\x00\x7e"  # mov 0x7e00,%eax
    b"\xb1\x3d"  # mov $0x3d,%cl
    b"\x66\x3b\x06\xdc\x7c"  # cmp 0x7cdc,%eax
    b"\x74\x02"  # je 7c52 <tick+0x24>
    b"\xb1\x21"  # mov $0x21,%cl
    b"\x88\x0e\xe0\x7c"  # mov %cl,0x7ce0
    b"\x66\x40"  # inc %eax
    b"\x66\xa3\x00\x7e"  # mov %eax,0x7e00
    b"\x66\xa3\xdc\x7c"  # mov %eax,0x7cdc
    b"\xb4\x43"  # mov $0x43,%ah
    b"\xe8\x4f\x00"  # call 7cb4 <disk_io>
    b"\xb0\x43"  # mov $0x43,%al
    b"\xe8\x1b\x00"  # call 7c85 <putc>
    b"\x66\xa1\xd8\x7c"  # mov 0x7cd8,%eax
    b"\xe8\x27\x00"  # call 7c98 <hex8>
    b"\x66\xa1\xdc\x7c"  # mov 0x7cdc,%eax
    b"\xe8\x20\x00"  # call 7c98 <hex8>
    b"\xa0\xe0\x7c"  # mov 0x7ce0,%al
    b"\xe8\x07\x00"  # call 7c85 <putc>
    b"\xe8\x02\x00"  # call 7c83 <newline>
    b"\xeb\xab"  # jmp 7c2e <tick>
    # newline:
    b"\xb0\x0a"  # mov $0xa,%al
    # putc:
    b"\x52"  # push %dx
    b"\x88\xc4"  # mov %al,%ah
    b"\xba\xfd\x03"  # mov $0x3fd,%dx
    b"\xec"  # in (%dx),%al
    b"\xa8\x20"  # test $0x20,%al
    b"\x74\xfb"  # je 7c8b <putc+0x6>
    b"\xba\xf8\x03"  # mov $0x3f8,%dx
    b"\x88\xe0"  # mov %ah,%al
    b"\xee"  # out %al,(%dx)
    b"\x5a"  # pop %dx
    b"\xc3"  # ret
    # hex8:
    b"\x66\x89\xc3"  # mov %eax,%ebx
    b"\xb9\x08\x00"  # mov $0x8,%cx
    b"\x66\xc1\xc3\x04"  # rol $0x4,%ebx
    b"\x88\xd8"  # mov %bl,%al
    b"\x24\x0f"  # and $0xf,%al
    b"\x3c\x0a"  # cmp $0xa,%al
    b"\x72\x02"  # jb 7cac <hex8+0x14>
    b"\x04\x07"  # add $0x7,%al
    b"\x04\x30"  # add $0x30,%al
    b"\xe8\xd4\xff"  # call 7c85 <putc>
    b"\xe2\xeb"  # loop 7c9e <hex8+0x6>
    b"\xc3"  # ret
    # disk_io:
    b"\xbe\xc8\x7c"  # mov $0x7cc8,%si
    b"\xc6\x44\x02\x01"  # movb $1,2(%si)
    b"\x8a\x16\xe1\x7c"  # mov 0x7ce1,%dl
    b"\x30\xc0"  # xor %al,%al
    b"\x50"  # push %ax
    b"\xcd\x13"  # int $0x13
    b"\x58"  # pop %ax
    b"\x72\xed"  # jb 7cb4 <disk_io>
    b"\xc3"  # ret
    # packet: 16 bytes long, 1 sector, buffer at 0x7e00, sector 8; then counter, expected, flag and drive, all 0
    b"\x10\x00\x01\x00\x00\x7e\x00\x00\x08"
)
BOOT_SECTOR = _CODE.ljust(510, b"\0") + b"\x55\xaa"


POWER_OFF_SECTOR = (
    b"\xba\x04\x06"  # mov $0x604,%dx       PM1a control of the q35 machine (ACPI 4.8.3.2), where SeaBIOS puts it
    b"\xb8\x00\x20"  # mov $0x2000,%ax      sleep enable, type 0: S5
    b"\xef"  # out %ax,%dx
    b"\xf4"  # hlt
).ljust(510, b"\0") + b"\x55\xaa"
"""Another guest: it shuts the machine down at once. QEMU only."""

FLOOD_SECTOR = (
    b"\xba\xfd\x03"  # next: mov $0x3fd,%dx    line status
    b"\xec"  # wait: in (%dx),%al
    b"\xa8\x20"  # test $0x20,%al
    b"\x74\xfb"  # je wait
    b"\xba\xf8\x03"  # mov $0x3f8,%dx
    b"\xb0\x78"  # mov $'x',%al
    b"\xee"  # out %al,(%dx)
    b"\xeb\xf0"  # jmp next
).ljust(510, b"\0") + b"\x55\xaa"
"""Another guest: it prints x as fast as its serial port takes it."""


SEES_DISKS_SECTOR = (
    # _start:
    b"\xfa"  # cli
    b"\x31\xc0"  # xor %ax,%ax
    b"\x8e\xd8"  # mov %ax,%ds
    b"\x8e\xc0"  # mov %ax,%es
    b"\x8e\xd0"  # mov %ax,%ss
    b"\xbc\x00\x7c"  # mov $0x7c00,%sp
    b"\xfb"  # sti
    b"\xfc"  # cld
    # tick:
    b"\x8b\x1e\x6c\x04"  # mov 0x46c,%bx
    b"\xf4"  # hlt
    b"\x3b\x1e\x6c\x04"  # cmp 0x46c,%bx
    b"\x74\xf9"  # je 0x7c12
    b"\x66\xff\x06\x9b\x7c"  # incl 0x7c9b
    b"\xb0\x43"  # mov $0x43,%al
    b"\xe8\x39\x00"  # call 0x7c5c
    b"\x66\xa1\x9b\x7c"  # mov 0x7c9b,%eax
    b"\xe8\x45\x00"  # call 0x7c6f
    b"\xb2\x81"  # mov $0x81,%dl
    b"\xe8\x0c\x00"  # call 0x7c3b
    b"\xb2\x82"  # mov $0x82,%dl
    b"\xe8\x07\x00"  # call 0x7c3b
    b"\xb0\x0a"  # mov $0xa,%al
    b"\xe8\x23\x00"  # call 0x7c5c
    b"\xeb\xd3"  # jmp 0x7c0e
    # see:
    b"\xb0\x20"  # mov $0x20,%al
    b"\xe8\x1c\x00"  # call 0x7c5c
    b"\x66\xc7\x06\x00\x7e\xff\xff\xff\xff"  # movl $0xffffffff,0x7e00
    b"\xbe\x8b\x7c"  # mov $0x7c8b,%si
    b"\xc6\x44\x02\x01"  # movb $0x1,0x2(%si)
    b"\xb4\x42"  # mov $0x42,%ah
    b"\xcd\x13"  # int $0x13
    b"\x66\xa1\x00\x7e"  # mov 0x7e00,%eax
    b"\xe8\x14\x00"  # call 0x7c6f
    b"\xc3"  # ret
    # putc:
    b"\x52"  # push %dx
    b"\x88\xc4"  # mov %al,%ah
    b"\xba\xfd\x03"  # mov $0x3fd,%dx
    b"\xec"  # in (%dx),%al
    b"\xa8\x20"  # test $0x20,%al
    b"\x74\xfb"  # je 0x7c62
    b"\xba\xf8\x03"  # mov $0x3f8,%dx
    b"\x88\xe0"  # mov %ah,%al
    b"\xee"  # out %al,(%dx)
    b"\x5a"  # pop %dx
    b"\xc3"  # ret
    # hex8:
    b"\x66\x89\xc3"  # mov %eax,%ebx
    b"\xb9\x08\x00"  # mov $0x8,%cx
    b"\x66\xc1\xc3\x04"  # rol $0x4,%ebx
    b"\x88\xd8"  # mov %bl,%al
    b"\x24\x0f"  # and $0xf,%al
    b"\x3c\x0a"  # cmp $0xa,%al
    b"\x72\x02"  # jb 0x7c83
    b"\x04\x07"  # add $0x7,%al
    b"\x04\x30"  # add $0x30,%al
    b"\xe8\xd4\xff"  # call 0x7c5c
    b"\xe2\xeb"  # loop 0x7c75
    b"\xc3"  # ret
    # packet: 16 bytes long, 1 sector, buffer at 0x7e00, sector 8; then the counter
    b"\x10\x00\x01\x00\x00\x7e\x00\x00\x08"
).ljust(510, b"\0") + b"\x55\xaa"
"""Another guest: with each tick it prints C<memory counter> and what it finds in sector 8 of its second and of its
third disk, as the firmware counts them: 8 hexadecimal digits each, FFFFFFFF where it can read none."""


@dataclass(frozen=True)
class Seen:
    """One line of that guest."""

    memory: int
    disks: tuple[int, int]


_SEEN = re.compile(rb"C([0-9A-F]{8}) ([0-9A-F]{8}) ([0-9A-F]{8})")


def seen(console: Path) -> list[Seen]:
    """What it has printed so far: whole lines only."""
    if not console.exists():
        return []
    found = (_SEEN.search(text) for text in console.read_bytes().split(b"\n")[:-1])
    return [Seen(int(match[1], 16), (int(match[2], 16), int(match[3], 16))) for match in found if match]


def make_further_disk(path: Path, kind: str, content: int) -> Path:
    """A disk that no guest boots from, with a number in its sector 8 and data to its end."""
    sector = (bytes(510) + b"\x55\xaa" + bytes(7 * 512) + content.to_bytes(4, "little")).ljust(DISK_BYTES, b"d")
    return make_image(path, kind, sector)


@dataclass(frozen=True)
class Line:
    """One line of the guest's console. memory is 0 in the line that tells of a boot."""

    memory: int
    disk: int
    consistent: bool = True


_LINE = re.compile(rb"B([0-9A-F]{8})|C([0-9A-F]{8})([0-9A-F]{8})([=!])")


def lines(console: Path) -> list[Line]:
    """What the guest has printed so far: whole lines only."""
    if not console.exists():
        return []
    found = []
    for text in console.read_bytes().split(b"\n")[:-1]:
        match = _LINE.search(text)  # SeaBIOS may have left the cursor in the middle of a line
        if match and match[1]:
            found.append(Line(0, int(match[1], 16)))
        elif match:
            found.append(Line(int(match[2], 16), int(match[3], 16), match[4] == b"="))
    return found


def make_image(path: Path, kind: str = "raw", sector: bytes = BOOT_SECTOR) -> Path:
    """The guest's disk as raw, qcow2 or vdi."""
    raw = path.with_suffix(".tmp-raw")
    raw.write_bytes(sector.ljust(DISK_BYTES, b"\0"))
    if kind == "raw":
        return raw.rename(path)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, str(raw), str(path)], check=True, timeout=60)
    raw.unlink()
    return path
