"""The guest's file tree: what is unpacked, left out, compiled and added. Works in a folder; makes no file system of it.

Everything belongs to root and is read-only in the guest; what may be written is on another disk or in memory.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from guest.image.packages import (
    DEBIAN_PACKAGES,
    GUEST_PYTHON,
    PackageError,
    Pins,
    deb_path,
    unpack_deb,
    unpack_wheel,
)
from guest.image.tools import FILES

PROJECT = Path(__file__).resolve().parents[2]
"""The folder that has the packages `guest` and `vmcontrol`."""

MERGED = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
"""Debian's merged /usr."""

FOLDERS = ("data", "dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "usr/local/bin",
           "var/tmp", "var/lib", "var/cache", "var/log")  # fmt: skip
LINKS = {
    "etc/resolv.conf": "../run/resolv.conf",
    "etc/mtab": "../proc/self/mounts",
    "var/run": "../run",
    "usr/bin/python3": f"python{GUEST_PYTHON}",
    "usr/bin/python": f"python{GUEST_PYTHON}",
}
IN_SBIN = ("init", "modprobe", "poweroff", "reboot", "halt")
"""Applets that the kernel or custom look for in /sbin."""

DOCUMENTATION = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/bug",
                 "usr/share/info", "usr/share/doc-base", "usr/share/menu")  # fmt: skip
LEFT_OUT = (
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/libmvec*",
    "usr/lib/x86_64-linux-gnu/audit",
    *(
        f"usr/lib/python{GUEST_PYTHON}/{name}"
        for name in (
            *("test", "idlelib", "tkinter", "lib2to3", "pydoc_data", "ensurepip", "turtledemo", "distutils", "sqlite3"),
            *(
                "curses",
                "dbm",
                "unittest/test",
                "ctypes/test",
                "__phello__",
                "config-*",
                "turtle.py",
                "sitecustomize.py",
                "sitecustomize.py",
            ),
            *("lib-dynload/_test*", "lib-dynload/_codecs_*", "lib-dynload/xx*", "lib-dynload/_sqlite3*"),
            *("lib-dynload/_curses*", "lib-dynload/readline*", "lib-dynload/_dbm*", "lib-dynload/_gdbm*"),
            *("lib-dynload/nis*", "lib-dynload/_ctypes_test*"),
        )
    ),
    *(
        f"usr/lib/python3/dist-packages/{name}"
        for name in (
            *("**/test", "**/tests", "twisted/conch", "twisted/mail", "twisted/words", "twisted/trial", "twisted/pair"),
            *("twisted/positioning", "twisted/names", "twisted/plugins", "twisted/runner", "twisted/scripts"),
            *("**/*.c", "**/*.h", "**/*.pyi", "**/newsfragments"),
        )
    ),
)
"""What neither the agent nor a simple program needs (patterns of Path.glob)."""


def base_tree(tree: Path, downloads: Path, pins: Pins) -> None:
    """Unpack all packages but the kernel into the new folder `tree`, without what is left out."""
    tree.mkdir(parents=True)
    for link, target in MERGED.items():
        (tree / target).mkdir(parents=True, exist_ok=True)
        (tree / link).symlink_to(target)
    for name, version in sorted(pins.debian.items()):
        if name == pins.kernel:
            continue
        add_package(tree, deb_path(downloads, name, version))
    site = tree / "usr/lib/python3/dist-packages"
    for wheel in sorted(pins.python):
        unpack_wheel(downloads / "wheels" / wheel, site)
    _leave_out(tree, only_documentation=False)
    for name in FOLDERS:
        (tree / name).mkdir(parents=True, exist_ok=True)
    _make_links(tree)
    compile_python(tree, ["usr/lib/python3/dist-packages", f"usr/lib/python{GUEST_PYTHON}"], drop_source=True)
    if extra := set(pins.debian) - set(DEBIAN_PACKAGES) - {pins.kernel}:
        _configure_libraries(tree, extra)


def add_package(tree: Path, package: Path) -> None:
    """Lay a Debian package's files over the tree. Raises PackageError."""
    with tempfile.TemporaryDirectory(prefix=f"{package.name}-", dir=tree.parent) as work:
        unpack_deb(package, Path(work))
        overlay(tree, Path(work))


def _make_links(tree: Path) -> None:
    for link, target in LINKS.items():
        _link(tree / link, target)
    for applet in applets(tree / "usr/bin/busybox"):
        if not os.path.lexists(tree / "usr/bin" / applet):
            _link(tree / "usr/bin" / applet, "busybox")
    for applet in IN_SBIN:
        if not os.path.lexists(tree / "usr/sbin" / applet):
            _link(tree / "usr/sbin" / applet, "../bin/busybox")


