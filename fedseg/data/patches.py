"""Draw training patches: cut from the memory-mapped case first, then convert and augment."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedseg.data.augmentation import AIR, RECIPES, Recipe, apply_change, draw_change, source_size
from fedseg.data.cache import CachedCase
from fedseg.data.plan import REGIONS, Plan
from fedseg.sections import TrainConfig

__all__ = ["batches", "cut", "draw_centre", "draw_sample", "patch_start", "planned_batches"]


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


def patch_start(
    shape: Sequence[int], centre: Sequence[int], size: Sequence[int]
) -> tuple[int, int, int]:
    """First voxel of a patch around a centre: inside the case where it fits, else in its middle."""
    x, y, z = (
        min(max(middle - wanted // 2, 0), n - wanted) if n >= wanted else -((wanted - n) // 2)
        for middle, wanted, n in zip(centre, size, shape, strict=True)
    )
    return x, y, z


def cut(array: np.ndarray, start: Sequence[int], size: Sequence[int], *, fill: float) -> np.ndarray:
    """Copy `size` voxels from `start` on; past the array's sides lies `fill`."""
    box = [(first, first + n) for first, n in zip(start, size, strict=True)]
    inside = tuple(slice(max(a, 0), max(b, 0)) for a, b in box)
    found = array[inside]
    if found.shape == tuple(size):
        return np.array(found)
    whole = np.full(tuple(size), fill, array.dtype)
    place = tuple(
        slice(max(-a, 0), max(-a, 0) + n) for (a, _), n in zip(box, found.shape, strict=True)
    )
    whole[place] = found
    return whole


def draw_sample(
    case: CachedCase,
    rng: np.random.Generator,
    *,
    patch_size: Sequence[int],
    foreground: float,
    recipe: Recipe | None,
    spacing: Sequence[float],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one patch: image float32 and labels uint8, `patch_size`, on `device`.

    It depends on the case and `rng` alone.
    """
    centre = draw_centre(case, rng, foreground=foreground)
    start = patch_start(case.image.shape, centre, patch_size)
    size = tuple(patch_size)
    change = draw_change(recipe, rng) if recipe else None
    if change:
        size = source_size(change, patch_size, spacing=spacing)
        x, y, z = (a - (n - m) // 2 for a, n, m in zip(start, size, patch_size, strict=True))
        start = x, y, z
    image = _to(device, cut(case.image, start, size, fill=AIR)).float()
    labels = _to(device, cut(case.labels, start, size, fill=0))
    case.release()
    if change:
        return apply_change(image, labels, change, size=patch_size, spacing=spacing)
    return image, labels


def _to(device: torch.device, array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        # Only from pinned memory does the processor go on while the copy runs.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def batches(
    cases: Sequence[CachedCase],
    *,
    steps: int,
    batch_size: int,
    patch_size: Sequence[int],
    foreground: float,
    augmentation: str,
    rng: np.random.Generator,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    device: torch.device | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `steps` batches of image float32 `[B, 1, x, y, z]` and labels int64 `[B, x, y, z]`.

    Cases come in a shuffled order, each once before any comes again. Each sample has random numbers
    of its own, spawned from `rng`: the n-th is the same in batches of any size.

    Args:
        cases: Where patches are cut.
        steps: Number of batches.
        batch_size: Patches in each.
        patch_size: Voxels.
        foreground: Share of patches centred on a region.
        augmentation: Name of a recipe, a key of `augmentation.RECIPES`.
        rng: Decides everything.
        spacing: mm a voxel.
        device: Where patches are changed, and yielded; the CPU by default.
    """
    queue: list[int] = []
    for _ in range(steps):
        images, labels = [], []
        for _ in range(batch_size):
            if not queue:
                queue = [int(i) for i in rng.permutation(len(cases))]
            image, label = draw_sample(
                cases[queue.pop()],
                rng.spawn(1)[0],
                patch_size=patch_size,
                foreground=foreground,
                recipe=RECIPES[augmentation],
                spacing=spacing,
                device=device or torch.device("cpu"),
            )
            images.append(image)
            labels.append(label)
        yield torch.stack(images)[:, None], torch.stack(labels).long()


def planned_batches(
    cases: Sequence[CachedCase],
    plan: Plan,
    config: TrainConfig,
    *,
    steps: int,
    rng: np.random.Generator,
    device: torch.device | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches as a study trains with them; see `batches`."""
    return batches(
        cases,
        steps=steps,
        batch_size=plan.batch_size,
        patch_size=plan.patch_size,
        foreground=config.foreground,
        augmentation=config.augmentation,
        rng=rng,
        spacing=plan.spacing,
        device=device,
    )
