"""The command line, as data. Pure: words in, a request out; no file is opened and nothing is printed.

Two forms, told apart by whether a BOINC client started us:

- Standalone: `vmwrapper [options] [JOB_FILE] [ARGS...]`, `vmwrapper check [FILE]`, `vmwrapper package ...`, `vmwrapper
  convert ...`, `vmwrapper doctor`, `vmwrapper licenses`. Options come first; `--` ends them; everything after the job
  file goes to the tasks as it stands.
- Under a client every word has its meaning from BOINC's own wrapper (samples/wrapper/wrapper.cpp, main): its options
  are taken wherever they stand, every other word is appended to the command line of every task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmwrapper import cvalues
from vmwrapper.options import BoincRuntimeKind, RunOptions

RUNTIME_KINDS: tuple[BoincRuntimeKind, ...] = ("auto", "library", "python")
RUNTIME_VARIABLE = "VMWRAPPER_BOINC_RUNTIME"
"""Environment variable with the kind of runtime; the option --boinc-runtime wins over it."""

USAGE = """\
usage: vmwrapper [options] [JOB_FILE] [ARGS...]
       vmwrapper check [JOB_FILE]
       vmwrapper package --app APP --app-version VERSION --executable PLATFORM=FILE [options] [JOB_FILE]
       vmwrapper convert [options] JOB_TOML
       vmwrapper doctor
       vmwrapper licenses

Runs the tasks of a job file, on this computer or in virtual machines, in the current directory as the slot.
JOB_FILE is a first argument that ends in .xml or is an existing file; without one it is the logical name job.xml.
ARGS are appended to the command line of every task.

  check    says what is wrong with a job file: exit status 0 when nothing is, else 206
  package  makes an app version for a BOINC project (vmwrapper package --help): exit status 0, or 206
  convert  writes a job.xml from docker_wrapper's job.toml (vmwrapper convert --help): exit status 0, or 206
  doctor   says whether this computer can run virtual machines: exit status 0 when it can, else 1
  licenses the licences of everything that is in this program

options (before the job file):
  --help                    this text
  --version                 the version
  --boinc-runtime KIND      auto, library or python (default: $VMWRAPPER_BOINC_RUNTIME, else auto)
  --nthreads N              number of processors the tasks may use
  --device N                number of the GPU the tasks may use
  --trickle SECONDS         send a trickle-up message with the run time so far this often
  --sporadic                pass messages of sporadic apps on in the files ac and ca
  --use_tstp                suspend host tasks with SIGTSTP instead of SIGSTOP
  --passthrough_child ARGS  everything that follows goes to guest tasks, and to host tasks with append_cmdline_args
  --                        end of the options
