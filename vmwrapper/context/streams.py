"""The files of a host program's streams, by their logical names."""

from __future__ import annotations

from vmwrapper.context.logical_names import LinkRefused, LogicalNames
from vmwrapper.job.model import Program
from vmwrapper.process.program import StreamError, Streams


def streams_of(program: Program, names: LogicalNames) -> Streams:
    """Raises StreamError for a link that is not to be followed."""
    found = {}
    for stream, name, place in (
        ("stdin", program.stdin_filename, names.source),
        ("stdout", program.stdout_filename, names.appended),
        ("stderr", program.stderr_filename, names.appended),
    ):
        try:
            found[stream] = place(name) if name else None
        except LinkRefused as error:
            raise StreamError(stream, name, error) from error
    return Streams(found["stdin"], found["stdout"], found["stderr"], base=names.base)
