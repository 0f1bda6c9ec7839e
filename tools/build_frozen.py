"""Builds the frozen executables `vmwrapper` and `vmmain` in a clean virtual environment: one command, one file each.

    python3 tools/build_frozen.py [--output FOLDER] [--python PYTHON] [--without-libboinc] [--again]

Only the standard library: it runs before anything is installed. Owns .cache/frozen: the environment (made anew when
packaging/constraints.txt, pyproject.toml or the Python change), PyInstaller's work folder, and the output unless
another is named. What was built from the same sources is not built again.

The Python has to be Debian's (or another with a shared libpython): what it needs of the C library is what the
executable needs. libboinc_api comes from Debian's libboinc-app7. See docs/internals/frozen.md.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "frozen"
CONSTRAINTS = ROOT / "packaging" / "constraints.txt"
PROGRAMS = ("vmwrapper", "vmmain")
LIBBOINC = ("libboinc_api.so.7", "libboinc.so.7")
SOURCE_DATE_EPOCH = "1700000000"
"""Any fixed second: what PyInstaller writes times from."""


class BuildError(Exception):
    """The build cannot be done; `str` says why and what to do."""


def main(words: list[str] | None = None) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(prog="build_frozen", description="Build the frozen executables.")
    parser.add_argument("--output", type=Path, default=CACHE / "dist", help="folder for the executables")
    parser.add_argument("--python", default=default_python(), help="the Python that is frozen (default: %(default)s)")
    parser.add_argument("--without-libboinc", action="store_true", help="leave BOINC's own runtime out")
    parser.add_argument("--again", action="store_true", help="build also if nothing has changed")
    options = parser.parse_args(words)
    try:
        found = build(
            options.output.resolve(), python=options.python, libboinc=not options.without_libboinc, again=options.again
        )
    except BuildError as error:
        print(f"build_frozen: {error}", file=sys.stderr)
        return 1
    for path in found:
        print(f"{path} {path.stat().st_size / 1e6:.1f} MB")
    return 0


def default_python() -> str:
    """Debian's own where it is new enough: not whatever comes first on somebody's PATH."""
    return "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable


def build(output: Path, *, python: str, libboinc: bool = True, again: bool = False) -> list[Path]:
    """The executables. Raises BuildError. One build at a time; what is there from the same sources is taken."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        version = _check_python(python)
        libraries = find_libboinc() if libboinc and sys.platform.startswith("linux") else []
        key = source_key(version, libraries)
        programs = [output / name for name in PROGRAMS]
        stamp = output / "build.json"
        current = stamp.exists() and json.loads(stamp.read_text()).get("key") == key
        if current and not again and all(program.exists() for program in programs):
            return programs
        environment = _environment(python, version)
        _freeze(environment, libraries, output)
        stamp.write_text(json.dumps({"key": key, "python": version}) + "\n")
        return programs


def source_key(version: str, libraries: list[Path]) -> str:
    """Changes with everything that the executables are made of."""
    digest = hashlib.sha256(version.encode())
    for path in [*_sources(), *libraries]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    for folder in ("vmwrapper", "vmcontrol", "guest", "packaging"):
        yield from sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".spec", ".txt"))
    yield from (ROOT / "pyproject.toml", ROOT / "COPYING", ROOT / "COPYING.LESSER", Path(__file__).resolve())


def find_libboinc() -> list[Path]:
    """BOINC's libraries, where Debian's libboinc-app7 and libboinc7 put them. Raises BuildError."""
    for folder in sorted(Path("/usr/lib").glob("*-linux-gnu")):
        found = [folder / name for name in LIBBOINC]
        if all(path.exists() for path in found):
            return found
    raise BuildError("libboinc_api is not there: install Debian's libboinc-app7, or build --without-libboinc")


def _check_python(python: str) -> str:
    """Its version and where it is. Raises BuildError when it cannot be frozen."""
    code = (
        "import sys, sysconfig; v = sysconfig.get_config_var; from pathlib import Path; "
        "there = any((Path(v('LIBDIR')) / d / v('INSTSONAME')).exists() for d in ('', v('MULTIARCH') or '')); "
        "print(sys.version_info >= (3, 11), there or sys.platform == 'win32', sys.base_prefix, sys.version)"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{python} cannot be run: {error}") from error
    new, shared, rest = done.stdout.strip().split(" ", 2)
    if new != "True":
        raise BuildError(f"{python} is older than 3.11")
    if shared != "True":
        raise BuildError(f"{python} has no shared libpython: install Debian's libpython3.11, or name another Python")
    return rest


def _environment(python: str, version: str) -> Path:
    """The clean virtual environment's Python: our dependencies, PyInstaller, nothing else."""
    folder = CACHE / "venv"
    stamp = folder / "frozen.stamp"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["frozen"]]
    key = hashlib.sha256(json.dumps([version, wanted, CONSTRAINTS.read_text(), str(folder)]).encode()).hexdigest()
    inside = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if stamp.exists() and stamp.read_text() == key and inside.exists():
        return inside
    shutil.rmtree(folder, ignore_errors=True)
    _run([python, "-m", "venv", str(folder)], "making the environment (Debian: python3-venv)")
    _run(
        [
            *(str(inside), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"),
            *("--constraint", str(CONSTRAINTS), *wanted),
        ],
        "installing what is frozen",
    )
    stamp.write_text(key)
    return inside


def _freeze(python: Path, libraries: list[Path], output: Path) -> None:
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    generated = work / "generated"
    generated.mkdir(parents=True)
    _run(
        [str(python), str(ROOT / "packaging" / "collect_licenses.py"), str(generated / "frozen_licenses.py"),
         *map(str, libraries)],
        "collecting licences",
    )  # fmt: skip
    environment = {
        **os.environ,
        "FROZEN_GENERATED": str(generated),
        "FROZEN_LIBBOINC": str(libraries[0].parent) if libraries else "",
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYINSTALLER_CONFIG_DIR": str(work / "config"),
    }
    new = work / "dist"
    _run(
        [
            *(str(python), "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN"),
            *("--distpath", str(new), "--workpath", str(work / "build")),
            str(ROOT / "packaging" / "frozen.spec"),
        ],
        "PyInstaller",
        environment,
    )
    output.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        (new / name).replace(output / name) if new.stat().st_dev == output.stat().st_dev else shutil.copy2(
            new / name, output / name
        )
    shutil.rmtree(work)


def _run(command: list[str], what: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{what} failed:\n{(done.stdout + done.stderr)[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
