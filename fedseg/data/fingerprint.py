"""The fingerprint: what a site tells a study about its data before training, never a case.

Fixed-bin histograms of HU, spacing, size and lesion volume. A case adds mass 1 to each, spread over
its voxels where there are many, so that a large scan weighs no more than a small one. Neighbouring
bins are merged until each group has at least `min_count` cases (or lesions) in it: that guards
cases, not voxels. Summing sites' histograms gives that of all cases, from which medians and
percentiles are read.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedseg.config import readable
from fedseg.errors import ConfigError

__all__ = [
    "EDGES",
    "MAX_FINGERPRINT_BYTES",
    "CaseMeasure",
    "Fingerprint",
    "Histogram",
    "add_fingerprints",
    "bin_of",
    "fingerprint_of",
    "memory_told",
    "quantile",
    "resolution",
    "shared_scans",
]

MAX_FINGERPRINT_BYTES = 256 * 1024

_HU = np.arange(-1020.0, 1521.0, 20.0)
_MM = np.geomspace(0.2, 20.0, 95)  # 5% a bin
_EXTENT = np.arange(0.0, 1001.0, 20.0)
_LESION = np.geomspace(0.01, 3000.0, 32)  # 1.5 times a bin

EDGES: dict[str, np.ndarray] = {
    "body.hu": _HU,
    "liver.hu": _HU,
    "tumor.hu": _HU,
    "spacing.x": _MM,
    "spacing.y": _MM,
    "spacing.z": _MM,
    "extent.x": _EXTENT,
    "extent.y": _EXTENT,
    "extent.z": _EXTENT,
    "lesion.ml": _LESION,
}
"""Quantity to bin edges: HU; voxel size in mm; size of the body in mm; volume of a lesion in mL."""

_Mass = Annotated[float, Field(ge=0, le=1e7)]
_Count = Annotated[int, Field(ge=0, le=10**7)]

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

CaseMeasure = dict[str, dict[int, float]]
"""Quantity to the mass in its bins, of one case; for lesions, their number. Stays at the site."""


class Histogram(BaseModel):
    """Mass in the fixed bins of one quantity.

    Attributes:
        mass: Mass in each bin; that of a merged group lies evenly over its bins.
        groups: First bin of each group.
        count: Cases (lesions) in it; 0 where it is held back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mass: Annotated[tuple[_Mass, ...], Field(max_length=256)] = ()
    groups: Annotated[tuple[_Count, ...], Field(max_length=256)] = ()
    count: _Count = 0


