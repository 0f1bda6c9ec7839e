"""Jobs for BOINC's `wrapper` and vmwrapper, with what they need. tools/compare_with_wrapper.py runs them with both;
those with an outcome are run by tests/integration/vmwrapper/host/test_wrapper_cases.py with vmwrapper alone."""

from __future__ import annotations

import io
import os
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

SHELL = "#!/bin/sh\n"


@dataclass(frozen=True)
class Case:
    """A job with the files it needs."""

    job: str | bytes
    """What is in job_desc; bytes: the whole file."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Executable when they begin with #!. Names may hold bytes that are not UTF-8, as os.fsdecode gives them."""
    words: tuple[str, ...] = ()
    preferences: bytes = b""
    """What the project wrote into its preferences."""
    folder: str = "client"
    """Name of the client's folder."""
    outputs: tuple[str, ...] = ()
    """Further links to output files."""
    edit: tuple[bytes, bytes] | None = None
    """When the file `ready` is there the client says quit; then this is replaced in job.xml, and a new start made."""


def task(application: str, more: str = "") -> str:
    return f"<task><application>{application}</application>{more}</task>"


def script(text: str) -> dict[str, bytes]:
    return {"p": (SHELL + text + "\n").encode()}


def archive(*members: tuple[bytes, bytes, int, bool]) -> bytes:
    """A zip archive with names of any bytes. Each: name, content, mode, whether it says that its name is UTF-8."""
    content = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(content, "w") as made:
        warnings.simplefilter("ignore")  # names that come twice
        for name, data, mode, told in members:
            information = _Named("x")
            information.raw, information.told = name, told
            information.create_system, information.external_attr = 3, mode << 16
            made.writestr(information, data)
    return content.getvalue()


