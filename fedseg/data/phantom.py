"""Simulated abdominal CT with livers and tumours, made to differ between sites as real CT does."""

import gzip
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, auto
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fedseg.data.tumors import FloatArray, Mask, implant_tumors, smooth_field

__all__ = ["KINDS", "UNSEEN", "Phantom", "PhantomKind", "make_phantom", "write_phantom_site"]

FIELD_OF_VIEW_MM = (300.0, 250.0, 210.0)
MIDDLE_MM = (0.0, 2.0, 9.0)
LIVER_ML = (1250.0, 1800.0)

Point = tuple[float, float, float]


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


class Tissue(IntEnum):
    """What the anatomy is painted with."""

    AIR = 0
    TABLE = auto()
    SKIN = auto()
    FAT = auto()
    MUSCLE = auto()
    BONE = auto()
    MARROW = auto()
    DISC = auto()
    CORD = auto()
    LUNG = auto()
    HEART = auto()
    GAS = auto()
    GUT = auto()
    CHYME = auto()
    PANCREAS = auto()
    GALL = auto()
    SPLEEN = auto()
    CORTEX = auto()
    MEDULLA = auto()
    AORTA = auto()
    CAVA = auto()
    LIVER = auto()


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
    body = _Body(shape, spacing, rng)
    liver = _paint_patient(body)
    vessels = _vessels(liver, body, rng)

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


