"""Score a network, or masks that exist, on whole volumes in their own grid."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedseg.data.cache import CachedCase
from fedseg.data.cases import pairing_stem
from fedseg.data.plan import Plan
from fedseg.data.preprocess import restore
from fedseg.data.sites import Case, nifti_stem, site_cases
from fedseg.data.volumes import Volume, read_image, read_mask
from fedseg.errors import CaseError, DataError, ModelError, why_left_out
from fedseg.segmentation.inference import predict_labels, predict_logits
from fedseg.segmentation.intervals import Interval, intervals
from fedseg.segmentation.metrics import Scoring, add, summarise, sums_of_case
from fedseg.segmentation.postprocess import clean_labels
from fedseg.site_config import SiteConfig, load_site_config

__all__ = [
    "FolderScores",
    "evaluate_cases",
    "evaluate_folder",
    "evaluate_predictions",
    "score_cases",
]

Sums = Mapping[str, float]
_Labels = Callable[[Case, Volume, SiteConfig], np.ndarray]


def score_cases(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    *,
    device: torch.device,
    precision: str = "auto",
    annotated: Sequence[str] = ("liver", "tumor"),
    distances: bool = False,
) -> list[dict[str, float]]:
    """Predict each case by sliding window and score it.

    Args:
        network: The network.
        cases: The cases.
        plan: The plan.
        device: Where it runs.
        precision: Number format, see `training.choose_dtype`.
        annotated: Regions that the cases' masks can have.
        distances: Whether surface distances are measured; they cost time.

    Returns:
        Sums and counts of each case, see `metrics.sums_of_case`.
    """
    parts = []
    for case in cases:
        logits = predict_logits(network, case.image, plan, device=device, precision=precision)
        sums = sums_of_case(
            restore(logits, case.placement),
            case.truth,
            spacing=case.placement.spacing,
            annotated=annotated,
            scoring=Scoring(distances=distances),
        )
        parts.append(sums)
        case.release()
    return parts


def evaluate_cases(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    *,
    device: torch.device,
    precision: str = "auto",
    annotated: Sequence[str] = ("liver", "tumor"),
    distances: bool = False,
) -> dict[str, float]:
    """Add up `score_cases`: what a site sends about an evaluation."""
    return add(
        score_cases(
            network,
            cases,
            plan,
            device=device,
            precision=precision,
            annotated=annotated,
            distances=distances,
        )
    )


@dataclass(frozen=True, kw_only=True)
class FolderScores:
    """Metrics of a folder.

    Attributes:
        cases: Name of a case to its sums.
        skipped: One line for each case that can't be used.
        seed: Of the intervals.
        cleaning: How a network's masks were cleaned, see `clean_labels`; None for masks that exist.
    """

    cases: Mapping[str, Sums]
    skipped: tuple[str, ...]
    seed: int = 0
    cleaning: Mapping[str, bool] | None = None

    @property
    def all(self) -> dict[str, float | int | None]:
        """Mean over the cases, and pooled over their voxels."""
        return summarise({**add(self.cases.values()), "skipped": float(len(self.skipped))})

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95% intervals of what `all` holds, by bootstrap over cases."""
        return intervals(list(self.cases.values()), seed=self.seed)

    def rows(self) -> list[dict[str, Any]]:
        """Summary of each case, with its name under `case`: the per-case table."""
        return [{"case": name, **summarise(sums)} for name, sums in self.cases.items()]

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "all": self.all,
            "intervals": {key: list(ends) for key, ends in self.intervals.items()},
            "cases": {name: summarise(sums) for name, sums in self.cases.items()},
            "skipped": list(self.skipped),
            "cleaning": self.cleaning,
        }


