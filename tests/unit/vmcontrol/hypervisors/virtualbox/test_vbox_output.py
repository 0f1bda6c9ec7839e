"""Parsers of what VBoxManage and VirtualBox's log say. Texts are from VirtualBox 7.2.22, shortened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.hypervisors.virtualbox import output
from vmcontrol.hypervisors.virtualbox.output import Forward, Listed, Snapshot, Version
from vmcontrol.protocol.vm import VmState

WARNING = """WARNING: The character device /dev/vboxdrv does not exist.
\t Please install the virtualbox-dkms package and the appropriate
\t headers, most likely linux-headers-amd64.

\t You will not be able to start VMs until this problem is fixed.
"""
UUID = "9036b340-2385-40f9-a77d-60527f45d9c9"
INFO = f"""name="one"
groups="/"
UUID="{UUID}"
CfgFile="/slot 1/vm/one/one.vbox"
LogFldr="/slot 1/vm/one/Logs"
description="two
lines with \\"quotes\\" and = signs"
memory=32
VMState="running"
VMStateChangeTime="2026-11-22T20:13:50.158000000"
"disk-0-0"="/slot 1/vm/one/disk.vdi"
"disk-ImageUUID-0-0"="c14a618d-75f1-4d1f-a72a-237370328b75"
macaddress1="080027849331"
cableconnected1="on"
nic1="nat"
nicspeed1="0"
Forwarding(0)="agent,tcp,127.0.0.1,24616,,4616"
Forwarding(1)="odd,udp,,53,,53"
macaddress2="080027859331"
cableconnected2="off"
nic2="nat"
nic3="none"
vrdeport=-1
SnapshotName="vmwrapper_1"
SnapshotUUID="e7c5963c-474d-4a82-a658-083792c6e3bd"
SnapshotName-1="vmwrapper_2"
SnapshotUUID-1="c908fe70-4198-4a1a-9006-4d0770d22928"
CurrentSnapshotName="vmwrapper_2"
CurrentSnapshotUUID="c908fe70-4198-4a1a-9006-4d0770d22928"
CurrentSnapshotNode="SnapshotName-1"
"""


def test_what_a_vm_is() -> None:
    facts = output.facts(WARNING + INFO)
    assert facts is not None
    assert (facts.name, facts.uuid, facts.state) == ("one", UUID, VmState.RUNNING)
    assert facts.settings_file == "/slot 1/vm/one/one.vbox"
    assert facts.log_folder == "/slot 1/vm/one/Logs"
    assert facts.macs == {1: "08:00:27:84:93:31", 2: "08:00:27:85:93:31"}
    assert facts.cables == {1: True, 2: False}
    assert facts.nics == {1: "nat", 2: "nat"}
    assert facts.forwards == (Forward("agent", 24616, 4616),)
    assert facts.disks == ("/slot 1/vm/one/disk.vdi",)
    assert [one.name for one in facts.snapshots] == ["vmwrapper_1", "vmwrapper_2"]
    assert facts.snapshots[1] == Snapshot("vmwrapper_2", "c908fe70-4198-4a1a-9006-4d0770d22928")
    assert facts.current_snapshot_name == "vmwrapper_2"
    assert facts.remote_desktop_port == 0
    assert output.pairs(INFO)["description"] == 'two\nlines with "quotes" and = signs'


@pytest.mark.parametrize("text", ["", WARNING, 'name="x"\n', 'VMState="running"\nUUID="no"\n'])
def test_what_is_no_answer_about_a_vm(text: str) -> None:
    assert output.facts(text) is None


def test_a_list_of_vms() -> None:
    text = f'{WARNING}"one" {{{UUID}}}\n"my "old" {{VM}}" {{{UUID.upper()}}}\n"<inaccessible>" {{{UUID}}}\nnoise\n'
    assert output.vm_list(text) == [
        Listed("one", UUID),
        Listed('my "old" {VM}', UUID),
        Listed("<inaccessible>", UUID),
    ]
    assert [one.accessible for one in output.vm_list(text)] == [True, True, False]


def test_warnings_of_scripts_are_taken_away() -> None:
    script = WARNING.replace("\n\n", "\n\t \n")
    assert output.without_warnings(script + "7.2.22_Debianr175245\n") == "7.2.22_Debianr175245"
    deprecated = "Warning: --audio is deprecated and will be removed soon. Use --audio-driver instead!\nnext"
    assert output.without_warnings(deprecated) == "next"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("7.2.22_Debianr175245\n", Version(7, 2, 22)),
        ("6.1.38_Debianr153438", Version(6, 1, 38)),
        ("7.0.20r163906\n", Version(7, 0, 20)),
        (WARNING + "7.1.4r165100\n", Version(7, 1, 4)),
        ("", None),
        ("VBoxManage: error: no", None),
    ],
)
def test_versions(text: str, version: Version | None) -> None:
    assert output.version(text) == version


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("poweroff", VmState.POWERED_OFF),
        ("saved", VmState.SAVED),
        ("aborted", VmState.ABORTED),
        ("aborted-saved", VmState.SAVED),
        ("gurumeditation", VmState.STUCK),
        ("livesnapshotting", VmState.RUNNING),
        ("something new", None),
    ],
)
def test_states(word: str, state: VmState | None) -> None:
    assert output.state(word) is state


LOG = """00:00:00.017816 Process ID: 4886
00:00:00.021300 Console: Machine state changed to 'Starting'
00:00:00.340795 Console: Machine state changed to 'Running'
00:00:01.900085 Changing the VM state from 'SUSPENDING' to 'SUSPENDED'
00:00:01.900096 Console: Machine state changed to 'Paused'
"""


def test_the_log() -> None:
    assert output.log_process(LOG) == 4886
    assert output.log_state(LOG) is VmState.PAUSED
    assert output.log_state("00:00:01 Guest said: Console: Machine state changed to 'Running'") is None
    assert output.log_state("") is None
    assert output.log_process("") is None
    trouble = "00:00:09.1 Console: VM runtime error: fatal=false, errorID=DrvVD_DISKFULL message=...\n"
    assert "DISKFULL" in output.log_trouble(LOG + trouble)
    assert output.log_trouble(LOG) == ""
    assert output.runtime_error(LOG) == ""
    assert output.runtime_error(trouble + LOG) == "", "it went on since"
    assert output.runtime_error(LOG + trouble) == "errorID=DrvVD_DISKFULL message=..."
    assert output.runtime_error(LOG + "00:00:09.1 Guest said: VM runtime error: fatal=false, x\n") == ""
    assert not output.log_ends_in_order(LOG)
    orphan = "00:00:15.0 VBoxHeadless: VBoxSVC became unavailable, exiting.\n"
    orphan += "00:00:15.1 Changing the VM state from 'RUNNING' to 'POWERING_OFF'\n"
    assert not output.log_ends_in_order(LOG + orphan), "nobody asked for that"
    assert output.log_ends_in_order(LOG + "00:00:02.1 Changing the VM state from 'RUNNING' to 'POWERING_OFF'\n")


def test_adapters() -> None:
    assert output.host_only_adapters("Name:            vboxnet0\nGUID: x\n\nName:   vboxnet1\n") == [
        "vboxnet0",
        "vboxnet1",
    ]


@given(st.text())
def test_nothing_raises_for_any_text(text: str) -> None:
    output.pairs(text)
    output.facts(INFO + text)
    output.vm_list(text)
    output.version(text)
    output.log_state(text)
    output.log_process(text)
    output.log_trouble(text)
    output.without_warnings(text)


_plain = st.text(st.characters(codec="utf-8", exclude_characters='"\\\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'))


@given(st.dictionaries(st.from_regex(r"[A-Za-z][A-Za-z0-9_()-]{0,20}", fullmatch=True), _plain))
def test_pairs_come_back(values: dict[str, str]) -> None:
    text = "\n".join(f'{key}="{value}"' for key, value in values.items())
    assert output.pairs(text) == values


@given(st.text())
def test_warnings_never_hide_an_answer(text: str) -> None:
    assert output.without_warnings(f"{WARNING}name={'x'}").endswith("name=x")
    kept = output.without_warnings(text)
    assert set(kept.splitlines()) <= set(text.splitlines()) | {""}
