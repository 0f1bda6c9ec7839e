"""Settings that belong to a virtual machine, gathered from all the tasks that run on it.

Given by one task they count for every task on that machine; two tasks that give different values are an error. The
hypervisor is chosen once for the whole job, because one HostMain drives all its machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vmwrapper.job.complaints import Complaints
from vmwrapper.job.model import GuestOptions, Task


@dataclass(frozen=True, slots=True)
class _Given:
    value: Any
    element: str
    line: int


@dataclass(slots=True)
class GivenSettings:
    """Fields of VmSettings that a job file gives, image and hypervisor, each with its place in the file."""

    values: dict[str, _Given] = field(default_factory=dict)

    def give(self, setting: str, value: object, element: str, line: int) -> None:
        self.values[setting] = _Given(value, element, line)

    def merge(self, other: GivenSettings, complaints: Complaints, whose: str) -> None:
        """Take over what `other` gives; what both give must be the same."""
        for setting, given in other.values.items():
            known = self.values.setdefault(setting, given)
            if known.value != given.value:
                complaints.error(
                    given.line,
                    given.element,
                    f"differs from line {known.line}; expected the same value for all tasks of {whose}",
                )

    def applied_to(self, options: GuestOptions) -> GuestOptions:
        values = {setting: given.value for setting, given in self.values.items()}
        own = {setting: values.pop(setting) for setting in ("image", "hypervisor") if setting in values}
        return replace(options, **own, settings=replace(options.settings, **values))


def unite(tasks: Sequence[Task], given: Mapping[int, GivenSettings], complaints: Complaints) -> tuple[Task, ...]:
    """The tasks, each with all the settings of its virtual machine. given: by index of the task; guest tasks only."""
    machines: dict[str, GivenSettings] = {}
    job = GivenSettings()
    for index, settings in given.items():
        guest = tasks[index].guest
        if guest is None:
            continue
        hypervisor = {name: value for name, value in settings.values.items() if name == "hypervisor"}
        others = {name: value for name, value in settings.values.items() if name != "hypervisor"}
        name = guest.virtualmachine
        machines.setdefault(name, GivenSettings()).merge(
            GivenSettings(others), complaints, f"the virtual machine {name!r}"
        )
        job.merge(GivenSettings(hypervisor), complaints, "a job")
    if not given:
        return tuple(tasks)
    return tuple(
        task
        if task.guest is None
        else replace(task, guest=job.applied_to(machines[task.guest.virtualmachine].applied_to(task.guest)))
        for task in tasks
    )
