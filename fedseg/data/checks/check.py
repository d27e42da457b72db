"""Check a site's folder before a study does: all cases, each read once, none hides another."""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from fedseg.data.cases import Case, nifti_stem, pairing_stem
from fedseg.data.checks.checked_case import CheckedCase
from fedseg.data.checks.digest import content_digest
from fedseg.data.checks.findings import SEVERITIES, Finding, Severity, case_finding, pairing_finding
from fedseg.data.checks.mask_checks import (
    contents,
    field_of_view,
    liver_pieces,
    liver_volume,
    tumor_outside,
)
from fedseg.data.checks.place_checks import placement
from fedseg.data.checks.scan_checks import (
    header_geometry,
    identity,
    intensity,
    liver_hu,
    voxel_size,
)
from fedseg.data.plan import REGIONS
from fedseg.data.sites import site_cases
from fedseg.data.volumes import read_image, read_mask
from fedseg.errors import CaseError
from fedseg.site_config import SiteConfig

__all__ = ["CHECKS", "CheckReport", "check_folder"]

CHECKS: tuple[Callable[[CheckedCase], Iterator[Finding]], ...] = (
    voxel_size,
    header_geometry,
    intensity,
    identity,
    contents,
    field_of_view,
    liver_volume,
    liver_pieces,
    tumor_outside,
    placement,
    liver_hu,
)
"""What is looked at in a case that can be read, in the order of the findings."""

_IMAGE = "a NIfTI file or DICOM series with one 3D scan in mm"
_MASK = "labels on the grid of the image"
_FILE = re.compile(r"(.*?\.nii(?:\.gz)?|.*?): ", re.IGNORECASE | re.DOTALL)
_INDEX_BYTES = 2 * 20_000 * 8


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check of a folder found.

    Attributes:
        findings: By case; those about the whole folder come last.
        layout: How the folder is laid out.
        cases: Complete pairs of image and mask.
        usable: How many of them a study can use.
        usable_for: Region to number of usable cases that annotate it.
        annotated: Region to number of usable cases in which it occurs.
    """

    findings: tuple[Finding, ...]
    layout: str
    cases: int
    usable: int
    usable_for: Mapping[str, int]
    annotated: Mapping[str, int]

    @property
    def clean(self) -> bool:
        """Whether nothing needs a look; notes don't."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def counts(self) -> dict[Severity, int]:
        """Severity to number of findings."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    @property
    def summary(self) -> str:
        """One line for a person."""
        regions = ", ".join(
            f"{count} with {name}" if self.usable_for[name] or not self.usable else f"no {name}"
            for name, count in self.annotated.items()
        )
        return f"{self.usable} of {self.cases} cases usable ({regions})"

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "clean": self.clean,
            "layout": self.layout,
            "cases": self.cases,
            "usable": self.usable,
            "usable_for": dict(self.usable_for),
            "annotated": dict(self.annotated),
            "counts": dict(self.counts),
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What is kept of a usable case when the next one is read."""

    name: str
    image: Path
    digest: bytes
    axes: str
    modality: str
    regions: frozenset[str]
    cache_bytes: int


