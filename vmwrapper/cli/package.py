"""`vmwrapper package`: an app version for a BOINC project, as a folder that bin/update_versions takes as it is.

    APPS/<app>/<version>/<platform>/    physical files, and version.xml, which gives them their logical names

The job file says what belongs to it. Physical names carry the version, for BOINC's files never change; those of the two
large files, executable and image, carry their content's hash instead, so that a new version with the same ones costs
nobody a download. The same input makes the same bytes. What a folder has to be: tools/update_versions of BOINC.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import lzma
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NoReturn
from xml.sax.saxutils import escape

from vmcontrol.common.slotfiles import JOB_FILE
from vmcontrol.hypervisors.common import diskimage
from vmwrapper import __version__
from vmwrapper.cli import console
from vmwrapper.errors import BadInput
from vmwrapper.exit_status import ExitStatus
from vmwrapper.job import commandline, parse
from vmwrapper.job.filenames import DESCRIPTION_SUFFIX
from vmwrapper.job.model import Job, Program, Task, UnzipTask, VmManageTask
from vmwrapper.vm import container_check, shipped_image
from vmwrapper.vm.decisions import files_in, files_out

API_VERSION = "7.20.5"
"""Of the BOINC library whose form of shared memory we speak: update_versions cannot read it from our executable."""
COMPRESSIONS = ("xz", "gzip", "none")
MAX_NAME = 200
"""Characters of a physical name; the server's column has 254."""
_PIECE = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[0-9]+(\.[0-9]{1,2})?")


class PackageError(Exception):
    """The app version cannot be made; `lines` say why, each for itself."""

    def __init__(self, *lines: str) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for."""

    job_file: Path
    app: str
    version: str
    executables: tuple[tuple[str, Path], ...]
    """Platform, with __ and a plan class if there is one, and file."""
    output: Path
    compression: str = "xz"
    preset: int = 6
    """Of xz: 0 is fast, 9 small."""
    inputs: frozenset[str] = frozenset()
    """Logical names that come with each workunit."""
    files: dict[str, Path] = field(default_factory=dict)
    """Further files, or where one is that does not lie beside the job file, by logical name."""
    copied: frozenset[str] = frozenset()
    """Logical names that are copied into the slot rather than linked."""
    api_version: str = API_VERSION


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the app version. path: its content; physical: its name there."""

    physical: str
    path: Path
    logical: str = ""
    main_program: bool = False
    copied: bool = False
    gzip: bool = False

    def xml(self) -> str:
        flags = (("main_program", self.main_program), ("copy_file", self.copied), ("gzip", self.gzip))
        return (
            f"    <file>\n        <physical_name>{escape(self.physical)}</physical_name>\n"
            + (f"        <logical_name>{escape(self.logical)}</logical_name>\n" if self.logical else "")
            + "".join(f"        <{name}/>\n" for name, given in flags if given)
            + "    </file>\n"
        )


# --- the command


def run(words: Sequence[str]) -> int:
    """The subcommand; its exit status: 0, or 206 with what is wrong on stderr."""
    try:
        folders, notes = make(wanted_by(words))
    except PackageError as error:
        for line in error.lines:
            _say(f"vmwrapper package: {line}", error=True)
        return ExitStatus.INIT_FAILURE
    except OSError as error:
        _say(f"vmwrapper package: {error.filename or ''}: {error.strerror}", error=True)
        return ExitStatus.INIT_FAILURE
    for note in notes:
        _say(f"note: {note}", error=True)
    for folder in folders:
        _say(f"{folder}:")
        for path in sorted(folder.iterdir()):
            _say(f"    {path.stat().st_size:>12}  {path.name}")
    return ExitStatus.DONE


def _say(line: str, *, error: bool = False) -> None:
    console.say(line, sys.stderr if error else sys.stdout)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PackageError(f"{message} (vmwrapper package --help says more)")