class _Named(zipfile.ZipInfo):
    raw = b""
    told = False

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 (zipfile's)
        return self.raw, 0x800 if self.told else 0


def unzipped(script_text: str, *members: tuple[bytes, bytes, int, bool]) -> Case:
    """An archive of inputs, and a program that uses it."""
    job = "<unzip_input><zipfilename>i.zip</zipfilename></unzip_input>" + task("p", OUT)
    return Case(job, {**script(script_text), "i.zip": archive(*members)})


LINK = 0o120777
OUT = "<stdout_filename>out</stdout_filename>"
SHOW = 'for word; do echo "[$word]"; done'
IGNORED = (
    "<weight>1,5</weight>",
    "<weight>1.0f</weight>",
    "<weight>inf</weight>",
    "<weight>nan</weight>",
    "<weight>0x2</weight>",
    "<weight></weight>",
    "<weight/>",
    "<time_limit>3600s</time_limit>",
    "<time_limit>inf</time_limit>",
    "<priority>9</priority>",
    "<priority>low</priority>",
    "<priority>2.0</priority>",
    "<priority></priority>",
    "<multi_process>true</multi_process>",
    "<daemon>yes</daemon>",
    "<append_cmdline_args>08</append_cmdline_args>",
    "<command_line>a<x>b</x></command_line>",
    "<command_line>a<!-- c -->b</command_line>",
    "<command_line>a <![CDATA[b]]></command_line>",
    "<command_line>a</comand_line>",
    "<x><command_line>a</command_line></x>",
    "<command_line a='b'>c</command_line>",
    "<command_line>1</command_line><command_line>2</command_line>",
    "<command_line>1</command_line><command_line/>",
    "text",
    "</stray>",
    "<task>",
    "<unknown>1</unknown>",
    "<!-- a -- b -->",
    "<command_line>a &nbsp; &#65; & b</command_line>",
)
CASES = {
    "a program fails": Case(task("p") + task("p"), script("exit 3")),
    "a program is killed": Case(task("p"), script("kill -9 $$")),
    "a program that is no program": Case(task("p"), {"p": b"text\n"}),
    "no such application": Case(task("nowhere")),
    "an exec_dir that is none": Case(task("p", "<exec_dir>nowhere</exec_dir>"), script("true")),
    "stdin cannot be opened": Case(task("p", "<stdin_filename>nowhere</stdin_filename>"), script("true")),
    "stdout cannot be opened": Case(task("p", "<stdout_filename>no/where</stdout_filename>"), script("true")),
    "no task": Case(""),
    "a job file that is cut": Case("<task><application>p</application>", script("true")),
    "a bare &": Case(task("p", f"<command_line>a &amp; b & c</command_line>{OUT}"), script('echo "$@"')),
    "an unknown option": Case(task("p", OUT), script('echo "$@"'), ("--unknown",)),
    "words passed on": Case(
        task("p", f"<append_cmdline_args/><command_line>1</command_line>{OUT}") + task("p", OUT),
        script('for word; do echo "[$word]"; done'),
        ("--passthrough_child", "a", "'b", "c'", "--x"),
    ),
    "macros": Case(
        task("p", f"<command_line>$NTHREADS $GPU_DEVICE_NUM boinc_resolve(in) $PWD</command_line>{OUT}"),
        {**script('for word; do echo "[${word##*/}]"; done'), "in": b"x"},
        ("--nthreads", "2", "--device", "1"),
    ),
    "quotes": Case(
        task("p", f'<command_line>a "b c" \'d\' x"y z" "e"f it\'s --g="h i"</command_line>{OUT}'),
        script('for word; do echo "[$word]"; done'),
    ),
    "environment": Case(
        task("p", f"<setenv>A=b c</setenv><setenv>N=$NTHREADS</setenv>{OUT}"),
        script('echo "$A|$N|${HOME-none}|${PATH-none}"'),
    ),
    "no stdout_filename": Case(task("p"), script("echo to stdout")),
    "priority": Case(task("p", OUT) + task("p", f"<priority>2</priority>{OUT}"), script("nice")),
    "a time limit": Case(task("p", f"<time_limit>1</time_limit>{OUT}"), script("echo a; exec sleep 60")),
    "a grandchild": Case(task("p"), script("(sleep 3; echo late > late) &")),
    "a daemon that ends early": Case(task("d", "<daemon/>") + task("p"), {**script("sleep 0.2"), "d": b"#!/bin/sh\n"}),
    "a pattern that is none": Case(
        "<zip_output><zipfilename>z</zipfilename><filename>a(b</filename></zip_output>" + task("p"), script("echo > ab")
    ),
    "patterns": Case(
        "<zip_output><zipfilename>z</zipfilename><filename>^[[:alpha:]]+_\\d{2}$</filename>"
        "<filename>\\.(txt|dat)$</filename></zip_output>" + task("p"),
        script("touch ab_12 a1_12 ab_123 x.txt y.dat z.txtx; mkdir -p q"),
    ),
    "a pattern that finds everything": Case(
        "<zip_output><zipfilename>z</zipfilename><filename>.*</filename></zip_output>" + task("p"), script("touch a b")
    ),
    "archives of inputs": Case(
        "<unzip_input><zipfilename>i.zip</zipfilename><zipfilename>none</zipfilename></unzip_input>" + task("p", OUT),
        script("cat sub/x"),
    ),
    "an archive that is none": Case(
        "<unzip_input><zipfilename>i</zipfilename></unzip_input>" + task("p"), {**script("true"), "i": b"text"}
    ),
    "trickles": Case(task("p"), script("sleep 2.5"), ("--trickle", "1")),
    "fraction done": Case(
        task("p", "<fraction_done_filename>f</fraction_done_filename><weight>3</weight>") + task("p"),
        script("echo 0.5 > f; sleep 1.6"),
    ),
    **{
        f"in a task: {one}": Case(task("p", OUT + one), script(f"nice; {SHOW}"), ("--passthrough_child", "w"))
        for one in IGNORED
    },
    "a setenv without =": Case(task("p", f"<setenv>OMP</setenv>{OUT}"), script('echo "${OMP-none}|${HOME-none}"')),
    "an empty setenv": Case(task("p", f"<setenv></setenv>{OUT}"), script('echo "${HOME-none}"')),
    "a setenv twice": Case(
        task("p", f"<setenv>A=1</setenv><setenv>A=2</setenv>{OUT}"),
        {"p": f"#!{sys.executable} -IS\nimport os\nprint(os.environ['A'])\n".encode()},
    ),
    "a good and a bad pattern": Case(
        "<zip_output><zipfilename>z</zipfilename><filename>^a</filename><filename>a(b</filename></zip_output>"
        + task("p"),
        script("echo > ab"),
    ),
    "an empty pattern": Case(
        "<zip_output><zipfilename>z</zipfilename><filename></filename><filename>^a</filename></zip_output>" + task("p"),
        script("echo > ab"),
    ),
    "names in ISO-8859-1": Case(
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<job_desc>'
        "<task><application>p</application><stdin_filename>größe</stdin_filename><command_line>größe</command_line>"
        "<stdout_filename>aus_ä</stdout_filename></task></job_desc>\n".encode("latin-1"),
        {**script('cat; test -e "$1" && echo there'), os.fsdecode("größe".encode("latin-1")): b"in\n"},
        outputs=(os.fsdecode("aus_ä".encode("latin-1")),),
    ),
    "names in UTF-8, and Windows' line ends": Case(
        "<job_desc>\r\n<task>\r\n<application>p</application>\r\n<stdin_filename>größe</stdin_filename>\r\n"
        "<stdout_filename>out</stdout_filename>\r\n</task>\r\n</job_desc>\r\n".encode(),
        {**script("cat"), "größe": b"in\n"},
    ),
    "a byte order mark": Case(b"\xef\xbb\xbf<job_desc>" + task("p", OUT).encode() + b"</job_desc>", script("echo a")),
    "a job file of 2 MB": Case(
        "<job_desc>" + task("p", OUT) + f"<!-- {'.' * 200} -->\n" * 10000 + task("p", OUT) + "</job_desc>",
        script("echo a"),
    ),
    "--device 0,1": Case(
        task("p", f"<command_line>$GPU_DEVICE_NUM</command_line>{OUT}"), script(SHOW), ("--device", "0,1")
    ),
    "--device -1": Case(
        task("p", f"<command_line>$GPU_DEVICE_NUM</command_line>{OUT}"), script(SHOW), ("--device", "-1")
    ),
    **{
        f"--nthreads {one}": Case(
            task("p", f"<command_line>$NTHREADS</command_line>{OUT}"), script(SHOW), ("--nthreads", one)
        )
        for one in ("0", "x", "4.000000", "-2", "3x")
    },
    "--trickle abc": Case(task("p", OUT), script("sleep 1.5"), ("--trickle", "abc")),
    "a folder with &": Case(
        task("$PROJECT_DIR/p", f"<command_line>$PROJECT_DIR</command_line>{OUT}"), script('basename "$1"'), folder="R&D"
    ),
    "a folder in ISO-8859-1": Case(
        task("p", f"<command_line>$PROJECT_DIR</command_line>{OUT}"),
        script('test -d "$1"; echo $?'),
        folder=os.fsdecode(b"M\xfcller"),
    ),
    **{
        f"preferences: {one[:30].decode(errors='replace')}": Case(
            task("p", f"<command_line>$PROJECT_DIR $GPU_DEVICE_NUM</command_line>{OUT}"),
            script('test -d "$1"; echo "$? $2"'),
            preferences=one,
        )
        for one in (b"<motd>one<br>two</motd>", b"</stray><x a=b c>", b"<a>" * 300, b"\xff & < >", b"<slot>9</slot>")
    },
    "an archive: UTF-8 without the flag": unzipped("cat größe*", ("größe".encode(), b"a\n", 0o644, False)),
    "an archive: cp437": unzipped("cat größe*", ("größe".encode("cp437"), b"a\n", 0o644, False)),
    "an archive: job.xml inside": unzipped(
        "cat d/x", (b"job.xml", b"<job_desc/>", 0o644, False), (b"d/x", b"a\n", 0o644, False)
    ),
    "an archive: a link that nobody follows": unzipped(
        "cat x", (b"lib/l", b"/usr/lib/libc.so", LINK, False), (b"x", b"a\n", 0o644, False)
    ),
    "an archive: a link inside": unzipped("cat l", (b"l", b"x", LINK, False), (b"x", b"a\n", 0o644, False)),
    "an archive: odd members": unzipped(
        "find . -type f -name '*_o' | sort; cat lib/x_o",
        (b"lib/../lib/x_o", b"1", 0o644, False),
        (b"/abs/y_o", b"2", 0, False),
        (b"twice_o", b"3", 0o755, False),
        (b"twice_o", b"4", 0o600, False),
        (b"A_o", b"5", 0o644, False),
        (b"a_o", b"6", 0o644, False),
        (b"d\\z_o", b"7", 0o644, False),
        (b"d/", b"", 0o755, False),
        (b"./", b"", 0, False),
    ),
    "an archive: out of the slot": unzipped("cat x", (b"../evil", b"e", 0o644, False), (b"x", b"a\n", 0o644, False)),
    "an archive: encrypted": Case(
        "<unzip_input><zipfilename>i.zip</zipfilename></unzip_input>" + task("p", OUT),
        {
            **script("true"),
            "i.zip": archive((b"x", b"a\n", 0o644, False)).replace(b"\x14\x03\x14\0\0\0", b"\x14\x03\x14\0\1\0"),
        },
    ),
    "an output archive of names that are not UTF-8": Case(
        "<zip_output><zipfilename>z</zipfilename><filename>^a</filename></zip_output>" + task("p"),
        script("echo 1 > a1; echo 2 > \"$(printf 'a\\351')\""),
    ),
    "job.xml edited: a comment": Case(
        task("p", f"<command_line>one</command_line>{OUT}")
        + task("p", f"<command_line>two</command_line>{OUT}")
        + task("p", f"<command_line>three</command_line>{OUT}"),
        script('echo "$1"; if test "$1" = two && ! test -e ready; then touch ready; sleep 60; fi'),
        edit=(b"<job_desc>", b"<job_desc>\n<!-- edited -->"),
    ),
    "job.xml edited: a task appended": Case(
        task("p", f"<command_line>one</command_line>{OUT}") + task("p", f"<command_line>two</command_line>{OUT}"),
        script('echo "$1"; if test "$1" = two && ! test -e ready; then touch ready; sleep 60; fi'),
        edit=(b"</job_desc>", task("p", f"<command_line>three</command_line>{OUT}").encode() + b"</job_desc>"),
    ),
}