class Fingerprint(BaseModel):
    """All that leaves a site about its data.

    Attributes:
        histograms: Quantity to its histogram.
        ct: Number of CT cases; 0 below the minimum.
        mr: Number of MR cases; 0 below the minimum.
        liver: Cases with a liver mask; 0 below the minimum.
        tumor: Cases with a tumour; 0 below the minimum.
        min_count: The minimum that the site kept to.
        held_back: What the minimum, or noise, held back.
        device: Kind of device the site trains on.
        memory_gb: Its memory, rounded down to a power of two.
        digests: Keyed digest of each scan, where the sites agreed on a `study-key`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    histograms: dict[str, Histogram]
    ct: _Count
    mr: _Count
    liver: _Count
    tumor: _Count
    min_count: _Count
    held_back: tuple[Annotated[str, Field(max_length=16)], ...] = ()
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    memory_gb: Annotated[int, Field(ge=1, le=4096)] = 1
    digests: Annotated[tuple[_Digest, ...], Field(max_length=3000)] = ()

    @model_validator(mode="after")
    def _knownbin_of(self) -> "Fingerprint":
        for name, histogram in self.histograms.items():
            if name not in EDGES:
                raise ValueError(f"fingerprint: unknown quantity '{name[:32]}'")
            bins = len(EDGES[name]) - 1
            held_back = not histogram.count and not histogram.mass
            if not held_back and len(histogram.mass) != bins:
                raise ValueError(f"fingerprint.{name}: expected {bins} bins")
            if any(not 0 <= group < bins for group in histogram.groups):
                raise ValueError(f"fingerprint.{name}: expected groups within {bins} bins")
        return self

    def to_json(self) -> str:
        """Write the very bytes that leave the site."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        """Read what a site sent, under bounds.

        Raises:
            ConfigError: It is too long, no JSON, or has other quantities or bins.
        """
        if len(text.encode()) > MAX_FINGERPRINT_BYTES:
            raise ConfigError(f"fingerprint: got over {MAX_FINGERPRINT_BYTES} bytes")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(readable(error, prefix="fingerprint.")) from None


def bin_of(name: str, values: np.ndarray) -> np.ndarray:
    """Index of the bin of each value; what lies outside falls into the first or last bin."""
    edges = EDGES[name]
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)


def fingerprint_of(
    measures: Sequence[CaseMeasure],
    *,
    modalities: Sequence[Literal["ct", "mr"]],
    min_count: int,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    memory_gb: int = 1,
) -> Fingerprint:
    """Merge and hold back; `fingerprint_noise` makes one with noise.

    Args:
        measures: One for each case.
        modalities: One for each case.
        min_count: Fewest cases (lesions) a group of bins or a number may stand for.
        device: Kind of device.
        memory_gb: Its memory.
    """
    histograms = {name: _histogram(name, measures, min_count) for name in EDGES}
    numbers = {
        "ct": sum(kind == "ct" for kind in modalities),
        "mr": sum(kind == "mr" for kind in modalities),
        "liver": sum("liver.hu" in m or "extent.x" in m for m in measures),
        "tumor": sum("lesion.ml" in m for m in measures),
    }
    kept = {name: n if n >= min_count else 0 for name, n in numbers.items()}
    held_back = [name for name, n in numbers.items() if n and not kept[name]]
    held_back += [
        name for name in EDGES if any(name in m for m in measures) and not histograms[name].count
    ]
    return Fingerprint(
        histograms=histograms,
        min_count=min_count,
        held_back=tuple(held_back),
        device=device,
        memory_gb=memory_told(memory_gb),
        **kept,
    )


def memory_told(gigabytes: int) -> int:
    """Round memory down to a power of two, at least 1."""
    return int(2 ** int(math.log2(max(gigabytes, 1))))


def _histogram(name: str, measures: Sequence[CaseMeasure], min_count: int) -> Histogram:
    """Merge bins from the left until each group stands for enough cases."""
    bins = len(EDGES[name]) - 1
    cases = [m[name] for m in measures if name in m]
    table = np.zeros((len(cases), bins))
    for row, case in enumerate(cases):
        for index, share in case.items():
            table[row, index] = share
    lesions = name.startswith("lesion")
    total = int(table.sum()) if lesions else len(cases)
    if total < min_count or total == 0:
        return Histogram()

    def stands_for(start: int, stop: int) -> int:
        part = table[:, start:stop]
        return int(part.sum()) if lesions else int(part.any(axis=1).sum())

    starts = [0]
    for index in range(1, bins):
        # With a minimum of 1 nothing is hidden, empty bins neither.
        if min_count <= 1 or stands_for(starts[-1], index) >= min_count:
            starts.append(index)
    if min_count > 1 and len(starts) > 1 and stands_for(starts[-1], bins) < min_count:
        starts.pop()
    mass = np.zeros(bins)
    for start, stop in zip(starts, [*starts[1:], bins], strict=True):
        mass[start:stop] = table[:, start:stop].sum() / (stop - start)
    return Histogram(
        mass=tuple(float(f"{value:.6g}") for value in mass), groups=tuple(starts), count=total
    )


def add_fingerprints(parts: Iterable[Fingerprint]) -> Mapping[str, Histogram]:
    """Sum sites' histograms; a group start survives where every site that sent one has it."""
    total: dict[str, Histogram] = {}
    sent = list(parts)
    for name, edges in EDGES.items():
        found = [p.histograms[name] for p in sent if name in p.histograms]
        found = [histogram for histogram in found if histogram.count]
        mass = np.zeros(len(edges) - 1)
        groups = set(range(len(edges) - 1))
        for histogram in found:
            mass += np.array(histogram.mass)
            groups &= set(histogram.groups)
        # Sums may pass the bounds of what one site sends.
        total[name] = Histogram.model_construct(
            mass=tuple(float(m) for m in mass),
            groups=tuple(sorted(groups)) if found else (),
            count=sum(histogram.count for histogram in found),
        )
    return total


def shared_scans(fingerprints: Mapping[str, Fingerprint]) -> dict[tuple[str, str], int]:
    """Count the scans that two sites both hold, by the sites' names."""
    found = {}
    for one, other in itertools.combinations(sorted(fingerprints), 2):
        both = set(fingerprints[one].digests) & set(fingerprints[other].digests)
        if both:
            found[one, other] = len(both)
    return found


def quantile(name: str, histogram: Histogram, q: float) -> float | None:
    """Read a quantile off a histogram, linear within a bin; None where there is no mass."""
    mass = np.array(histogram.mass)
    if not mass.sum() > 0:
        return None
    edges = EDGES[name]
    rising = np.concatenate([[0.0], np.cumsum(mass)]) / mass.sum()
    index = int(np.clip(np.searchsorted(rising, q, side="left") - 1, 0, len(mass) - 1))
    inside = (q - rising[index]) / max(rising[index + 1] - rising[index], 1e-12)
    return float(edges[index] + np.clip(inside, 0, 1) * (edges[index + 1] - edges[index]))


def resolution(name: str, histogram: Histogram, value: float) -> float:
    """Width of the bins that were merged around a value: the bound on how far it may be off."""
    edges = EDGES[name]
    index = int(bin_of(name, np.array([value]))[0])
    starts = np.array([0, *histogram.groups])
    start = int(starts[starts <= index].max())
    later = [group for group in histogram.groups if group > index]
    stop = later[0] if later else len(edges) - 1
    return float(edges[stop] - edges[start])
