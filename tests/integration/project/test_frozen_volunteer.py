"""The worker example on a volunteer's computer: Debian 12, BOINC's client, QEMU, no Python, an unprivileged user.

The frozen executable is the main program of the app version that examples/worker/version.xml describes. Opt-in: the
root folder takes minutes and half a gigabyte once. Its outcome stands in docs/internals/frozen.md.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from tests.support import boinc_client
from tests.support.boinc_client import BoincClient, Job, JobFile
from tests.support.frozen_programs import frozen_programs
from tests.support.volunteer_root import give_to_user, program_there, user_of, volunteer_root, why_not

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "worker"

pytestmark = [
    pytest.mark.boinc,
    pytest.mark.qemu,
    pytest.mark.optin,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


@pytest.fixture(scope="module")
def root() -> Path:
    root = volunteer_root()
    assert not list(root.glob("usr/bin/python*"))
    assert not list(root.glob("usr/lib/*/libpython*"))
    assert not list(root.glob("usr/lib/*/libboinc_api*"))
    return root


@pytest.fixture
def home(tmp_path: Path, root: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    give_to_user(root, folder)
    return folder


def worker(home: Path) -> Job:
    """The job of version.xml; what the frozen program and the image are hard links of is not given away."""
    from guest.image.cache import guest_image

    where = {
        "vmwrapper": frozen_programs() / "vmwrapper",
        "guest.vdi": guest_image(ROOT / ".cache" / "guest-image"),
        **{name: EXAMPLE / name for name in ("job.xml", "HostConfig.cfg", "worker.py", "in", "stdin_worker")},
    }
    parts = home.parent / "parts"
    parts.mkdir()
    main, files = "", []
    for file in etree.parse(EXAMPLE / "version.xml").getroot().iter("file"):
        name = file.findtext("logical_name") or "vmwrapper"
        copy = Path(shutil.copyfile(where[name], parts / name))
        if file.find("main_program") is not None:
            main = str(copy)
        else:
            files.append(JobFile(name, copy, copied=file.find("copy_file") is not None))
    files += [JobFile(name, where[name].read_bytes()) for name in ("in", "stdin_worker")]
    return Job("worker", Path(main), files=files, outputs=["out", "stdout_worker", "stderr_worker"])


def test_the_worker_example_finishes(home: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_in(root / "tmp")
    client = BoincClient(home / "client", [worker(home)])
    give_to_user(root, home)
    monkeypatch.setattr(boinc_client, "BOINC", str(program_there(root, "boinc", home, home.parent / "boinc")))
    with client:
        client.wait_for(lambda: client.result("worker").is_running, "started", 60)
        slot = client.slot("worker")
        assert slot.stat().st_uid == user_of(root)[0] != 0
        client.wait_for(lambda: client.result("worker").ready_to_report, "finished", 600)
        said = client.stderr_of("worker")
        assert client.result("worker").state == boinc_client.RESULT_FILES_UPLOADED, said
        assert "THIS FILE IS CALLED IN" in client.output("worker", "out").read_text()
        assert client.output("worker", "stdout_worker").read_text() == (EXAMPLE / "stdin_worker").read_text().upper()
        assert "libboinc_api.so.7)" in said
        print(said)
        assert not list(home.rglob("_MEI*"))
        assert files_in(root / "tmp") == before


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_check_and_doctor(home: Path, root: Path) -> None:
    shutil.copy(frozen_programs() / "vmwrapper", home / "vmwrapper")
    shutil.copy(EXAMPLE / "job.xml", home / "job.xml")
    give_to_user(root, home)
    program = program_there(root, "./vmwrapper", home, home.parent / "enter")
    done = [
        subprocess.run([program, *words], capture_output=True, text=True, timeout=120)
        for words in (["check", "job.xml"], ["doctor"], ["licenses"])
    ]
    print(done)
    assert [one.returncode for one in done] == [0, 0, 0], done
    assert [path.name for path in home.glob("_MEI*")] == []