def write_phantom_site(
    directory: Path, kind: PhantomKind, seeds: Sequence[int], *, name: str
) -> None:
    """Write a site's folder: images, masks and a site.toml.

    Files appear whole or not at all and a case that is there is kept, so two processes may write
    the same site at once.

    Args:
        directory: The site's folder; made if it is missing.
        kind: How the site scans.
        seeds: One a case; also the case's number.
        name: What the site is called.
    """
    for folder in ("images", "masks"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        file = f"case-{seed:04d}.nii.gz"
        targets = directory / "images" / file, directory / "masks" / file
        if all(target.exists() for target in targets):
            continue
        case = make_phantom(kind, seed)
        _replace(targets[0], _nifti(case.image, case.affine))
        _replace(targets[1], _nifti(case.mask, case.affine))
    settings = {"name": name, "layout": "images-masks", "modality": "ct", "labels": "liver,tumor"}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    _replace(directory / "site.toml", "".join(lines).encode())


def _nifti(array: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> bytes:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _replace(target: Path, content: bytes) -> None:
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, target)


class _Body:
    """The patient's tissue map and a bent, scaled coordinate frame to paint it in.

    x grows to the patient's right, y to the front, z to the head, mm; 0 is near the scan's middle.
    """

    def __init__(
        self, shape: Sequence[int], spacing: Sequence[float], rng: np.random.Generator
    ) -> None:
        self.rng = rng
        self.spacing = spacing
        self.tissue = np.zeros(shape, dtype=np.uint8)
        size = rng.uniform(0.92, 1.06) * rng.uniform(0.97, 1.03, size=3)
        self.volume = float(size.prod())
        axes = np.meshgrid(
            *((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)),
            indexing="ij",
            sparse=True,
        )
        self.x: FloatArray
        self.y: FloatArray
        self.z: FloatArray
        self.x, self.y, self.z = (
            (axis.astype(np.float32) - middle + 3.5 * self.field(60) + 0.9 * self.field(22))
            / factor
            for axis, middle, factor in zip(axes, MIDDLE_MM, size.astype(np.float32), strict=True)
        )

    def field(self, length_mm: float) -> FloatArray:
        """A smooth random field over the scan, [X, Y, Z], unit variance."""
        return smooth_field(self.rng, self.tissue.shape, spacing=self.spacing, length_mm=length_mm)

    def about(self, center: Point, jitter: float = 4.0) -> Point:
        """A place that differs from patient to patient, mm."""
        x, y, z = self.rng.normal(center, jitter)
        return float(x), float(y), float(z)

    def blob(self, center: Point, radii: Point) -> FloatArray:
        """An ellipsoid's norm, [X, Y, Z]: below 1 inside."""
        a, b, c = (self.rng.uniform(0.92, 1.08, size=3) * radii).tolist()
        x, y, z = center
        norm: FloatArray = np.sqrt(
            ((self.x - x) / a) ** 2 + ((self.y - y) / b) ** 2 + ((self.z - z) / c) ** 2
        )
        return norm

    def tube(self, start: Point, end: Point) -> FloatArray:
        """Distance to a line from start to end, [X, Y, Z], mm."""
        (x, y, z), (a, b, c) = start, (e - s for e, s in zip(end, start, strict=True))
        u, v, w = self.x - x, self.y - y, self.z - z
        along = np.clip((u * a + v * b + w * c) / (a * a + b * b + c * c), 0, 1)
        distance: FloatArray = np.sqrt(
            (u - along * a) ** 2 + (v - along * b) ** 2 + (w - along * c) ** 2
        )
        return distance

    def paint(self, where: Mask, tissue: Tissue) -> None:
        """Fill a region of the map with a tissue."""
        self.tissue[where] = tissue


def _paint_patient(body: _Body) -> Mask:
    """Paint everything; return the healthy liver, bool [X, Y, Z]."""
    cavity = _paint_torso(body)
    below = _paint_chest(body, cavity)
    _paint_gut(body, below)
    _paint_spleen_and_kidneys(body, below)
    _paint_spine_and_vessels(body)
    liver = _liver(body, below)
    body.paint(liver, Tissue.LIVER)
    return liver


def _paint_torso(body: _Body) -> Mask:
    rng, x, y, z = body.rng, body.x, body.y, body.z
    body.paint(np.broadcast_to(np.abs(y + 119 + x**2 / 900) < 2.5, x.shape), Tissue.TABLE)
    a, b = rng.uniform(132, 139), rng.uniform(92, 102)
    norm = (np.abs(x / a) ** 2.4 + np.abs(y / b) ** 2.4) ** (1 / 2.4)
    depth = (1 - norm) * (0.75 * b + 0.25 * np.abs(x))
    fat = rng.uniform(8, 16) + 5 * np.clip(-z / 100, 0, 1)
    wall = depth - fat
    cavity: Mask = wall > 11
    body.paint(depth > 0, Tissue.SKIN)
    body.paint(depth > 2.5, Tissue.FAT)
    body.paint(wall > 0, Tissue.MUSCLE)
    body.paint(cavity, Tissue.FAT)
    slant = z - 0.35 * y + 0.1 * np.abs(x)
    between = np.abs((slant % 27) - 13) < 5
    rib = between & (np.abs(wall - 7.5) < 3.2) & (slant > -45 + 30 * (y > 20))
    body.paint(rib & (np.abs(x) > 22), Tissue.BONE)
    body.paint(rib & (np.abs(x) > 22) & (np.abs(wall - 7.5) < 1.2), Tissue.MARROW)
    return cavity


def _paint_chest(body: _Body, cavity: Mask) -> Mask:
    """Paint lungs and heart; return what lies under the diaphragm, bool [X, Y, Z]."""
    rng, x, y, z = body.rng, body.x, body.y, body.z
    right = rng.normal(72, 3) - 58 * (((x - 58) / 78) ** 2 + ((y - 8) / 88) ** 2)
    left = rng.normal(62, 3) - 55 * (((x + 62) / 74) ** 2 + ((y - 2) / 84) ** 2)
    dome = np.maximum(right, left)
    lung = cavity & (z > dome + 3)
    body.paint(lung, Tissue.LUNG)
    body.paint(lung & (np.abs(x + 3) < 24 - 0.1 * y) & (y < 15), Tissue.FAT)
    heart = body.blob(body.about((-18, 34, 92)), (52, 40, 42))
    body.paint(cavity & (z > dome - 2) & (heart < 1.12), Tissue.FAT)
    body.paint(cavity & (z > dome) & (heart < 1), Tissue.HEART)
    body.paint(cavity & (np.abs(z - dome - 1) < 2), Tissue.MUSCLE)
    below: Mask = cavity & (z < dome - 1)
    return below


def _paint_gut(body: _Body, below: Mask) -> None:
    y, z = body.y, body.z
    loops = body.field(17) - 0.02 * np.clip(z + 20, 0, None) + 0.012 * np.clip(y + 10, -60, 20)
    filling = body.field(26)
    bowel = below & (z < 25) & (y > -45)
    body.paint(bowel & (loops > 0.15), Tissue.GUT)
    body.paint(bowel & (loops > 0.55) & (filling > 0), Tissue.CHYME)
    body.paint(bowel & (loops > 0.7) & (filling > 0.9) & (y > 0), Tissue.GAS)
    center = body.about((-52, 18, 22), 5)
    stomach = body.blob(center, (40, 40, 44))
    body.paint(below & (stomach < 1.12), Tissue.FAT)
    body.paint(below & (stomach < 1), Tissue.GUT)
    body.paint(below & (stomach < 0.88), Tissue.CHYME)
    level = center[1] + body.rng.uniform(0, 25)
    body.paint(below & (stomach < 0.88) & (y > level), Tissue.GAS)


def _paint_spleen_and_kidneys(body: _Body, below: Mask) -> None:
    spleen = np.maximum(
        body.blob(body.about((-88, -30, 22)), (36, 52, 48)),
        1.55 - 0.55 * body.blob((-42, -2, 15), (34, 44, 60)),
    )
    body.paint(below & (spleen < 1.1), Tissue.FAT)
    body.paint(below & (spleen < 1), Tissue.SPLEEN)
    for side, height in ((1, -48), (-1, -36)):
        x, y, z = body.about((side * 54, -42, height))
        kidney = body.blob((x, y, z), (27, 27, 52))
        sinus = body.blob((x - side * 15, y + 6, z), (15, 10, 26))
        body.paint(below & (kidney < 1.22), Tissue.FAT)
        body.paint(below & (kidney < 1), Tissue.CORTEX)
        lobes = np.sin(body.z / 4.5) * 0.06 + 0.72
        body.paint(below & (kidney < lobes), Tissue.MEDULLA)
        body.paint(below & (sinus < 1), Tissue.FAT)


def _paint_spine_and_vessels(body: _Body) -> None:
    x, y, z = body.x, body.y, body.z
    beside = np.abs(x)
    body.paint(np.hypot((beside - 32) / 24, (y + 72) / 17) < 1, Tissue.MUSCLE)
    psoas = np.hypot((beside - 30) / 15, (y + 48) / 15) < np.clip(-z / 40, 0, 1.1)
    body.paint(psoas, Tissue.MUSCLE)
    spinous = (beside < 3.5) & (y < -66) & (y > -90) & (((z + 8) % 32) < 18)
    transverse = (np.abs(y + 66 + 0.15 * beside) < 4) & (beside < 34) & ((z % 32) < 11)
    body.paint(spinous | transverse, Tissue.BONE)
    arch = np.hypot(x / 15, (y + 64) / 13)
    body.paint((arch < 1) & ((z % 32) < 24), Tissue.BONE)
    body.paint(np.hypot(x / 10, (y + 63) / 8) < 1, Tissue.CORD)
    vertebra = np.hypot(x / 22, (y + 40) / 17)
    body.paint(vertebra < 1, Tissue.BONE)
    body.paint(vertebra < 0.87, Tissue.MARROW)
    body.paint((vertebra < 1) & ((z % 32) < 6), Tissue.DISC)
    pancreas = np.minimum(
        body.tube((24, 6, -34), (2, 6, -14)), body.tube((2, 6, -14), (-58, -18, 0))
    )
    body.paint(pancreas + 2.5 * body.field(9) < 10, Tissue.PANCREAS)
    portal = np.minimum(
        body.tube((26, 6, -4), (2, -4, -20)), body.tube((2, -4, -20), (-60, -24, 6)) + 2.5
    )
    body.paint(portal < 6.5, Tissue.CAVA)
    body.paint(body.tube((-9, -13, -130), (-11, -17, 130)) < 10, Tissue.AORTA)
    body.paint(np.hypot((x - 19) / 12, (y + 14 - 0.04 * z) / 9) < 1, Tissue.CAVA)


def _liver(body: _Body, below: Mask) -> Mask:
    """A liver of two lobes under the right dome, made to a drawn volume, bool [X, Y, Z]."""
    rng, x, y, z = body.rng, body.x, body.y, body.z
    right = body.blob(body.about((62, 2, 6), 5), (72, 84, 84))
    left = body.blob(body.about((-2, 46, 34), 5), (72 + rng.normal(0, 8), 32, 34))
    lobes = -np.log(np.exp(-9 * right) + np.exp(-9 * left)) / 9
    tilt = rng.normal((-0.62, -0.12, -0.78), 0.05)
    under = (x - 10) * tilt[0] + y * tilt[1] + (z + rng.normal(26, 5)) * tilt[2]
    level = np.logaddexp(12 * lobes, 12 + 12 * under / 80) / 12
    level += np.clip(-68 - z, 0, None) / 25
    level += 0.35 * np.exp(-((x - 4) ** 2) / 18) * np.clip((30 - z) / 30, 0, 1) * (y > 25)
    gall = body.blob(body.about((34, 36, -30)), (13, 17, 24))
    body.paint(below & (gall < 1), Tissue.GALL)
    keep_out = (
        Tissue.MUSCLE, Tissue.BONE, Tissue.MARROW, Tissue.DISC, Tissue.CORTEX, Tissue.MEDULLA,
        Tissue.AORTA, Tissue.CAVA, Tissue.GALL, Tissue.SPLEEN,
    )  # fmt: skip
    retroperitoneum = np.hypot(x / 36, (y + 46) / 35) < 1
    free = below & ~np.isin(body.tissue, keep_out) & ~retroperitoneum
    volume = np.clip(rng.uniform(*LIVER_ML) * body.volume, 1080, 1950) * 1000
    voxels = int(volume / np.prod(body.spacing))
    values = level[free]
    liver = np.zeros_like(free)
    liver[free] = values < np.partition(values, voxels)[voxels]
    parts, _ = ndimage.label(ndimage.binary_opening(liver))
    largest: Mask = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    return largest


def _vessels(liver: Mask, body: _Body, rng: np.random.Generator) -> FloatArray:
    """Portal and hepatic trees inside the liver as the share of each voxel, float32 [X, Y, Z]."""
    share = np.zeros(liver.shape, dtype=np.float32)
    voxels = np.argwhere(liver)
    points = voxels * np.asarray(body.spacing)
    places = np.stack([axis[tuple(voxels.T)] for axis in (body.x, body.y, body.z)], axis=1)
    for root, radius, twigs in (((24, 4, -4), 8.0, 45), ((20, -8, 48), 7.0, 30)):
        start = points[np.linalg.norm(places - np.array(root), axis=1).argmin()]
        tips = points[rng.choice(len(points), size=twigs, replace=False)]
        for tube in _tree(start, tips, radius):
            _draw_tube(share, *tube, body.spacing)
    return share


Tube = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]


