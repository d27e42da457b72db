"""A finding: one thing about a site's folder that someone should know."""

import re
from dataclasses import dataclass
from typing import Literal

from fedseg.errors import CaseError

__all__ = ["SEVERITIES", "Finding", "Severity", "case_finding", "pairing_finding"]

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""A study leaves a case with an error out; a warning needs a look; a note is good to know."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, odd or good to know.

    Attributes:
        severity: `error`, `warning` or `note`.
        case: The case's name, `""` where it is about the whole folder.
        file: The file it is about.
        what: Which check found it.
        got: What is there.
        expected: What should be there.
        mend: How to mend it.
    """

    severity: Severity
    case: str
    file: str
    what: str
    got: str
    expected: str
    mend: str

    def __str__(self) -> str:
        """One line for a person."""
        return (
            f"{self.severity}: {self.file}: {self.what}: got {self.got}, expected {self.expected}; "
            f"{self.mend}"
        )


def case_finding(error: CaseError, case: str, *, expected: str) -> Finding:
    """Turn what makes a study leave a case out into a finding.

    Args:
        error: What reading the case raised.
        case: Its name.
        expected: What to say where the error doesn't.
    """
    return Finding(
        severity="error",
        case=case,
        file=str(error.path),
        what="can't be used",
        got=error.got,
        expected=error.expected or expected,
        mend=error.mend,
    )


def pairing_finding(problem: str, case: str, file: str) -> Finding:
    """Turn a layout's `file: what; mend` into a finding.

    Args:
        problem: The line.
        case: Name of the case that the file would be.
        file: The file it starts with.
    """
    what, _, mend = problem.removeprefix(f"{file}: ").rpartition("; ")
    got, *expected = re.split("[,;] expected ", what, maxsplit=1)
    return Finding(
        severity="error",
        case=case,
        file=file,
        what="pairing",
        got=got,
        expected=expected[0] if expected else "one image and one mask a case",
        mend=mend,
    )
