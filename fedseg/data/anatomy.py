"""The anatomy of phantoms: organs and liver vessels that differ from patient to patient."""

from collections.abc import Sequence
from enum import IntEnum, auto

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fedseg.data.tumors import FloatArray, Mask, smooth_field

__all__ = ["Body", "Point", "Tissue", "draw_vessels", "paint_patient"]

MIDDLE_MM = (0.0, 2.0, 9.0)
LIVER_ML = (1250.0, 1800.0)

Point = tuple[float, float, float]


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


class Body:
    """The patient's tissue map and a bent, scaled coordinate frame to paint it in.

    x grows to the patient's right, y to the front, z to the head, mm; 0 is near the scan's middle.
    """

    def __init__(
        self, shape: Sequence[int], spacing: Sequence[float], rng: np.random.Generator
    ) -> None:
        """Draw a patient's size and posture."""
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


def paint_patient(body: Body) -> Mask:
    """Paint everything; return the healthy liver, bool [X, Y, Z]."""
    cavity = _paint_torso(body)
    below = _paint_chest(body, cavity)
    _paint_gut(body, below)
    _paint_spleen_and_kidneys(body, below)
    _paint_spine_and_vessels(body)
    liver = _liver(body, below)
    body.paint(liver, Tissue.LIVER)
    return liver


def _paint_torso(body: Body) -> Mask:
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


def _paint_chest(body: Body, cavity: Mask) -> Mask:
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


def _paint_gut(body: Body, below: Mask) -> None:
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


def _paint_spleen_and_kidneys(body: Body, below: Mask) -> None:
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


def _paint_spine_and_vessels(body: Body) -> None:
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


def _liver(body: Body, below: Mask) -> Mask:
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


def draw_vessels(liver: Mask, body: Body, rng: np.random.Generator) -> FloatArray:
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
