"""Logical names of the slot, resolved: the one module of the wrapper that does it.

The rule (docs/internals/link.md, "Links of the slot"): what a name leads to is what the client, or a program of the
job, has linked before any guest ran. Until then links are followed as they lie there, as BOINC does. When the first
guest task is about to start they are written down (`establish`), and from then on that list counts and no
link that lies in the slot: a file that came out of a guest, or was written by us, is never followed.
Later starts use the list.

Owns `vmwrapper_links.json` and `vmwrapper_links.previous.json`. Never makes or removes a link.

    LinkRefused         a name leads through a link that is not on the list, or to a file that is ours
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vmcontrol.common import beneath
from vmcontrol.common.slotfiles import GUEST_CONSOLE, LINKS, PREVIOUS_LINKS, VM_FOLDER
from vmwrapper.errors import BadInput
from vmwrapper.job.names import is_kept_by_us
from vmwrapper.names import VM_PREFIX
from vmwrapper.paths import is_there, listed
from vmwrapper.slot import Slot
from vmwrapper.state import links
from vmwrapper.state.generations import TwoGenerations
from vmwrapper.state.links import Kind, Link, SlotLinks

HOPS_LIMIT = 40
"""Links on the way of one name, as Linux."""
HOW_TO_BEGIN_ANEW = "begin in an empty folder"

log = logging.getLogger(__name__)


class LinkRefused(OSError):  # noqa: N818 (named for what was found)
    """The file cannot be used; `why` says it, as the end of a sentence that begins with its name."""

    def __init__(self, why: str, path: object) -> None:
        super().__init__(errno.ELOOP, why, str(path))
        self.why = why


class LogicalNames:
    """The names of one slot."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._folder = Path(os.path.realpath(slot.folder))
        self._files = TwoGenerations(slot.file(LINKS), slot.file(PREVIOUS_LINKS), links.SIZE_LIMIT, links.from_bytes)
        self._known = SlotLinks()
        self._links: dict[str, Link] | None = None
        """None: not established yet, links are followed as they lie there."""
        self.was_lost = False
        """There was a list once, and none can be read."""

    # --- the list

    @property
    def established(self) -> bool:
        return self._links is not None

    @property
    def folder(self) -> Path:
        """The slot, by a path without links."""
        return self._folder

    @property
    def base(self) -> Path | None:
        """The folder below which no link is to be followed when a file is opened; None: follow as the system does."""
        return self._folder if self.established else None

    def load(self) -> list[str]:
        """Read the list of an earlier start; what is wrong with it, in lines. Raises OSError for what may pass."""
        complaints: list[str] = []
        for path, known in self._files.readable(complaints):
            self._files.found_good(path)
            self._take(known)
            return complaints
        self.was_lost = bool(complaints)
        return complaints

    def _take(self, known: SlotLinks) -> None:
        self._known = known
        self._links = {link.name: link for link in known.links} if known.established else None

    def _keep(self, known: SlotLinks) -> None:
        """Durable on return. Raises OSError."""
        self._files.save(links.to_bytes(known))
        self._take(known)

    def establish(self, wanted: Iterable[str]) -> None:
        """No guest has run: write down the links that there are. Durable on return. Nothing the second time.

        wanted: names of the job file. Raises OSError.
        """
        if self.established:
            return
        found, complete = links.scan_links(self._folder, filter(None, map(self._name, wanted)))
        if not complete:
            log.warning(
                "the slot has more than %d files: of the others only those that the job file names may be links",
                links.ENTRIES_LIMIT,
            )
        unpacked = set(self._known.unpacked)
        kept = [link for link in found.values() if link.kind != Kind.SOFT_LINK or link.name not in unpacked]
        self._keep(SlotLinks(True, tuple(sorted(kept, key=lambda link: link.name)), self._known.unpacked))
        symbolic = sum(link.kind != Kind.HARD_LINK for link in kept)
        log.debug("%d links of the slot are written down: no other one is followed from now on", symbolic)

    def recover(
        self, wanted: Collection[str], written: Collection[str], project_dir: Path | None, result: str, why: str
    ) -> None:
        """A guest may have run and there is no list: take the links that cannot be a guest's doing.

        That is: names of the job file (`wanted`) that lead into the project's folder; those that a guest's files get
        (`written`), to files of this result only, which the client names after it. Raises BadInput for any other link
        of such a name, and OSError.
        """
        by_guest = {name for name in map(self._name, written) if name}
        found: dict[str, Link] = {}
        project = Path(os.path.realpath(project_dir)) if project_dir is not None else None
        for name in filter(None, map(self._name, wanted)):
            for step in (*reversed(PurePosixPath(name).parents), PurePosixPath(name)):
                link = links.find_link(self._folder, str(step)) if step.name else None
                if link is None or link.kind == Kind.HARD_LINK:
                    continue
                target = Path(os.path.realpath(self._folder / PurePosixPath(link.name).parent / link.target))
                if link.kind == Kind.SOFT_LINK:
                    target = Path(os.path.realpath(self._folder / link.target))
                if not _is_of_project(target, project) or (
                    link.name in by_guest and not (result and target.name.startswith(f"{result}_"))
                ):
                    raise BadInput(
                        f"{why}: which links were there before the guest ran is not known, and {link.name} leads to"
                        f" {target}, which is no file of this job in the project's folder. It is not followed:"
                        f" {HOW_TO_BEGIN_ANEW}"
                    )
                found[link.name] = link
        log.warning("%s: %d links into the project's folder are taken: %s", why, len(found), listed(sorted(found)))
        self._keep(SlotLinks(True, tuple(found[name] for name in sorted(found)), ()))

    def note_unpacked(self, name: str) -> None:
        """A file that is about to come out of an archive looks like a link: it is none. Raises OSError."""
        if not self.established and name not in self._known.unpacked:
            self._keep(replace(self._known, unpacked=(*self._known.unpacked, name)))

    # --- names

    def _name(self, logical: str | os.PathLike[str]) -> str:
        """The name relative to the slot; "" for what is not below it."""
        try:
            parts = beneath.parts_below(self._folder / logical, self._folder)
        except ValueError:
            return ""
        return "/".join(parts or ())

    def is_same(self, logical: str, other: str) -> bool:
        """Whether two names are the same file of the slot."""
        name = self._name(logical)
        return bool(name) and name == self._name(other)

    def resolve(self, logical: str) -> Path:
        """What boinc_resolve_filename gives: where a soft link leads, relative to the slot; else the name itself."""
        if self._links is None:
            if self._known.unpacked and self._name(logical) in self._known.unpacked:
                return Path(logical)
            target = links.read_soft_link(self._slot.folder / logical)
            return Path(logical) if target is None else Path(target)
        link = self._links.get(self._name(logical))
        return Path(link.target) if link is not None and link.kind == Kind.SOFT_LINK else Path(logical)

    def link_text(self, logical: str) -> str:
        """The text of a link of either form; "" when the name is none."""
        name = self._name(logical)
        link = links.find_link(self._folder, name) if self._links is None else self._links.get(name)
        return link.target if link is not None and name not in self._known.unpacked else ""

    def links_now(self) -> list[str]:
        """Names of the slot itself that look like links now; which of them are followed is another matter."""
        return links.top_links(self._folder)

    def text_now(self, name: str) -> str:
        """The text of what looks like a link now, for messages; "" when it is none."""
        link = links.find_link(self._folder, name)
        return link.target if link is not None else ""

    def source(self, logical: str) -> Path:
        """Where the bytes of a name are, to be read; it need not exist. Raises LinkRefused.

        A link that a program of the job has made after the first guest task may lead to another file of the slot,
        and to none of the client's or ours.
        """
        path = self._slot.folder / self.resolve(logical)
        if self._links is None:
            return path
        strict, now = self._follow(path, self._listed), self._follow(path, self._listed_or_there)
        if now != strict:
            parts = beneath.parts_below(now, self._folder)
            if not parts or _is_ours(parts):
                raise LinkRefused(beneath.LINK_WORDS, path)
        self._check_names(now)
        return now

    def target(self, logical: str) -> Path:
        """Where a file that replaces what has this name is to be put. Raises LinkRefused."""
        path = self._slot.folder / self.resolve(logical)
        if self._links is None:
            return Path(os.path.realpath(path))
        return self._writable(self._follow(path, self._listed))

    def appended(self, logical: str) -> Path:
        """A file to which a stream is appended; to be opened below `base`. Raises LinkRefused."""
        path = self._slot.folder / self.resolve(logical)
        if self._links is None:
            return path
        found = self._writable(self._follow(path, self._listed))
        self._check_names(found)
        return found

    def _writable(self, path: Path) -> Path:
        parts = beneath.parts_below(path, self._folder)
        if parts is not None:
            if not parts or _is_ours(parts):
                raise LinkRefused("is a file that the BOINC client or vmwrapper uses itself", path)
            try:
                beneath.refuse_links(self._folder, parts[:-1])
            except OSError as error:
                raise LinkRefused(beneath.LINK_WORDS, path) from error
        return path

    def outside_targets(self) -> list[Path]:
        """Files outside of the slot that its links lead to."""
        names = self._links if self._links is not None else self.links_now()
        found = (self._follow(self._folder / self.resolve(name), self._listed_or_there) for name in names)
        return [path for path in found if beneath.parts_below(path, self._folder) is None]

    # --- following

    def _follow(self, path: Path, link_at: Callable[[Path], str | None]) -> Path:
        """The path without links: like os.path.realpath, with `link_at` to say what a link is."""
        path = self._folder / path
        done, todo = Path(path.anchor), list(reversed(path.parts[1:]))
        hops = 0
        while todo:
            part = todo.pop()
            if part == "..":
                done = done.parent
                continue
            text = link_at(done / part)
            if text is None:
                done /= part
                continue
            hops += 1
            if hops > HOPS_LIMIT:
                raise LinkRefused("leads through too many links", path)
            target = Path(text)
            if target.is_absolute():
                done = Path(target.anchor)
            todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        return done

    def _listed(self, path: Path) -> str | None:
        """Below the slot the list counts; elsewhere the volunteer's own links do."""
        parts = beneath.parts_below(path, self._folder)
        if not parts:
            return None if path.parts[1:2] == ("proc",) else _text_of(path)  # the kernel's: /dev/stdout leads to one
        link = (self._links or {}).get("/".join(parts))
        return link.target if link is not None and link.kind == Kind.SYMLINK else None

    def _listed_or_there(self, path: Path) -> str | None:
        return self._listed(path) or _text_of(path)

    def _check_names(self, path: Path) -> None:
        """A file with several names: it was there, or all its names are in the slot. Raises LinkRefused."""
        if beneath.parts_below(path, self._folder) is None:
            return
        try:
            status = path.lstat()
        except (OSError, ValueError):
            return
        if not stat.S_ISREG(status.st_mode) or status.st_nlink < 2:
            return
        number = (status.st_dev, status.st_ino)
        if any((link.device, link.inode) == number for link in (self._links or {}).values()):
            return
        if _names_of(self._folder, number) < status.st_nlink:
            raise LinkRefused("has another name outside of the slot, which it got after the first guest task", path)


def guest_has_left_traces(slot: Slot) -> bool:
    """Whether a guest may have run in this slot, whatever the checkpoint says.

    A VM that somebody put there to be used by the job, as QEMU's existing ones are, has not run for it yet.
    """
    try:
        ours = any(entry.name.startswith(VM_PREFIX) for entry in os.scandir(slot.vm_folder))
    except OSError:
        ours = False
    return ours or is_there(slot.file(GUEST_CONSOLE))


def _text_of(path: Path) -> str | None:
    try:
        return os.fspath(path.readlink()) if path.is_symlink() else None
    except (OSError, ValueError):  # ValueError: no file can have such a name
        return None


def _is_ours(parts: tuple[str, ...]) -> bool:
    first = parts[0].casefold()  # as Windows and macOS compare names
    return first == VM_FOLDER or is_kept_by_us(first)


def _is_of_project(target: Path, project: Path | None) -> bool:
    return project is not None and target != project and target.is_relative_to(project)


def _names_of(folder: Path, number: tuple[int, int]) -> int:
    """How many names below a folder belong to one file."""
    count = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(Path(place, name))
            except OSError:
                continue
            count += (status.st_dev, status.st_ino) == number
    return count
