"""`vmwrapper convert`: a job.xml from docker_wrapper's job.toml. The only writer of the converter's output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.slotfiles import JOB_FILE
from vmwrapper.cli import console
from vmwrapper.exit_status import ExitStatus
from vmwrapper.job import parse
from vmwrapper.project.docker_wrapper import MAX_BYTES, Converted, ConvertError, convert


def run(words: Sequence[str]) -> int:
    """The subcommand; its exit status: 0, or 206 with what is wrong on stderr."""
    try:
        wanted = _parser().parse_args(words)
        output = wanted.output or wanted.job_toml.parent / JOB_FILE
        converted = _converted(wanted)
        if not wanted.force and (output.exists() or output.is_symlink()):
            raise ConvertError(f"{output} exists: --force replaces it, -o FILE writes another")
        write_atomically(output, converted.job_xml.encode())
    except ConvertError as error:
        for line in error.lines:
            console.say(f"vmwrapper convert: {line}", sys.stderr)
        return ExitStatus.INIT_FAILURE
    except OSError as error:
        console.say(f"vmwrapper convert: {error.filename or ''}: {error.strerror}", sys.stderr)
        return ExitStatus.INIT_FAILURE
    for note in converted.notes:
        console.say(f"note: {note}", sys.stderr)
    console.say(f"{output}: written", sys.stdout)
    return ExitStatus.DONE


def _converted(wanted: argparse.Namespace) -> Converted:
    """The job file, looked at as `vmwrapper check` does: what the converter writes has to be good."""
    with wanted.job_toml.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        converted = convert(content, inputs=wanted.input, outputs=wanted.output_file)
    except ConvertError as error:
        raise ConvertError(*(f"{wanted.job_toml}: {line}" for line in error.lines)) from None
    if complaints := parse.examine(converted.job_xml.encode(), JOB_FILE).complaints:
        raise ConvertError(*(f"{wanted.job_toml}: makes no good job file: {complaint}" for complaint in complaints))
    return converted


class _Parser(argparse.ArgumentParser):
    """argparse that raises what we say, in place of exiting with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConvertError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vmwrapper convert",
        description="Write a job.xml that does what a job.toml of BOINC's docker_wrapper says.",
        allow_abbrev=False,
    )
    parser.add_argument("job_toml", metavar="JOB_TOML", type=Path)
    parser.add_argument("-o", dest="output", metavar="FILE", type=Path, help="default: job.xml beside JOB_TOML")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--input", metavar="NAME", action="append", default=[], help="input file; may be given again")
    parser.add_argument(
        "--output", dest="output_file", metavar="NAME", action="append", default=[], help="output file; likewise"
    )
    return parser
