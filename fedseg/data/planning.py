"""Make the plan: read medians and percentiles off the summed fingerprints, like nnU-Net off cases.

What the study config fixes stays as it is; what it leaves empty is planned, each with its reason
(rules after Isensee et al., Nature Methods 2021, sized for the smallest device of the federation).
"""

import math
from collections.abc import Mapping, Sequence

from fedseg.config import StudyConfig
from fedseg.data.fingerprint import (
    Fingerprint,
    Histogram,
    add_fingerprints,
    quantile,
    resolution,
)
from fedseg.data.plan import Plan

__all__ = ["make_plan", "needs_fingerprints", "training_gigabytes"]

DEFAULT_SPACING = (3.0, 3.0, 3.0)
DEFAULT_WINDOW = (-150.0, 250.0)

_COVERAGE = 0.6
"""Share of the median body that a patch should see along each axis."""

_PATCH_SIDES = (32, 48, 64, 80, 96, 112, 128)
_CPU_SIDE = 64
"""On a CPU a larger patch takes more seconds a step than it is worth."""

_COST = {"unet": 1.0, "attention-unet": 2.8, "unet++": 6.6}
_BYTES = 60.0
"""Training memory a voxel and first-level channel: 26 to 39 bytes were measured for the U-Net
on a CPU (its other networks take as many times more); the rest is room for a GPU's workspace."""


def needs_fingerprints(study: StudyConfig) -> bool:
    """Tell whether the study config leaves anything to plan."""
    train, model = study.train, study.model
    planned = (train.spacing, train.ct_window, train.patch_size, train.batch_size, model.depth)
    return any(value is None for value in planned)


def training_gigabytes(side: int, batch: int, width: int, model: str) -> float:
    """Estimate of the memory that training with cubic patches takes, in GB."""
    return side**3 * batch * width * _BYTES * _COST.get(model, 6.6) / 1024**3


def make_plan(study: StudyConfig, fingerprints: Sequence[Fingerprint] = ()) -> Plan:
    """Plan what the study config leaves empty.

    Args:
        study: The study config.
        fingerprints: One of each site that sent one.

    Raises:
        ConfigError: A fixed value is impossible.
    """
    total = add_fingerprints(fingerprints)
    reasons: dict[str, str] = {}
    side, reasons["patch_size"] = _side(study, fingerprints)
    batch, reasons["batch_size"] = _batch(study, side, fingerprints)
    depth, reasons["depth"] = _depth(study, side)
    spacing, reasons["spacing"] = _spacing(study, total, side)
    patch = study.train.patch_size or _patch(total, side, spacing, depth)
    window, reasons["ct_window"] = _window(study, total)
    reasons["inference_patch"] = _FIXED if study.train.inference_patch else _AS_TRAINED
    return Plan.from_config(
        study,
        spacing=spacing,
        ct_window=window,
        patch_size=patch,
        batch_size=batch,
        depth=depth,
        reasons=reasons,
    )


_FIXED = "fixed by the study config"
_AS_TRAINED = (
    "the training patch: on phantoms a window of 80 or 96 voxels, where training had seen 64, lost "
    "points of Dice, for the network is used to the borders and the intensities of a patch"
)


def _smallest(fingerprints: Sequence[Fingerprint]) -> tuple[str, int]:
    """Kind and memory of the device that limits the federation; a CPU before any GPU."""
    if not fingerprints:
        return "cpu", 8
    return min(((f.device, f.memory_gb) for f in fingerprints), key=lambda d: (d[0] != "cpu", d[1]))


def _side(study: StudyConfig, fingerprints: Sequence[Fingerprint]) -> tuple[int, str]:
    if study.train.patch_size is not None:
        return max(study.train.patch_size), _FIXED
    device, memory = _smallest(fingerprints)
    batch = study.train.batch_size or 2
    fits = [
        side
        for side in _PATCH_SIDES
        if training_gigabytes(side, batch, study.model.width, study.model.name) <= 0.6 * memory
    ]
    side = max(fits, default=_PATCH_SIDES[0])
    if device == "cpu" and side > _CPU_SIDE:
        return _CPU_SIDE, f"{_CPU_SIDE} voxels: a site trains on a CPU, where more is too slow"
    return side, f"{side} voxels: the largest that fits the smallest device ({device}, {memory} GB)"