def wanted_by(words: Sequence[str]) -> Wanted:
    """The command line, understood. Raises PackageError; --help ends the process."""
    parser = _Parser(
        prog="vmwrapper package",
        allow_abbrev=False,
        description="Makes an app version for BOINC's bin/update_versions: APPS/APP/VERSION/PLATFORM/ with version.xml."
        " Files that the job file names are taken from its folder.",
    )
    parser.add_argument("job_file", nargs="?", type=Path, default=Path(JOB_FILE), metavar="JOB_FILE")
    parser.add_argument("--app", required=True, help="short name of the application, as in project.xml")
    parser.add_argument("--app-version", required=True, metavar="VERSION", help="such as 1.00; MINOR below 100")
    parser.add_argument(
        "--executable", action="append", default=[], metavar="PLATFORM=FILE",
        help="the frozen vmwrapper for a platform, such as x86_64-pc-linux-gnu; again for each platform;"
        " PLATFORM__PLANCLASS for a plan class",
    )  # fmt: skip
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME", help="a file that comes with each workunit"
    )
    parser.add_argument(
        "--file", action="append", default=[], metavar="NAME[=PATH]",
        help="a further file, or where one is that does not lie beside the job file",
    )  # fmt: skip
    parser.add_argument(
        "--copy", action="append", default=[], metavar="NAME",
        help="the file is copied into the slot: for host programs that know nothing of BOINC's links",
    )  # fmt: skip
    parser.add_argument(
        "--image-compression", choices=COMPRESSIONS, default="xz",
        help="xz: vmwrapper unpacks (smallest); gzip: the BOINC client unpacks; none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--xz-preset", type=int, choices=range(10), default=6, metavar="N", help="0: fast, 9: small (default: 6)"
    )
    parser.add_argument("--api-version", default=API_VERSION, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("apps"), metavar="APPS", help="default: ./%(default)s")
    given = parser.parse_args(list(words))
    return Wanted(
        job_file=given.job_file,
        app=given.app,
        version=given.app_version,
        executables=tuple(_pair(word, "--executable") for word in given.executable),
        output=given.output,
        compression=given.image_compression,
        preset=given.xz_preset,
        inputs=frozenset(given.input),
        files={
            name: Path(path) if path else given.job_file.parent / name
            for name, _, path in (word.partition("=") for word in given.file)
        },
        copied=frozenset(given.copy),
        api_version=given.api_version,
    )


def _pair(word: str, option: str) -> tuple[str, Path]:
    name, equals, path = word.partition("=")
    if not equals or not name or not path:
        raise PackageError(f"{option} needs PLATFORM=FILE, not {word!r}")
    return name, Path(path)


# --- making it


def make(wanted: Wanted) -> tuple[list[Path], list[str]]:
    """The folders, one for each platform, and what should be known of them.

    Nothing is there under its name before it is whole. Raises PackageError, and OSError of the computer.
    """
    _check_names(wanted)
    job = _read_job(wanted.job_file)
    inventory = needed(job, wanted)
    found, complaints = inventory.found, inventory.complaints
    targets = [wanted.output / wanted.app / wanted.version / platform for platform, _ in wanted.executables]
    complaints += [
        f"{target} is there already: an app version never changes, so this needs another version"
        for target in targets
        if target.exists()
    ]
    complaints += [
        f"{file}: is no executable file"
        for _, file in wanted.executables
        if not (file.is_file() and os.access(file, os.X_OK))
    ]
    images = sorted({task.guest.image for task in job.tasks if task.guest is not None and task.guest.image})
    complaints += [text for name in images if name in found for text in _faults_of_image(found[name])]
    disks = {task.guest.container for task in job.tasks if task.guest is not None and task.guest.container}
    complaints += container_check.faults(job, lambda name: found.get(name, wanted.job_file.parent / name))
    if complaints:
        raise PackageError(*complaints)
    wanted.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".package-", dir=wanted.output) as scratch:
        common = list(_entries(wanted, inventory, sorted({*images, *disks}), Path(scratch)))
        for (platform, file), target in zip(wanted.executables, targets, strict=True):
            _lay_out([_executable(platform, file), *common], wanted, Path(scratch) / f"{platform}.new", target)
    return targets, inventory.notes


