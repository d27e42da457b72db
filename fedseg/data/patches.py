"""Draw training patches: cut from the memory-mapped case first, then convert and augment."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedseg.data.cache import CachedCase
from fedseg.data.plan import REGIONS

__all__ = ["batches", "cut_patch", "draw_centre"]

_AIR = -2.0
"""Where a patch reaches past the scan it holds what the clipped window holds outside the body."""


def draw_centre(
    case: CachedCase, rng: np.random.Generator, *, foreground: float
) -> tuple[int, int, int]:
    """Draw a patch's centre voxel: with chance `foreground` on a region, tumour or liver alike."""
    shape = case.image.shape
    regions = [name for name in REGIONS if case.foreground[name].size]
    if regions and rng.random() < foreground:
        indices = case.foreground[regions[int(rng.integers(len(regions)))]]
        flat = int(indices[int(rng.integers(indices.size))])
        where = np.unravel_index(flat, shape)
        return int(where[0]), int(where[1]), int(where[2])
    x, y, z = (int(rng.integers(n)) for n in shape)
    return x, y, z


def cut_patch(
    case: CachedCase, centre: Sequence[int], size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut image float32 and labels uint8 of `size` around a centre, kept inside where it fits."""
    inside, outside = [], []
    for middle, wanted, n in zip(centre, size, case.image.shape, strict=True):
        start = min(max(middle - wanted // 2, 0), max(n - wanted, 0))
        stop = min(start + wanted, n)
        before = (wanted - (stop - start)) // 2
        inside.append(slice(start, stop))
        outside.append(slice(before, before + stop - start))
    image = np.full(tuple(size), _AIR, np.float32)
    labels = np.zeros(tuple(size), np.uint8)
    image[tuple(outside)] = case.image[tuple(inside)]
    labels[tuple(outside)] = case.labels[tuple(inside)]
    return image, labels


def batches(
    cases: Sequence[CachedCase],
    *,
    steps: int,
    batch_size: int,
    patch_size: Sequence[int],
    foreground: float,
    augmentation: bool,
    rng: np.random.Generator,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `steps` batches of image float32 `[B, 1, x, y, z]` and labels int64 `[B, x, y, z]`.

    Cases come in a shuffled order, each once before any comes again. The sequence depends on `rng`
    alone.
    """
    queue: list[int] = []
    for _ in range(steps):
        images, labels = [], []
        for _ in range(batch_size):
            if not queue:
                queue = [int(i) for i in rng.permutation(len(cases))]
            case = cases[queue.pop()]
            image, label = cut_patch(
                case, draw_centre(case, rng, foreground=foreground), patch_size
            )
            case.release()
            if augmentation:
                image, label = augment(image, label, rng)
            images.append(image)
            labels.append(label)
        yield (
            torch.from_numpy(np.stack(images))[:, None],
            torch.from_numpy(np.stack(labels)).long(),
        )


def augment(
    image: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Flip and change contrast, brightness and noise of one patch.

    Sites differ in contrast phase and noise: the intensity changes make one site's patches look
    like another's. Only front-back and up-down are flipped: left and right of an abdomen differ.
    """
    for axis in (1, 2):
        if rng.random() < 0.5:
            image, labels = np.flip(image, axis), np.flip(labels, axis)
    contrast, brightness = rng.uniform(0.75, 1.25), rng.uniform(-0.3, 0.3)
    image = image * np.float32(contrast) + np.float32(brightness)
    if rng.random() < 0.3:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        image = image + noise * np.float32(rng.uniform(0, 0.2))
    return np.ascontiguousarray(image), np.ascontiguousarray(labels)