def _batch(study: StudyConfig, side: int, fingerprints: Sequence[Fingerprint]) -> tuple[int, str]:
    if study.train.batch_size is not None:
        return study.train.batch_size, _FIXED
    device, memory = _smallest(fingerprints)
    batch = 2
    while (
        device != "cpu"
        and batch < 8
        and training_gigabytes(side, 2 * batch, study.model.width, study.model.name) <= 0.6 * memory
    ):
        batch *= 2
    return batch, f"{batch} patches fit the smallest device ({device}, {memory} GB)"


def _depth(study: StudyConfig, side: int) -> tuple[int, str]:
    if study.model.depth is not None:
        return study.model.depth, _FIXED
    if study.model.name == "unet++":
        return 5, "unet++ has five levels"
    sizes = study.train.patch_size or (side,)
    fits = [
        depth
        for depth in (2, 3, 4, 5)
        if all(n % 2 ** (depth - 1) == 0 and n // 2 ** (depth - 1) >= 2 for n in sizes)
    ]
    depth = max(fits, default=5)
    left = min(sizes) // 2 ** (depth - 1)
    return depth, f"{left} voxels are left at the deepest level"


def _median(total: Mapping[str, Histogram], name: str) -> float | None:
    return quantile(name, total[name], 0.5)


def _spacing(
    study: StudyConfig, total: Mapping[str, Histogram], side: int
) -> tuple[tuple[float, float, float], str]:
    if study.train.spacing is not None:
        return study.train.spacing, _FIXED
    medians = [_median(total, f"spacing.{axis}") for axis in "xyz"]
    extents = [_median(total, f"extent.{axis}") for axis in "xyz"]
    if any(value is None for value in (*medians, *extents)):
        return DEFAULT_SPACING, "default: no site's fingerprint tells its spacing"
    found = [float(value) for value in medians if value is not None]
    sizes = [float(value) for value in extents if value is not None]
    patch = study.train.patch_size or (side, side, side)
    shares = [_COVERAGE * size / mm for size, mm in zip(sizes, found, strict=True)]
    # Axes keep the proportions of the voxel, but for one along which a fixed patch is shorter.
    scale = max(1.0, max(shares) / side)
    scales = [max(scale, share / voxels) for share, voxels in zip(shares, patch, strict=True)]
    x, y, z = (round(mm * times, 2) for mm, times in zip(found, scales, strict=True))
    bound = max(
        resolution(f"spacing.{axis}", total[f"spacing.{axis}"], mm)
        for axis, mm in zip("xyz", found, strict=True)
    )
    text = ", ".join(f"{mm:.2f}" for mm in found)
    why = f"median {text} mm (to {bound:.2f} mm)"
    if max(scales) > 1:
        times = [f"{value:.2f}" for value in scales]
        told = times[0] if len(set(times)) == 1 else ", ".join(times)
        why += f", coarser by {told} so that a patch sees {_COVERAGE:.0%} of the median body"
    return (x, y, z), why


def _patch(
    total: Mapping[str, Histogram], side: int, spacing: Sequence[float], depth: int
) -> tuple[int, int, int]:
    """A cube, cut along axes where the largest bodies are shorter."""
    factor = 2 ** (depth - 1)
    sides = []
    for axis, mm in zip("xyz", spacing, strict=True):
        largest = quantile(f"extent.{axis}", total[f"extent.{axis}"], 0.95)
        needed = side if largest is None else max(2, math.ceil(largest / mm / factor)) * factor
        sides.append(min(side, needed))
    return (sides[0], sides[1], sides[2])


def _window(study: StudyConfig, total: Mapping[str, Histogram]) -> tuple[tuple[float, float], str]:
    if study.train.ct_window is not None:
        return study.train.ct_window, _FIXED
    histogram = total["liver.hu"]
    low, high = (quantile("liver.hu", histogram, q) for q in (0.005, 0.995))
    if low is None or high is None:
        return DEFAULT_WINDOW, "default: no site's fingerprint tells the liver's HU"
    # Fat and vessels around the liver lie beside its own HU, and new sites differ from these.
    margin = 0.25 * (high - low)
    window = (5.0 * round((low - margin) / 5), 5.0 * round((high + margin) / 5))
    bound = max(resolution("liver.hu", histogram, edge) for edge in (low, high))
    return window, (
        f"0.5 to 99.5% of the liver's voxels are {low:.0f} to {high:.0f} HU (to {bound:.0f} HU), "
        "a quarter wider on each side"
    )
