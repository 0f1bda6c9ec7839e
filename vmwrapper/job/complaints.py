"""What is wrong with a job file, collected while it is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmwrapper.job.model import Complaint

WARNINGS_LIMIT = 1000
"""Warnings that are kept: a file of 64 MiB can have millions of them."""
ERRORS_LIMIT = 1000


@dataclass(slots=True)
class Complaints:
    """Errors, which forbid to run a job file, and warnings."""

    source: str
    errors: list[Complaint] = field(default_factory=list)
    warnings: list[Complaint] = field(default_factory=list)
    further_errors: int = 0
    further_warnings: int = 0

    def error(self, line: int | None, element: str, text: str) -> None:
        if len(self.errors) < ERRORS_LIMIT:
            self.errors.append(Complaint(self.source, line, element, text))
        else:
            self.further_errors += 1

    def warn(self, line: int | None, element: str, text: str) -> None:
        if len(self.warnings) < WARNINGS_LIMIT:
            self.warnings.append(Complaint(self.source, line, element, text))
        else:
            self.further_warnings += 1

    def sorted_errors(self) -> tuple[Complaint, ...]:
        """In the order of the file."""
        return _sorted(self.source, self.errors, self.further_errors)

    def sorted_warnings(self) -> tuple[Complaint, ...]:
        return _sorted(self.source, self.warnings, self.further_warnings)


def _sorted(source: str, complaints: list[Complaint], further: int) -> tuple[Complaint, ...]:
    found = sorted(complaints, key=lambda complaint: complaint.line or 0)
    if further:
        found.append(Complaint(source, found[-1].line, "", f"and {further} more after these"))
    return tuple(found)