def _check_names(wanted: Wanted) -> None:
    complaints = []
    if not _NAME.fullmatch(wanted.app):
        complaints.append(f"--app: {wanted.app!r} is no name of an application (letters, digits, . _ -)")
    if not _VERSION.fullmatch(wanted.version):
        complaints.append(f"--app-version: {wanted.version!r} is not of the form MAJOR.MINOR with MINOR below 100")
    if not wanted.executables:
        complaints.append(
            "--executable PLATFORM=FILE is missing: the frozen vmwrapper (tools/build_frozen.py makes it)"
        )
    platforms = [platform for platform, _ in wanted.executables]
    complaints += [f"--executable: {one!r} is no name of a platform" for one in platforms if not _NAME.fullmatch(one)]
    complaints += [f"--executable: {one} comes twice" for one in sorted(set(platforms)) if platforms.count(one) > 1]
    if complaints:
        raise PackageError(*complaints)


def _read_job(path: Path) -> Job:
    try:
        findings = parse.examine_file(path, str(path))
    except BadInput as error:
        raise PackageError(str(error)) from error
    if findings.job is None or findings.complaints:
        raise PackageError(*(str(complaint) for complaint in findings.complaints))
    return findings.job


def needed(job: Job, wanted: Wanted) -> Inventory:
    """What the job file names, looked for in the order in which the job needs it."""
    inventory = Inventory(wanted)
    for name in wanted.files:
        inventory.want(name, "--file")
    for name in job.unzip_inputs:
        inventory.want(name, f"{wanted.job_file}: <unzip_input>")
    inventory.anything_made = bool(job.unzip_inputs)
    for program in (*job.unzip_tasks, *job.vmmanage_tasks, *job.daemons, *job.tasks):
        if isinstance(program, Task) and program.guest is not None:
            inventory.add_guest_task(program, program.guest.image)
        else:
            inventory.add_host_program(program)
    inventory.check_options()
    return inventory


class Inventory:
    """The files of an app version by logical name, without the executable."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.found: dict[str, Path] = {JOB_FILE: wanted.job_file}
        self.copied = set(wanted.copied)
        self.complaints: list[str] = []
        """What is missing."""
        self.notes: list[str] = []
        """What should be known."""
        self.anything_made = False
        """A program on the host runs before: it may make any file."""
        self._made: set[str] = set()

    def want(self, name: str, where: str, *, optional: bool = False) -> bool:
        """Whether a file is there, or will be when it is needed."""
        name = str(PurePosixPath(name))
        path = self._wanted.files.get(name) or self._wanted.job_file.parent / name
        if name in self._wanted.inputs or name in self._made or name in self.found:
            return True
        if path.is_file():
            self.found[name] = path
            return True
        if not optional:
            self.complaints.append(
                f"{where}: {name} is not at {path}; --file {name}=PATH says where it is, --input {name} that workunits"
                " bring it"
            )
        return False

    def add_guest_task(self, task: Task, image: str) -> None:
        for copy in files_in(task):
            self.want(copy.logical, self._place(task, copy.what), optional=self.anything_made)
        if image:
            self.want(image, self._place(task, "image"), optional=self.anything_made)
        if task.guest is not None and task.guest.container:
            self.want(task.guest.container, self._place(task, "container"), optional=self.anything_made)
        self._made |= {one.remote for one in files_out(task)}
        self._add_streams(task)

    def add_host_program(self, program: Program) -> None:
        is_ours = isinstance(program, VmManageTask) and program.is_host_main
        if not is_ours:
            self._add_application(program)
        if program.stdin_filename:
            self.want(program.stdin_filename, self._place(program, "stdin_filename"), optional=self.anything_made)
        for word in commandline.split(program.command_line):
            if word.startswith("./") and not word.endswith("HostMain.py"):
                optional = self.anything_made or not (is_ours or isinstance(program, UnzipTask))
                self.want(word, self._place(program, "command_line"), optional=optional)
                if is_ours:  # HostMain's configuration
                    self.copied.add(str(PurePosixPath(word)))
        self.anything_made = self.anything_made or not isinstance(program, VmManageTask)
        self._add_streams(program)

    def _add_application(self, program: Program) -> None:
        """A file of the app version, or a command of the volunteer's computer."""
        name, where = program.application, self._place(program, "application")
        if "$PROJECT_DIR" in name or Path(name).is_absolute():
            self.notes.append(f"{where}: {name} has to be on the volunteer's computer already")
        elif "/" in name:
            self.want(name, where, optional=self.anything_made)
        elif not self.want(name, where, optional=True):
            self.notes.append(f"{where}: {name} is no file of the app version: taken from the volunteer's PATH")

    def _add_streams(self, program: Program) -> None:
        streams = (program.stdout_filename, program.stderr_filename)
        self._made |= {str(PurePosixPath(name)) for name in streams if name}

    def _place(self, program: Program, element: str) -> str:
        return f"{self._wanted.job_file}:{program.line}: <{element}>"

    def check_options(self) -> None:
        for name in sorted(self._wanted.copied - set(self.found)):
            self.complaints.append(f"--copy: {name} is no file of the app version")
        for name in sorted(self._wanted.inputs & set(self._wanted.files)):
            self.complaints.append(f"--input and --file: {name} cannot be both")