def _tree(
    root: npt.NDArray[np.float64], tips: npt.NDArray[np.float64], radius: float
) -> list[Tube]:
    """Join tips to a root, near ones first; calibres follow Murray's law (J Gen Physiol 1926)."""
    order = np.argsort(np.linalg.norm(tips - root, axis=1))
    nodes = np.vstack([root, tips[order]])
    parents, way = np.zeros(len(nodes), dtype=int), np.zeros(len(nodes))
    for child in range(1, len(nodes)):
        reach = np.linalg.norm(nodes[:child] - nodes[child], axis=1)
        parents[child] = (reach + 0.6 * way[:child]).argmin()
        way[child] = way[parents[child]] + reach[parents[child]]
    flow = np.ones(len(nodes))
    for child in range(len(nodes) - 1, 0, -1):
        flow[parents[child]] += flow[child]
    calibers = radius * (flow / flow[0]) ** 0.36
    return [
        (nodes[parents[child]], nodes[child], float(calibers[child]))
        for child in range(1, len(nodes))
    ]


def _draw_tube(
    share: FloatArray,
    start: npt.NDArray[np.float64],
    end: npt.NDArray[np.float64],
    radius: float,
    spacing: Sequence[float],
) -> None:
    step = np.asarray(spacing)
    low = np.maximum(((np.minimum(start, end) - radius) / step).astype(int) - 1, 0)
    high = ((np.maximum(start, end) + radius) / step).astype(int) + 3
    window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    target = share[window]
    grid = (np.indices(target.shape).reshape(3, -1).T + low) * step - start
    way = end - start
    along = np.clip(grid @ way / max(way @ way, 1e-9), 0, 1)
    distance = np.linalg.norm(grid - along[:, None] * way, axis=1).reshape(target.shape)
    voxel = float(np.cbrt(step.prod()))
    np.maximum(target, np.clip(0.5 + (radius - distance) / voxel, 0, 1), out=target)


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
