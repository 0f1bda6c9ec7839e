"""vmwrapper.cli.arguments: what the words of the command line ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmwrapper.cli.arguments import (
    CheckRequest,
    DoctorRequest,
    LicensesRequest,
    Request,
    ShowHelp,
    ShowVersion,
    UsageError,
    parse_arguments,
)
from vmwrapper.options import RunOptions

FILES = {"jobfile", "other.xml"}


def by_hand(*words: str, **environment: str) -> Request:
    return parse_arguments(words, under_client=False, environment=environment, is_file=FILES.__contains__)


def under_client(*words: str, **environment: str) -> Request:
    def never(word: str) -> bool:
        raise AssertionError(f"looked for a file {word!r}")

    return parse_arguments(words, under_client=True, environment=environment, is_file=never)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", RunOptions()),
        ("job.xml", RunOptions(Path("job.xml"))),
        ("JOB.XML 5 --fast", RunOptions(Path("JOB.XML"), ("5", "--fast"))),
        ("jobfile 5", RunOptions(Path("jobfile"), ("5",))),
        ("nofile 5", RunOptions(None, ("nofile", "5"))),
        ("-- job.xml --x", RunOptions(Path("job.xml"), ("--x",))),
        ("-- -odd.xml", RunOptions(Path("-odd.xml"))),
        ("-- --x jobfile", RunOptions(None, ("--x", "jobfile"))),
        ("-- check", RunOptions(None, ("check",))),
        ("job.xml -- --nthreads 4", RunOptions(Path("job.xml"), ("--nthreads", "4"))),
        ("-- job.xml -- x", RunOptions(Path("job.xml"), ("--", "x"))),
        ("job.xml --nthreads 4", RunOptions(Path("job.xml"), ("--nthreads", "4"))),
        ("--nthreads 4 job.xml a", RunOptions(Path("job.xml"), ("a",), nthreads=4)),
        ("--boinc-runtime python job.xml", RunOptions(Path("job.xml"), boinc_runtime="python")),
        ("--boinc-runtime=library", RunOptions(boinc_runtime="library")),
        (
            "--device 1 --trickle 90.5 --sporadic --use_tstp x.xml",
            RunOptions(Path("x.xml"), trickle_s=90.5, device=1, sporadic=True, use_tstp=True),
        ),
        ("--passthrough_child --help job.xml", RunOptions(passed_args=("--help", "job.xml"))),
        ("--help", ShowHelp()),
        ("--nthreads 2 -h", ShowHelp()),
        ("--version", ShowVersion()),
        ("check", CheckRequest()),
        ("check some/file", CheckRequest(Path("some/file"))),
        ("check -- -x", CheckRequest(Path("-x"))),
        ("check --help", ShowHelp()),
        ("doctor", DoctorRequest()),
        ("doctor -h", ShowHelp()),
        ("licenses", LicensesRequest()),
    ],
)
def test_standalone(line: str, expected: Request) -> None:
    assert by_hand(*line.split()) == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--frobnicate job.xml", "unknown option '--frobnicate'; put -- before"),
        ("-x", "unknown option '-x'"),
        ("--nthreads", "--nthreads needs a value"),
        ("--boinc-runtime ruby", "must be one of auto, library, python, not 'ruby'"),
        ("--boinc-runtime", "needs a value"),
        ("check a b", "also given 'b'"),
        ("check --x", "check has no option '--x'"),
        ("doctor now", "doctor takes no arguments"),
        ("licenses all", "licenses takes no arguments"),
    ],
)
def test_what_cannot_be_understood(line: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        by_hand(*line.split())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", RunOptions(under_client=True)),
        ("job.xml", RunOptions(extra_args=("job.xml",), under_client=True)),
        ("check", RunOptions(extra_args=("check",), under_client=True)),
        ("doctor", RunOptions(extra_args=("doctor",), under_client=True)),
        ("licenses", RunOptions(extra_args=("licenses",), under_client=True)),
        ("a -- --help b", RunOptions(extra_args=("a", "--", "--help", "b"), under_client=True)),
        ("a --nthreads 4.000000 b", RunOptions(extra_args=("a", "b"), under_client=True, nthreads=4)),
        ("--unknown 1 --device 2", RunOptions(extra_args=("--unknown", "1"), under_client=True, device=2)),
        (
            "--trickle 60 --passthrough_child --trickle 1 --version",
            RunOptions(passed_args=("--trickle", "1", "--version"), under_client=True, trickle_s=60.0),
        ),
        ("--boinc-runtime x", RunOptions(extra_args=("--boinc-runtime", "x"), under_client=True)),
        ("--version", ShowVersion()),
        ("a -v", ShowVersion()),
    ],
)
def test_under_a_client(line: str, expected: Request) -> None:
    assert under_client(*line.split()) == expected


@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize(
    ("line", "nthreads", "device", "trickle_s", "warned"),
    [
        ("--device 0,1", None, 0, 0.0, "--device: expected a number of at least -1, not '0,1'; it counts as 0"),
        ("--device -1", None, -1, 0.0, ""),
        ("--device x", None, 0, 0.0, "--device: "),
        ("--device 1e3", None, 1, 0.0, ""),
        ("--nthreads 0", 0, None, 0.0, "--nthreads: expected a number of at least 1, not '0'; it counts as 0"),
        ("--nthreads x", 0, None, 0.0, "--nthreads: "),
        ("--nthreads 4threads", 4, None, 0.0, "--nthreads: "),
        ("--nthreads -2", -2, None, 0.0, "--nthreads: "),
        ("--trickle abc", None, None, 0.0, "--trickle: "),
        ("--trickle 60s", None, None, 60.0, "--trickle: "),
        ("--trickle -5", None, None, 0.0, "--trickle: "),
        ("--trickle nan", None, None, 0.0, "--trickle: "),
        ("--trickle inf", None, None, 0.0, "--trickle: "),
        ("--trickle 1e2", None, None, 100.0, ""),
    ],
)
def test_numbers_are_read_as_boincs_wrapper_reads_them(
    line: str, nthreads: int | None, device: int | None, trickle_s: float, warned: str, client: bool
) -> None:
    request = (under_client if client else by_hand)(*line.split())
    assert isinstance(request, RunOptions)
    assert (request.nthreads, request.device, request.trickle_s) == (nthreads, device, trickle_s)
    assert len(request.warnings) == bool(warned)
    assert all(warning.startswith(warned) for warning in request.warnings)


@given(st.sampled_from(["--nthreads", "--device", "--trickle"]), st.text())
def test_any_text_is_a_number_to_an_option(option: str, text: str) -> None:
    request = under_client(option, text)
    assert isinstance(request, RunOptions)
    assert 0 <= request.trickle_s < float("inf")


def test_a_faulty_option_of_the_wrapper_is_an_error_under_a_client_too() -> None:
    with pytest.raises(UsageError, match="--nthreads needs a value"):
        under_client("--nthreads")


def test_the_runtime_may_be_chosen_by_the_environment() -> None:
    assert under_client(VMWRAPPER_BOINC_RUNTIME="python") == RunOptions(under_client=True, boinc_runtime="python")
    assert by_hand("--boinc-runtime", "auto", VMWRAPPER_BOINC_RUNTIME="python") == RunOptions()
    with pytest.raises(UsageError, match="must be one of"):
        by_hand(VMWRAPPER_BOINC_RUNTIME="x")


WORDS = st.lists(
    st.sampled_from(["--nthreads", "4", "--", "job.xml", "x", "--passthrough_child", "a b", "--trickle", ""])
)


@given(WORDS, st.booleans())
def test_no_word_is_lost_or_made_up(words: list[str], client: bool) -> None:
    try:
        request = parse_arguments(words, under_client=client, environment={}, is_file=lambda _: False)
    except UsageError:
        return
    assert isinstance(request, RunOptions)
    left = iter(words)
    assert all(word in left for word in request.extra_args)  # in their order
