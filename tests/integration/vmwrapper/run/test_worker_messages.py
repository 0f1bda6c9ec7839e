"""Trickles, early uploads, preferences and the network through the whole wrapper; client and HostMain are played."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import after
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot
from vmwrapper.boinc.channels import Channel


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    yield slot
    slot.clean()


def guest(line: str, more: str = "") -> str:
    return (
        "<task><virtualmachine>one</virtualmachine><image>guest.vdi</image><application>worker</application>"
        f"<command_line>{line}</command_line>{more}</task>"
    )


def vm(slot: TestSlot) -> dict[str, Any]:
    world: dict[str, dict[str, Any]] = json.loads(slot.text("fake_world.json"))
    return next(iter(world.values()), {})


def wait_for(condition: Any, what: str, limit_s: float = 15) -> None:
    end = after(limit_s)
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def next_trickle(slot: TestSlot, client: PlayedClient) -> str:
    """As the client does: told of one, it moves the file away."""
    while "have_new_trickle_up" not in client.hears(Channel.TRICKLE_UP):
        pass
    path = slot.folder / "trickle_up.xml"
    wait_for(path.exists, "trickle_up.xml")
    text = path.read_text()
    path.unlink()
    return text


def test_trickles_both_ways_and_an_early_upload(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    slot.write("trickle_down_7", "from the project")
    slot.job(
        HOST_MAIN_TASK,
        guest(
            "sleep=600 early=news:half_way early=part:a_part",
            "<trickle_trigger_file>news</trickle_trigger_file>"
            "<minimum_checkpoint_interval>1</minimum_checkpoint_interval>",
        ),
        "<trickle_up_period>100000</trickle_up_period><intermediate_upload_file>part</intermediate_upload_file>",
    )
    process = slot.start()
    seen = [next_trickle(slot, client) for _ in range(2)]
    news = next(text for text in seen if "<variety>news</variety>" in text)
    assert news.endswith("half_way")
    figures = next(text for text in seen if "<variety>cpu_time</variety>" in text)
    assert "<cpu_time>" in figures
    assert "<fraction_done>0.5" in figures, "at a snapshot"

    wait_for(lambda: vm(slot)["files"].get("trickle_down_7") == "from the project", "the guest has the trickle-down")
    wait_for(lambda: vm(slot)["files"]["news"] == "", "what was taken is empty")
    (slot.folder / "trickle_down_8").write_text("and again")
    client.say("<have_trickle_down/>", Channel.TRICKLE_DOWN)
    wait_for(lambda: vm(slot)["files"].get("trickle_down_8") == "and again", "the second one")

    wait_for((slot.folder / "boinc_ufr_part").exists, "an upload is asked for", 30)
    assert slot.text("part") == "a_part"
    (slot.folder / "boinc_ufs_part").write_text("<status>0</status>\n")
    client.say("<abort/>")
    assert process.wait(10) == 194
    calls = slot.text("fake_calls.txt")
    assert calls.count("trickle_down_7") == 2, "each once: its path and its name in one call"


def test_an_early_file_comes_into_a_folder_that_the_slot_does_not_have(slot: TestSlot) -> None:
    """The client uploads no file of a folder: its names are the result's. The job goes on all the same."""
    client = PlayedClient(slot)
    slot.job(
        HOST_MAIN_TASK,
        guest("sleep=600 early=folder/part:a_part"),
        "<intermediate_upload_file>folder/part</intermediate_upload_file>",
    )
    process = slot.start()
    slot.wait_for("folder/part", "a_part", 30)
    client.say("<abort/>")
    assert process.wait(10) == 194


def test_a_trickle_down_that_comes_late_reaches_a_guest_of_whom_nothing_else_is_wanted(slot: TestSlot) -> None:
    """Looks at the guest that have nothing to do come before it."""
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("sleep=600"))
    process = slot.start()
    slot.wait_for("fake_runs.txt", "_0_")
    for _ in range(3):
        client.status()
    slot.write("trickle_down_9", "better late")
    client.say("<have_trickle_down/>", Channel.TRICKLE_DOWN)
    wait_for(lambda: vm(slot)["files"].get("trickle_down_9") == "better late", "the guest has the trickle-down", 10)
    client.say("<abort/>")
    assert process.wait(10) == 194


def test_cpu_time_that_the_client_was_told_stays_told_when_both_checkpoints_are_lost(slot: TestSlot) -> None:
    client = PlayedClient(slot, more="<wu_cpu_time>50</wu_cpu_time>\n")
    slot.job("<task><application>sleep</application><command_line>60</command_line></task>")
    process = slot.start()
    report = client.status()
    for element in ("current_cpu_time", "checkpoint_cpu_time"):
        assert float(report.split(f"<{element}>")[1].split("<")[0]) >= 50
    client.say("<abort/>")
    assert process.wait(10) == 194


