"""What a VM can be given: one place for job file, XML-RPC, drivers and wrapper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vmcontrol.api.faults import REFUSED, to_fault
from vmcontrol.hypervisors.common import spec as specs
from vmcontrol.hypervisors.interface import SpecRefused, VmSpec
from vmcontrol.hypervisors.virtualbox import output
from vmcontrol.hypervisors.virtualbox.dialect import Dialect
from vmcontrol.hypervisors.virtualbox.output import Version
from vmcontrol.protocol import vmlimits
from vmcontrol.protocol.vm import VmSettings
from vmwrapper.job import model
from vmwrapper.job.model import GuestOptions
from vmwrapper.vm import decisions
from vmwrapper.vm.hostmain import _typed
from vmwrapper.vm.trouble import Refused

SPEC = VmSpec("one", image=Path("i"), folder=Path("/slot/vm/one"))
NCPUS = GuestOptions("one", settings=VmSettings(cpus=model.NCPUS))


@pytest.mark.parametrize(
    ("memory", "cpus", "words"),
    [
        (16, 1, ""),
        (1024 * 1024, 64, ""),
        (15, 1, "15 MiB of memory cannot be: it has to be from 16 to 1048576 MiB"),
        (1024 * 1024 + 1, 1, "from 16 to 1048576 MiB"),
        (512, 0, "0 processors cannot be"),
        (512, 65, "65 processors are more than VirtualBox takes: at most 64"),
    ],
)
def test_what_cannot_be_is_said_with_the_limit(memory: int, cpus: int, words: str) -> None:
    fault = vmlimits.fault_of(memory, cpus, 64, "VirtualBox")
    assert words in fault
    assert bool(fault) is bool(words)


@pytest.mark.parametrize("wrong", [{"cpus": 65}, {"memory_mb": 8}, {"name": "a/b"}, {"mac": "x"}])
def test_a_driver_refuses_what_can_never_be_made_and_that_has_a_code_of_its_own(wrong: dict[str, object]) -> None:
    with pytest.raises(SpecRefused) as caught:
        specs.check(replace(SPEC, **wrong), Path("/slot/vm"), 64, "VirtualBox")  # type: ignore[arg-type]
    fault = to_fault(caught.value)
    assert fault.faultCode == REFUSED
    assert isinstance(_typed("defineVM", fault), Refused)


def test_as_many_as_virtualbox_says() -> None:
    assert output.max_cpus("Minimum guest CPU count:         1\nMaximum guest CPU count:         64\n") == 64
    assert output.max_cpus("Maximum guest CPU count:  many\n") is None
    assert output.max_cpus("") is None
    assert (Dialect(Version(7, 2, 0)).max_cpus, Dialect(Version(6, 1, 50)).max_cpus) == (64, 32)


def test_what_any_hypervisor_takes_is_asked_of_nobody() -> None:
    assert vmlimits.SAFE_CPUS == 32
    assert vmlimits.MOST_CPUS == 255


def test_ncpus_is_capped_with_a_line_and_a_number_of_the_job_file_is_not() -> None:
    assert decisions.wanted_cpus(NCPUS, 96.0) == 96
    assert decisions.wanted_cpus(NCPUS, 0.5) == 1
    cpus, line = decisions.capped_cpus(NCPUS, 96, 64)
    assert cpus == 64
    assert line == ("the client gives 96 processors to this job, and the hypervisor takes at most 64: the VM gets 64")
    assert decisions.capped_cpus(NCPUS, 64, 64) == (64, "")
    given = GuestOptions("one", settings=VmSettings(cpus=96))
    assert decisions.capped_cpus(given, 96, 64) == (96, ""), "it is refused when the VM is made"


def test_more_than_the_computer_has_is_said() -> None:
    assert vmlimits.more_than_there_is(512, 2, there_mb=512, there_cpus=2) == []
    memory, cpus = vmlimits.more_than_there_is(4096, 8, there_mb=2048, there_cpus=4)
    assert memory == "the virtual machine is to have 4096 MiB of memory, and this computer has 2048"
    assert cpus == "the virtual machine is to have 8 processors, and this computer has 4"
