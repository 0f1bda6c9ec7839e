"""docker_wrapper's job.toml becomes a job.xml, and nothing of it is dropped in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmwrapper.job import parse
from vmwrapper.project import docker_options
from vmwrapper.project.docker_wrapper import MAX_BYTES, ConvertError, convert


def faults(toml: str) -> tuple[str, ...]:
    with pytest.raises(ConvertError) as caught:
        convert(toml.encode())
    return caught.value.lines


def test_all_that_can_be_said_is_said() -> None:
    toml = """
        image_name = "registry:5000/lab/myapp:1.0"
        workdir = "/work"
        create_args = "--memory 512m --cpus=1.5 -e A='b & c' -w /work --entrypoint /bin/run"
    """
    converted = convert(toml.encode(), inputs=["in"], outputs=["out"])
    assert converted.job_xml == (
        "<job_desc>\n    <task>\n"
        "        <container>myapp.vdi</container>\n"
        "        <container_workdir>/work</container_workdir>\n"
        "        <application>/bin/run</application>\n"
        "        <setenv>A=b &amp; c</setenv>\n"
        "        <copy_file_to_VM>in</copy_file_to_VM>\n"
        "        <copy_file_from_VM>out</copy_file_from_VM>\n"
        "        <memory_size_mb>640</memory_size_mb>\n"
        "        <cpus>2</cpus>\n"
        "    </task>\n</job_desc>\n"
    )
    assert any("--cpus 1.5 becomes 2" in note for note in converted.notes)
    assert not parse.examine(converted.job_xml.encode(), "job.xml").complaints


def test_an_empty_file_makes_a_good_job() -> None:
    converted = convert(b"")
    assert "<container>container.vdi</container>" in converted.job_xml
    assert "<container_workdir>/app</container_workdir>" in converted.job_xml
    assert not parse.examine(converted.job_xml.encode(), "job.xml").complaints


@pytest.mark.parametrize(
    ("toml", "part"),
    [
        ("use_gpu = true", "no GPU"),
        ('mount = ["/a:/b"]', "--input and --output"),
        ('project_dir_mount = "/p"', "--input and --output"),
        ("portmap = [80]", "no port of the host"),
        ("web_graphics_guest_port = 80", "no port of the host"),
        ('build_args = "--build-arg A=b"', "docker build"),
        ("strange = 1", "unknown"),
        ('workdir = "app"', "not absolute"),
        ("workdir = 5", "expected a string"),
        ("create_args = [1]", "expected a string"),
        ('create_args = "-e \'A=b"', "no closing quotation"),
        ('create_args = "-u app"', "write USER in the Dockerfile"),
        ('create_args = "--gpus all"', "no GPU"),
        ('create_args = "-e HOME"', "NAME=VALUE"),
        ('create_args = "--network host"', "no network"),
        ('create_args = "-w /other"', "have to be the same"),
        ('create_args = "--memory lots"', "no size"),
        ('create_args = "--cpus 0"', "no number of processors"),
        ('create_args = "--memory"', "needs a value"),
        ('create_args = "image"', "no option"),
        ('create_args = "--no-such x"', "job.xml has nothing for it"),
        ('create_args = ["-e", "A=\\u0001"]', "control character"),
        ("= 1", "no TOML"),
        ("a = " + "[" * 20000, "nested too deeply"),
        ("#" * MAX_BYTES + "#", "no job.toml"),
    ],
)
def test_what_cannot_be_said_is_a_fault_that_says_what_to_do(toml: str, part: str) -> None:
    assert any(part in line for line in faults(toml)), faults(toml)


def test_every_fault_is_told_at_once() -> None:
    assert len(faults('use_gpu = true\nportmap = [80]\ncreate_args = "-u app --privileged"')) == 4


def test_what_has_no_effect_is_told() -> None:
    notes = convert(b'verbose = true\ncreate_args = "-it --rm --name x"').notes
    for name in ("verbose", "--interactive", "--tty", "--rm", "--name"):
        assert any(f"{name} is left out" in note for note in notes)


@given(st.binary(max_size=300))
def test_any_bytes_are_converted_or_refused(content: bytes) -> None:
    """Nothing but ConvertError, and what is made is a good job file."""
    try:
        converted = convert(content)
    except ConvertError:
        return
    assert not parse.examine(converted.job_xml.encode(), "job.xml").complaints


@given(
    st.lists(st.sampled_from(["-e", "A=b", "-m", "1g", "--cpus", "2", "-it", "-u", "--x", "", "-", "--"]) | st.text())
)
def test_any_words_are_taken_or_told(words: list[str]) -> None:
    options = docker_options.read(words)
    said = [options.memory_mb, options.cpus, options.workdir, options.entrypoint, *options.environment]
    assert not words or any(one is not None for one in said) or options.faults or options.notes