def check_folder(
    root: Path,
    config: SiteConfig | None = None,
    *,
    on_case: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check every case of a site's folder, and the cases together.

    Each scan and mask is read once, and one case is in memory at a time.

    Args:
        root: The site's folder.
        config: The site config; without, all defaults.
        on_case: Called after each case with `(done, all)`.

    Raises:
        ConfigError: The layout has no function.
        DataError: The folder is missing, has no such layout or no case.
    """
    listing, config = site_cases(root, config or SiteConfig())
    findings = [_pairing(problem) for problem in listing.problems]
    seen: list[_Seen] = []
    for number, (case, name) in enumerate(
        zip(listing.cases, _names(listing.cases, root), strict=True), 1
    ):
        found, kept = _check_case(case, name, config)
        findings += found
        seen += [kept] if kept else []
        if on_case:
            on_case(number, len(listing.cases))
    findings += _duplicates(seen)
    findings.sort(key=lambda finding: finding.case)
    return CheckReport(
        findings=(*findings, *_of_folder(root, seen, config)),
        layout=listing.layout,
        cases=len(listing.cases),
        usable=len(seen),
        usable_for={name: len(seen) if name in config.labels else 0 for name in REGIONS},
        annotated={name: sum(name in kept.regions for kept in seen) for name in REGIONS},
    )


def _names(cases: Sequence[Case], root: Path) -> list[str]:
    """Name cases by their files, by their folders where that isn't enough."""
    short = [pairing_stem(case.image) or case.image.name for case in cases]
    often = Counter(short)
    return [
        name if often[name] == 1 else str(_below(case.image, root))
        for name, case in zip(short, cases, strict=True)
    ]


def _below(path: Path, root: Path) -> Path:
    path = path.with_name(nifti_stem(path) or path.name)
    return path.relative_to(root) if path.is_relative_to(root) else path


def _pairing(problem: str) -> Finding:
    found = _FILE.match(problem)  # a name may have ": " in it
    file = found[1] if found else problem
    return pairing_finding(problem, pairing_stem(Path(file)) or Path(file).name, file)


def _check_case(case: Case, name: str, config: SiteConfig) -> tuple[list[Finding], _Seen | None]:
    findings, image = [], None
    try:
        image = read_image(case.image)
    except CaseError as error:
        findings.append(case_finding(error, name, expected=_IMAGE))
    try:
        mask = read_mask(case.mask, image=image, label_map=config.label_map)
    except CaseError as error:
        return [*findings, case_finding(error, name, expected=_MASK)], None
    if image is None:
        return findings, None
    checked = CheckedCase(name=name, image=image, mask=mask, config=config)
    try:
        with np.errstate(all="ignore"):  # values of 1e38 overflow a sum
            return [finding for check in CHECKS for finding in check(checked)], _seen(checked)
    except MemoryError:
        full = CaseError(case.image, "doesn't fit in memory", "crop the scan")
        return [case_finding(full, name, expected=_IMAGE)], None


def _seen(case: CheckedCase) -> _Seen:
    labels = case.mask.array
    return _Seen(
        name=case.name,
        image=case.image.path,
        digest=content_digest(case.image.array),
        axes="".join(nib.aff2axcodes(case.image.stored_affine)),
        modality=case.modality,
        regions=frozenset(name for name, lowest in REGIONS.items() if (labels >= lowest).any()),
        cache_bytes=_cache_bytes(case),
    )


def _cache_bytes(case: CheckedCase) -> int:
    """Size of the cached case at the scan's own voxel size; a plan's is seldom finer."""
    voxels = case.image.array.size
    share = 1.0
    for others in ((1, 2), (0, 2), (0, 1)):
        along = case.body.any(axis=others)
        where = np.flatnonzero(along)
        share *= (where[-1] - where[0] + 1) / along.size if where.size else 1.0
    return int(voxels * (1 + 3 * share)) + _INDEX_BYTES


def _duplicates(seen: Sequence[_Seen]) -> Iterator[Finding]:
    first: dict[bytes, _Seen] = {}
    for kept in seen:
        other = first.setdefault(kept.digest, kept)
        if other is not kept:
            yield Finding(
                severity="warning",
                case=kept.name,
                file=str(kept.image),
                what="duplicate image",
                got=f"the voxels of case {other.name}",
                expected="each scan once",
                mend="remove one: the same scan in training and validation flatters the model",
            )


def _of_folder(root: Path, seen: Sequence[_Seen], config: SiteConfig) -> Iterator[Finding]:
    """What is seen only on all cases together."""
    for what, found, expected in (
        ("orientation", Counter(kept.axes for kept in seen), "one; all are read by their affine"),
        ("modality", Counter(kept.modality for kept in seen), "one; each is normalised as its own"),
    ):
        if len(found) > 1:
            yield _note(
                root,
                what,
                got=", ".join(f"{count} of {name}" for name, count in sorted(found.items())),
                expected=expected,
                mend="nothing to mend if that is so",
            )
    if seen and "tumor" in config.labels and not any("tumor" in kept.regions for kept in seen):
        yield _note(
            root,
            "labels",
            got="no tumor in any case",
            expected="some, as labels in site.toml (or its default) says tumors are annotated",
            mend='set labels = "liver" if they aren\'t: the model would learn that there are none',
        )
    yield from _cache_space(config.cache, sum(kept.cache_bytes for kept in seen))


def _note(root: Path, what: str, *, got: str, expected: str, mend: str) -> Finding:
    return Finding(
        severity="note",
        case="",
        file=str(root),
        what=what,
        got=got,
        expected=expected,
        mend=mend,
    )


def _cache_space(cache: Path, needed: int) -> Iterator[Finding]:
    try:
        there = next(path for path in (cache, *cache.parents) if path.exists())
        free = shutil.disk_usage(there).free
    except OSError:
        return
    if free < needed:
        yield Finding(
            severity="warning",
            case="",
            file=str(cache),
            what="space for the cache",
            got=f"{free / 1e9:.3g} GB free",
            expected=f"{needed / 1e9:.3g} GB or more for preprocessed cases",
            mend="free space, or set cache-dir in site.toml",
        )
