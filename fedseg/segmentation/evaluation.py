"""Score a network on whole volumes in their own grid."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedseg.data.cache import CachedCase
from fedseg.data.plan import Plan
from fedseg.data.preprocess import restore
from fedseg.data.sites import Case, nifti_stem, site_cases
from fedseg.data.volumes import read_image, read_mask
from fedseg.errors import CaseError, DataError
from fedseg.segmentation.inference import predict_labels, predict_logits
from fedseg.segmentation.metrics import add, summarise, sums_of_case
from fedseg.site_config import load_site_config

__all__ = ["FolderScores", "evaluate_cases", "evaluate_folder"]


def evaluate_cases(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    *,
    device: torch.device,
    precision: str = "auto",
    annotated: Sequence[str] = ("liver", "tumor"),
) -> dict[str, float]:
    """Predict each case by sliding window and sum up its metrics.

    Returns:
        Sums and counts, see `metrics.sums_of_case`.
    """
    parts = []
    for case in cases:
        logits = predict_logits(network, case.image, plan, device=device, precision=precision)
        parts.append(sums_of_case(restore(logits, case.placement), case.truth, annotated=annotated))
        case.release()
    return add(parts)


@dataclass(frozen=True, kw_only=True)
class FolderScores:
    """Metrics of a folder.

    Attributes:
        cases: Name of a case to its sums.
        skipped: One line for each case that can't be used.
    """

    cases: Mapping[str, Mapping[str, float]]
    skipped: tuple[str, ...]

    @property
    def all(self) -> dict[str, float | int | None]:
        """Mean over the cases, and pooled over their voxels."""
        return summarise({**add(self.cases.values()), "skipped": float(len(self.skipped))})

    def columns(self) -> dict[str, Mapping[str, float | int | None]]:
        """Columns of the table: per case (mean) and pooled (all voxels), as LiTS has them."""
        every = self.all
        pooled = {
            key.removesuffix(".pooled"): value
            for key, value in every.items()
            if key.endswith(".pooled")
        }
        return {"per case": every, "pooled": {**pooled, "cases": every["cases"]}}

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "all": self.all,
            "cases": {name: summarise(sums) for name, sums in self.cases.items()},
            "skipped": list(self.skipped),
        }


def evaluate_folder(
    network: nn.Module, plan: Plan, folder: Path, *, device: torch.device
) -> FolderScores:
    """Score a network on every case of a site's folder; `site.toml` there applies.

    Raises:
        DataError: The folder is missing or has no usable case.
    """
    listing, site = site_cases(folder, load_site_config({}, folder=folder))
    names = _names(listing.cases, folder)
    skipped = list(listing.problems)
    cases: dict[str, Mapping[str, float]] = {}
    for case, name in zip(listing.cases, names, strict=True):
        try:
            scan = read_image(case.image)
            truth = read_mask(case.mask, image=scan, label_map=site.label_map)
            labels = predict_labels(network, scan, plan, device=device, modality=site.modality)
        except CaseError as error:
            skipped.append(str(error))
            continue
        sums = sums_of_case(labels, truth.array, annotated=site.labels)
        cases[name] = sums
    if not cases:
        raise DataError(f"{folder}: no usable case; run `fedseg check` on it")
    return FolderScores(cases=cases, skipped=tuple(skipped))


def _names(cases: Sequence[Case], folder: Path) -> list[str]:
    """Name cases by their file; where two would have one name, by the path in their folder."""
    names = [nifti_stem(case.image) or case.image.name for case in cases]
    if len(set(names)) == len(names):
        return names
    return [os.path.relpath(case.image, folder) for case in cases]
