"""Simulated abdominal CT with livers and tumours, made to differ between sites as real CT does."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fedseg.data.anatomy import Body, Point, Tissue, draw_vessels, paint_patient
from fedseg.data.tumors import FloatArray, implant_tumors
from fedseg.data.whole_file import replace_file

__all__ = [
    "KINDS",
    "UNSEEN",
    "Phantom",
    "PhantomKind",
    "make_phantom",
    "phantom_seeds",
    "write_phantom_site",
]

FIELD_OF_VIEW_MM = (300.0, 250.0, 210.0)


@dataclass(frozen=True, kw_only=True)
class PhantomKind:
    """How one site scans, and whom: contrast phase, scanner and tumour load."""

    name: str
    liver_hu: float
    """Mean HU of healthy parenchyma; single cases vary around it."""
    vessel_hu: float
    """Portal and hepatic veins minus parenchyma, HU."""
    spleen_hu: float
    cortex_hu: float
    """Kidney cortex, HU."""
    medulla_hu: float
    """Kidney medulla, HU."""
    aorta_hu: float
    cava_hu: float
    """Vena cava and the portal vein outside the liver, HU."""
    noise_sd: float = 20.0
    """HU."""
    noise_correlation: tuple[float, float] = (0.5, 0.18)
    """Noise autocorrelation at a lag of one voxel, in plane and across slices."""
    spacing: Point = (2.5, 2.5, 3.0)
    """mm, of the axes x, y, z."""
    kernel_mm: float = 1.2
    """Standard deviation of the scanner's blur, mm."""
    tumor_count: tuple[int, int] = (1, 5)
    """Fewest and most tumours in a case."""
    tumor_radius_weights: Sequence[float] = field(default=(0.2, 0.35, 0.33, 0.12))
    """How often tumours of r = 4, 8, 16, 32 mm come up."""
    tumor_contrast_hu: tuple[float, float] = (-79.0, -47.0)
    orientation: str = "RAS"
    """RAS or LPS: where the array's axes point."""


KINDS = {
    kind.name: kind
    for kind in (
        PhantomKind(
            name="portal",
            liver_hu=118,
            vessel_hu=38,
            spleen_hu=124,
            cortex_hu=190,
            medulla_hu=165,
            aorta_hu=155,
            cava_hu=145,
        ),
        PhantomKind(
            name="arterial",
            liver_hu=82,
            vessel_hu=14,
            spleen_hu=125,
            cortex_hu=200,
            medulla_hu=80,
            aorta_hu=310,
            cava_hu=85,
            noise_sd=21,
            noise_correlation=(0.42, 0.18),
            kernel_mm=0.9,
            spacing=(2.4, 2.4, 3.0),
            tumor_count=(1, 3),
            tumor_radius_weights=(0.1, 0.35, 0.4, 0.15),
            tumor_contrast_hu=(-62, -45),
            orientation="LPS",
        ),
        PhantomKind(
            name="native",
            liver_hu=55,
            vessel_hu=-10,
            spleen_hu=48,
            cortex_hu=33,
            medulla_hu=31,
            aorta_hu=42,
            cava_hu=41,
            noise_sd=15,
            noise_correlation=(0.58, 0.22),
            kernel_mm=1.6,
            spacing=(2.7, 2.7, 3.0),
            tumor_count=(2, 6),
            tumor_contrast_hu=(-46, -32),
        ),
        PhantomKind(
            name="low-dose",
            liver_hu=105,
            vessel_hu=30,
            spleen_hu=112,
            cortex_hu=180,
            medulla_hu=160,
            aorta_hu=140,
            cava_hu=130,
            noise_sd=27,
            noise_correlation=(0.58, 0.24),
            kernel_mm=1.4,
            tumor_count=(1, 4),
            tumor_radius_weights=(0.1, 0.4, 0.4, 0.1),
            orientation="LPS",
        ),
        PhantomKind(
            name="thick-slice",
            liver_hu=140,
            vessel_hu=42,
            spleen_hu=142,
            cortex_hu=205,
            medulla_hu=185,
            aorta_hu=170,
            cava_hu=165,
            noise_sd=16,
            noise_correlation=(0.34, 0.12),
            kernel_mm=1.3,
            spacing=(2.3, 2.3, 4.0),
            tumor_count=(0, 2),
            tumor_radius_weights=(0.3, 0.4, 0.25, 0.05),
        ),
    )
}
"""The kinds that simulated sites get, in this order."""

UNSEEN = PhantomKind(
    name="late",
    liver_hu=95,
    vessel_hu=8,
    spleen_hu=88,
    cortex_hu=140,
    medulla_hu=220,
    aorta_hu=105,
    cava_hu=104,
    noise_sd=22,
    noise_correlation=(0.45, 0.22),
    kernel_mm=1.0,
    spacing=(2.6, 2.6, 3.2),
    tumor_contrast_hu=(-60, -40),
    orientation="LPS",
)
"""A kind that no site has, to see how a model travels."""


@dataclass(frozen=True)
class Phantom:
    """One simulated case."""

    image: npt.NDArray[np.int16]
    """[X, Y, Z], HU."""
    mask: npt.NDArray[np.uint8]
    """[X, Y, Z]: 0 background, 1 liver, 2 tumor."""
    affine: npt.NDArray[np.float64]
    """Voxel to RAS+ world, mm, [4, 4]."""


