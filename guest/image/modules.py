"""Which kernel modules the guest gets, and the tables by which its modprobe finds them.

Debian's kernel package has no modules.dep and modules.alias (depmod writes them at installation), but every module
carries what they are made of in its ELF section .modinfo: `depends`, `softdep` and `alias`. Pure but for reading
the modules.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

BOOT_MODULES = (
    # what carries the disk: QEMU's and VirtualBox's
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "ahci",
    "ata_piix",
    "ata_generic",
    "mptspi",
    "mptsas",
    "megaraid_sas",
    "BusLogic",
    "sym53c8xx",
    "nvme",
    "sd_mod",
    # network cards
    "virtio_net",
    "e1000",
    "e1000e",
    "pcnet32",
    # file systems
    "squashfs",
    "ext4",
    "crc32c_generic",
    "crc32c_intel",
    # entropy: Python waits for it at its start
    "virtio_rng",
)
"""In the initramfs: what may be needed before the system is there."""

LATER_MODULES = (
    "button",
    "evdev",
    "virtio_balloon",
    "virtio_console",
    "overlay",
    "loop",
    "fuse",
    "isofs",
    "sr_mod",
    "vfat",
)
"""In the system: loaded when a device or a mount asks for them, or by a project's own files."""


class ModuleMissing(Exception):  # noqa: N818
    """The kernel has no such module, neither loadable nor built in. str: its name."""


@dataclass(frozen=True, slots=True)
class Module:
    """What one module says of itself. Names with underscores, as the kernel writes them."""

    name: str
    path: Path
    depends: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    """softdep "pre": wanted before it, if they are there."""
    aliases: tuple[str, ...] = ()


def canonical(name: str) -> str:
    """The kernel takes - and _ in module names for the same; in its tables it is _."""
    return name.replace("-", "_")


def modinfo(content: bytes) -> list[tuple[str, str]]:
    """(key, value) pairs of a module's .modinfo section. ValueError: no 64-bit ELF file, or it has no such section."""
    if content[:6] != b"\x7fELF\x02\x01" or len(content) < 64:
        raise ValueError("not a 64-bit ELF file")
    try:
        sections = struct.unpack_from("<Q", content, 40)[0]
        size, count, names_index = struct.unpack_from("<HHH", content, 58)
        names_at = struct.unpack_from("<Q", content, sections + size * names_index + 24)[0]
        for index in range(count):
            name, _, _, _, offset, length = struct.unpack_from("<IIQQQQ", content, sections + size * index)
            at = names_at + name
            if content[at : at + 9] == b".modinfo\0":
                words = content[offset : offset + length].split(b"\0")
                pairs = (word.decode("utf-8", "replace").partition("=") for word in words if b"=" in word)
                return [(key, value) for key, _, value in pairs]
    except (struct.error, OverflowError) as error:
        raise ValueError("ELF file is cut short") from error
    raise ValueError("no .modinfo section")


def parse(name: str, path: Path, content: bytes) -> Module:
    """A Module from the bytes of a .ko file."""
    depends: tuple[str, ...] = ()
    before: list[str] = []
    aliases = []
    for key, value in modinfo(content):
        if key == "depends":
            depends = tuple(canonical(word) for word in value.split(",") if word)
        elif key == "alias":
            aliases.append(value)
        elif key == "softdep":
            wanted = False
            for word in value.split():
                if word.endswith(":"):
                    wanted = word == "pre:"
                elif wanted:
                    before.append(canonical(word))
    return Module(canonical(name), path, depends, tuple(before), tuple(aliases))


class ModuleTree:
    """The modules of one kernel, below `folder` (lib/modules/VERSION)."""

    def __init__(self, folder: Path) -> None:
        self._paths = {canonical(path.name.removesuffix(".ko")): path for path in folder.rglob("*.ko")}
        built_in = (folder / "modules.builtin").read_text(encoding="ascii").split()
        self._built_in = {canonical(Path(line).name.removesuffix(".ko")) for line in built_in}
        self._parsed: dict[str, Module] = {}

    def module(self, name: str) -> Module:
        name = canonical(name)
        if name not in self._parsed:
            try:
                path = self._paths[name]
            except KeyError:
                raise ModuleMissing(name) from None
            self._parsed[name] = parse(name, path, path.read_bytes())
        return self._parsed[name]

    def closure(self, names: Iterable[str]) -> list[Module]:
        """These modules and all they need, each after what it needs, without built-in ones. Raises ModuleMissing."""
        order: dict[str, Module] = {}

        def add(name: str, chain: tuple[str, ...]) -> None:
            name = canonical(name)
            if name in order or name in self._built_in or name in chain:
                return
            module = self.module(name)
            for wanted in module.before:
                # "crc32c" names whatever implements it, and is no module: BOOT_MODULES lists the two that do.
                if wanted in self._paths:
                    add(wanted, (*chain, name))
            for needed in module.depends:
                add(needed, (*chain, name))
            order[name] = module

        for name in names:
            add(name, ())
        return list(order.values())


def dependency_table(modules: Iterable[Module]) -> str:
    """modules.dep: "path: paths that it needs", nearest first, as modprobe wants them. Flat folder of NAME.ko files."""
    by_name = {module.name: module for module in modules}

    def all_needed(name: str) -> list[str]:
        found: dict[str, None] = {}
        for needed in (*by_name[name].depends, *by_name[name].before):
            if needed in by_name:
                found[needed] = None
                for deeper in all_needed(needed):
                    # Later entries are loaded first, so what is needed by more must move to the end.
                    found.pop(deeper, None)
                    found[deeper] = None
        return list(found)

    return "".join(f"{name}.ko:{''.join(f' {needed}.ko' for needed in all_needed(name))}\n" for name in sorted(by_name))


def alias_table(modules: Iterable[Module]) -> str:
    """modules.alias: "alias PATTERN NAME" for each."""
    lines = [f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases]
    return "".join(sorted(lines))


def files(modules: Iterable[Module]) -> Mapping[str, bytes]:
    """Everything that lib/modules/VERSION must have: the modules, side by side, and the tables."""
    modules = list(modules)
    content = {f"{module.name}.ko": module.path.read_bytes() for module in modules}
    content["modules.dep"] = dependency_table(modules).encode()
    content["modules.alias"] = alias_table(modules).encode()
    return content