def _faults_of_image(path: Path) -> Iterator[str]:
    try:
        diskimage.inspect(path)
    except diskimage.BadImage as error:
        yield f"{path}: {error}"


def _entries(wanted: Wanted, inventory: Inventory, images: Sequence[str], scratch: Path) -> Iterator[Entry]:
    for logical, path in sorted(inventory.found.items()):
        if logical in images:
            yield from _image_entries(wanted, logical, path, scratch)
            continue
        yield Entry(_physical(wanted.app, wanted.version, logical), path, logical, copied=logical in inventory.copied)


def _physical(*parts: str) -> str:
    """One name of what makes it up; characters that URLs or shells mind are replaced."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", "_".join(parts))[-MAX_NAME:]


def _executable(platform: str, file: Path) -> Entry:
    name = _physical("vmwrapper", __version__, platform, _sha256(file)[:12])
    return Entry(f"{name}.exe" if file.suffix == ".exe" else name, file, main_program=True)


def _image_entries(wanted: Wanted, logical: str, path: Path, scratch: Path) -> Iterator[Entry]:
    if wanted.compression != "xz":
        stem, suffix = PurePosixPath(logical).stem, PurePosixPath(logical).suffix
        physical = _physical(wanted.app, stem, _sha256(path)[:12]) + suffix
        yield Entry(physical, path, logical, gzip=wanted.compression == "gzip")
        return
    packed = scratch / _physical("packed", logical)
    with path.open("rb") as source, lzma.open(packed, "wb", check=lzma.CHECK_CRC64, preset=wanted.preset) as target:
        shutil.copyfileobj(source, target, _PIECE)
    description = replace(shipped_image.describe(path), packed_size=packed.stat().st_size)
    said = scratch / _physical("described", logical)
    said.write_bytes(description.to_json())
    name = PurePosixPath(logical)
    yield Entry(_physical(wanted.app, name.stem, _sha256(packed)[:12]) + f"{name.suffix}.xz", packed, logical)
    described = f"{logical}{DESCRIPTION_SUFFIX}"
    yield Entry(_physical(wanted.app, wanted.version, described), said, described)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lay_out(entries: Sequence[Entry], wanted: Wanted, fresh: Path, target: Path) -> None:
    """All files and version.xml in a new folder, which then takes its place."""
    names = [entry.physical for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PackageError(f"two files would be called {', '.join(twice)}")
    fresh.mkdir()
    for entry in entries:
        place = fresh / entry.physical
        with contextlib.suppress(OSError):  # several platforms share a packed image of gigabytes
            if entry.path.parent == fresh.parent:
                place.hardlink_to(entry.path)
        if not place.exists():
            shutil.copyfile(entry.path, place)
        executable = entry.main_program or os.access(entry.path, os.X_OK)
        place.chmod(0o755 if executable else 0o644)
    (fresh / "version.xml").write_text(
        "<version>\n"
        + "".join(entry.xml() for entry in entries)
        + f"    <api_version>{escape(wanted.api_version)}</api_version>\n</version>\n",
        encoding="utf-8",
        newline="\n",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh.chmod(0o755)
    fresh.rename(target)
