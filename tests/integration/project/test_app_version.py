"""The example project's app version as a volunteer's client gets it: signed, linked, copied, run to its end, and gone.

examples/boinc-project as it stands: its script makes the folder, with the frozen executable; its templates make the
work; its trickle handler credits what came. Two app versions run at the same time and share one unpacked image.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import boinc_client
from tests.support.boinc_client import BoincClient
from tests.support.frozen_programs import frozen_programs
from tests.support.loopback_project import LoopbackProject
from tests.unit.project.test_credit_trickles import Server

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "boinc-project"
PLATFORM = "x86_64-pc-linux-gnu"
RECORDED = ROOT / "tests" / "unit" / "project" / "recorded_trickles.json"

pytestmark = [
    pytest.mark.boinc,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not boinc_client.AVAILABLE, reason=boinc_client.WHY_NOT),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
]

DEFAULTS = (
    "<rsc_fpops_est>3600e9</rsc_fpops_est><rsc_fpops_bound>86400e9</rsc_fpops_bound>"
    "<rsc_memory_bound>500e6</rsc_memory_bound><rsc_disk_bound>1e9</rsc_disk_bound>"
)
"""What create_work adds to a workunit whose template does not say (tools/create_work.cpp)."""


def template(name: str) -> str:
    text = (EXAMPLE / "templates" / name).read_text()
    return text if "rsc_" in text else text.replace("</workunit>", f"{DEFAULTS}</workunit>")


def next_version(first: Path, apps: Path) -> Path:
    """2.00: another job file, the same executable and image. It makes checkpoints, and so trickles, each second."""
    target = apps / "worker" / "2.00" / PLATFORM
    target.mkdir(parents=True)
    for path in first.iterdir():
        copy = target / path.name.replace("_1.00_", "_2.00_")
        shutil.copy(path, copy)
        if path.name.endswith("job.xml"):
            interval = "<minimum_checkpoint_interval>1</minimum_checkpoint_interval>"
            copy.write_text(path.read_text().replace("<weight>", f"{interval}<weight>"))
    described = target / "version.xml"
    described.write_text(described.read_text().replace("_1.00_", "_2.00_"))
    return target


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackProject]:
    from guest.image.cache import guest_image

    folder = tmp_path_factory.mktemp("server")
    program, image = frozen_programs() / "vmwrapper", guest_image(ROOT / ".cache" / "guest-image")
    made = subprocess.run(
        [EXAMPLE / "make_app_version", "1.00", program, image, "--xz-preset", "0"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    first = folder / "apps" / "worker" / "1.00" / PLATFORM
    with LoopbackProject(folder / "project") as project:
        project.add_app_version("worker", first, version_num=100)
        project.add_app_version("worker", next_version(first, folder / "apps"), version_num=200)
        yield project


def client_folder_of(client: BoincClient, project: LoopbackProject) -> Path:
    """The project's folder on the volunteer's computer."""
    return client.folder / "projects" / re.sub(r"[^A-Za-z0-9.-]", "_", project.url.removeprefix("http://").strip("/"))


def test_from_the_folder_to_the_finished_workunits_and_away(project: LoopbackProject, tmp_path: Path) -> None:
    for name, version, templates in (
        ("page", 100, ("worker_wu", "worker_result")),
        ("now", 200, ("worker_in", "worker_out")),
    ):
        project.add_work(
            name,
            "worker",
            input_template=template(templates[0]),
            output_template=template(templates[1]),
            inputs={f"{name}_in": f"the file of {name}".encode(), f"{name}_stdin": b"words\n"},
            version_num=version,
        )
    began = int(time.time())
    with BoincClient(tmp_path, attach=(project.url, project.account_key), checkpoint_period_s=1) as client:
        here = client_folder_of(client, project)
        for name in ("page_0", "now_0"):
            client.wait_for(lambda name=name: name in client.log() and client.result(name).is_running, name, 120)  # type: ignore[misc]
            check_slot(client.slot(name), here)
        for name in ("page", "now"):
            report = project.report_of(f"{name}_0", 300)
            said = "".join(report.raw.itertext())
            assert report.exit_status == 0, said
            assert report.state == boinc_client.RESULT_FILES_UPLOADED
            assert re.search(r"image guest\.vdi: vmwrapper_image_[0-9a-f]{32}, ready", said)
            assert project.uploaded(f"{name}_0_0").read_text() == f"THE FILE OF {name.upper()}"
            assert project.uploaded(f"{name}_0_1").read_text() == "WORDS\n"
            assert "worker: 6 characters on stdin" in project.uploaded(f"{name}_0_2").read_text()
        asked = [file for file, first in project.downloads if first == 0]
        large = [file for file in asked if file.endswith(".vdi.xz") or file.startswith("vmwrapper_")]
        assert len(large) == len(set(large)) == 2, "executable and image are downloaded once for both versions"
        (image,) = unpacked(here)
        check_credit(project, began)

        kept = tmp_path / "kept"
        kept.hardlink_to(image)
        client.boinccmd("--project", project.url, "reset")
        client.wait_for(lambda: not list(here.glob("vmwrapper_image_*")), "the reset project's folder is empty", 30)
        here.joinpath(image.name).hardlink_to(kept)
        client.boinccmd("--project", project.url, "detach")
        client.wait_for(lambda: not here.exists(), "the detached project's folder is gone", 30)
        assert not list(tmp_path.glob("slots/*/*"))


def unpacked(folder: Path) -> list[Path]:
    return [path for path in folder.glob("vmwrapper_image_*") if path.suffix not in (".lock", ".part")]


def check_slot(slot: Path, here: Path) -> None:
    """Links of the client where version.xml says nothing else, copies where it says copy_file."""
    assert (slot / "HostConfig.cfg").read_text().startswith("# HostMain")
    assert (slot / "in").read_text().startswith("the file of")
    for name in ("job.xml", "worker.py", "guest.vdi", "guest.vdi.json", "stdin"):
        link = re.fullmatch(r"<soft_link>(.*)</soft_link>\n?", (slot / name).read_text())
        assert link, name
        assert (slot / link[1]).resolve().parent == here.resolve()


def check_credit(project: LoopbackProject, began: int) -> None:
    """The example's handler on the trickles as the scheduler would put them into its database."""
    trickles = [trickle for trickle in project.trickles if "<fraction_done>" in trickle.text]
    assert {trickle.result for trickle in trickles} == {"now_0"}
    server = Server(sqlite3.connect(":memory:"), began)
    server.add_result("now_0")
    sizes = [len(request) for request in project.requests]
    print(f"{len(sizes)} scheduler requests of {sum(sizes) / len(sizes):.0f} bytes, {len(trickles)} trickles")
    texts = [f"      <result_name>{one.result}</result_name>\n      <time>1</time>\n{one.text}\n" for one in trickles]
    for text in texts:
        server.receive(text, at=int(time.time()))
    server.handler.one_pass("cpu_time")
    reported = max(float(one) for text in texts for one in re.findall("<cpu_time>(.*?)</cpu_time>", text))
    assert reported > 1
    assert server.cpu_time_credited("now_0") == pytest.approx(reported)
    if "RECORD_TRICKLES" in os.environ:  # done once; tests/unit/project/test_credit_trickles.py plays it
        RECORDED.write_text(json.dumps(texts, indent=1) + "\n")