def test_preferences_and_the_network_reach_the_vm(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("sleep=600", "<enable_network>1</enable_network>"))
    process = slot.start()
    slot.wait_for("fake_runs.txt", "_0_")
    assert vm(slot)["network"] is True
    data = slot.text("init_data.xml")
    preferences = "<global_preferences><cpu_usage_limit>40</cpu_usage_limit></global_preferences>"
    slot.write(
        "init_data.xml",
        data.replace("</app_init_data>", f"<plan_class>vbox64_mt</plan_class>{preferences}</app_init_data>"),
    )
    client.say("<reread_app_info/>")
    wait_for(lambda: vm(slot).get("share") == 40, "the share of the processors")
    client.say("<heartbeat/><network_suspended/>", Channel.HEARTBEAT)
    wait_for(lambda: vm(slot)["network"] is False, "the network is pulled")
    client.say("<heartbeat/>", Channel.HEARTBEAT)
    wait_for(lambda: vm(slot)["network"] is True, "the network is back")
    client.say("<abort/>")
    assert process.wait(10) == 194


def test_what_comes_with_new_preferences_counts_for_what_begins_later(slot: TestSlot) -> None:
    """init_data.xml is read again as a whole: the VM and the program that begin after that get its new values."""
    client = PlayedClient(slot, more="<ncpus>2</ncpus>\n<process_priority>1</process_priority>\n")
    nice = "<task><application>/bin/sh</application><command_line>-c 'nice > niceness_{}'</command_line></task>"
    cpus = "<cpus>ncpus</cpus>"
    two = guest("sleep=600", cpus).replace("one", "two")
    slot.job(HOST_MAIN_TASK, nice.format(1), guest("sleep=4", cpus), nice.format(2), two)
    with (slot.folder / "said").open("wb") as said:
        process = slot.start(stderr=said)
    slot.wait_for("fake_runs.txt", "_1_")
    assert vm(slot)["cpus"] == 2
    data = slot.text("init_data.xml")
    data = data.replace("<ncpus>2<", "<ncpus>3<").replace("<process_priority>1<", "<process_priority>0<")
    slot.write("init_data.xml", data)
    client.say("<reread_app_info/>")
    wait_for(lambda: "preferences have changed" in slot.text("said"), "the preferences are read")
    slot.wait_for("fake_runs.txt", "_3_")
    assert vm(slot)["cpus"] == 3
    assert int(slot.text("niceness_2")) > int(slot.text("niceness_1"))
    client.say("<abort/>")
    assert process.wait(10) == 194


def test_the_address_of_the_vms_screen_is_told_and_only_when_the_job_asks_for_one(slot: TestSlot) -> None:
    """The BOINC Manager's "Show VM console"."""
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("make=out", "<enable_remotedesktop>1</enable_remotedesktop>"), guest("sleep=600"))
    process = slot.start()
    assert client.hears(Channel.GRAPHICS_REPLY) == "<remote_desktop_addr>127.0.0.1:5999</remote_desktop_addr>"
    client.say("<abort/>")
    assert process.wait(10) == 194

    client = PlayedClient(slot, result="another_0")
    slot.job(HOST_MAIN_TASK, guest("sleep=600"))
    process = slot.start()
    slot.wait_for("fake_runs.txt", "another_0")
    for _ in range(2):
        client.status()
    client.say("<abort/>")
    assert process.wait(10) == 194
    assert "remote_desktop_addr" not in client.last(Channel.GRAPHICS_REPLY)


def test_a_snapshot_that_fails_is_no_checkpoint_and_is_not_tried_every_second(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    fault = json.dumps({"key": "disk-full", "reason": "no space for a snapshot", "delay_s": 600})
    slot.plan(faults=[["saveSnapshot", 1, fault]])
    slot.job(
        HOST_MAIN_TASK,
        guest("sleep=600", "<minimum_checkpoint_interval>0</minimum_checkpoint_interval>"),
    )
    process = slot.start()
    slot.wait_for("fake_calls.txt", "saveSnapshot")
    reports = [client.status() for _ in range(4)]
    assert slot.text("fake_calls.txt").count("saveSnapshot") == 1
    for report in reports:
        assert float(report.split("<checkpoint_cpu_time>")[1].split("<")[0]) == 0
    client.say("<abort/>")
    assert process.wait(10) == 194
