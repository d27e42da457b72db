"""Tests of drawing patches."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.data.cache import CachedCase
from fedseg.data.patches import augment, batches, cut_patch, draw_centre
from fedseg.data.preprocess import Placement


def make_case(
    shape: tuple[int, int, int] = (24, 20, 18), *, seed: int = 0, empty: bool = False
) -> CachedCase:
    """A case whose image tells label and place of every voxel."""
    labels = np.zeros(shape, np.uint8)
    if not empty:
        labels[2:10, 3:9, 3:9] = 1
        labels[4:6, 4:6, 4:6] = 2
    image = (labels.astype(np.float16) - 1) + np.float16(0.001 * seed)
    return CachedCase(
        image=image,
        labels=labels,
        foreground={
            "liver": np.flatnonzero(labels >= 1),
            "tumor": np.flatnonzero(labels == 2),
        },
        truth=labels,
        placement=Placement(shape=shape, grid=shape, box=tuple(slice(0, n) for n in shape)),  # type: ignore[arg-type]
    )


def draw(cases: list[CachedCase], **changes: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options: dict[str, Any] = {
        "steps": 5,
        "batch_size": 2,
        "patch_size": (8, 10, 12),
        "foreground": 0.67,
        "augmentation": True,
        "rng": np.random.default_rng(0),
    }
    return list(batches(cases, **{**options, **changes}))


def test_shape_and_dtype() -> None:
    drawn = draw([make_case(), make_case(seed=1)])
    assert len(drawn) == 5
    for image, labels in drawn:
        assert image.shape == (2, 1, 8, 10, 12)
        assert labels.shape == (2, 8, 10, 12)
        assert image.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert torch.isfinite(image).all()


def test_same_rng_same_patches_and_another_rng_others() -> None:
    cases = [make_case(), make_case(seed=1), make_case(seed=2)]
    first, again, other = (draw(cases, rng=np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_torch_and_numpy_state_are_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw([make_case()])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw([make_case()])[0][0], first[0][0])


def test_foreground_is_respected_tumour_and_liver_alike() -> None:
    case, rng = make_case(), np.random.default_rng(0)
    drawn = [case.labels[draw_centre(case, rng, foreground=1.0)] for _ in range(2000)]
    count = Counter(int(label) for label in drawn)
    assert count[0] == 0
    tumor_in_liver = 8 / 288
    assert count[2] / 2000 == pytest.approx(0.5 + 0.5 * tumor_in_liver, abs=0.04)
    share = (case.labels > 0).mean()
    for foreground in (0.0, 0.6):
        labels = [case.labels[draw_centre(case, rng, foreground=foreground)] for _ in range(2000)]
        expected = foreground + (1 - foreground) * share
        assert np.mean([label > 0 for label in labels]) == pytest.approx(expected, abs=0.04)


def test_case_without_foreground_is_drawn_anywhere() -> None:
    case, rng = make_case(empty=True), np.random.default_rng(0)
    centres = np.array([draw_centre(case, rng, foreground=1.0) for _ in range(500)])
    assert np.all(centres.min(0) <= 2)
    assert np.all(centres.max(0) >= np.array(case.image.shape) - 3)


def test_drawn_patches_hold_their_region() -> None:
    for _, labels in draw([make_case()], foreground=1.0, steps=20):
        assert (labels.amax((1, 2, 3)) >= 1).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_patch_is_cut_around_its_centre_inside_the_case(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(2, 20)] * 3))
    size = data.draw(st.tuples(*[st.integers(1, 24)] * 3))
    centre = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    case = make_case(shape)
    case.image[centre] = 1.5
    image, labels = cut_patch(case, centre, size)
    assert image.shape == labels.shape == size
    assert image.dtype == np.float32
    assert labels.dtype == np.uint8
    assert np.count_nonzero(image == 1.5) == 1  # the centre is in it
    inside = image != -2.0
    assert inside.sum() == np.prod([min(n, s) for n, s in zip(shape, size, strict=True)])
    assert not labels[~inside].any()


def test_small_case_lies_in_the_middle_of_its_padding() -> None:
    case = make_case((12, 12, 12))
    image, labels = cut_patch(case, (0, 11, 5), (16, 12, 20))
    assert np.array_equal(image[2:14, :, 4:16], case.image.astype(np.float32))
    assert np.array_equal(labels[2:14, :, 4:16], case.labels)
    assert np.all(image[:2] == -2) and np.all(image[14:] == -2)


def test_image_and_labels_stay_on_each_other_under_augmentation() -> None:
    flipped = Counter[str]()
    for seed in range(60):
        case, rng = make_case(), np.random.default_rng(seed)
        before = cut_patch(case, (5, 6, 6), (16, 16, 16))
        image, labels = augment(*before, rng)
        # The image is label - 1 (-2 in the padding), so a linear change and noise keep the order.
        means = [image[labels == label].mean() for label in range(3)]
        assert means[0] < means[1] < means[2]
        spread = image[labels == 1].std()
        assert spread <= 0.25
        ways = {
            "none": before[1],
            "front-back": before[1][:, ::-1],
            "up-down": before[1][:, :, ::-1],
            "both": before[1][:, ::-1, ::-1],
        }
        flipped.update(name for name, way in ways.items() if np.array_equal(labels, way))
    assert set(flipped) == {"none", "front-back", "up-down", "both"}
    assert sum(flipped.values()) == 60


def test_augmentation_changes_contrast_within_its_bounds_and_can_be_off() -> None:
    rng = np.random.default_rng(0)
    image, labels = np.zeros((8, 8, 8), np.float32), np.zeros((8, 8, 8), np.uint8)
    image[4:] = 1
    means, noisy = [], 0
    for _ in range(300):
        changed, _ = augment(image, labels, rng)
        assert changed.dtype == np.float32
        means.append((changed[:4].mean(), changed[4:].mean() - changed[:4].mean()))
        noisy += changed[:4].std() > 1e-6
    brightness, contrast = np.array(means).T
    assert -0.35 < brightness.min() < -0.2 and 0.2 < brightness.max() < 0.35
    assert 0.7 < contrast.min() < 0.8 and 1.2 < contrast.max() < 1.3
    assert 0.2 < noisy / 300 < 0.4
    for drawn, _ in draw([make_case()], augmentation=False):
        assert set(np.unique(drawn)) <= {-2.0, -1.0, 0.0, 1.0}


def test_each_case_comes_once_before_any_comes_again() -> None:
    cases = [make_case(seed=seed) for seed in range(5)]
    drawn = draw(cases, steps=10, batch_size=2, augmentation=False, patch_size=(24, 20, 18))
    order = [round(float(image.min()) * 1000 + 1000) for batch, _ in drawn for image in batch]
    cycles = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(cycle) == [0, 1, 2, 3, 4] for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1


def test_memory_mapped_case_is_not_changed(tmp_path: Any) -> None:
    case = make_case()
    np.save(tmp_path / "image.npy", case.image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r", allow_pickle=False)
    case = CachedCase(**{**vars(case), "image": mapped})
    draw([case])
    assert np.array_equal(np.load(tmp_path / "image.npy", allow_pickle=False), make_case().image)


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from fedseg.data.cache import CachedCase
from fedseg.data.patches import batches
from fedseg.data.preprocess import Placement

def mapped(path, dtype):
    return np.lib.format.open_memmap(path, "w+", dtype, (160, 160, 160))

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1024**2

def case(number):
    folder = Path(sys.argv[1])
    image, labels = (mapped(folder / f"{number}-{name}.npy", kind)
                     for name, kind in (("image", "f2"), ("labels", "u1")))
    return CachedCase(image=image, labels=labels, truth=labels, placement=None,
                      foreground={"liver": np.arange(9), "tumor": np.arange(0)})

cases = [case(number) for number in range(int(sys.argv[2]))]
draw = batches(cases, steps=60, batch_size=2, patch_size=(96, 96, 96), foreground=0,
               augmentation=False, rng=np.random.default_rng(0))
for _ in draw:
    pass
print(resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_resident_memory_does_not_grow_with_the_cases(tmp_path: Path) -> None:
    """20 cases of 12 MB against 2: +216 MB on disk, next to nothing in memory."""

    def resident(cases: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(cases)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert resident(20) - resident(2) < 40