"""

_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class UsageError(Exception):
    """The words cannot be understood; `str` is one sentence. Exit status 206."""


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """`vmwrapper check`: say what is wrong with a job file."""

    job_file: Path | None = None
    """None: the logical name job.xml."""


@dataclass(frozen=True, slots=True)
class PackageRequest:
    """`vmwrapper package`: an app version for a project. words: after `package`; vmwrapper.cli.package knows them."""

    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """`vmwrapper convert`: a job.xml from a job.toml. words: after `convert`; vmwrapper.cli.convert knows them."""

    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DoctorRequest:
    """`vmwrapper doctor`: can this computer run virtual machines?"""


@dataclass(frozen=True, slots=True)
class LicensesRequest:
    """`vmwrapper licenses`: the licences of everything inside."""


@dataclass(frozen=True, slots=True)
class ShowHelp:
    """--help."""


@dataclass(frozen=True, slots=True)
class ShowVersion:
    """--version."""


Request = (
    RunOptions
    | CheckRequest
    | PackageRequest
    | ConvertRequest
    | DoctorRequest
    | LicensesRequest
    | ShowHelp
    | ShowVersion
)


def parse_arguments(
    words: Sequence[str], *, under_client: bool, environment: Mapping[str, str], is_file: Callable[[str], bool]
) -> Request:
    """What the command line asks for.

    words: without the program's name. is_file: whether a word names an existing file (used standalone only).
    Raises UsageError.
    """
    options = RunOptions(under_client=under_client, boinc_runtime=_runtime_kind(environment.get(RUNTIME_VARIABLE, "")))
    if under_client:
        return _under_client(words, options)
    return _standalone(words, options, is_file)


def _under_client(words: Sequence[str], options: RunOptions) -> Request:
    extra: list[str] = []
    position = 0
    while position < len(words):
        if words[position] in ("--version", "-v"):
            return ShowVersion()
        if words[position] == "--passthrough_child":
            options = replace(options, passed_args=tuple(words[position + 1 :]))
            break
        taken = _take_wrapper_option(words, position, options)
        if taken is None:
            extra.append(words[position])
            position += 1
        else:
            options, position = taken
    return replace(options, extra_args=tuple(extra))


def _standalone(words: Sequence[str], options: RunOptions, is_file: Callable[[str], bool]) -> Request:
    if words and words[0] == "check":
        return _check(words[1:])
    if words and words[0] in ("package", "convert"):
        rest = tuple(words[1:])
        return PackageRequest(rest) if words[0] == "package" else ConvertRequest(rest)
    if words and words[0] in ("doctor", "licenses"):
        return _alone(words[0], words[1:])
    position = 0
    while position < len(words):
        word = words[position]
        if word in ("--help", "-h", "--version", "-v"):
            return ShowHelp() if word in ("--help", "-h") else ShowVersion()
        if word == "--passthrough_child":
            return replace(options, passed_args=tuple(words[position + 1 :]))
        if word == "--" or not word.startswith("-"):
            break
        taken = _take_own_option(words, position, options) or _take_wrapper_option(words, position, options)
        if taken is None:
            raise UsageError(f"unknown option {word!r}; put -- before words that are meant for the tasks")
        options, position = taken
    return _job_file_and_args(words[position:], options, is_file)


def _job_file_and_args(words: Sequence[str], options: RunOptions, is_file: Callable[[str], bool]) -> RunOptions:
    rest = list(words)
    options_ended = bool(rest) and rest[0] == "--"
    if options_ended:
        rest.pop(0)
    if rest and (rest[0].lower().endswith(".xml") or is_file(rest[0])):
        options = replace(options, job_file=Path(rest.pop(0)))
        if not options_ended and rest and rest[0] == "--":
            rest.pop(0)
    return replace(options, extra_args=tuple(rest))


def _check(words: Sequence[str]) -> Request:
    rest = list(words)
    if any(word in ("--help", "-h") for word in rest):
        return ShowHelp()
    if rest and rest[0] == "--":
        rest.pop(0)
    elif rest and rest[0].startswith("-"):
        raise UsageError(f"check has no option {rest[0]!r}")
    if len(rest) > 1:
        raise UsageError(f"check takes one job file, but was also given {rest[1]!r}")
    return CheckRequest(Path(rest[0]) if rest else None)


def _alone(subcommand: str, words: Sequence[str]) -> Request:
    if any(word in ("--help", "-h") for word in words):
        return ShowHelp()
    if words:
        raise UsageError(f"{subcommand} takes no arguments, but was given {words[0]!r}")
    return DoctorRequest() if subcommand == "doctor" else LicensesRequest()


def _take_own_option(words: Sequence[str], position: int, options: RunOptions) -> tuple[RunOptions, int] | None:
    name, equals, value = words[position].partition("=")
    if name != "--boinc-runtime":
        return None
    if equals:
        return replace(options, boinc_runtime=_runtime_kind(value)), position + 1
    return replace(options, boinc_runtime=_runtime_kind(_value(words, position))), position + 2


def _take_wrapper_option(words: Sequence[str], position: int, options: RunOptions) -> tuple[RunOptions, int] | None:
    """One of the options of BOINC's wrapper: the new options and the position after it; None when it is none."""
    match words[position]:
        case "--nthreads":
            options, number = _number(words, position, options, minimum=1)
            return replace(options, nthreads=int(number)), position + 2
        case "--device":
            options, number = _number(words, position, options, minimum=-1)
            return replace(options, device=int(number)), position + 2
        case "--trickle":
            options, number = _number(words, position, options, minimum=0)
            return replace(options, trickle_s=number if 0 <= number < math.inf else 0.0), position + 2
        case "--sporadic":
            return replace(options, sporadic=True), position + 1
        case "--use_tstp":
            return replace(options, use_tstp=True), position + 1
    return None


def _value(words: Sequence[str], position: int) -> str:
    if position + 1 >= len(words):
        raise UsageError(f"{words[position]} needs a value")
    return words[position + 1]


def _number(words: Sequence[str], position: int, options: RunOptions, *, minimum: int) -> tuple[RunOptions, float]:
    """The number as BOINC's wrapper reads it (atoi, atof), and the options with a warning when it may be none.

    The scheduler writes --nthreads as 4 or 4.000000.
    """
    name, text = words[position], _value(words, position)
    number = cvalues.leading_double(text) if name == "--trickle" else float(cvalues.leading_integer(text))
    if _PLAIN_NUMBER.fullmatch(text) and minimum <= number < math.inf:
        return options, number
    warning = f"{name}: expected a number of at least {minimum}, not {text[:100]!r}; it counts as {number:g}"
    return replace(options, warnings=(*options.warnings, warning)), number


def _runtime_kind(text: str) -> BoincRuntimeKind:
    for kind in RUNTIME_KINDS:
        if kind == (text.strip() or "auto"):
            return kind
    raise UsageError(f"the BOINC runtime must be one of {', '.join(RUNTIME_KINDS)}, not {text!r}")