def make_phantom(kind: PhantomKind, seed: int) -> Phantom:
    """Make one case.

    Args:
        kind: How the site scans.
        seed: Picks the patient, at least 0; the same kind and seed give the same case.

    Returns:
        The image, its mask and the affine.
    """
    rng = np.random.default_rng([seed, *kind.name.encode()])
    spacing = kind.spacing
    shape = [round(extent / step) for extent, step in zip(FIELD_OF_VIEW_MM, spacing, strict=True)]
    body = Body(shape, spacing, rng)
    liver = paint_patient(body)
    vessels = draw_vessels(liver, body, rng)

    image = _tissue_hu(kind, rng)[body.tissue]
    image += liver * (kind.vessel_hu * vessels + 4 * body.field(12))
    image = ndimage.gaussian_filter(image, [kind.kernel_mm / step for step in spacing])
    image, mask = implant_tumors(
        image,
        liver,
        rng,
        spacing=spacing,
        count=int(rng.integers(kind.tumor_count[0], kind.tumor_count[1] + 1)),
        radius_weights=kind.tumor_radius_weights,
        contrast_hu=kind.tumor_contrast_hu,
        avoid=vessels > 0.5,
    )
    image += _noise(shape, kind, rng)
    stored = np.clip(np.rint(image), -1024, 3071).astype(np.int16)

    directions = np.array([-1.0, -1.0, 1.0] if kind.orientation == "LPS" else [1.0, 1.0, 1.0])
    affine = np.diag([*(directions * spacing), 1.0])
    affine[:3, 3] = -directions * (np.array(shape) - 1) * spacing / 2
    if kind.orientation == "LPS":
        stored, mask = stored[::-1, ::-1], mask[::-1, ::-1]
    return Phantom(np.ascontiguousarray(stored), np.ascontiguousarray(mask), affine)


def phantom_seeds(study_seed: int, site: int, count: int) -> list[int]:
    """Seeds of a site's phantoms: no two sites and no two study seeds share a patient.

    Args:
        study_seed: `data.seed`.
        site: Index of the site, under 1,000.
        count: Number of phantoms, 10,000 at most.
    """
    first = 10_000_000 * study_seed + 10_000 * site
    return [first + case for case in range(count)]


def write_phantom_site(
    directory: Path, kind: PhantomKind, seeds: Sequence[int], *, name: str, note: str = ""
) -> None:
    """Write a site's folder: a site.toml, images and masks.

    Files appear whole or not at all and a case that is there is kept, so two processes may write
    the same site at once.

    Args:
        directory: The site's folder; made if it is missing.
        kind: How the site scans.
        seeds: One a case; also the case's number.
        name: What the site is called.
        note: First line of site.toml, a comment.
    """
    for folder in ("images", "masks"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    settings = {"name": name, "layout": "images-masks", "modality": "ct", "labels": "liver,tumor"}
    lines = [f"# {note}\n"] if note else []
    lines += [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    lines += ["\n[policy]\n", "min-count = 1  # nobody to protect in a phantom\n"]
    replace_file(directory / "site.toml", "".join(lines).encode())
    for seed in seeds:
        file = f"case-{seed:04d}.nii.gz"
        targets = directory / "images" / file, directory / "masks" / file
        if all(target.exists() for target in targets):
            continue
        case = make_phantom(kind, seed)
        replace_file(targets[0], _nifti(case.image, case.affine))
        replace_file(targets[1], _nifti(case.mask, case.affine))


def _nifti(array: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> bytes:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _tissue_hu(kind: PhantomKind, rng: np.random.Generator) -> FloatArray:
    """One patient's HU by tissue."""
    shift = rng.normal(0, 5)
    values: dict[Tissue, float] = {
        Tissue.AIR: -1000, Tissue.TABLE: -350, Tissue.SKIN: 10, Tissue.FAT: -103,
        Tissue.MUSCLE: 58, Tissue.BONE: 420, Tissue.MARROW: 185, Tissue.DISC: 85,
        Tissue.CORD: 25, Tissue.LUNG: -850, Tissue.HEART: (kind.aorta_hu + kind.cava_hu) / 2,
        Tissue.GAS: -960, Tissue.GUT: 45 + 0.3 * kind.liver_hu, Tissue.CHYME: rng.uniform(5, 40),
        Tissue.PANCREAS: 0.6 * kind.liver_hu + 18, Tissue.GALL: rng.uniform(2, 16),
        Tissue.SPLEEN: kind.spleen_hu + shift, Tissue.CORTEX: kind.cortex_hu + 2 * shift,
        Tissue.MEDULLA: kind.medulla_hu + 2 * shift, Tissue.AORTA: kind.aorta_hu + 3 * shift,
        Tissue.CAVA: kind.cava_hu + 2 * shift, Tissue.LIVER: kind.liver_hu + rng.normal(shift, 4),
    }  # fmt: skip
    return np.array([values[tissue] for tissue in Tissue], dtype=np.float32)


def _noise(shape: Sequence[int], kind: PhantomKind, rng: np.random.Generator) -> FloatArray:
    """Noise, HU [X, Y, Z], whose lag-1 autocorrelation is exactly the kind's."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    plane, across = kind.noise_correlation
    for axis, correlation in enumerate((plane, plane, across)):
        side = (1 - np.sqrt(1 - 2 * correlation**2)) / (2 * correlation)
        taps = np.array([side, 1, side]) / np.sqrt(1 + 2 * side**2)
        noise = ndimage.correlate1d(noise, taps, axis=axis, mode="wrap")
    scaled: FloatArray = noise * np.float32(kind.noise_sd)
    return scaled
