"""A real guest whose outputs look like links of the client's: both directions, by both runtimes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.vmwrapper.run.test_worker_job import EXAMPLE, WRAPPER, host_main, image, shell, story
from tests.integration.vmwrapper.vm.test_guest_links import library_is_there
from tests.support.slots import TestSlot

__all__ = ["image"]

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
]


def out(*names: str) -> str:
    return "".join(f"<copy_file_from_VM>{name}</copy_file_from_VM>" for name in names)


@pytest.mark.parametrize("runtime", ["python", "library"])
def test_a_guest_writes_and_reads_nothing_but_its_own_files(
    tmp_path: Path,
    image: Path,
    runtime: str,
) -> None:
    if runtime == "library" and not library_is_there():
        pytest.skip("libboinc_api is not installed")
    victim, project = tmp_path / "victim", tmp_path / "project"
    victim.write_text("secret\n")
    project.mkdir()
    (tmp_path / "slot").mkdir()
    slot = TestSlot(tmp_path / "slot")
    shutil.copy(EXAMPLE / "HostConfig.cfg", slot.folder / "HostConfig.cfg")
    slot.write("guest.vdi", f"<soft_link>{image}</soft_link>\n")
    slot.write("out", "<soft_link>../project/out_0</soft_link>\n")
    attack = f"<soft_link>{victim}</soft_link>"
    slot.job(
        host_main(),
        shell(
            f'echo "{attack}" | tee fresh trap out',
            out("fresh", "trap", "out") + "<stdout_filename>log</stdout_filename>",
        ),
        shell(
            "for f in fresh out; do echo over > $f; done; echo over",
            out("fresh", "out") + "<stdout_filename>log</stdout_filename>",
        ),
        shell(
            "cat trap fresh > seen",
            "<copy_file_to_VM>trap</copy_file_to_VM><copy_file_to_VM>fresh</copy_file_to_VM>" + out("seen"),
        ),
    )
    try:
        status = slot.run("job.xml", program=WRAPPER, limit_s=200, VMWRAPPER_BOINC_RUNTIME=runtime)
        assert status == 0, story(slot)
        assert victim.read_text() == "secret\n"
        assert slot.text("seen") == f"{attack}\nover\n"
        assert slot.text("trap") == f"{attack}\n"
        assert (slot.text("fresh"), slot.text("log")) == ("over\n", "over\n")
        assert (project / "out_0").read_text() == "over\n", "the client's link counts to the end"
    finally:
        slot.clean()
