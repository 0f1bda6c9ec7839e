"""Macros, patterns and the forgiving reading of job files: what BOINC's wrapper makes of the same text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmwrapper.job import commandline, macros, parse
from vmwrapper.job.macros import Macros, OpenMacro
from vmwrapper.job.patterns import BadPattern, compile_pattern


class TestMacros:
    MACROS = Macros("/boinc/projects/p", 3, "/boinc/slots/0", 1)

    @pytest.mark.parametrize(
        ("text", "result"),
        [
            ("$PROJECT_DIR/a $NTHREADS", "/boinc/projects/p/a 3"),
            ("x$PWD:$PWD", "x/boinc/slots/0:/boinc/slots/0"),
            ("--gpu=$GPU_DEVICE_NUM", "--gpu=1"),
            ("$NTHREADSx $$NTHREADS", "3x $3"),
            ("$nthreads ${PWD} %PWD% $OTHER", "$nthreads ${PWD} %PWD% $OTHER"),
            ("", ""),
        ],
    )
    def test_they_are_replaced_everywhere(self, text: str, result: str) -> None:
        assert self.MACROS.substitute(text) == result

    def test_without_a_client(self) -> None:
        assert Macros(pwd="/s").substitute("$PROJECT_DIR $NTHREADS $GPU_DEVICE_NUM") == ". 1 $GPU_DEVICE_NUM"

    def test_applications(self) -> None:
        assert self.MACROS.application("$PROJECT_DIR/worker") == "/boinc/projects/p/worker"
        assert self.MACROS.application("ignored$PROJECT_DIR/worker") == "/boinc/projects/p/worker"
        assert self.MACROS.application("worker") is None
        assert self.MACROS.application("$PWD/worker") is None

    @pytest.mark.parametrize(
        ("text", "result"),
        [
            ("boinc_resolve(in)", "../in"),
            ("-i=boinc_resolve(a b),boinc_resolve(c)-", "-i=../a b,../c-"),
            ("boinc_resolve()", "../"),
            ("boinc_resolve (a) )(", "boinc_resolve (a) )("),
        ],
    )
    def test_resolve(self, text: str, result: str) -> None:
        assert macros.resolve(text, lambda name: f"../{name}") == result

    def test_resolve_on_windows(self) -> None:
        assert macros.resolve("boinc_resolve(a)", lambda _: "c:/d\\e", forward_slashes=True) == "c:/d/e"
        assert macros.resolve("boinc_resolve(a)", lambda _: "c:/d\\e", forward_slashes=False) == "c:\\d\\e"

    def test_an_open_macro(self) -> None:
        with pytest.raises(OpenMacro):
            macros.resolve("a boinc_resolve(b", str)

    @given(st.text(), st.text(alphabet="ab/. "))
    def test_text_without_macros_stays(self, text: str, value: str) -> None:
        plain = text.replace("$", "").replace("boinc_resolve(", "")
        assert Macros(value, 1, value, 2).substitute(plain) == plain
        assert macros.resolve(plain, str) == plain

    @given(st.lists(st.sampled_from(["$PWD", "$NTHREADS", " ", "x", '"', "'"])))
    def test_a_macro_is_one_word_if_its_value_is(self, parts: list[str]) -> None:
        """Splitting comes after replacing, and a value without blanks and quotes makes no more words."""
        text = "".join(parts)
        words = commandline.split(Macros(pwd="/p", nthreads=7).substitute(text))
        assert len(words) == len(commandline.split(text))


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "matching", "others"),
        [
            (r".*\.out$", ["a.out", ".out"], ["a.out2", "a.outx", "a.out\n"]),
            ("out", ["my_outputs", "out"], ["ou t"]),
            ("^out", ["out1"], ["1out"]),
            (r"^res_\d+\.(txt|dat)$", ["res_1.txt", "res_22.dat"], ["res_.txt", "res_1.txt.gz", "res_٣.txt"]),
            ("[[:alpha:]]+_[[:digit:]]$", ["ab_1"], ["1_a", "_1"]),
            ("^[^a-c]$", ["d", "-"], ["a", "b"]),
            (r"^[\w.-]+$", ["a-b.c"], ["a b"]),
            ("^a{2,3}$", ["aa", "aaa"], ["a", "aaaa"]),
            ("^(a|b)*?c$", ["abac", "c"], ["abd"]),
            (r"^(.)\1$", ["aa"], ["ab"]),
            ("^a**$", ["aaa", ""], ["b"]),
            (r"\x41\u0042\cA", ["AB\x01"], ["ABcA"]),
            (r"^\z\a$", ["za"], ["a"]),
            ("^(?!tmp)(?:a|b)", ["ax"], ["tmpa"]),
            ("^[]|b$", ["xb"], ["a", "]"]),
            ("^[^]$", ["x"], [""]),
            ("]}", ["]}"], ["]"]),
            ("é", ["café"], ["e"]),
            ("", ["anything"], []),
        ],
    )
    def test_what_they_match(self, pattern: str, matching: list[str], others: list[str]) -> None:
        compiled = compile_pattern(pattern)
        assert [name for name in matching if not compiled.search(name.encode())] == []
        assert [name for name in others if compiled.search(name.encode())] == []

    @pytest.mark.parametrize(
        "pattern",
        ["(", ")", "a(b", "[a", "*a", "^*", "a{", "a{x}", "a{3,1}", "a{9999}", "(?<=a)b", "(?i)a", "(?P<n>a)", "\\",
         r"\x4", r"\1", r"(a)\2", "[b-a]", "[[:nothing:]]", "|*", r"\u4e2d", "[[=ab=]]", "[\\"],
    )  # fmt: skip
    def test_what_is_refused(self, pattern: str) -> None:
        with pytest.raises(BadPattern):
            compile_pattern(pattern)

    @given(st.text(alphabet="ab01.*+?()[]{}^$|\\-:=,dwsbxuc?!<"), st.text(max_size=8))
    def test_any_text_is_a_pattern_or_refused(self, pattern: str, name: str) -> None:
        try:
            compiled = compile_pattern(pattern)
        except BadPattern:
            return
        compiled.search(name.encode("utf-8", "replace"))

    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
    def test_an_escaped_name_matches_itself_alone(self, name: str) -> None:
        escaped = "".join(f"\\{letter}" if letter in r"\^$.*+?()[]{}|" else letter for letter in name)
        compiled = compile_pattern(f"^{escaped}$")
        assert compiled.search(name.encode())
        assert not compiled.search(name.encode() + b"x")


def examined(text: str) -> parse.Findings:
    return parse.examine(text.encode(), "job.xml")


TASK = "<task><application>a</application><command_line>{}</command_line></task>"


class TestForgiving:
    @pytest.mark.parametrize(
        ("text", "command_line"),
        [
            ("<job_desc>" + TASK.format("a & b && c") + "</job_desc>", "a & b && c"),
            ("<job_desc>" + TASK.format("&nbsp; &lt;x&gt; & &#65; &amp;") + "</job_desc>", "&nbsp; <x> & A &"),
            ("<job_desc><!-- a -- b -->" + TASK.format("x") + "</job_desc>", "x"),
            ("<job_desc a=1 b>" + TASK.format("x") + "</job_desc>", "x"),
            ("<job_desc>" + TASK.format("x") + "</job_desc> the end <x>", "x"),
            ("<job_desc></stray><p>" + TASK.format("x") + "</job_desc>", "x"),
            ("<job_desc><group>" + TASK.format("x") + "</group></job_desc>", "x"),
            ("<job_desc>text" + TASK.format("x") + "</job_desc>", "x"),
            ("<job_desc><task>" + TASK.format("x") + "</job_desc>", "x"),
            ("<job_desc>" + TASK.format("x") + "</task></job_desc>", "x"),
            ("<job_desc><unzip_input><x></unzip_input>" + TASK.format("x") + "</job_desc>", "x"),
            ("<?xml version=1.0?><?pi?>\n<job_desc>" + TASK.format("a & b") + "</job_desc>", "a & b"),
        ],
    )
    def test_what_boincs_parser_takes_is_taken_with_a_warning(self, text: str, command_line: str) -> None:
        findings = examined(text)
        assert findings.job is not None, findings.errors
        assert findings.job.tasks[0].command_line == command_line
        assert findings.warnings

    @pytest.mark.parametrize(
        "text",
        [
            "<job_desc><task><application>a & b</job_desc>",
            "<job_desc><task><application>a & b</application></job_desc>",
            "<job_desc>" + TASK.format("a & b"),
            "&" + "<job_desc>" + TASK.format("a") + "</job_desc>",
            '<!DOCTYPE x [<!ENTITY e "f">]><job_desc>' + TASK.format("&e; &") + "</job_desc>",
        ],
    )
    def test_what_makes_no_sense_is_refused_with_its_line(self, text: str) -> None:
        findings = examined(text)
        assert findings.job is None
        assert "job.xml" in str(findings.errors[0])

    def test_lines_stay(self) -> None:
        text = "<job_desc\n a=1>\n<!-- --\n -->\n<x\n>\n" + TASK.format("&") + "\n<weight>1</weight></job_desc>"
        assert [warning.line for warning in examined(text).warnings] == [1, 3, 5, 7, 8]