def _leave_out(tree: Path, *, only_documentation: bool) -> None:
    for pattern in DOCUMENTATION if only_documentation else (*DOCUMENTATION, *LEFT_OUT):
        for path in list(tree.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _configure_libraries(tree: Path, extra: Iterable[str]) -> None:
    """Extra packages may keep libraries in folders of their own, found by ld.so.cache (BLAS, for example)."""
    folders = sorted(
        f"/{path.parent.relative_to(tree)}"
        for path in tree.glob("usr/lib/x86_64-linux-gnu/*/*.so.*")
        if path.parent.name in {"blas", "lapack", "atlas", "openblas-pthread"}
    )
    configuration = tree / "etc/ld.so.conf"
    configuration.parent.mkdir(exist_ok=True)
    configuration.write_text("".join(f"{folder}\n" for folder in dict.fromkeys(folders)), encoding="ascii")
    done = subprocess.run(
        ["/sbin/ldconfig", "-r", tree, "-X", "-f", "/etc/ld.so.conf", "-C", "/etc/ld.so.cache"],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PackageError(f"ldconfig failed for {', '.join(sorted(extra))}: {done.stderr.strip()}")
    shutil.rmtree(tree / "var/cache/ldconfig", ignore_errors=True)


def applets(busybox: Path) -> list[str]:
    """The commands of a busybox (a static program, which this computer can run)."""
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    return sorted(name for name in listed.stdout.split() if "/" not in name)


_COMPILE = """
import os, py_compile, sys
tree, *folders = sys.argv[1:]
for folder in folders:
    for here, inside, files in os.walk(os.path.join(tree, folder)):
        inside.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                path = os.path.join(here, name)
                try:
                    py_compile.compile(path, path + "c", path[len(tree):], doraise=True, quiet=2,
                        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
                except py_compile.PyCompileError:
                    continue  # templates and tests of old syntax
                print(path)
"""


def make_initramfs_tree(tree: Path, busybox: Path) -> None:
    """Add what starts the system, busybox and our init, to the modules in `tree`. /dev/console is the kernel's own."""
    for name in ("bin", "dev", "etc", "proc", "root", "sbin", "sys"):
        (tree / name).mkdir()
    shutil.copy(busybox, tree / "bin/busybox")
    _link(tree / "bin/sh", "busybox")
    _link(tree / "sbin/modprobe", "../bin/busybox")
    overlay(tree, FILES / "initramfs")
    set_modes(tree)


def compile_python(tree: Path, folders: Sequence[str], *, drop_source: bool) -> None:
    """Compile modules to name.pyc beside them, by the guest's own Python, which this computer runs with its own loader.

    Unchecked: Python does not look for the source at each import, so the source need not be there.
    """
    libraries = f"{tree}/usr/lib/x86_64-linux-gnu"
    command = [
        *(
            f"{tree}/usr/lib64/ld-linux-x86-64.so.2",
            "--library-path",
            libraries,
            f"{tree}/usr/bin/python{GUEST_PYTHON}",
        ),
        *("-s", "-S", "-B", "-c", _COMPILE, str(tree), *folders),
    ]
    environment = {"PYTHONHOME": f"{tree}/usr", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PATH": os.defpath}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise PackageError(f"the guest's Python failed to compile its modules:\n{done.stderr[-2000:]}")
    if drop_source:
        for line in done.stdout.splitlines():
            Path(line).unlink()
    for folder in folders:
        for cache in list((tree / folder).rglob("__pycache__")):
            shutil.rmtree(cache)


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Names that a module's source imports, anywhere in it: `a.b` and, for `from a import b`, both `a` and `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def agent_sources(project: Path = PROJECT) -> list[Path]:
    """The agent's modules, relative to `project`: `guest` but the recipe, and what that imports of `vmcontrol`."""
    found: dict[Path, None] = {}
    modules = (path.relative_to(project) for path in sorted((project / "guest").rglob("*.py")))
    todo = [path for path in modules if path.parts[:2] != ("guest", "image")]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found[path] = None
        todo += [parent / "__init__.py" for parent in path.parents if parent.name]
        package = ".".join(path.parent.parts)
        for name in imported_modules((project / path).read_text(encoding="utf-8"), package):
            place = Path(*name.split(".")) if name else Path()
            if place.parts[:1] != ("vmcontrol",) and place.parts[:1] != ("guest",):
                continue
            for candidate in (place.with_suffix(".py"), place / "__init__.py"):
                if (project / candidate).is_file():
                    todo.append(candidate)
    return sorted(found)


def add_agent(tree: Path, project: Path = PROJECT) -> None:
    """The agent's modules, compiled, where the guest's Python finds them."""
    site = "usr/lib/python3/dist-packages"
    for path in agent_sources(project):
        target = tree / site / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project / path, target)
    compile_python(tree, [f"{site}/guest", f"{site}/vmcontrol"], drop_source=True)


def overlay(tree: Path, files: Path) -> None:
    """Copy everything below `files` into the tree, links as links; what is there is replaced.

    Links of the tree are followed on the way, as the guest does, unless they lead out of it: PackageError.
    """
    for here, folders, names in os.walk(files):
        inside = Path(here).relative_to(files)
        for name in sorted(folders + names):
            source, target = Path(here) / name, tree / inside / name
            check_inside(tree, target)
            if source.is_symlink():
                _link(target, os.readlink(source))  # noqa: PTH115
            elif source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                # The tree's files are hard links into the cache: never write through them.
                target.unlink(missing_ok=True)
                shutil.copyfile(source, target)
                target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def check_inside(tree: Path, path: Path) -> None:
    """PackageError if `path`, below `tree`, would be made elsewhere: absolute links lead to this computer's folders."""
    if path != tree and not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(tree)):
        raise PackageError(f"{path.relative_to(tree)}: a link on the way leads out of the guest's tree")


def set_modes(tree: Path) -> None:
    """One mode for all: folders and programs 0755, others 0644: neither umask nor packages make a difference."""
    for here, folders, names in os.walk(tree):
        for name in folders + names:
            path = Path(here) / name
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o111 else 0o644)
