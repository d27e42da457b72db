"""Check a site's folder before a study does: one finding a problem, none hides another."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fedseg.data.sites import Case, find_cases
from fedseg.data.volumes import Volume, read_image, read_mask
from fedseg.errors import CaseError

__all__ = ["CheckReport", "Finding", "check_folder"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: `error` (the case is left out) or `warning`.
        file: The file it is about.
        what: What was got and what was expected.
        mend: How to mend it.
    """

    severity: Literal["error", "warning"]
    file: str
    what: str
    mend: str

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.severity}: {self.file}: {self.what}; {self.mend}"


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check of a folder found.

    Attributes:
        findings: In the order of the files.
        cases: Complete pairs of image and mask.
        usable: How many of them a study can use.
        annotated: Region to number of usable cases in which it occurs.
    """

    findings: tuple[Finding, ...]
    cases: int
    usable: int
    annotated: Mapping[str, int]

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "clean": self.clean,
            "cases": self.cases,
            "usable": self.usable,
            "annotated": dict(self.annotated),
            "findings": [asdict(finding) for finding in self.findings],
        }


def check_folder(
    root: Path,
    *,
    layout: str = "auto",
    label_map: Mapping[int, int] | None = None,
    on_case: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check pairing, geometry, label values and finite numbers of every case.

    Args:
        root: The site's folder.
        layout: Name of its layout.
        label_map: Mask value to label, where the masks have values of their own.
        on_case: Called after each case with `(done, all)`.

    Raises:
        DataError: The folder is missing, has no such layout or no case.
    """
    listing = find_cases(root, layout=layout)
    findings = [_pairing(problem) for problem in listing.problems]
    usable, annotated = 0, {"liver": 0, "tumor": 0}
    for number, case in enumerate(listing.cases, 1):
        problems, labels = _check_case(case, label_map)
        findings += problems
        if labels is not None:
            usable += 1
            annotated["liver"] += int(bool((labels.array >= 1).any()))
            annotated["tumor"] += int(bool((labels.array == 2).any()))
        if on_case:
            on_case(number, len(listing.cases))
    return CheckReport(
        findings=tuple(findings), cases=len(listing.cases), usable=usable, annotated=annotated
    )


def _pairing(problem: str) -> Finding:
    file, _, rest = problem.partition(": ")
    what, _, mend = rest.rpartition("; ")
    return Finding(severity="error", file=file, what=what, mend=mend)


def _check_case(
    case: Case, label_map: Mapping[int, int] | None
) -> tuple[list[Finding], Volume | None]:
    findings = []
    image: Volume | None = None
    try:
        image = read_image(case.image)
    except CaseError as error:
        findings.append(_finding(error))
    try:
        mask = read_mask(case.mask, image=image, label_map=label_map)
    except CaseError as error:
        return [*findings, _finding(error)], None
    return findings, None if image is None else mask


def _finding(error: CaseError) -> Finding:
    return Finding(severity="error", file=str(error.path), what=error.what, mend=error.mend)