def evaluate_folder(
    network: nn.Module,
    plan: Plan,
    folder: Path,
    *,
    device: torch.device,
    largest_liver: bool = True,
    tumor_in_liver: bool = False,
    scoring: Scoring | None = None,
    seed: int = 0,
) -> FolderScores:
    """Score a network's masks, cleaned as `fedseg predict` does, on every case of a site's folder.

    Args:
        network: The network.
        plan: Its plan.
        folder: The site's folder; `site.toml` there applies.
        device: Where it runs.
        largest_liver: As in `clean_labels`.
        tumor_in_liver: As in `clean_labels`.
        scoring: What is measured, and how.
        seed: Of the intervals.

    Raises:
        DataError: The folder is missing or has no usable case.
    """
    cleaning = {"largest_liver": largest_liver, "tumor_in_liver": tumor_in_liver}

    def labels(case: Case, scan: Volume, site: SiteConfig) -> np.ndarray:
        found = predict_labels(network, scan, plan, device=device, modality=site.modality)
        return clean_labels(found, **cleaning)

    scores = _score_folder(folder, labels, scoring=scoring, seed=seed)
    return replace(scores, cleaning=cleaning)


def evaluate_predictions(
    predictions: Path, folder: Path, *, scoring: Scoring | None = None, seed: int = 0
) -> FolderScores:
    """Score masks that exist, such as nnU-Net's, on every case of a site's folder.

    A case's prediction is named as its image, with or without `_0000`, or as its mask. It lies on
    the scan's grid and has labels 0, 1, 2; a `label-map` in a `site.toml` beside the predictions
    maps others. A case without prediction is skipped, and said so.

    Raises:
        DataError: A folder is missing, or no case can be used.
    """
    if not predictions.is_dir():
        raise DataError(f"{predictions}: no such folder; give the folder of the predicted masks")
    found: dict[str, list[Path]] = {}
    for path in sorted(predictions.iterdir()):
        found.setdefault(nifti_stem(path) or "", []).append(path)
    label_map = load_site_config({}, folder=predictions).label_map

    def labels(case: Case, scan: Volume, site: SiteConfig) -> np.ndarray:
        path = _prediction_of(case, found, predictions)
        return read_mask(path, image=scan, label_map=label_map).array

    return _score_folder(folder, labels, scoring=scoring, seed=seed)


def _prediction_of(case: Case, found: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    names = [nifti_stem(case.image), pairing_stem(case.image), nifti_stem(case.mask)]
    stems = list(dict.fromkeys(name for name in (*names, case.image.name) if name))
    paths = [path for stem in stems for path in found.get(stem, ())]
    if not paths:
        raise CaseError(case.image, f"no prediction in {folder}", f"name it {stems[0]}.nii.gz")
    if len(paths) > 1:
        both = f"{paths[0].name} and {paths[1].name}"
        raise CaseError(case.image, f"two predictions, {both}", "keep one of them")
    return paths[0]


def _score_folder(
    folder: Path, labels_of: _Labels, *, scoring: Scoring | None, seed: int
) -> FolderScores:
    listing, site = site_cases(folder, load_site_config({}, folder=folder))
    names = _names(listing.cases, folder)
    skipped = list(listing.problems)
    cases: dict[str, Sums] = {}
    for case, name in zip(listing.cases, names, strict=True):
        try:
            scan = read_image(case.image)
            truth = read_mask(case.mask, image=scan, label_map=site.label_map)
            labels = labels_of(case, scan, site)
            cases[name] = sums_of_case(
                labels, truth.array, spacing=scan.spacing, annotated=site.labels, scoring=scoring
            )
        except (CaseError, ModelError, MemoryError, RuntimeError) as error:
            skipped.append(why_left_out(case.image, error))
    if not cases:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise DataError(f"{folder}: no usable case; run `fedseg check` on it{first}")
    return FolderScores(cases=cases, skipped=tuple(skipped), seed=seed)


def _names(cases: Sequence[Case], folder: Path) -> list[str]:
    """Name cases by their file; where two would have one name, by the path in their folder."""
    names = [nifti_stem(case.image) or case.image.name for case in cases]
    if len(set(names)) == len(names):
        return names
    return [os.path.relpath(case.image, folder) for case in cases]
