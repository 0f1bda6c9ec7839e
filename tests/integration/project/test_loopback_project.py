"""The whole cycle of a job with the real client: attached to a project, files downloaded and their signatures checked,
run in a virtual machine, trickles both ways, an early upload, outputs uploaded, reported.

The guest's program ends only when the project has answered its trickle: no time of this test decides anything.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import boinc_client
from tests.support.boinc_client import BoincClient
from tests.support.client_vm import HOST_CONFIG, executions
from tests.support.code_signing import SigningKey
from tests.support.loopback_project import LoopbackProject, folder_of
from tests.support.slots import HOST_MAIN_TASK

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.timeout(400),  # a VM under emulation, perhaps on two busy processors
    pytest.mark.boinc,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(not boinc_client.AVAILABLE, reason=boinc_client.WHY_NOT),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
]

PROGRAM = b"""\
#!/usr/bin/env python3
'''usage: program.py IN OUT: reports, waits for the project's answer, ends.'''
import sys, time
from pathlib import Path
Path("early").write_text("of the middle\\n")
Path("news").write_text("half of it is done")
while not (answers := sorted(Path(".").glob("trickle_down*"))):
    time.sleep(0.1)
Path(sys.argv[2]).write_text(Path(sys.argv[1]).read_text() + answers[0].read_text().strip() + "\\n")
print(*sys.argv[3:])
print("some words", file=sys.stderr)
"""

JOB = f"""\
<job_desc>
{HOST_MAIN_TASK}
<task><virtualmachine>one</virtualmachine><image>guest.vdi</image><hypervisor>qemu</hypervisor>
<memory_size_mb>128</memory_size_mb><application>program.py</application><copy_app_to_VM>1</copy_app_to_VM>
<copy_file_to_VM>in</copy_file_to_VM><command_line>in out</command_line>
<stdout_filename>words</stdout_filename><copy_file_from_VM>out</copy_file_from_VM>
<trickle_trigger_file>news</trickle_trigger_file></task>
<intermediate_upload_file>early</intermediate_upload_file>
</job_desc>
"""

VERSION = """\
<version>
<file><physical_name>wrapper_1</physical_name><main_program/></file>
<file><physical_name>job_1.xml</physical_name><logical_name>job.xml</logical_name></file>
<file><physical_name>HostConfig_1.cfg</physical_name><logical_name>HostConfig.cfg</logical_name><copy_file/></file>
<file><physical_name>program_1.py</physical_name><logical_name>program.py</logical_name></file>
<file><physical_name>guest_1.vdi</physical_name><logical_name>guest.vdi</logical_name></file>
</version>
"""

WORK = """\
<file_info><number>0</number></file_info>
<workunit>
<file_ref><file_number>0</file_number><open_name>in</open_name></file_ref>
<command_line>--trickle 2 more words</command_line>
<rsc_fpops_est>1e12</rsc_fpops_est><rsc_fpops_bound>1e18</rsc_fpops_bound>
<rsc_memory_bound>1e8</rsc_memory_bound><rsc_disk_bound>1e10</rsc_disk_bound><min_quorum>1</min_quorum>
</workunit>
"""

TRAP = "<workunit><rsc_fpops_bound>1e18</rsc_fpops_bound><rsc_disk_bound>1e10</rsc_disk_bound></workunit>"

OUTPUTS = ("out", "words", "early")
CUT = 5_000_000
"""Bytes of the image after which its first download breaks."""


def output_template(names: tuple[str, ...] = OUTPUTS) -> str:
    infos = "".join(
        f"<file_info><name><OUTFILE_{number}/></name><generated_locally/><upload_when_present/>"
        "<max_nbytes>1000000</max_nbytes><url><UPLOAD_URL/></url></file_info>\n"
        for number, _ in enumerate(names)
    )
    references = "".join(
        f"<file_ref><file_name><OUTFILE_{number}/></file_name><open_name>{name}</open_name></file_ref>\n"
        for number, name in enumerate(names)
    )
    return f"{infos}<result>\n{references}</result>\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackProject]:
    """A project with three app versions: one in order, and two that are not signed as they should be."""
    from guest.image.cache import guest_image

    folder = tmp_path_factory.mktemp("project")
    wrapper = f'#!/bin/sh\nexport PYTHONPATH="{ROOT}"\nexec "{sys.executable}" -m vmwrapper "$@"\n'
    good = folder_of(
        folder / "good",
        {
            "wrapper_1": wrapper.encode(),
            "job_1.xml": JOB.encode(),
            "HostConfig_1.cfg": HOST_CONFIG,
            "program_1.py": PROGRAM,
            "guest_1.vdi": guest_image(ROOT / ".cache" / "guest-image"),
        },
        VERSION,
        ["wrapper_1", "program_1.py"],
    )
    trap = f'#!/bin/sh\ntouch "{folder}/was-run"\n'
    with LoopbackProject(folder / "server") as project:
        project.add_app_version("worker", good)
        for name in ("stranger", "changed"):
            version = f"<version><file><physical_name>{name}_1</physical_name><main_program/></file></version>"
            bad = folder_of(folder / name, {f"{name}_1": trap.encode()}, version, [f"{name}_1"])
            if name == "changed":
                (bad / f"{name}_1.sig").write_text(project.key.sign_text(trap + "# and more"))
            project.add_app_version(name, bad, signed_by=SigningKey())
        yield project


@pytest.fixture(scope="module")
def client(project: LoopbackProject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoincClient]:
    project.cut_next_download("guest_1.vdi", CUT)
    project.add_work(
        "cycle",
        "worker",
        input_template=WORK,
        output_template=output_template(),
        inputs={"cycle_in": b"The question. "},
    )
    for name in ("stranger", "changed"):
        project.add_work(f"{name}_trap", name, input_template=TRAP, output_template=output_template(("out",)))
    folder = tmp_path_factory.mktemp("client")
    with BoincClient(folder, attach=(project.url, project.account_key)) as client:
        yield client


def test_the_whole_cycle(project: LoopbackProject, client: BoincClient) -> None:
    # a download whose connection breaks is gone on with, from where it broke
    def gone_on() -> list[int]:
        firsts = [first for name, first in project.downloads if name == "guest_1.vdi"]
        if firsts and not any(firsts):
            with contextlib.suppress(KeyError):  # else the client waits for a minute or more
                client.retry_transfer("guest_1.vdi")
        return [first for first in firsts if first]

    assert client.wait_for(gone_on, "the download goes on", 60) == [
        CUT - 5000
    ]  # the client does not trust the last bytes

    # up: what the guest's program wrote, and the file it made before its end
    project.wait_for(lambda: [one.name for one in project.uploads] == ["cycle_0_2"], "the early upload", 240)
    client.update()  # because of the two jobs whose downloads failed it would not call for a minute or more
    news = project.wait_for(lambda: [t for t in project.trickles if t.variety == "news"], "the trickle")
    assert [(one.result, one.text) for one in news] == [("cycle_0", "half of it is done")]
    assert project.uploaded("cycle_0_2").read_text() == "of the middle\n"
    slot = client.slot("cycle_0")
    assert executions((slot / "guest_console.log").read_text(errors="replace")) == [("0", 1)]
    by_time = [one.text for one in project.trickles if one.variety == "cpu_time"]
    assert by_time
    assert all(re.fullmatch(r"<cpu_time>\d+\.\d+</cpu_time>", text) for text in by_time), by_time

    # down: handed to the program that runs
    project.send_trickle_down("cycle_0", "The answer.")
    client.update()

    report = project.report_of("cycle_0")
    assert (report.exit_status, report.state) == (0, boinc_client.RESULT_FILES_UPLOADED), report.stderr
    assert "running program.py in the guest" in report.stderr
    assert report.cpu_time > 0
    assert project.uploaded("cycle_0_0").read_text() == "The question. The answer.\n"
    assert project.uploaded("cycle_0_1").read_text() == "more words\n"
    assert sorted(one.name for one in project.uploads) == ["cycle_0_0", "cycle_0_1", "cycle_0_2"], "each once"
    assert len(project.requests) < 30
    assert not (slot / "vm").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("stranger", "signature verification error"), ("changed", "signature verification failed")],
    ids=["signed with another key", "another content than was signed"],
)
def test_a_file_that_is_not_signed_by_the_project_is_refused(
    project: LoopbackProject, client: BoincClient, name: str, words: str
) -> None:
    result = f"{name}_trap_0"
    client.wait_for(lambda: result in project.reports or has_failed(client, result), f"{result} has failed")
    if result not in project.reports:
        client.update()
    report = project.report_of(result)
    assert report.exit_status != 0
    assert words in report.stderr.lower()
    assert not (project.folder.parent / "was-run").exists()


def has_failed(client: BoincClient, result: str) -> bool:
    try:
        return client.result(result).exit_status != 0  # its state is still that of a download
    except KeyError:  # the client has not asked for work yet
        return False
