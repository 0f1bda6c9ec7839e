"""The hardware that a saved VM of QEMU goes on with: the one it was saved with, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmcontrol.hypervisors.interface import HostProblem
from vmcontrol.hypervisors.qemu.accelerator import to_resume
from vmcontrol.hypervisors.qemu.command import Accelerator
from vmcontrol.hypervisors.qemu.files import Definition

KVM, EMULATION = Accelerator("kvm", "host"), Accelerator("tcg", "max")
VM = Definition(
    name="one",
    image="i",
    image_format="raw",
    memory_mb=32,
    cpus=1,
    mac="",
    agent_port=0,
    secret_file=None,
    console_log="",
    network=False,
)


def test_a_saved_vm_goes_on_with_what_it_ran_with() -> None:
    saved = replace(VM, accelerator="tcg", cpu="max,erms=off")
    assert to_resume(saved, KVM) == Accelerator("tcg", "max,erms=off"), "emulation works everywhere"
    assert to_resume(replace(VM, accelerator="kvm", cpu="host"), KVM) == KVM


def test_a_snapshot_remembers_its_own() -> None:
    hardware = {"1:a": ("tcg", "max"), "2:b": ("kvm", "host")}
    vm = replace(VM, accelerator="kvm", cpu="host", snapshot_hardware=hardware, resume_snapshot="1:a")
    assert to_resume(vm, KVM) == EMULATION


def test_hardware_virtualization_that_is_gone_is_a_problem_and_comes_back() -> None:
    with pytest.raises(HostProblem, match="one was saved with hardware virtualization") as caught:
        to_resume(replace(VM, accelerator="kvm", cpu="host"), EMULATION)
    assert caught.value.key == "accelerator-changed"
    assert caught.value.delay_s


def test_where_nothing_is_remembered_the_one_that_works_is_taken() -> None:
    assert to_resume(VM, KVM) == KVM
