"""The reference documents name all that can be called, sent, configured, found in a slot, or was there in 2009."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from guest.agent import config as vm_config
from vmcontrol.api.api import Api
from vmcontrol.api.calls import functions_of
from vmcontrol.api.methods_v1 import MethodsV1
from vmcontrol.api.methods_v2 import MethodsV2
from vmcontrol.common import slotfiles
from vmcontrol.hostmain import config as host_config
from vmcontrol.hypervisors.qemu import problems as qemu_problems
from vmcontrol.hypervisors.virtualbox import problems as virtualbox_problems
from vmcontrol.protocol import messages
from vmwrapper.exit_status import ExitStatus

ROOT = Path(__file__).parents[3]
OF_2009 = functions_of(MethodsV1) | functions_of(Api)
METHODS = OF_2009 | functions_of(MethodsV2)


def document(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described_with_its_arguments(name: str) -> None:
    wanted = [one for one in inspect.signature(METHODS[name]).parameters if one != "self"]
    described = re.findall(rf"`{name}\(([^`]*)\)`", document("reference/xml-rpc.md"))
    assert len(wanted) in [len([one for one in text.split(",") if one.strip()]) for text in described], described


@pytest.mark.parametrize("name", messages._READERS)
def test_every_message_is_described(name: str) -> None:
    assert f"`{name}`" in document("reference/messages.md")


@pytest.mark.parametrize(("section", "options"), vm_config._KNOWN.items())
def test_every_option_of_the_agent_is_described(section: str, options: set[str]) -> None:
    table = document("reference/configuration.md").split("\n## VMConfig.cfg\n")[1]
    rows = [row for row in table.splitlines() if row.lower().startswith(f"| {section} |")]
    assert {option for row in rows for option in re.findall(r"`(\w+)`", row.split("|")[2])} == options


@pytest.mark.parametrize(("section", "options"), host_config.KNOWN.items())
def test_every_option_of_hostmain_is_described(section: str, options: frozenset[str]) -> None:
    table = document("reference/configuration.md").split("\n## VMConfig.cfg\n")[0]
    rows = [row for row in table.splitlines() if row.lower().startswith(f"| {section} |")]
    assert {option for row in rows for option in re.findall(r"`(\w+)`", row.split("|")[2])} == options


@pytest.mark.parametrize("status", ExitStatus)
def test_every_exit_status_is_described(status: ExitStatus) -> None:
    assert f"\n| {status.value} |" in document("reference/exit-status.md").split("## HostMain")[0]


@pytest.mark.parametrize("name", [*sorted(slotfiles.RESERVED), slotfiles.VM_FOLDER + "/", slotfiles.HOSTMAIN_LOCK])
def test_every_file_of_the_slot_is_described(name: str) -> None:
    assert re.search(rf"`(vm/)?{re.escape(name)}`", document("reference/slot-files.md"))


REASONS = {one.reason for one in (*qemu_problems.PROBLEMS, *virtualbox_problems.PROBLEMS) if one.delay_s is not None}


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_reason_to_wait_is_explained_to_volunteers(reason: str) -> None:
    table = document("volunteers.md").split("## Messages in the BOINC Manager")[1].split("## When a task")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")]
    assert any(part.strip() in reason for row in rows for part in re.split(r"\.\.\.|;", row) if len(part.strip()) > 20)


@pytest.mark.parametrize("name", OF_2009)
def test_what_became_of_each_method_of_2009_is_said(name: str) -> None:
    assert f"`{name}`" in document("projects/from-cern-vmwrapper.md") or name in (
        "getNamesToIdsMapping",
        "getIdsToNamesMapping",
    )


def test_compatibility_names_tests_that_exist() -> None:
    text = document("projects/from-cern-vmwrapper.md")
    there = {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert set(re.findall(r"`(?:tests/\w+/)?(\w+\.py)`", text.split("## What is shown where")[1])) <= there


def test_the_pages_job_file_is_the_pages() -> None:
    """Typed off the VmApps page; nobody is to improve it."""
    text = (ROOT / "examples" / "vmapps-page" / "job.xml").read_text(encoding="utf-8")
    for line in (
        "<command_line>-xf ./cctools-2_5_2-i686-linux-2.6.tar</command_line>",
        "<command_line>-xf ./apache-activemq-5.2.0.tar</command_line>",
        "<command_line>-xf ./boincvm.tar</command_line>",
        "<application>./apache-activemq-5.2.0/bin/activemq</application>",
        "<application>python</application>",
        "<command_line>./boincvm/HostMain.py ./boincvm/HostConfig.cfg</command_line>",
        "<virtualmachine>CernVM</virtualmachine>",
        "<app_pathVM></app_pathVM>",
        "<copy_file_to_VM>stdin_worker</copy_file_to_VM>",
        "<command_line>5</command_line>",
    ):
        assert line in text
