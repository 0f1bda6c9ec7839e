"""Command lines of job.xml: into words, and the words that name files into physical paths. Pure.

Never asks a shell: `$HOME`, `*`, `;` and backslashes are ordinary characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

BLANKS = " \t\n\v\f\r"
"""What C's isspace takes for white space; other Unicode blanks are ordinary characters, as they are in BOINC."""

FILE_PREFIX = "./"
"""A word that begins so names a file by its logical name (VmApps page, command_line)."""


def split(command_line: str) -> list[str]:
    """The words of a command line, exactly as BOINC's wrapper makes them (lib/str_util.cpp, parse_command_line).

    Words are separated by white space. A quote, single or double, at the start of a word groups up to the next quote
    of its kind, where the word ends even if no blank follows; anywhere else a quote is an ordinary character. A quote
    that is never closed groups to the end. BOINC does not look at the first character after an opening quote, so `''`
    is not an empty word but an open one that begins with a quote: no empty word can be written, apart from a lone quote
    at the very end (where BOINC reads past the end of its buffer; here it is an empty word).
    """
    words: list[str] = []
    position, end = 0, len(command_line)
    while position < end:
        character = command_line[position]
        if character in BLANKS:
            position += 1
        elif character in "'\"":
            closing = command_line.find(character, position + 2)
            stop = closing if closing >= 0 else end
            words.append(command_line[position + 1 : stop])
            position = stop + 1
        else:
            stop = position
            while stop < end and command_line[stop] not in BLANKS:
                stop += 1
            words.append(command_line[position:stop])
            position = stop
    return words


def resolve(words: Iterable[str], resolver: Callable[[str], str | Path]) -> list[str]:
    """The words with each that begins with `./` replaced by its physical path; blanks in the path stay in the word.

    resolver: boinc_resolve_filename, which gives its argument back when it is no link; the word then stays as it was
    written. Not for guest tasks: their files are in the guest, under the same names.
    """
    return [_resolve_word(word, resolver) if word.startswith(FILE_PREFIX) else word for word in words]


def _resolve_word(word: str, resolver: Callable[[str], str | Path]) -> str:
    physical = resolver(word)
    return word if Path(physical) == Path(word) else str(physical)
